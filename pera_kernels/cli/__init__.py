"""The command line: ``python -m pera_kernels``."""
