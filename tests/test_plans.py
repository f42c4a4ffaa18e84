"""The ways to form an expansion in the launchers, and what plan="auto" means: the same numbers."""

from dataclasses import replace

import pytest
import torch

import pera_kernels as pk
from pera_kernels import torch_backend
from pera_kernels.testing import Case, check, make_inputs, run


@pytest.fixture(params=["on chip", "in memory"])
def way(request, triton_backend, monkeypatch):
    from pera_kernels.kernels import tiles

    limit = 0 if request.param == "in memory" else 10**12
    monkeypatch.setattr(tiles, "choices", lambda device: tiles.Choices(products=limit))
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
        pytest.param("full", 25, 5, torch.float32, None, 0.0, marks=pytest.mark.slow),
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


@pytest.fixture
def composed_calls(monkeypatch):
    """For every forward of the torch backend, whether it composed."""
    seen = []
    original = torch_backend.forward

    def recorded(*arguments):
        seen.append(arguments[-1].plan == "composed")
        return original(*arguments)

    monkeypatch.setattr(torch_backend, "forward", recorded)
    return seen


@pytest.mark.parametrize("terms, r", [("full", 16), ("cross", 12), ("square", 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_auto_composes_for_many_tokens(terms, r, dtype, composed_calls, device):
    """Judged as factored: the plan that the library chooses must not cost accuracy."""
    if device.type != "cpu":
        pytest.skip("GPUs stay factored")
    case = Case(terms=terms, r=r, T=400, N=70, M=50, dtype=dtype, plan="auto")
    if dtype == torch.float32:
        verdicts = check(case, "torch", device)
        assert all(v.passed for v in verdicts), [str(v) for v in verdicts if not v.passed]
    else:
        inputs = make_inputs(case)
        composed = run(case, inputs, "torch", exact=True)
        factored = run(replace(case, plan="factored"), inputs, "torch", exact=True)
        del composed_calls[1:]
        for name, exact in factored.items():
            torch.testing.assert_close(composed[name], exact, rtol=1e-11, atol=1e-11)
    assert composed_calls and all(composed_calls)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"dropout_p": 0.1},
        {"T": 80},
        {"plan": "factored"},
        {"terms": "linear"},
    ],
    ids=str,
)
def test_auto_stays_factored(change, composed_calls):
    case = Case(**{"terms": "full", "r": 16, "T": 400, "N": 70, "M": 50, "plan": "auto", **change})
    check(case, "torch")
    assert composed_calls and not any(composed_calls)


@pytest.mark.parametrize("T", [40, 400])
def test_auto_does_not_ask_for_gradients(T, composed_calls):
    """The plan depends on shapes, dtypes and device alone: a forward always has the same bits."""
    layer = pk.PeraLinear(64, 64, 16, backend="torch")
    torch.nn.init.ones_(layer.pera_h)
    x = torch.randn(T, 64)
    layer(x)
    with torch.no_grad():
        layer(x)
    layer.requires_grad_(False)
    layer(x.requires_grad_())
    assert composed_calls == [T == 400] * 3
