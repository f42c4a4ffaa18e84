"""``PeraLinear``: a drop-in for ``nn.Linear`` with a frozen base and a trainable PERA adapter."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from . import checks, functional, reference
from .backends import resolve
from .checks import FLOATING
from .linear import features, is_plain_linear, unobserved
from .memory import Tie, refuse_tied
from .operands import Base, Factors, Options
from .sharded import (
    factors_of_part,
    here,
    is_dtensor,
    is_offloaded,
    is_partition,
    kept,
    like,
    put_back,
    whole,
    write,
)
from .switch import Switch
from .terms import Terms, check_rank, check_terms, coefficient_count

__all__ = ["PARTS", "AdapterOptions", "PeraLinear"]

# The parameters of an adapter.
PARTS = ("pera_A", "pera_B", "pera_h")


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
    keep: str = "u"

    def __post_init__(self) -> None:
        check_rank(self.r)
        check_terms(self.terms)
        checks.check_dropout(self.dropout, "dropout")
        checks.check_alpha(self.alpha)
        checks.check_init(self.init)
        checks.check_adapter_dtype(self.adapter_dtype)
        checks.check_backend(self.backend)
        checks.check_plan(self.plan)
        checks.check_keep(self.keep)
        if self.plan == "composed" and self.dropout > 0.0:
            raise ValueError(f"plan='composed' takes no dropout; got dropout={self.dropout}")


class Adapter(NamedTuple):
    """An adapter's ΔW: its factors, its scale and its terms."""

    factors: Factors
    scale: float
    terms: Terms


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
        adapter_dtype: dtype of A, B and h; None means float32, or float64 over a float64 weight.
            float64 goes with a float64 weight only.
        backend, plan, keep: see :func:`pera_kernels.pera_linear`.

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
        keep: str = "u",
    ) -> None:
        checks.check_features(in_features=in_features, out_features=out_features)
        options = AdapterOptions(r, alpha, terms, dropout, init, adapter_dtype, backend, plan, keep)
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
        keep: str = "u",
    ) -> PeraLinear:
        """Adapt an existing layer, whose parameters are frozen and shared, not copied.

        A plain ``nn.Linear`` gives its ``weight`` and ``bias``. Any other module with
        ``in_features`` and ``out_features`` (a quantized linear, an ``nn.Linear`` with hooks or
        parametrizations) becomes ``base_layer``: it is called, the update is added to its output,
        and no weight is touched.

        A layer cannot know who else holds its weight (an embedding that it is tied to), nor that
        its parent reads the weight and never calls it (``nn.MultiheadAttention``):
        :meth:`merge` changes it for all, and such a parent leaves the adapter out.
        :func:`pera_kernels.inject` knows and refuses.

        Raises:
            TypeError: ``layer`` is not a module with ``in_features`` and ``out_features``, or its
                parameters have no shape yet.
            ValueError: ``layer`` is adapted already, or an option does not fit.
        """
        options = AdapterOptions(r, alpha, terms, dropout, init, adapter_dtype, backend, plan, keep)
        return cls.adapting(layer, options)

    @classmethod
    def adapting(cls, layer: nn.Module, options: AdapterOptions) -> PeraLinear:
        """:meth:`from_linear` with options that are checked already."""
        if is_adapted(layer):
            raise ValueError(
                f"layer is a {type(layer).__name__} with an adapter already: use that, or unload it"
            )
        if not isinstance(layer, nn.Module):
            raise TypeError(f"layer must be an nn.Module; got {type(layer).__name__}")
        if features(layer) is None:
            raise TypeError(
                "layer must have an int in_features and out_features, as nn.Linear has; "
                f"{type(layer).__name__} has none"
            )
        if any(nn.parameter.is_lazy(p) for p in layer.parameters()):
            raise TypeError(
                f"layer must have parameters with a shape; those of this {type(layer).__name__} "
                "get theirs in its first call: call the model once before"
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

    # What is made in inference mode could never train.
    @torch.inference_mode(False)
    def _add_adapter(self, options: AdapterOptions) -> None:
        self.r = r = options.r
        self.alpha = float(r if options.alpha is None else options.alpha)
        self.terms: Terms = options.terms
        self.dropout = float(options.dropout)
        self.init = options.init
        self.backend = options.backend
        self.plan = options.plan
        self.keep = options.keep
        self.merged = False
        self.was_called = False
        self._switch = Switch()
        self._added: Adapter | None = None
        self.tied: tuple[Tie, ...] = ()
        self.shared_inputs: Sharing | None = None
        self.register_buffer("merged_base", None, persistent=False)
        device, own = self._adapter_place()
        dtype = options.adapter_dtype or torch.promote_types(own, torch.float32)
        if (dtype == torch.float64) != (own == torch.float64):
            raise TypeError(
                "adapter_dtype must be float64 for a float64 layer and for no other; "
                f"got {dtype} for a layer of {own}"
            )
        if options.backend != "auto":
            resolve(options.backend, device, (dtype,))
        count = coefficient_count(r, options.terms)
        self.pera_A = nn.Parameter(torch.empty(r, self.in_features, device=device, dtype=dtype))
        self.pera_B = nn.Parameter(torch.empty(self.out_features, r, device=device, dtype=dtype))
        # Without coefficients (linear terms, cross terms of rank 1) there is no parameter.
        h = nn.Parameter(torch.empty(count, device=device, dtype=dtype)) if count else None
        self.register_parameter("pera_h", h)
        self.reset_adapter()

    def _adapter_place(self) -> tuple[torch.device, torch.dtype]:
        """Device and dtype of the base."""
        return self.weight.device, self.weight.dtype

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        return self.alpha / self.r

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Initialise A as ``init`` says, B and h with zero: the adapter changes nothing yet."""
        with here(self, PARTS, written=True):
            A: torch.Tensor = self.pera_A
            if is_dtensor(A):
                # Processes of one seed have the A that a single process draws.
                A = torch.empty(A.shape, device=A.device, dtype=A.dtype)
            if self.init == "kaiming":
                nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            else:
                nn.init.normal_(A, std=1.0 / self.r)
            if A is not self.pera_A:
                write(self, "pera_A", A)
            nn.init.zeros_(self.pera_B)
            if self.pera_h is not None:
                nn.init.zeros_(self.pera_h)

    def reset_parameters(self) -> None:
        """Initialise the layer anew: weight and bias as ``nn.Linear`` does, and the adapter."""
        self.unmerge()
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]
        self.reset_adapter()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = input
        if not (torch.compiler.is_compiling() or self.was_called):
            self.was_called = True
        if self.merged:
            checks.check_frozen(self.weight, self.bias)
        if self._switch.is_off():
            return self._base_forward(x)
        if self.merged:
            return F.linear(x, self.weight, self.bias)
        if self.shared_inputs is not None:
            y = self.shared_inputs.take(self, x)
            if y is not None:
                return y
        return functional.apply(x, self._base(x), self._factors(), self._options())

    def _base_forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged and x.requires_grad and torch.is_grad_enabled():
            # One saved tensor more, and the first: a checkpoint that is not reentrant looks at
            # their shapes alone, and would take W0 for W or the other way round.
            x = x * x.new_ones(())
        return F.linear(x, self.base_weight(), self.bias)

    def _base(self, x: torch.Tensor) -> Base:
        return Base(self.weight, self.bias)

    def _factors(self) -> Factors:
        return Factors(self.pera_A, self.pera_B, self.pera_h)

    def _options(self) -> Options:
        dropout = self.dropout if self.training else 0.0
        return Options(self.terms, self.scale, dropout, self.plan, self.backend, self.keep)

    def shared_call(self, x: torch.Tensor) -> tuple[Base, Factors, Options] | None:
        """What :meth:`forward` computes, for layers that are evaluated together; None where this
        one has to compute alone: merged, disabled, or observed by hooks.
        """
        if self.merged or self._switch.is_off() or not unobserved(self):
            return None
        return self._base(x), self._factors(), self._options()

    def whole_factors(self) -> Factors:
        """A, B and h, also of a layer that is sharded or offloaded. Of a sharded one they are
        gathered: a call for every process that holds a part.
        """
        with here(self, PARTS):
            A, B, h = self._factors()
            return Factors(whole(A), whole(B), None if h is None else whole(h))

    def delta_weight(self) -> torch.Tensor:
        """ΔW ``(M, N)`` in the adapter's dtype, differentiable in A, B and h.

        Of a sharded layer the whole, from :meth:`whole_factors`; under ZeRO-3 without gradients.

        Raises:
            RuntimeError: it would have gradients under ZeRO-3.
        """
        if is_partition(self.pera_A) and torch.is_grad_enabled():
            raise RuntimeError(
                "delta_weight has no gradient under ZeRO-3: call it within torch.no_grad()"
            )
        return functional.delta_weight(
            *self.whole_factors(),
            scale=self.scale,
            terms=self.terms,
            backend=self.backend,
        )

    def _adapter(self) -> Adapter:
        """The adapter as it is now."""
        return Adapter(self.whole_factors(), self.scale, self.terms)

    @torch.no_grad()
    def _exact_delta(self, adapter: Adapter) -> torch.Tensor:
        """ΔW in float32 (float64 for a float64 weight), the precision of a merge; sharded as the
        weight is.
        """
        factors, scale, terms = adapter
        delta = functional.exact_delta_weight(
            factors_of_part(factors, self.weight),
            scale=scale,
            terms=terms,
            like=self.weight,
            backend=self.backend,
        )
        return like(self.weight, delta)

    @torch.no_grad()
    def base_weight(self) -> torch.Tensor:
        """W0: the weight without the adapter, also while merged."""
        if not self.merged:
            return self.weight
        if self.merged_base is not None:
            return like(self.weight, self.merged_base)
        assert self._added is not None
        delta = self._exact_delta(self._added)
        return (self.weight.to(delta.dtype) - delta).to(self.weight.dtype)

    @torch.no_grad()
    def merged_weight(self, safe: bool = True) -> torch.Tensor:
        """W0 + ΔW, formed in at least float32 and rounded once; the layer is not changed.

        Raises:
            TypeError: the weight is not a plain parameter.
            ValueError: A, B and h do not fit, or with ``safe``, the result is not finite.
        """
        self.check_plain_weight()
        with here(self, ["weight"]):
            return self._merged_weight(self._adapter(), safe)

    def _merged_weight(self, adapter: Adapter, safe: bool) -> torch.Tensor:
        self.check_fit(adapter.factors)
        delta = self._exact_delta(adapter)
        merged = delta.add_(self.base_weight()).to(self.weight.dtype)
        if safe and merged.device.type != "meta":
            count = int(whole((~torch.isfinite(merged)).sum()))
            if count:
                raise ValueError(
                    f"merging would make {count} of {merged.numel()} weights infinite or NaN; the "
                    "weight is unchanged (merge(safe=False) merges all the same)"
                )
        return merged

    def check_fit(self, factors: Factors) -> None:
        """Raise if A, B and h, which may have been replaced, do not fit each other or the layer."""
        A, B, h = factors
        checks.check_adapter(A, B, h, self.terms)
        has, wants = (A.shape[1], B.shape[0]), (self.in_features, self.out_features)
        if A.shape[0] != self.r:
            raise ValueError(f"A is of rank {A.shape[0]}, the layer has r={self.r!r}")
        if has != wants:
            raise ValueError(f"A and B are for (in, out) {has}, the layer has {wants}")

    def check_plain_weight(self) -> None:
        """Raise if ``weight`` is computed from other tensors: what is written to it is lost."""
        # A parametrization that was removed may leave a buffer.
        if self._parameters.get("weight", self._buffers.get("weight")) is None:
            raise TypeError(
                "the weight must be a tensor of the layer to be merged, unmerged or unloaded; "
                "this one is computed (by a parametrization, weight normalisation or pruning): "
                "make it permanent first, for example by "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )

    def check_unmergeable(self) -> None:
        """Raise if the layer is merged and cannot be unmerged."""
        if self.merged:
            self.check_plain_weight()

    @torch.no_grad()
    def merge(self, safe: bool = True, *, keep_base: bool = True) -> None:
        """Fold ΔW into ``weight``, so that the layer costs what its base costs. Does nothing if
        merged.

        The sum is formed in float32 and rounded once. While merged, the adapter gets no gradient,
        and what is written to it counts after :meth:`unmerge`.

        Args:
            safe: refuse a result that is not finite.
            keep_base: keep a copy of W0 for :meth:`unmerge`. Without it a copy of the adapter is
                kept, and unmerging subtracts its ΔW again, which is exact only up to the rounding
                of the weight's dtype.

        Raises:
            TypeError: the weight is computed from other tensors.
            ValueError: A, B and h do not fit, the merged weight would not be finite, or ``inject``
                found that other modules share it, and they still do. The weight is untouched.
        """
        if self.merged:
            return
        refuse_tied(self.weight, self.tied)
        self.check_plain_weight()
        with here(self, ["weight"], written=True):
            adapter = self._adapter()
            merged = self._merged_weight(adapter, safe)
            own = [kept(self.weight)] if keep_base else list(adapter.factors)
            # What accelerate offloads does not come to stay.
            place = "cpu" if is_offloaded(self) else merged.device
            # A copy that is made in inference mode could not be used outside of it.
            with torch.inference_mode(False):
                copies = [None if t is None else t.detach().to(place, copy=True) for t in own]
            self.weight.copy_(merged)
        if keep_base:
            (self.merged_base,) = copies
        else:
            self._added = adapter._replace(factors=Factors(*copies))  # type: ignore[arg-type]
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put W0 back: bit for bit from the kept copy, else by subtracting the ΔW that was added.
        Does nothing if unmerged.
        """
        if not self.merged:
            return
        self.check_plain_weight()
        with here(self, ["weight"], written=True):
            if self.merged_base is None:
                self.weight.copy_(self.base_weight())
            else:
                put_back(self.weight, self.merged_base)
        self.merged_base = self._added = None
        self.merged = False

    @contextlib.contextmanager
    def disabled(self) -> Iterator[PeraLinear]:
        """Within this context the layer computes its base alone, merged or not. May be nested.

        It holds for this thread, and for replicas that ``nn.DataParallel`` makes inside it; a copy
        is not disabled. A checkpoint that computes again finds the state of its forward.
        """
        with self._switch.off():
            yield self

    def _replicate_for_data_parallel(self) -> PeraLinear:
        """A replica is called in another thread: it takes the state of this one along."""
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._switch = Switch(always_off=self._switch.is_off())
        return replica  # type: ignore[no-any-return]

    def quadratic_share(self) -> float:
        """‖ΔW_quad‖_F / ‖BA‖_F: how much the products contribute beside plain LoRA; float64 inside.

        0 where there are no products or they vanish, inf where BA alone vanishes, NaN where a
        parameter is NaN.
        """
        return quadratic_share(*self.whole_factors(), self.terms)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """As usual, but ``weight`` is always W0: a checkpoint never holds the adapter twice."""
        self.check_unmergeable()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + "weight"] = self.base_weight()
            warnings.warn(
                "a state dict of a merged PeraLinear holds the base weight and the adapter apart: "
                "a plain model would load the base weight alone. To save merged weights, call "
                "pera_kernels.unload(model) first",
                stacklevel=2,
            )

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
            f"plan={self.plan!r}, keep={self.keep!r}, merged={self.merged}"
        )


