"""Bad input: a clear error that names the argument, what came and what is accepted."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import pera_kernels as pk


def arguments(**changes):
    values = {
        "x": torch.randn(4, 10),
        "weight": torch.randn(6, 10),
        "A": torch.randn(3, 10),
        "B": torch.randn(6, 3),
        "h": torch.randn(6),
    }
    return {**values, **changes}


BAD = [
    ({"x": torch.randn(4, 9)}, ValueError, r"x must be \(\.\.\., 10\).*got \(4, 9\)"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x must be \(\.\.\., 10\)"),
    ({"x": [1.0]}, TypeError, "x must be a torch.Tensor; got list"),
    ({"x": torch.ones(4, 10, dtype=torch.int64)}, TypeError, "x must be float64.*got torch.int64"),
    ({"weight": torch.randn(10, 6)}, ValueError, r"weight must be \(6, 10\).*got \(10, 6\)"),
    ({"weight": torch.randn(6, 10).half()}, TypeError, "weight must have the dtype of x"),
    ({"bias": torch.randn(5)}, ValueError, r"bias must have shape \(6,\); got \(5,\)"),
    ({"A": torch.randn(10)}, ValueError, "A must have 2 dimensions"),
    ({"A": torch.randn(0, 10)}, ValueError, "A must be .* with r >= 1"),
    ({"B": torch.randn(6, 4)}, ValueError, r"B must be \(out_features, 3\).*got shape \(6, 4\)"),
    ({"B": torch.randn(6, 3).bfloat16()}, TypeError, "B must have the dtype of A"),
    ({"h": None}, ValueError, r"h must be a tensor of shape \(6,\) for terms='full'; got None"),
    ({"h": torch.randn(5)}, ValueError, r"h must have shape \(6,\).*got \(5,\)"),
    ({"h": torch.randn(6).double()}, TypeError, "h must be float64 only with float64 factors"),
    ({"terms": "linear"}, ValueError, "h must be None for terms='linear'"),
    ({"terms": "cubic"}, ValueError, "terms must be one of .*got 'cubic'"),
    ({"terms": 2}, TypeError, "terms must be a string; got 2"),
    ({"scale": float("nan")}, ValueError, "scale must be finite; got nan"),
    ({"scale": "1"}, TypeError, "scale must be a real number; got '1'"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\); got 1.0"),
    ({"dropout_p": None}, TypeError, "dropout_p must be a number"),
    ({"backend": "cuda"}, ValueError, "backend must be one of .*got 'cuda'"),
    ({"plan": "fast"}, ValueError, "plan must be one of .*got 'fast'"),
    ({"keep": "y"}, ValueError, "keep must be one of 'u', 'x'; got 'y'"),
    ({"plan": "composed", "dropout_p": 0.1}, ValueError, "plan='composed' takes no dropout"),
    ({"A": torch.randn(3, 10, device="meta")}, ValueError, "B must be on the device of A, meta"),
    ({"x": torch.randn(4, 10, device="meta")}, ValueError, "weight must be on the device of x"),
    ({"x": torch.randn(4, 10).double()}, TypeError, "weight must have the dtype|A must be float64"),
]


@pytest.mark.parametrize("changes, error, words", BAD, ids=[str(i) for i in range(len(BAD))])
def test_pera_linear(changes, error, words):
    with pytest.raises(error, match=words):
        pk.pera_linear(**arguments(**changes))


def test_float64_is_refused_by_the_triton_backend():
    doubles = {name: t.double() for name, t in arguments().items()}
    with pytest.raises(ValueError, match="backend='triton' cannot run here: .*float64"):
        pk.pera_linear(**doubles, backend="triton")


MODULES = [
    ({"in_features": 0}, ValueError, "in_features must be an int >= 1; got 0"),
    ({"out_features": 2.5}, TypeError, "out_features must be an int"),
    ({"r": True}, TypeError, "r must be an int"),
    ({"alpha": "16"}, TypeError, "alpha must be a number > 0"),
    ({"alpha": float("inf")}, ValueError, "alpha must be finite"),
    ({"init": "zeros"}, ValueError, "init must be one of 'kaiming', 'gaussian'; got 'zeros'"),
    ({"adapter_dtype": torch.int8}, TypeError, "adapter_dtype must be .*got torch.int8"),
    ({"dropout": -0.1}, ValueError, r"dropout must be in \[0, 1\); got -0.1"),
    ({"plan": "composed", "dropout": 0.1}, ValueError, "takes no dropout"),
    ({"keep": None}, ValueError, "keep must be one of 'u', 'x'; got None"),
    ({"backend": "numpy"}, ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(
    "changes, error, words", MODULES, ids=[str(i) for i in range(len(MODULES))]
)
def test_module(changes, error, words):
    with pytest.raises(error, match=words):
        pk.PeraLinear(**{"in_features": 8, "out_features": 6, "r": 2, **changes})


@pytest.mark.parametrize("layer", [nn.Conv1d(3, 4, 1), nn.Embedding(4, 3), "layer", None])
def test_from_linear_needs_a_linear_like_module(layer):
    with pytest.raises(TypeError, match="layer must"):
        pk.PeraLinear.from_linear(layer)


def test_composed_needs_a_plain_base():
    base = nn.Linear(8, 6)
    base.register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match="plan='composed' needs a plain nn.Linear"):
        pk.PeraLinear.from_linear(base, 2, plan="composed")
    assert base.weight.requires_grad


def test_an_injection_that_fails_half_way_leaves_everything_trainable():
    """The second layer is float64, which the Triton backend does not compute in."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double())
    with pytest.raises(ValueError, match="backend='triton' cannot run here"):
        pk.inject(model, r"\d", 2, backend="triton")
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    assert all(p.requires_grad for p in model.parameters())


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )


def test_imports_and_trains_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, pera_kernels as pk\n"
        "layer = pk.PeraLinear(8, 6, r=2); layer(torch.randn(3, 8)).sum().backward()\n"
        "try: pk.PeraLinear(8, 6, r=2, backend='triton')\n"
        "except ValueError as error: print(error)\n"
    )
    done = run_python(code, PYTHONPATH=":".join(p for p in sys.path if p))
    assert done.returncode == 0, done.stderr
    assert "the triton package is not installed" in done.stdout


def test_without_a_gpu_the_triton_backend_says_why():
    code = (
        "import torch, pera_kernels as pk\n"
        "try: pk.PeraLinear(8, 6, r=2, backend='triton')\n"
        "except ValueError as error: print(error)\n"
    )
    done = run_python(code, PYTHONPATH=":".join(p for p in sys.path if p))
    assert "backend='triton' cannot run here: tensors on cpu need" in done.stdout, done.stderr


def test_import_does_not_import_triton():
    code = "import sys, pera_kernels; print('triton' in sys.modules)"
    done = run_python(code, PYTHONPATH=":".join(p for p in sys.path if p))
    assert done.stdout.strip() == "False", done.stderr
