"""PERA in PEFT: importing this module makes ``PeraConfig`` a method like any other.

from pera_kernels.peft import PeraConfig
model = peft.get_peft_model(model, PeraConfig(r=16, target_modules="all-linear"))
"""

try:
    import peft as _peft  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "peft":
        raise
    raise ImportError(
        'pera_kernels.peft needs PEFT, which is not installed: pip install "pera_kernels[peft]"'
    ) from error

from .config import PeraConfig
from .layer import PeraLayer
from .model import PeraModel
from .optim import parameter_groups
from .registry import register

__all__ = ["PeraConfig", "PeraLayer", "PeraModel", "parameter_groups", "register"]

register()
