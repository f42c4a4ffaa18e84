"""Which GPU is tuned or compiled for: the one that is here, or one that is named."""

from __future__ import annotations

import argparse

import torch

from pera_kernels import configs
from tools.compile_report import SHARED_LIMIT

from .offline import Chip

__all__ = ["architecture", "chip_here", "chip_named"]

# Multiprocessors (compute units) of the largest common chip of an architecture: A100, L40, H200,
# B200, MI300X.
PROCESSORS = {"sm_80": 108, "sm_89": 142, "sm_90": 132, "sm_100": 148, "gfx942": 304}


def architecture(text: str) -> str:
    """What ``--arch`` takes."""
    if text != "auto" and text not in SHARED_LIMIT:
        known = ", ".join(SHARED_LIMIT)
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, {known}")
    return text


def chip_here() -> Chip:
    """The current GPU. Raises ValueError where there is none, or none that is known."""
    if not torch.cuda.is_available():
        raise ValueError("there is no GPU here; name an architecture")
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    arch = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip:
        arch = str(properties.gcnArchName).partition(":")[0]
    if arch not in SHARED_LIMIT:
        raise ValueError(f"the GPU here is {arch}; known are {', '.join(SHARED_LIMIT)}")
    table, processors = configs.architecture(device), configs.processor_count(device)
    return Chip(arch, table, processors, SHARED_LIMIT[arch])


def chip_named(arch: str) -> Chip:
    """A chip of a known architecture that need not be here."""
    own = (configs.TABLES / f"{arch}.json").exists()
    return Chip(arch, arch if own else configs.GENERIC, PROCESSORS[arch], SHARED_LIMIT[arch])
