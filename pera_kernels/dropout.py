"""The dropout mask as a function of a seed and a position, so that nobody has to keep it.

Element ``(t, n)`` of the flattened ``(T, N)`` input survives if its 16-bit lot reaches
``p * 2**16``. The lots of two neighbours are the low and the high half of one hash of
``(seed, t, n // 2)``: the two words of a row's key come from the seed and ``t``, and the hash mixes
them with ``n // 2`` in two multiply-xorshift rounds. This file is the definition in plain PyTorch;
the Triton kernels compute the same bits, so one seed gives one mask in every backend, forward and
backward.
"""

from __future__ import annotations

import torch

__all__ = ["draw_seed", "keep_mask", "keep_scale"]

# Multipliers with good avalanche for 32-bit multiply-xorshift hashing.
MULTIPLY_1 = 0x7FEB352D
MULTIPLY_2 = 0x846CA68B
ROW_STEP = 0x9E3779B9
LOT_BITS = 16


def draw_seed(device: torch.device) -> torch.Tensor:
    """A fresh int64 seed ``(1,)`` from the default generator of ``device``.

    It stays on the device: no synchronisation, a captured CUDA graph draws a new one on each
    replay, and activation checkpointing, which restores the generator, draws the same one again.
    """
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)


def drop_threshold(p: float) -> int:
    """The lot from which an element survives: ``p`` in units of ``2**-16``, below 1."""
    return min(round(p * 2**LOT_BITS), 2**LOT_BITS - 1)


def keep_scale(p: float) -> float:
    """What survivors are multiplied by: 1 / (1 - p) for ``p`` as the threshold has it, so that the
    mean is kept.
    """
    return 2**LOT_BITS / (2**LOT_BITS - drop_threshold(p))


def _signed(value: int) -> int:
    """The int32 with the bits of a uint32 constant."""
    return value - 2**32 if value >= 2**31 else value


def _xorshift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """``x ^ (x >>> bits)`` on int32, in place; the mask makes the arithmetic shift logical."""
    return x.bitwise_xor_(x.bitwise_right_shift(bits).bitwise_and_((1 << (32 - bits)) - 1))


def _mix(x: torch.Tensor) -> torch.Tensor:
    _xorshift(x, 16).mul_(_signed(MULTIPLY_1))
    _xorshift(x, 15).mul_(_signed(MULTIPLY_2))
    return _xorshift(x, 16)


def _low_word(x: torch.Tensor) -> torch.Tensor:
    """The low 32 bits of an int64 tensor as int32, without relying on the cast's overflow."""
    low = x.bitwise_and(0xFFFFFFFF)
    return torch.where(low >= 2**31, low - 2**32, low).to(torch.int32)


def row_keys(seed: torch.Tensor, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two int32 key words ``(T, 1)`` for each row, from the seed's two words and the row's two."""
    rows = torch.arange(T, dtype=torch.int64, device=seed.device)
    low, high = _low_word(rows), _low_word(rows >> 32)
    key_0 = _mix(_mix(low.bitwise_xor(_low_word(seed))).add_(high))
    key_1 = _mix(_mix(low.mul(_signed(ROW_STEP)).add_(_low_word(seed >> 32))).bitwise_xor_(key_0))
    return key_0.unsqueeze(1), key_1.unsqueeze(1)


def keep_mask(seed: torch.Tensor, T: int, N: int, p: float, first: int = 0) -> torch.Tensor:
    """Boolean ``(T, N)`` mask of the elements that survive dropout with probability ``1 - p``, of
    the columns from ``first`` on.
    """
    key_0, key_1 = row_keys(seed, T)
    start, end = first // 2, (first + N + 1) // 2
    pairs = torch.arange(start, end, dtype=torch.int32, device=seed.device)
    x = pairs.unsqueeze(0).bitwise_xor(key_0)
    _xorshift(x, 16).mul_(_signed(MULTIPLY_1)).bitwise_xor_(key_1)
    _xorshift(x, 15).mul_(_signed(MULTIPLY_2))
    x = _xorshift(x, 16)
    low, high = x.bitwise_and(0xFFFF), x.bitwise_right_shift(LOT_BITS).bitwise_and_(0xFFFF)
    lots = torch.stack((low, high), dim=2).view(T, 2 * (end - start))
    return lots[:, first - 2 * start :][:, :N] >= drop_threshold(p)
