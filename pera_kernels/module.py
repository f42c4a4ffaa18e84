"""``PeraLinear``: a drop-in for ``nn.Linear`` with a frozen base and a trainable PERA adapter."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from . import checks, functional, reference
from .backends import resolve
from .checks import FLOATING
from .operands import Base, Factors, Options
from .terms import Terms, check_rank, check_terms, coefficient_count

__all__ = ["AdapterOptions", "PeraLinear"]


@dataclass(frozen=True)
class AdapterOptions:
    """How an adapter is made: the options of :class:`PeraLinear`, checked."""

    r: int = 16
    alpha: float | None = None
    terms: Terms = "full"
    dropout: float = 0.0
    init: str = "kaiming"
    adapter_dtype: torch.dtype | None = None
    backend: str = "auto"
    plan: str = "auto"

    def __post_init__(self) -> None:
        check_rank(self.r)
        check_terms(self.terms)
        checks.check_dropout(self.dropout, "dropout")
        checks.check_alpha(self.alpha)
        checks.check_init(self.init)
        checks.check_adapter_dtype(self.adapter_dtype)
        checks.check_backend(self.backend)
        checks.check_plan(self.plan)
        if self.plan == "composed" and self.dropout > 0.0:
            raise ValueError(f"plan='composed' takes no dropout; got dropout={self.dropout}")


class Sharing(Protocol):
    """Layers that share their input with others: see ``pera_kernels.adapters.shared_inputs``."""

    def take(self, layer: Any, x: torch.Tensor) -> torch.Tensor | None:
        """The output of ``layer``, computed together with others; None to compute it alone."""


class PeraLinear(nn.Module):
    """y = x W0ᵀ + bias + s · (x̂ φ(A)ᵀ ∘ c) φ(B)ᵀ with s = alpha / r (Eq. 4, 9): ``(..., N)`` ->
    ``(..., M)``.

    ``weight`` ``(M, N)`` and ``bias`` ``(M,)`` are frozen; exactly ``pera_A`` ``(r, N)``,
    ``pera_B`` ``(M, r)`` and ``pera_h`` ``(L,)`` train (``pera_h`` is None for ``terms="linear"``).
    At initialisation B and h are zero and the output is the base layer's. ``state_dict`` has the
    keys of ``nn.Linear`` and the three more.

    Args:
        in_features: N. out_features: M. bias, device, dtype: as in ``nn.Linear``.
        r: rank, any integer >= 1.
        alpha: numerator of the scale; None means ``r``, as in the paper (s = 1).
        terms: ``"full"``, ``"square"``, ``"cross"`` or ``"linear"`` (LoRA).
        dropout: probability in [0, 1) on the adapter's input, in training mode.
        init: of A: ``"kaiming"`` (uniform, a = √5) or ``"gaussian"`` (standard deviation 1 / r).
        adapter_dtype: dtype of A, B and h; None means that of the weight.
        backend, plan: see :func:`pera_kernels.pera_linear`.

    Raises:
        TypeError, ValueError: an option that does not fit, named, before anything is built.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    pera_h: nn.Parameter | None
    merged_base: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 16,
        *,
        alpha: float | None = None,
        terms: Terms = "full",
        dropout: float = 0.0,
        bias: bool = True,
        init: str = "kaiming",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
        plan: str = "auto",
    ) -> None:
        checks.check_features(in_features=in_features, out_features=out_features)
        options = AdapterOptions(r, alpha, terms, dropout, init, adapter_dtype, backend, plan)
        super().__init__()
        self._adopt(nn.Linear(in_features, out_features, bias, device=device, dtype=dtype))
        self._add_adapter(options)

    @classmethod
    def from_linear(
        cls,
        layer: nn.Module,
        r: int = 16,
        *,
        alpha: float | None = None,
        terms: Terms = "full",
        dropout: float = 0.0,
        init: str = "kaiming",
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
        plan: str = "auto",
    ) -> PeraLinear:
        """Adapt an existing layer, whose parameters are frozen and shared, not copied.

        A plain ``nn.Linear`` gives its ``weight`` and ``bias``. Any other module with
        ``in_features`` and ``out_features`` (a quantized linear, an ``nn.Linear`` with hooks or
        parametrizations) becomes ``base_layer``: it is called, the update is added to its output,
        and no weight is touched.

        Raises:
            TypeError: ``layer`` is not a module with ``in_features`` and ``out_features``.
            ValueError: ``layer`` is adapted already, or an option does not fit.
        """
        options = AdapterOptions(r, alpha, terms, dropout, init, adapter_dtype, backend, plan)
        return cls.adapting(layer, options)

    @classmethod
    def adapting(cls, layer: nn.Module, options: AdapterOptions) -> PeraLinear:
        """:meth:`from_linear` with options that are checked already."""
        if isinstance(layer, PeraLinear):
            raise ValueError("layer is a PeraLinear already; unmerge and use it, or adapt its base")
        if not isinstance(layer, nn.Module):
            raise TypeError(f"layer must be an nn.Module; got {type(layer).__name__}")
        for name in ("in_features", "out_features"):
            if not isinstance(getattr(layer, name, None), int):
                raise TypeError(
                    f"layer must have an int {name}, as nn.Linear has; "
                    f"{type(layer).__name__} has none"
                )
        dense = is_plain_linear(layer)
        if options.plan == "composed" and not dense:
            raise ValueError(
                "plan='composed' needs a plain nn.Linear as base; "
                f"got {type(layer).__name__}, which is called as it is"
            )
        kind = cls if dense else PeraOverModule
        self = kind.__new__(kind)
        nn.Module.__init__(self)
        self._adopt(layer)
        self._add_adapter(options)
        return self.train(layer.training)

    def _adopt(self, layer: nn.Module) -> None:
        """Take the features and the frozen parameters of a plain linear layer."""
        self.in_features = int(layer.in_features)  # type: ignore[arg-type]
        self.out_features = int(layer.out_features)  # type: ignore[arg-type]
        self.register_parameter("weight", layer.weight.requires_grad_(False))  # type: ignore[arg-type, union-attr]
        bias = layer.bias
        self.register_parameter("bias", None if bias is None else bias.requires_grad_(False))  # type: ignore[arg-type, operator, union-attr]

    def _add_adapter(self, options: AdapterOptions) -> None:
        self.r = r = options.r
        self.alpha = float(r if options.alpha is None else options.alpha)
        self.terms: Terms = options.terms
        self.dropout = float(options.dropout)
        self.init = options.init
        self.backend = options.backend
        self.plan = options.plan
        self.merged = False
        self._disabled_depth = 0
        self.shared_inputs: Sharing | None = None
        self.register_buffer("merged_base", None, persistent=False)
        device, dtype = self._adapter_place(options.adapter_dtype)
        if options.backend != "auto" and device.type != "meta":
            resolve(options.backend, device, (dtype,))
        count = coefficient_count(r, options.terms)
        self.pera_A = nn.Parameter(torch.empty(r, self.in_features, device=device, dtype=dtype))
        self.pera_B = nn.Parameter(torch.empty(self.out_features, r, device=device, dtype=dtype))
        self.register_parameter(
            "pera_h",
            None
            if self.terms == "linear"
            else nn.Parameter(torch.empty(count, device=device, dtype=dtype)),
        )
        self.reset_adapter()

    def _adapter_place(self, dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
        return self.weight.device, dtype or self.weight.dtype

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        return self.alpha / self.r

    def reset_adapter(self) -> None:
        """Initialise A as ``init`` says, B and h with zero: the adapter changes nothing yet."""
        if self.init == "kaiming":
            nn.init.kaiming_uniform_(self.pera_A, a=math.sqrt(5))
        else:
            nn.init.normal_(self.pera_A, std=1.0 / self.r)
        nn.init.zeros_(self.pera_B)
        if self.pera_h is not None:
            nn.init.zeros_(self.pera_h)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._disabled_depth > 0:
            return self._base_forward(x)
        if self.merged:
            return F.linear(x, self.weight, self.bias)
        if self.shared_inputs is not None:
            y = self.shared_inputs.take(self, x)
            if y is not None:
                return y
        return functional.apply(x, self._base(x), self._factors(), self._options())

    def _base_forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.base_weight(), self.bias)

    def _base(self, x: torch.Tensor) -> Base:
        return Base(self.weight, self.bias)

    def _factors(self) -> Factors:
        return Factors(self.pera_A, self.pera_B, self.pera_h)

    def _options(self) -> Options:
        dropout = self.dropout if self.training else 0.0
        return Options(self.terms, self.scale, dropout, self.plan, self.backend)

    def shared_call(self, x: torch.Tensor) -> tuple[Base, Factors, Options] | None:
        """What :meth:`forward` computes, for layers that are evaluated together; None where this
        one has to compute alone: merged, disabled, or observed by hooks.
        """
        if self.merged or self._disabled_depth or not unobserved(self):
            return None
        return self._base(x), self._factors(), self._options()

    def delta_weight(self) -> torch.Tensor:
        """ΔW ``(M, N)`` in the adapter's dtype, differentiable in A, B and h."""
        return functional.delta_weight(
            *self._factors(),
            scale=self.scale,
            terms=self.terms,
            backend=self.backend,
        )

    @torch.no_grad()
    def _exact_delta(self) -> torch.Tensor:
        """ΔW in float32 (float64 for a float64 weight), the precision of a merge."""
        work = torch.promote_types(self.weight.dtype, torch.float32)
        h = None if self.pera_h is None else self.pera_h.to(work)
        return functional.delta_weight(
            self.pera_A.to(work),
            self.pera_B.to(work),
            h,
            scale=self.scale,
            terms=self.terms,
            backend="auto" if work == torch.float64 else self.backend,
        )

    @torch.no_grad()
    def base_weight(self) -> torch.Tensor:
        """W0: the weight without the adapter, also while merged."""
        if not self.merged:
            return self.weight
        if self.merged_base is not None:
            return self.merged_base
        delta = self._exact_delta()
        return (self.weight.to(delta.dtype) - delta).to(self.weight.dtype)

    @torch.no_grad()
    def merged_weight(self, safe: bool = True) -> torch.Tensor:
        """W0 + ΔW, formed in at least float32 and rounded once; the layer is not changed.

        Raises:
            ValueError: with ``safe``, the result is not finite.
        """
        delta = self._exact_delta()
        merged = delta.add_(self.base_weight()).to(self.weight.dtype)
        if safe and not torch.isfinite(merged).all():
            count = int((~torch.isfinite(merged)).sum())
            raise ValueError(
                f"merging would make {count} of {merged.numel()} weights infinite or NaN; the "
                "weight is unchanged (merge(safe=False) merges all the same)"
            )
        return merged

    @torch.no_grad()
    def merge(self, safe: bool = True, *, keep_base: bool = True) -> None:
        """Fold ΔW into ``weight``, so that the layer costs what its base costs. Does nothing if
        merged.

        The sum is formed in float32 and rounded once. While merged, the adapter gets no gradient.

        Args:
            safe: refuse a result that is not finite.
            keep_base: keep a copy of W0 for :meth:`unmerge`. Without it that memory is saved and
                unmerging subtracts ΔW again, which is exact only up to the rounding of the weight's
                dtype.

        Raises:
            ValueError: the merged weight would not be finite; the weight is untouched.
        """
        if self.merged:
            return
        merged = self.merged_weight(safe)
        base = self.weight.detach().clone() if keep_base else None
        self.weight.copy_(merged)
        self.merged_base, self.merged = base, True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put W0 back: bit for bit from the kept copy, else by subtracting ΔW. Does nothing if
        unmerged.
        """
        if not self.merged:
            return
        self.weight.copy_(self.base_weight())
        self.merged_base = None
        self.merged = False

    @contextlib.contextmanager
    def disabled(self) -> Iterator[PeraLinear]:
        """Within this context the layer computes its base alone, merged or not. May be nested."""
        self._disabled_depth += 1
        try:
            yield self
        finally:
            self._disabled_depth -= 1

    @torch.no_grad()
    def quadratic_share(self) -> float:
        """‖ΔW_quad‖_F / ‖BA‖_F: how much the products contribute beside plain LoRA; float64 inside.

        0 where there are no products or they vanish, inf where BA alone vanishes.
        """
        return quadratic_share(self.pera_A, self.pera_B, self.pera_h, self.terms)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """As usual, but ``weight`` is always W0: a checkpoint never holds the adapter twice."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged and prefix + "weight" in destination:
            destination[prefix + "weight"] = self.base_weight()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """As usual, into the unmerged layer: what is loaded is W0 and the adapter apart."""
        self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, r={self.r}, alpha={self.alpha:g}, "
            f"terms={self.terms!r}, dropout={self.dropout:g}, backend={self.backend!r}, "
            f"plan={self.plan!r}, "
            f"merged={self.merged}"
        )


