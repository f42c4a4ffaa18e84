"""The others: PEFT's own LoRA layer and the released PERA formula, as their users run them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from pera_kernels.testing import Case, Inputs

from .contenders import Contender, Layer, frozen_linear

__all__ = ["PEERS", "PEER_ALLOWED", "Autocast", "ReleasedPera"]

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

    def __init__(
        self,
        base: nn.Linear,
        factors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        scale: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.base = base
        self.A, self.B, self.h = (nn.Parameter(factor.detach().clone()) for factor in factors)
        self.dropout = nn.Dropout(dropout) if dropout > 0.0 else nn.Identity()
        self.scale = scale
        r = self.A.shape[0]
        self.register_buffer("index", torch.triu_indices(r, r, device=base.weight.device))

    def _expand(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows ``(r, d)`` and their products ``(L, d)``."""
        outer = rows.unsqueeze(1) * rows.unsqueeze(0)
        return torch.cat([rows, outer[self.index[0], self.index[1]]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c = torch.cat([self.h.new_ones(self.A.shape[0]), self.h])
        phi_A, phi_B = self._expand(self.A), (self._expand(self.B.t()) * c.unsqueeze(1)).t()
        update = F.linear(F.linear(self.dropout(x), phi_A), phi_B)
        return self.base(x) + self.scale * update


@dataclass(frozen=True)
class Peer(Contender):
    """Somebody else's layer, in the working dtype or with float32 adapters under autocast."""

    autocast: bool = False

    def _adapter_dtype(self, case: Case) -> torch.dtype:
        return torch.float32 if self.autocast else case.dtype

    def _finished(self, layer: Layer, case: Case) -> Layer:
        return Layer(Autocast(layer.module, case.dtype), layer.trains) if self.autocast else layer

    def judged_as(self, case: Case) -> Case:
        # Peers draw other dropout masks: they are judged, and the same function shown, without.
        return replace(case, adapter_dtype=self._adapter_dtype(case), dropout_p=0.0)

    def unavailable(self, case: Case, device: torch.device) -> str | None:
        if self.autocast and case.dtype.itemsize >= 4:
            return "autocast is for half precision"
        if not self.autocast and case.factor_dtype != case.dtype:
            return f"its adapters are in the working dtype, here they are {case.factor_dtype}"
        return None


class PeftLora(Peer):
    """PEFT's LoRA layer of rank r."""

    def build(self, case: Case, inputs: Inputs) -> Layer:
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
        dtype = self._adapter_dtype(case)
        factors = (layer.lora_A["default"].to(dtype), layer.lora_B["default"].to(dtype))
        with torch.no_grad():
            for factor, value in zip(factors, (inputs.A, inputs.B), strict=True):
                factor.weight.copy_(value)
        trains = {"dA": factors[0].weight, "dB": factors[1].weight}
        return self._finished(Layer(layer, trains), case)

    def judged_as(self, case: Case) -> Case:
        return replace(super().judged_as(case), terms="linear")

    def unavailable(self, case: Case, device: torch.device) -> str | None:
        if importlib.util.find_spec("peft") is None:
            return "the peft package is not installed"
        return super().unavailable(case, device)


class Released(Peer):
    """The released formula."""

    def build(self, case: Case, inputs: Inputs) -> Layer:
        assert inputs.h is not None
        dtype = self._adapter_dtype(case)
        factors = inputs.A.to(dtype), inputs.B.to(dtype), inputs.h.to(dtype)
        base = frozen_linear(inputs.weight, inputs.bias)
        layer = ReleasedPera(base, factors, case.scale, case.dropout_p)
        return self._finished(Layer(layer, {"dA": layer.A, "dB": layer.B, "dh": layer.h}), case)

    def unavailable(self, case: Case, device: torch.device) -> str | None:
        if case.terms != "full":
            return "it is written for terms='full'"
        return super().unavailable(case, device)


PEERS: tuple[Contender, ...] = (
    PeftLora("peft-lora-amp", allowed=PEER_ALLOWED, autocast=True),
    PeftLora("peft-lora", allowed=PEER_ALLOWED),
    Released("released-amp", allowed=PEER_ALLOWED, autocast=True),
    Released("released", allowed=PEER_ALLOWED),
)
