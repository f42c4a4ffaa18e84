"""Command-line tools that use `pera_kernels` on real input."""
