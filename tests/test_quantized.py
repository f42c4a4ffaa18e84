"""Adapters over quantized and other linear-like bases, with the real libraries where they run."""

import pytest
import torch
from torch import nn

import pera_kernels as pk
from tests.adapted import refused


def bitsandbytes_4bit(linear):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        compute_dtype=linear.weight.dtype,
        quant_type="nf4",
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def bitsandbytes_8bit(linear):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, has_fp16_weights=False, threshold=0.0
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def torchao_int8(linear):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(linear, Int8WeightOnlyConfig())
    return linear


BASES = {f.__name__: f for f in (bitsandbytes_4bit, bitsandbytes_8bit, torchao_int8)}


def base(name, dtype):
    torch.manual_seed(0)
    try:
        layer = BASES[name](nn.Linear(64, 128).to(dtype))
        layer(torch.randn(2, 64, dtype=dtype))
    except (NotImplementedError, RuntimeError, AssertionError) as error:
        pytest.skip(f"{name} does not run on this CPU: {str(error).splitlines()[0]}")
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BASES)
def test_train_and_infer(name, dtype):
    layer = base(name, dtype)
    x = torch.randn(5, 64, dtype=dtype, requires_grad=True)
    y0 = layer(x.detach())
    model = nn.Sequential()
    model.add_module("proj", layer)
    pk.inject(model, ["proj"], 4, alpha=2.0, adapter_dtype=torch.float32)
    assert model.proj.base_layer is layer
    torch.testing.assert_close(model(x.detach()), y0)
    with torch.no_grad():
        for p in pk.adapter_parameters(model):
            p.normal_(std=0.2)
    y = model(x)
    update = (x.float() @ model.proj.delta_weight().t()).to(dtype)
    tolerance = {"atol": 5e-2, "rtol": 5e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(y - y0, update, **tolerance)
    y.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in pk.adapter_parameters(model))
    assert x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", BASES)
def test_merging_asks_for_a_dequantized_base(name):
    model = nn.Sequential()
    layer = base(name, torch.bfloat16)
    model.add_module("proj", layer)
    pk.inject(model, ["proj"], 4)
    kind = type(layer).__name__
    with pytest.raises(TypeError, match=rf"cannot merge into proj.*{kind}.*dequantized"):
        pk.merge(model)
    with pytest.raises(TypeError, match="dequantized"):
        pk.unload(model)
    pk.unload(model, merge=False)
    assert model.proj is layer


@pytest.mark.parametrize("name", BASES)
def test_in_peft(name, tmp_path):
    peft = pytest.importorskip("peft")
    from pera_kernels.peft import PeraConfig

    def quantized():
        model = nn.Sequential()
        model.add_module("proj", base(name, torch.bfloat16))
        return model

    torch.manual_seed(1)
    model = peft.get_peft_model(
        quantized(), PeraConfig(r=3, target_modules=["proj"], init_weights=False)
    )
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    y = model(x)
    y.float().square().mean().backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "pera_" in n)
    with pytest.raises(TypeError, match="proj: merging needs a plain dense base.*dequantize"):
        model.merge_adapter()
    with pytest.raises(TypeError, match="dequantize"):
        model.merge_and_unload()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantized(), tmp_path)
    # Without gradients the coefficients are folded elsewhere, and bfloat16 rounds otherwise.
    torch.testing.assert_close(loaded(x), y.detach(), atol=2e-2, rtol=2e-2)


def test_any_linear_like_module(tmp_path):
    class Doubled(nn.Module):
        """Has neither a weight nor a bias."""

        in_features = out_features = 6

        def forward(self, x):
            return 2 * x

    model = nn.Sequential(Doubled(), nn.Linear(6, 6))
    pk.inject(model, r".*", 2)
    with torch.no_grad():
        for p in pk.adapter_parameters(model):
            p.normal_()
    x = torch.randn(3, 6)
    torch.testing.assert_close(model[0](x), 2 * x + x @ model[0].delta_weight().t())
    refused(model, "cannot merge into 0: .*Doubled", pk.merge)
    pk.save_adapter(model, tmp_path)
    other = nn.Sequential(Doubled(), nn.Linear(6, 6))
    other[1].load_state_dict({k: model[1].state_dict()[k] for k in ("weight", "bias")})
    pk.load_adapter(other, tmp_path)
    assert torch.equal(other(x), model(x))
