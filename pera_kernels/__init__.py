"""Fused kernels for PERA, Polynomial Expansion Rank Adaptation (arXiv 2604.11841)."""

from . import reference
from .adapt import adapted_modules, adapter_parameters, inject, parameter_groups
from .functional import delta_weight, expand_factors, pera_linear
from .groups import group_projections
from .module import PeraLinear
from .terms import expanded_rank

__version__ = "0.1.0"

__all__ = [
    "PeraLinear",
    "adapted_modules",
    "adapter_parameters",
    "delta_weight",
    "expand_factors",
    "expanded_rank",
    "group_projections",
    "inject",
    "parameter_groups",
    "pera_linear",
    "reference",
]