class PeraOverModule(PeraLinear):
    """A :class:`PeraLinear` over a base module that is called as it is; made by ``from_linear``."""

    def _adopt(self, layer: nn.Module) -> None:
        self.in_features = int(layer.in_features)  # type: ignore[arg-type]
        self.out_features = int(layer.out_features)  # type: ignore[arg-type]
        self.base_layer = layer.requires_grad_(False)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The base layer's own weight, whatever its form."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]
        return getattr(self.base_layer, "bias", None)

    def _adapter_place(self, dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
        weight = getattr(self.base_layer, "weight", None)
        if not isinstance(weight, torch.Tensor):
            return torch.empty(0).device, dtype or torch.get_default_dtype()
        own = weight.dtype if weight.dtype in FLOATING else torch.float32
        return weight.device, dtype or own

    def _base_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x)

    def _base(self, x: torch.Tensor) -> Base:
        return Base(None, None, self.base_layer(x))

    def shared_call(self, x: torch.Tensor) -> None:
        """None: the base layer is called as it is, so this one computes alone."""

    def merge(self, safe: bool = True, *, keep_base: bool = True) -> None:
        """Refused: there is no plain dense weight to merge into."""
        raise TypeError(
            "merge needs a plain nn.Linear as base; "
            f"{type(self.base_layer).__name__} is called as it is"
        )


