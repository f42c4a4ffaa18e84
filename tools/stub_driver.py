"""Triton's own binder and launcher without a GPU, over a stub of the CUDA driver.

The stub's calls succeed and do nothing, and CPU tensors stand for GPU ones: kernels are compiled
for an H200 and launched with the arguments that ship, never run. A process has to start with the
stub's environment and then to install it:

    subprocess.run([sys.executable, "-c", code], env=os.environ | environment(folder))
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["environment", "install"]

LIBRARY = "libcuda.so.1"
PATH = "TRITON_LIBCUDA_PATH"


def environment(folder: Path) -> dict[str, str]:
    """Build the stub in ``folder`` with gcc and the headers in Triton's wheel."""
    import triton

    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library = folder / LIBRARY
    source = Path(__file__).with_name("stub_cuda.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-I", headers], check=True)
    (folder / "libcuda.so").symlink_to(library)
    # Launchers that were linked to the stub stay apart from those of a real driver.
    return {
        "LD_LIBRARY_PATH": str(folder),
        PATH: str(folder),
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "TRITON_INTERPRET": "0",
    }


def install() -> Callable[[], int]:
    """Let launches go to the stub; what is returned says how many have come there."""
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # type: ignore[assignment]
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    from pera_kernels import backends
    from pera_kernels.kernels import plan, tiles

    class Stub(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.get_device_capability = lambda device=None: (9, 0)
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

    driver.set_active(Stub())
    tiles.architecture = lambda device: "sm_90"  # type: ignore[assignment]
    tiles.processor_count = lambda device: 132  # type: ignore[assignment]
    backends.unavailable = lambda backend, device, dtypes=(): None
    plan.plannable = lambda device: True
    library = ctypes.CDLL(os.path.join(os.environ[PATH], LIBRARY))
    count: Callable[[], int] = library.stub_launches
    count.restype = ctypes.c_long  # type: ignore[attr-defined]
    return count
