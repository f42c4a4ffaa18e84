"""How to compute a call: where expansions are formed, and factored or composed.

Each limit says whether it was measured or follows from a model; ``benchmarks/README.md`` has both.
"""

__all__ = ["EXPANDED_SOURCE_TOKENS"]

# A projection forms the expansion it needs on chip, anew for every block of 128 tokens, unless
# there are so many tokens. Model, from instruction counts of the compiled kernels: a block costs
# the whole GPU 0.25 µs at r=16, n=4096, and reading it from memory costs a share of a launch. From
# here on a projection also fills the GPU without being split along its features.
EXPANDED_SOURCE_TOKENS = 8192
