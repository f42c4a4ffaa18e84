"""A small byte-level transformer: a pre-norm decoder with rotary positions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256
HEADS = 4
# The projections that the paper adapts; the attention output projection stays as it is.
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


class Attention(nn.Module):
    """Causal multi-head self-attention, (batch, up to context, width) -> the same."""

    cosines: Tensor
    sines: Tensor

    def __init__(self, context: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)
        half = width // heads // 2
        angles = torch.arange(context)[:, None] * 10000 ** (-torch.arange(half) / half)
        self.register_buffer("cosines", angles.cos(), persistent=False)
        self.register_buffer("sines", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(
            self.rotate(query), self.rotate(key), value, is_causal=True
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))

    def rotate(self, x: Tensor) -> Tensor:
        """Turns channel pairs of `x` (batch, heads, C, head width) by the angle of their place."""
        cosines, sines = self.cosines[: x.shape[-2]], self.sines[: x.shape[-2]]
        first, second = x.chunk(2, dim=-1)
        return torch.cat(
            [first * cosines - second * sines, first * sines + second * cosines], dim=-1
        )


class FeedForward(nn.Module):
    """Two projections around a GELU, (batch, context, width) -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, 4 * width)
        self.down_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class Block(nn.Module):
    """Attention and feed-forward, each behind a layer norm and beside a residual."""

    def __init__(self, context: int, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(context, width, heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class ByteTransformer(nn.Module):
    """Bytes (batch, up to context) -> next-byte logits (batch, up to context, 256)."""

    def __init__(
        self, context: int = 128, width: int = 128, layers: int = 3, heads: int = HEADS
    ) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.Sequential(*(Block(context, width, heads) for _ in range(layers)))
        self.final_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.final_norm(self.blocks(self.embedding(tokens))))
