"""Make PEFT know the method."""

from __future__ import annotations

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils.peft_types import PeftType

from .config import PERA, PeraConfig
from .model import PeraModel

__all__ = ["register"]


def register() -> bool:
    """Enter PERA into PEFT's tables, once. Importing ``pera_kernels.peft`` does it.

    ``peft.register_peft_method`` takes members of PEFT's own enumeration only.

    Returns:
        Whether the tables hold this package's classes; False where PEFT brings a PERA of its own,
        which is left in its place.
    """
    if hasattr(PeftType, PERA.value):
        return False
    PEFT_TYPE_TO_CONFIG_MAPPING[PERA] = PeraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PERA] = PeraModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PERA] = PeraModel.prefix
    return True