class PeraOverModule(PeraLinear):
    """A :class:`PeraLinear` over a base module that is called as it is; made by ``from_linear``."""

    def _adopt(self, layer: nn.Module) -> None:
        self.in_features, self.out_features = features(layer)  # type: ignore[misc]
        self.base_layer = layer.requires_grad_(False)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The base layer's own weight, whatever its form."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]
        return getattr(self.base_layer, "bias", None)

    def _adapter_place(self) -> tuple[torch.device, torch.dtype]:
        tensors = [*self.base_layer.parameters(), *self.base_layer.buffers()]
        weight = getattr(self.base_layer, "weight", tensors[0] if tensors else None)
        if not isinstance(weight, torch.Tensor):
            return torch.device("cpu"), torch.float32
        return weight.device, weight.dtype if weight.dtype in FLOATING else torch.float32

    def reset_parameters(self) -> None:
        """Initialise the adapter anew; the base layer is its own."""
        self.reset_adapter()

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


def is_adapted(layer: nn.Module) -> bool:
    """Whether it is a layer with PERA adapters, of this package or of PEFT."""
    return isinstance(layer, PeraLinear) or hasattr(type(layer), "pera_view")


@torch.no_grad()
def quadratic_share(
    A: torch.Tensor, B: torch.Tensor, h: torch.Tensor | None, terms: Terms
) -> float:
    """:meth:`PeraLinear.quadratic_share` of these parameters."""
    checks.check_adapter(A, B, h, terms)
    h = None if h is None else h.double()
    phi_A, phi_B = reference.expanded_factors(A.double(), B.double(), h, terms)
    r = A.shape[0]
    linear = product_norm(phi_B[:, :r], phi_A[:r])
    quadratic = product_norm(phi_B[:, r:], phi_A[r:])
    if math.isnan(linear) or math.isnan(quadratic):
        return math.nan
    if quadratic == 0.0:
        return 0.0
    return quadratic / linear if linear > 0.0 else math.inf


def product_norm(B: torch.Tensor, A: torch.Tensor) -> float:
    """‖B A‖_F from the two Gram matrices, without forming the product; NaN where one is."""
    return float(((B.mT @ B) * (A @ A.mT)).sum().clamp(min=0.0).sqrt())
