"""How many kernels a call launches, and that splits are used where there are few tiles."""

import pytest
import torch

from pera_kernels import configs, ops
from pera_kernels.backends import unavailable
from pera_kernels.terms import TERMS, coefficient_count, lane_count


@pytest.fixture
def recorded(monkeypatch):
    """Names of the kernels that the launchers launch, on tensors without storage."""
    if (reason := unavailable("triton", torch.device("cuda"))) is not None:
        pytest.skip(reason)
    from pera_kernels import launch

    names = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            assert all(side >= 1 for side in grid)
            return lambda **arguments: names.append(self.name)

    for name in [n for n in vars(launch) if n.endswith("_kernel")]:
        monkeypatch.setattr(launch, name, Recorder(name))
    monkeypatch.setattr(configs, "processor_count", lambda device: 132)
    return names


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
@pytest.mark.parametrize("T", [1, 16, 512, 16384])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("r", [1, 16, 64])
def test_launches_per_factored_call(r, terms, T, dropout_p, recorded):
    """At most 3 forward and 6 backward beside the base GEMM and the draw of the dropout seed."""
    N = M = 4096
    x, dy, weight = meta(T, N), meta(T, M), meta(M, N)
    A, B = meta(r, N), meta(M, r)
    h = None if terms == "linear" else meta(coefficient_count(r, terms))
    seed = meta(1, dtype=torch.int64) if dropout_p else None
    rest = (A, B, h, seed, 1.0, terms, dropout_p, False)
    ops.linear_forward._init_fn(x, weight, None, None, *rest)
    assert len(recorded) <= 3, recorded
    recorded.clear()
    u = meta(T, lane_count(r, terms))
    ops.linear_backward._init_fn(dy, x, u, weight, *rest, [True, True, True, h is not None])
    assert len(recorded) <= 6, recorded


def test_split_covers_everything_once():
    for size in (1, 7, 64, 100, 4096):
        for wanted in (1, 2, 5, 44):
            for granule in (16, 64, 128):
                parts, part = configs.split(size, wanted, granule)
                assert parts <= max(1, wanted) and part % granule == 0
                assert (parts - 1) * part < size <= parts * part


def test_all_lanes_in_one_program_or_two_blocks_of_them():
    assert configs.pieces(160, 64, 4) == 3
    assert configs.pieces(256, 64, 4) == 4
    assert configs.pieces(576, 64, 4) == 2
    assert configs.pieces(576, 64, 1) == 1
    assert configs.pieces(32, 32, 4) == 1


@pytest.mark.parametrize("size, expected", [(1, 16), (16, 16), (17, 32), (64, 64), (900, 64)])
def test_blocks_shrink_to_small_sizes(size, expected):
    assert configs.shrink(64, size) == expected