def is_plain_linear(layer: nn.Module) -> bool:
    """An ``nn.Linear`` whose forward is F.linear on floating-point parameters and nothing else."""
    if type(layer) is not nn.Linear or layer.weight.dtype not in FLOATING:
        return False
    # A subclass of Tensor may be quantized, or a shard.
    if type(layer.weight) is not nn.Parameter:
        return False
    return unobserved(layer)


def unobserved(layer: nn.Module) -> bool:
    """Whether calling the layer is its class's forward and nothing else: no hooks, no override."""
    hooks = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
    )
    return "forward" not in layer.__dict__ and not any(hooks)


def quadratic_share(
    A: torch.Tensor, B: torch.Tensor, h: torch.Tensor | None, terms: Terms
) -> float:
    """:meth:`PeraLinear.quadratic_share` of these parameters."""
    h = None if h is None else h.double()
    phi_A, phi_B = reference.expanded_factors(A.double(), B.double(), h, terms)
    r = A.shape[0]
    linear = _product_norm(phi_B[:, :r], phi_A[:r])
    quadratic = _product_norm(phi_B[:, r:], phi_A[r:])
    if quadratic == 0.0:
        return 0.0
    return quadratic / linear if linear > 0.0 else math.inf


def _product_norm(B: torch.Tensor, A: torch.Tensor) -> float:
    """‖B A‖_F from the two Gram matrices, without forming the product."""
    return math.sqrt(max(0.0, float(((B.mT @ B) * (A @ A.mT)).sum())))
