"""PERA in PEFT: importing this module makes ``PeraConfig`` a method like any other.

from pera_kernels.peft import PeraConfig
model = peft.get_peft_model(model, PeraConfig(r=16, target_modules="all-linear"))
"""

from .config import PeraConfig
from .layer import PeraLayer
from .model import PeraModel
from .optim import parameter_groups
from .registry import register

__all__ = ["PeraConfig", "PeraLayer", "PeraModel", "parameter_groups", "register"]

register()
