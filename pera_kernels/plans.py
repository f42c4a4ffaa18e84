"""How to compute a call: where expansions are formed, and factored or composed.

Each limit says whether it was measured or follows from a model; ``benchmarks/README.md`` has both.
"""

from __future__ import annotations

import torch

__all__ = ["EXPANDED_SOURCE_TOKENS", "composes"]

# A projection forms the expansion it needs on chip, anew for every block of 128 tokens, unless
# there are so many tokens. Model, from instruction counts of the compiled kernels: a block costs
# the whole GPU 0.25 µs at r=16, n=4096, and reading it from memory costs a share of a launch. From
# here on a projection also fills the GPU without being split along its features.
EXPANDED_SOURCE_TOKENS = 8192

# Composing W0 + ΔW takes 2 M N K operations where a factored pass takes 2 T (N + M) K. An
# evaluation does one composition for one pass, training does two and saves one pass of three. By
# operations the ratios T (N + M) / (M N) from which it pays are 1 and 2. Measured on 2 CPU cores in
# float32 (M = N = 1024 and 2048, r = 8 to 32): even at 1 and 2, up to a third faster beyond.
COMPOSED_EVAL_RATIO = 1.5
COMPOSED_TRAINING_RATIO = 3.0
# With a smaller expanded rank both take the same time within noise.
COMPOSED_LANES = 64


def composes(
    T: int, N: int, M: int, K: int, dtype: torch.dtype, device: torch.device, trains: bool
) -> bool:
    """Whether ``plan="auto"`` composes: only where that is faster and rounds no more than
    factored.

    ``trains``: the gradient of a factor or of h will be asked for. Half precision would lose
    entries of ΔW. GPUs stay factored: not measured there.
    """
    if device.type != "cpu" or dtype not in (torch.float32, torch.float64) or K < COMPOSED_LANES:
        return False
    ratio = COMPOSED_TRAINING_RATIO if trains else COMPOSED_EVAL_RATIO
    return T * (N + M) >= ratio * M * N
