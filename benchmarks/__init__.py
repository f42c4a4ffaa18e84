"""Time PERA layers beside the frozen linear layer they adapt: ``python -m benchmarks``."""
