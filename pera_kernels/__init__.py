"""Fused kernels for PERA, Polynomial Expansion Rank Adaptation (arXiv 2604.11841)."""

from . import reference
from .adapters.checkpoint import adapter_state_dict, save_adapter
from .adapters.export import export_lora
from .adapters.inject import adapted_modules, adapter_parameters, inject
from .adapters.load import load_adapter
from .adapters.merge import merge, unload, unmerge
from .adapters.optimizer import parameter_groups
from .adapters.released import load_released
from .adapters.shared_inputs import shared_inputs
from .functional import delta_weight, expand_factors, pera_linear
from .module import PeraLinear
from .terms import expanded_rank

__version__ = "0.1.0"

__all__ = [
    "PeraLinear",
    "adapted_modules",
    "adapter_parameters",
    "adapter_state_dict",
    "delta_weight",
    "expand_factors",
    "expanded_rank",
    "export_lora",
    "inject",
    "load_adapter",
    "load_released",
    "merge",
    "parameter_groups",
    "pera_linear",
    "reference",
    "save_adapter",
    "shared_inputs",
    "unload",
    "unmerge",
]
