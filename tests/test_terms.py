"""Which monomials there are, and the two orders in which they stand."""

import pytest
import torch

import pera_kernels as pk
from pera_kernels import terms


@pytest.mark.parametrize(
    "kind, expected", [("full", 152), ("square", 32), ("cross", 136), ("linear", 16)]
)
def test_expanded_rank_matches_the_paper_at_rank_16(kind, expected):
    assert pk.expanded_rank(16, kind) == expected


@pytest.mark.parametrize(
    "r, expected", [(4, 14), (8, 44), (16, 152), (20, 230), (24, 324), (32, 560)]
)
def test_full_rank_bound(r, expected):
    assert pk.expanded_rank(r) == expected == 2 * r + r * (r - 1) // 2


@pytest.mark.parametrize("r", [1, 2, 3, 7, 16])
def test_public_order_is_row_major_upper_triangular(r):
    assert terms.pairs(r, "full") == [tuple(p) for p in torch.triu_indices(r, r).T.tolist()]
    assert terms.pairs(r, "cross") == [tuple(p) for p in torch.triu_indices(r, r, 1).T.tolist()]
    assert terms.pairs(r, "square") == [(i, i) for i in range(r)]
    assert terms.pairs(r, "linear") == []


@pytest.mark.parametrize("kind", terms.TERMS)
@pytest.mark.parametrize("r", [*range(1, 18), 20, 31, 32, 64])
def test_circular_order_has_every_pair_once(r, kind):
    order = terms.circular_order(r, kind).tolist()
    assert sorted(order) == list(range(terms.coefficient_count(r, kind)))


@pytest.mark.parametrize("r", [3, 8, 12])
def test_circular_order_is_lane_plus_offset(r):
    public = terms.pairs(r, "full")
    for lane, position in enumerate(terms.circular_order(r, "full").tolist()):
        offset, first = divmod(lane, r)
        assert set(public[position]) == {first, (first + offset) % r}


@pytest.mark.parametrize(
    "r, kind, lanes",
    [(16, "full", 160), (16, "linear", 16), (32, "full", 560), (1, "full", 16), (5, "full", 32)],
)
def test_lanes_are_whole_groups_of_16_and_no_more(r, kind, lanes):
    assert terms.lane_count(r, kind) == lanes


@pytest.mark.parametrize("r, error", [(0, ValueError), (-3, ValueError), (2.0, TypeError)])
def test_bad_rank_is_named(r, error):
    with pytest.raises(error, match=f"r must be an int >= 1; got {r}"):
        pk.expanded_rank(r)


def test_bad_terms_are_named():
    with pytest.raises(ValueError, match="terms must be one of 'full'.*got 'cubic'"):
        pk.expanded_rank(4, "cubic")
