"""``benchmarks.scaling``: the model by hand, the bytes that two ranks count, and the page."""

import json
import re

import pytest

from benchmarks.scaling import __main__ as page
from benchmarks.scaling import count
from benchmarks.scaling.model import (
    SHAPES,
    TOKENS,
    Adapter,
    Parallelism,
    Shape,
    adapter_bytes,
    base_bytes,
    input_bytes,
    operations,
    parallelisms,
    payload,
    sent,
)
from benchmarks.scaling.model import Parameter as P

GPU, TP = Parallelism("DDP", 1), Parallelism("TP", 8)
LORA, FULL = Adapter("linear"), Adapter("full")


def test_the_shapes_are_the_published_ones():
    counts = {shape.name: base_bytes(shape, GPU) // 2 for shape in SHAPES}
    assert counts == {"8B": 8_030_261_248, "70B": 70_553_706_496, "405B": 405_853_388_800}


def test_a_rank_by_hand():
    """The 8B model: 32 layers, 4096 wide, 1024 for k and v, 14336 in the MLP."""
    shape = SHAPES[0]
    A, B = 16 * (4 * 4096 + 14336), 16 * (4096 + 2 * 1024 + 14336 + 4096)
    u = 32 * 5 * TOKENS * 2
    assert adapter_bytes(shape, LORA, GPU) == 32 * 16 * (A + B) + u * 16
    assert adapter_bytes(shape, FULL, GPU) == 32 * 16 * (A + B + 5 * 136) + u * 160
    parts = 16 * (4 * 4096 + 14336 // 8) + 16 * ((4096 + 2 * 1024 + 14336) // 8 + 4096)
    assert adapter_bytes(shape, LORA, TP) == 32 * 16 * parts + u * 16
    assert input_bytes(shape, 1) == 32 * TOKENS * 2 * (2 * 4096 + 14336)
    # Whole factors: A of q, k, v and up, B of down, h of all.
    gradients = 32 * 4 * (16 * 5 * 4096 + 5 * 136)
    assert payload(shape, FULL, TP) == {"all_reduce": (32 * 7 + 2) * TOKENS * 4096 * 2 + gradients}
    assert sent(shape, FULL, GPU) == 0
    assert sent(shape, FULL, Parallelism("DDP", 8)) == 32 * 4 * (A + B + 5 * 136) * 2 * 7 / 8
    replicas = Parallelism("TP", 8, 4)
    between = 32 * 4 * (parts + 5 * 136) * 2 * 3 / 4
    assert sent(shape, FULL, replicas) - sent(shape, FULL, TP) == between
    assert (
        sent(shape, None, Parallelism("FSDP2", 2))
        == (
            2 * 32 * 2 * (8_030_261_248 - 2 * 128256 * 4096 - 4096) // 32
            + 2 * 2 * 128256 * 4096
            + 8192
        )
        / 2
    )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_operations(shape):
    """Ranks share the base; of the adapters each has all of one side."""
    alone = operations(shape, None, 1)
    assert alone == pytest.approx(4 * TOKENS * base_bytes(shape, GPU) / 2, rel=0.08)
    assert operations(shape, None, 8) * 8 == alone
    h, kv, wide = shape.hidden, shape.kv, shape.intermediate
    for tp in (1, 8):
        sides = 4 * h + (h + 2 * kv + wide) / tp + wide / tp + h
        added = operations(shape, FULL, tp) - operations(shape, None, tp)
        assert added == pytest.approx(shape.layers * 6 * TOKENS * 152 * sides, rel=0.01)


def test_fsdp_pads_what_it_divides():
    assert [P((16, 24), None).part(p, 0) for p in (2, 3, 16, 64)] == [384, 288, 48, 48]
    A = P((16, 64), None, trained=True)
    assert Parallelism("FSDP2", 64).part(A) == 4 * 64
    assert Parallelism("FSDP2 by N", 64).part(A) == 4 * 16
    assert Parallelism("FSDP2 by N", 64).part(P((16, 64), None)) == 2 * 64
    for shape in SHAPES:
        for p in parallelisms():
            whole = base_bytes(shape, GPU)
            assert whole / p.ranks <= base_bytes(shape, p) <= whole


@pytest.fixture(scope="module")
def committed():
    return {
        (row["kind"], row["terms"]): row
        for row in map(json.loads, count.FILE.read_text().splitlines())
    }


@pytest.mark.parametrize("p, adapter", count.CASES, ids=str)
def test_what_two_ranks_count(two_ranks, committed, p, adapter):
    """Today's bytes are those of the committed rows and of the formulas."""
    pytest.importorskip("transformers")
    row = committed[p.kind, adapter and adapter.terms]
    assert Shape(**row["shape"]) == count.SMALL and row["r"] == count.RANK
    counted = two_ranks.run(count.count, p, adapter)
    assert counted == 2 * [row["bytes"]]
    # Of DDP: the frequencies of rotary positions.
    assert counted[0].pop("broadcast", 0) == (8 if p.kind == "DDP" else 0)
    formulas = payload(count.SMALL, adapter, p, row["tokens"])
    assert counted[0] == {name: size for name, size in formulas.items() if size}


def test_what_a_layer_was_measured_to_keep():
    measured, modelled = map(float, re.findall(r"([\d.]+)\sMB", page.kept()))
    assert measured == pytest.approx(modelled, rel=0.005)


def test_the_page():
    for path, text in page.documents().items():
        assert path.read_text() == text, "run python -m benchmarks.scaling"
