"""Both ways of the Triton launchers to form an expansion give what the numeric rule allows."""

import pytest
import torch

from pera_kernels import plans
from tools.numerics import Case, check


@pytest.fixture(params=["on chip", "in memory"])
def way(request, monkeypatch):
    limit = 0 if request.param == "in memory" else 10**9
    monkeypatch.setattr(plans, "EXPANDED_SOURCE_TOKENS", limit)
    return request.param


@pytest.mark.parametrize(
    "terms, r, T, dtype, adapter_dtype, dropout_p",
    [
        ("full", 4, 33, torch.float32, None, 0.25),
        ("full", 5, 40, torch.bfloat16, torch.float32, 0.0),
        ("full", 16, 9, torch.bfloat16, None, 0.25),
        ("cross", 6, 20, torch.float16, None, 0.0),
        ("square", 9, 17, torch.float32, None, 0.0),
        ("linear", 3, 40, torch.float16, torch.float32, 0.25),
        ("full", 25, 5, torch.float32, None, 0.0),
    ],
)
def test_every_way(way, terms, r, T, dtype, adapter_dtype, dropout_p, triton_backend, device):
    case = Case(
        terms=terms,
        r=r,
        T=T,
        N=150,
        M=50,
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        dropout_p=dropout_p,
    )
    verdicts = check(case, "triton", device)
    assert all(v.passed for v in verdicts), [str(v) for v in verdicts if not v.passed]
