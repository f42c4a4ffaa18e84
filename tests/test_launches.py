"""How many kernels a call launches, and that splits are used where there are few tiles."""

from itertools import chain

import pytest
import torch

from pera_kernels.backends import unavailable
from pera_kernels.kernels import tiles
from pera_kernels.operands import Base, Factors, Options, Saved
from pera_kernels.terms import TERMS, coefficient_count, lane_count


@pytest.fixture
def ops(monkeypatch):
    """The Triton backend, on tensors without storage: its launches are only recorded."""
    if (reason := unavailable("triton", torch.device("cuda"))) is not None:
        pytest.skip(reason)
    from pera_kernels.kernels import ops

    monkeypatch.setattr(tiles, "processor_count", lambda device: 132)
    return ops


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def adapter(r, N, M, terms):
    h = None if terms == "linear" else meta(coefficient_count(r, terms))
    return Factors(meta(r, N), meta(M, r), h)


@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
@pytest.mark.parametrize("T", [1, 16, 512, 2048, 4096, 16384])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("r", [1, 16, 64])
def test_launches_per_factored_call(r, terms, T, dropout_p, ops):
    """At most 3 forward and 5 backward beside the base GEMM and the draw of the dropout seed."""
    from pera_kernels.kernels.launch import recorded

    N = M = 4096
    x, dy, weight, own = meta(T, N), meta(T, M), meta(M, N), adapter(r, N, M, terms)
    seed = meta(1, dtype=torch.int64) if dropout_p else None
    options = Options(terms, 1.0, dropout_p, "factored", "triton")
    with recorded() as calls:
        ops.forward(x, [Base(weight)], [own], seed, options)
    assert 2 <= len(calls) <= 3, calls
    needs = [True, True, True, own.h is not None]
    with recorded() as again:
        ops.backward(dy, Saved(x, None, weight, own, seed), options, needs)
    u = meta(T, lane_count(r, terms))
    with recorded() as calls:
        ops.backward(dy, Saved(x, u, weight, own, seed), options, needs)
    assert 3 <= len(calls) <= 5, calls
    # A projection, and an expansion before it or a sum behind it.
    assert 1 <= len(again) - len(calls) <= 2, again
    assert all(side >= 1 for call in calls for side in call.grid)
    options = {"num_warps", "num_stages", "maxnreg"}
    assert all(call.arguments.keys() - options == {*call.kernel.arg_names} for call in calls)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("T", [1, 16, 512, 4096, 16384])
def test_layers_that_share_x_read_it_once_and_copy_nothing(T, count, ops):
    """Beside their base GEMMs G layers make 2 + G launches."""
    from pera_kernels.kernels import steps
    from pera_kernels.kernels.launch import recorded
    from pera_kernels.kernels.plan import Recorder

    x, weights = meta(T, 4096), [meta(M, 4096) for M in (4096, 1024, 1024)[:count]]
    adapters = [adapter(16, 4096, weight.shape[0], "full") for weight in weights]
    options = Options("full", 1.0, backend="triton")
    with recorded() as calls, Recorder() as asked:
        bases = [Base(weight) for weight in weights]
        steps.forward([x, None, *chain(*bases), *chain(*adapters)], options)
    names = [call.kernel.__name__ for call in calls]
    assert names.count("project_kernel") == 1 and names.count("accumulate_kernel") == count
    assert len(names) == 2 + count
    last = T >= tiles.choices(x.device).base_last
    operators = [step.operator.overloadpacket.__name__ for step in asked.steps]
    assert last == (T > 2000) and operators == ["addmm_" if last else "mm"] * count


def test_split_covers_everything_once():
    for size in (1, 7, 64, 100, 4096):
        for wanted in (1, 2, 5, 44):
            for granule in (16, 64, 128):
                parts, part = tiles.split(size, wanted, granule)
                assert parts <= max(1, wanted) and part % granule == 0
                assert (parts - 1) * part < size <= parts * part


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("processors", [1, 4, 132, 304])
@pytest.mark.parametrize("tile", [tiles.Tile(128, 64, 64, 8, 3, 3), tiles.Tile(32, 16, 32, 4, 2)])
def test_a_projection_computes_every_lane_once(tile, processors, whole):
    for lanes in (16, 32, 48, 144, 160, 240, 576, 1120):
        for T in (1, 100, 512, 4096, 16384):
            cut = tiles.projection(tile, T, 4096, lanes, 2, 1, processors, whole)
            assert [first for first, _ in cut.pieces] == [
                sum(own for _, own in cut.pieces[:number]) for number in range(len(cut.pieces))
            ]
            assert all(own & (own - 1) == 0 and own >= 16 for _, own in cut.pieces)
            assert sum(own for _, own in cut.pieces) == cut.block_k <= tile.block_k * tile.pieces
            blocks_t = -(-T // cut.block_t)
            assert cut.programs == blocks_t * -(-lanes // cut.block_k)
            assert cut.splits * cut.programs <= max(processors, cut.programs)
            assert cut.splits == 1 or not whole
            assert (cut.splits - 1) * cut.n_per_split < 4096 <= cut.splits * cut.n_per_split


@pytest.mark.parametrize(
    "r, T, blocks, whole",
    [(16, 16384, 1, True), (16, 4096, 2, True), (16, 512, 2, False), (16, 16, 5, False)]
    + [(32, 8192, 3, False)],
)
def test_hardly_a_lane_is_computed_in_vain(r, T, blocks, whole):
    lanes = lane_count(r)
    cut = tiles.projection(tiles.Tile(128, 64, 64, 8, 3, 3), T, 4096, lanes, 2, 1, 132, whole)
    assert cut.programs * cut.splits <= 132 or r == 32
    assert lanes <= cut.block_k * blocks <= lanes + (r == 32) * 16


def test_choices_of_a_table_stand_over_the_generic_ones(monkeypatch):
    tables = {"generic": {"base_last": 64, "products": 5}, "sm_90": {"base_last": None}}
    monkeypatch.setattr(tiles, "_read", lambda name: {"choices": tables.get(name, {})})
    load = tiles.load_choices.__wrapped__
    assert load("sm_90") == tiles.Choices(products=5, base_last=None)
    assert load("sm_80") == tiles.Choices(products=5, base_last=64)
    limits = [(load("sm_80").base_last, 64), (load("sm_80").base_last, 63), (None, 64)]
    assert [tiles.reached(limit, meta(T, 8)) for limit, T in limits] == [True, False, False]


def test_choices_of_shipped_tables_are_known():
    for path in tiles.TABLES.glob("*.json"):
        assert isinstance(tiles.load_choices(path.stem), tiles.Choices)


def test_phi_is_in_memory_from_some_4000_tokens_on(ops, monkeypatch):
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_90")
    assert not tiles.phi_in_memory(meta(4000, 4096), 160)
    assert tiles.phi_in_memory(meta(4096, 4096), 160)


@pytest.mark.parametrize("size, expected", [(1, 16), (16, 16), (17, 32), (64, 64), (900, 64)])
def test_blocks_shrink_to_small_sizes(size, expected):
    assert tiles.shrink(64, size) == expected
