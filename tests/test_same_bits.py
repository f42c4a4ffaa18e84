"""A forward gives the same bits whoever asks: with and without gradients, first or tenth time."""

import pytest
import torch

import pera_kernels as pk
from pera_kernels.backends import unavailable


@pytest.mark.parametrize("plan", ["auto", "composed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "backend, T",
    [("torch", 1), ("torch", 20), ("torch", 300), ("triton", 20), ("reference", 20)],
)
def test_the_same_bits_in_every_mode(backend, dtype, T, plan, device):
    """T=300 at these sizes is where ``plan="auto"`` composes in float32 on a CPU."""
    if (reason := unavailable(backend, device)) is not None:
        pytest.skip(f"backend {backend}: {reason}")
    layer = pk.PeraLinear(
        64, 48, r=16, backend=backend, plan=plan, dtype=dtype, adapter_dtype=torch.float32
    ).to(device)
    for parameter in pk.adapter_parameters(layer):
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(T, 64, dtype=dtype, device=device)
    first = layer(x)
    assert first.requires_grad
    outputs = [layer(x.clone().requires_grad_())]
    with torch.no_grad():
        outputs += [layer(x) for _ in range(2 if backend == "triton" else 10)]
        outputs.append(layer.eval()(x))
    with torch.inference_mode():
        outputs.append(layer(x))
    layer.train().requires_grad_(False)
    outputs.append(layer(x))
    layer.pera_h.requires_grad_(True)
    outputs.append(layer(x))
    assert all(torch.equal(y, first) for y in outputs)
