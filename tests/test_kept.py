"""``benchmarks.kept``: what is counted, and that the committed rows are what the formula says."""

import pytest
import torch

pytest.importorskip("peft", reason="LoRA's layer is PEFT's")

from benchmarks import kept, rows
from pera_kernels.terms import expanded_rank, lane_count
from pera_kernels.testing import Case, make_inputs

CASE = Case(r=4, T=16, N=48, M=80, dtype=torch.bfloat16, adapter_dtype=torch.float32)
BYTES = ("bytes_per_token", "bytes_beside")


def count(name):
    row = kept.count(name, CASE, make_inputs(CASE))
    return {key: row[key] for key in BYTES}


def test_the_frozen_layer_and_lora_by_hand():
    """LoRA keeps x and x Aᵀ, and under autocast casts of A and B."""
    assert count("frozen layer") == {"bytes_per_token": 0, "bytes_beside": 0}
    half = count("PEFT LoRA under autocast")
    assert half == {"bytes_per_token": 2 * (48 + 4), "bytes_beside": 2 * 4 * (48 + 80)}
    assert count("PEFT LoRA without autocast")["bytes_per_token"] == 4 * (48 + 4)


def test_the_released_formula_by_hand():
    """φ(A), φ(B), what they were made of and casts of them: all of it whatever the tokens."""
    found = count("released PERA under autocast")
    assert found["bytes_per_token"] == 2 * (48 + expanded_rank(4))
    assert found["bytes_beside"] > 2 * expanded_rank(4) * (48 + 80)


@pytest.mark.parametrize("name", [name for name in kept.LINES if name.startswith("PERA")])
def test_ours_by_the_formula(name, triton_backend):
    contender, terms, keep = kept.LINES[name]
    u = lane_count(4, terms) * (keep == "u" and contender is kept.KERNELS)
    assert count(name) == {"bytes_per_token": 2 * (48 + u), "bytes_beside": 0}


# What is kept of a token beside x, in elements; that of ours follows from a line.
WIDTH = {"peft-lora-amp": 16, "peft-lora-cast": 16, "released-amp": expanded_rank(16)}


def test_committed_rows_are_what_the_formula_says():
    """PyTorch's dropout keeps a mask of one byte for each element of x, ours a seed."""
    found = rows.read(kept.FILE)
    assert {row["line"] for row in found} == kept.LINES.keys()
    for row in found:
        contender, terms, keep = kept.LINES[row["line"]]
        name, dropout, N = contender.name, row["dropout"] > 0, row["n"]
        if name == "frozen":
            assert row["bytes_per_token"] == row["bytes_beside"] == 0
        elif name in WIDTH:
            size = 4 if name == "peft-lora-cast" else 2
            assert row["bytes_per_token"] == size * (N + WIDTH[name]) + N * dropout
        else:
            u = lane_count(16, terms) * (keep == "u" and contender is kept.KERNELS)
            assert row["bytes_per_token"] == 2 * (N + u)
            assert row["bytes_beside"] == 8 * dropout


def test_the_shares_of_u_that_the_page_says():
    shares = [lane_count(r) / (4096 + lane_count(r)) for r in (16, 32, 64)]
    shares.append(3 * lane_count(16) / (4096 + 3 * lane_count(16)))
    first, second, third, of_three = (f"{share:.0%}".replace("%", " %") for share in shares)
    page = " ".join((rows.ROOT / "docs" / "memory.md").read_text().split())
    assert f"keeps at r=16, {second} at r=32 and {third} at r=64" in page
    assert f"u is {first} of" in page and f"share x {of_three} at r=16" in page
