"""The others: PEFT's own LoRA layer and the released PERA formula, as their users run them."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from pera_kernels.verify.numerics import Case, Inputs

from .layers import Contender, Layer, frozen_linear

__all__ = ["PEERS", "PEER_ALLOWED", "ReleasedPera"]

# Peers may round more often than we do: our tolerance is not theirs. A function that differs, such
# as one that adds the bias twice, misses by tens in bfloat16 and by far more in float32.
PEER_ALLOWED = 4.0


class Autocast(nn.Module):
    """Run a layer with float32 adapters as mixed-precision training does: under autocast."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, self.dtype):
            return self.layer(x)


class ReleasedPera(nn.Module):
    """The released formula for all pairs i ≤ j in eager PyTorch: outer products ``(r, r, …)``, a
    gather of their upper triangle, a concatenation, two linear layers (Eq. 2, 3, 9).

    The index of the gather is made once, the bias is added once and dropout is applied, whatever
    the released code does about them.
    """

    index: torch.Tensor

    def __init__(self, base: nn.Linear, case: Case, inputs: Inputs, dtype: torch.dtype) -> None:
        super().__init__()
        assert inputs.h is not None
        self.base = base
        self.A = nn.Parameter(inputs.A.detach().to(dtype, copy=True))
        self.B = nn.Parameter(inputs.B.detach().to(dtype, copy=True))
        self.h = nn.Parameter(inputs.h.detach().to(dtype, copy=True))
        self.dropout = nn.Dropout(case.dropout_p) if case.dropout_p > 0.0 else nn.Identity()
        self.scale = case.scale
        index = torch.triu_indices(case.r, case.r, device=base.weight.device)
        self.register_buffer("index", index)

    def _expand(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows ``(r, d)`` and their products ``(L, d)``."""
        outer = rows.unsqueeze(1) * rows.unsqueeze(0)
        return torch.cat([rows, outer[self.index[0], self.index[1]]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c = torch.cat([self.h.new_ones(self.A.shape[0]), self.h])
        phi_A, phi_B = self._expand(self.A), (self._expand(self.B.t()) * c.unsqueeze(1)).t()
        update = F.linear(F.linear(self.dropout(x), phi_A), phi_B)
        return self.base(x) + self.scale * update


def _peft_layer(case: Case, inputs: Inputs, dtype: torch.dtype) -> Layer:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear

    holder = nn.Sequential(frozen_linear(inputs.weight, inputs.bias))
    config = LoraConfig(
        r=case.r,
        # PEFT documents an int; the scale of a case is alpha / r.
        lora_alpha=case.scale * case.r,  # type: ignore[arg-type]
        lora_dropout=case.dropout_p,
        target_modules=["0"],
    )
    inject_adapter_in_model(config, holder)
    layer = holder[0]
    if not isinstance(layer, Linear):
        raise TypeError(f"PEFT put a {type(layer).__name__} in the place of nn.Linear")
    factors = (layer.lora_A["default"].to(dtype), layer.lora_B["default"].to(dtype))
    with torch.no_grad():
        for factor, value in zip(factors, (inputs.A, inputs.B), strict=True):
            factor.weight.copy_(value)
    return Layer(layer, dict(zip(("dA", "dB"), (f.weight for f in factors), strict=True)))


def _released_layer(case: Case, inputs: Inputs, dtype: torch.dtype) -> Layer:
    layer = ReleasedPera(frozen_linear(inputs.weight, inputs.bias), case, inputs, dtype)
    return Layer(layer, {"dA": layer.A, "dB": layer.B, "dh": layer.h})


def _judged(case: Case, amp: bool) -> Case:
    """Peers draw other dropout masks: they are judged, and the same function shown, without."""
    return replace(case, adapter_dtype=torch.float32 if amp else case.dtype, dropout_p=0.0)


def _dtype_mismatch(case: Case, amp: bool) -> str | None:
    if amp and case.dtype.itemsize >= 4:
        return "autocast is for half precision"
    if not amp and case.factor_dtype != case.dtype:
        return f"its adapters are in the working dtype, here they are {case.factor_dtype}"
    return None


def _peft(amp: bool) -> Contender:
    def build(case: Case, inputs: Inputs) -> Layer:
        layer = _peft_layer(case, inputs, torch.float32 if amp else case.dtype)
        return Layer(Autocast(layer.module, case.dtype), layer.trains) if amp else layer

    def unavailable(case: Case, device: torch.device) -> str | None:
        if importlib.util.find_spec("peft") is None:
            return "the peft package is not installed"
        return _dtype_mismatch(case, amp)

    return Contender(
        "peft-lora-amp" if amp else "peft-lora",
        "factored",
        build,
        unavailable,
        lambda case: replace(_judged(case, amp), terms="linear"),
        allowed=PEER_ALLOWED,
    )


def _released(amp: bool) -> Contender:
    def build(case: Case, inputs: Inputs) -> Layer:
        layer = _released_layer(case, inputs, torch.float32 if amp else case.dtype)
        return Layer(Autocast(layer.module, case.dtype), layer.trains) if amp else layer

    def unavailable(case: Case, device: torch.device) -> str | None:
        if case.terms != "full":
            return "it is written for terms='full'"
        return _dtype_mismatch(case, amp)

    return Contender(
        "released-amp" if amp else "released",
        "factored",
        build,
        unavailable,
        lambda case: _judged(case, amp),
        allowed=PEER_ALLOWED,
    )


PEERS = (_peft(amp=True), _peft(amp=False), _released(amp=True), _released(amp=False))
