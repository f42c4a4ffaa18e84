"""Time PERA layers, kernels and a decoder layer beside the frozen layers they adapt."""
