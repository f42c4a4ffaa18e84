"""The ``@triton.jit`` kernels: one file per operation, shared tile helpers in ``common``."""
