"""Fused kernels for PERA, Polynomial Expansion Rank Adaptation (arXiv 2604.11841)."""

from . import reference
from .adapt import adapted_modules, adapter_parameters, inject, parameter_groups
from .checkpoint import adapter_state_dict, load_adapter, save_adapter
from .export import export_lora
from .functional import delta_weight, expand_factors, pera_linear
from .groups import group_projections
from .merging import merge, unload, unmerge
from .module import PeraLinear
from .official import load_official
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
    "group_projections",
    "inject",
    "load_adapter",
    "load_official",
    "merge",
    "parameter_groups",
    "pera_linear",
    "reference",
    "save_adapter",
    "unload",
    "unmerge",
]
