"""A whole decoder layer under each kind of adapter: ``python -m benchmarks.decoder``."""

from .report import table

__all__ = ["table"]
