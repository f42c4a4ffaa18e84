"""The public functions: check the arguments, dispatch to a backend."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch.utils.weak import WeakIdKeyDictionary

from . import plans, reference
from .autograd import (
    DeltaWeight,
    PeraGroupFunction,
    PeraLinearFunction,
    Settings,
    in_dtype_of,
)
from .backends import check_backend, check_plan, implementation, resolve
from .dropout import draw_seed
from .terms import Terms, check_terms, coefficient_count

__all__ = ["delta_weight", "expand_factors", "pera_linear"]

# weight, bias, A, B, h.
Layer = tuple[
    torch.Tensor, "torch.Tensor | None", torch.Tensor, torch.Tensor, "torch.Tensor | None"
]
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _check_tensor(name: str, value: object, ndim: int | None) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16; got {value.dtype}")
    if ndim is not None and value.dim() != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions; got shape {tuple(value.shape)}")


def check_scale(scale: object, name: str = "scale") -> None:
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(
            f"{name} must be a real number; got {scale!r} of type {type(scale).__name__}"
        )
    # Written as a comparison: torch.compile traces it for a symbolic scale.
    if not abs(float(scale)) < math.inf:
        raise ValueError(f"{name} must be finite; got {scale!r}")


def check_dropout(p: object, name: str = "dropout_p") -> None:
    if isinstance(p, bool) or not isinstance(p, Real):
        raise TypeError(f"{name} must be a number in [0, 1); got {p!r} of type {type(p).__name__}")
    if not 0.0 <= float(p) < 1.0:
        raise ValueError(f"{name} must be in [0, 1); got {p!r}")


def check_adapter(A: object, B: object, h: object, terms: object) -> None:
    """A ``(R, N)``, B ``(M, R)`` of one dtype and device, h ``(L,)`` as ``terms`` asks.

    Raises:
        TypeError: not a tensor, not floating point, or dtypes that do not go together.
        ValueError: unknown terms, a wrong shape or device.
    """
    if not isinstance(terms, str):
        raise TypeError(f"terms must be a string; got {terms!r} of type {type(terms).__name__}")
    check_terms(terms)
    _check_tensor("A", A, 2)
    _check_tensor("B", B, 2)
    assert isinstance(A, torch.Tensor) and isinstance(B, torch.Tensor)
    R = A.shape[0]
    if R < 1:
        raise ValueError(f"A must be (r, in_features) with r >= 1; got shape {tuple(A.shape)}")
    if B.shape[1] != R:
        raise ValueError(
            f"B must be (out_features, {R}) for A of rank {R}; got shape {tuple(B.shape)}"
        )
    if B.dtype != A.dtype:
        raise TypeError(f"B must have the dtype of A, {A.dtype}; got {B.dtype}")
    if B.device != A.device:
        raise ValueError(f"B must be on the device of A, {A.device}; got {B.device}")
    length = coefficient_count(R, terms)  # type: ignore[arg-type]
    if terms == "linear":
        if h is not None:
            raise ValueError("h must be None for terms='linear', which has no coefficients")
        return
    if h is None:
        raise ValueError(f"h must be a tensor of shape ({length},) for terms={terms!r}; got None")
    _check_tensor("h", h, 1)
    assert isinstance(h, torch.Tensor)
    if h.shape[0] != length:
        raise ValueError(
            f"h must have shape ({length},) for terms={terms!r} at rank {R}; got {tuple(h.shape)}"
        )
    if h.dtype == torch.float64 != A.dtype:
        raise TypeError(
            f"h must be float64 only with float64 factors; got {h.dtype} with {A.dtype}"
        )
    if h.device != A.device:
        raise ValueError(f"h must be on the device of A, {A.device}; got {h.device}")


def _check_input(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    base_out: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
) -> None:
    _check_tensor("x", x, None)
    M, N = B.shape[0], A.shape[1]
    if x.dim() < 1 or x.shape[-1] != N:
        raise ValueError(
            f"x must be (..., {N}) for A of shape {tuple(A.shape)}; got {tuple(x.shape)}"
        )
    if weight is not None:
        _check_tensor("weight", weight, 2)
        if tuple(weight.shape) != (M, N):
            raise ValueError(
                f"weight must be ({M}, {N}) for B {tuple(B.shape)} and A {tuple(A.shape)}; "
                f"got {tuple(weight.shape)}"
            )
    if bias is not None:
        _check_tensor("bias", bias, 1)
        if bias.shape[0] != M:
            raise ValueError(f"bias must have shape ({M},); got {tuple(bias.shape)}")
    if base_out is not None and base_out.shape != (*x.shape[:-1], M):
        raise ValueError(
            f"the base layer must return {(*x.shape[:-1], M)} for x of shape {tuple(x.shape)}; "
            f"got {tuple(base_out.shape)}"
        )
    for name, tensor in (("weight", weight), ("bias", bias), ("base_out", base_out), ("A", A)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}; got {tensor.device}")
    if (A.dtype == torch.float64) != (x.dtype == torch.float64):
        raise TypeError(f"A must be float64 exactly where x is; got A {A.dtype} and x {x.dtype}")
    if torch.is_grad_enabled():
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.requires_grad:
                raise ValueError(
                    f"{name} must not require grad: PERA trains A, B and h on a frozen base; "
                    f"call {name}.requires_grad_(False)"
                )


def _check_same_dtype(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    base_out: torch.Tensor | None,
) -> None:
    for name, tensor in (("weight", weight), ("bias", bias), ("base layer's output", base_out)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}; got {tensor.dtype}")


def _autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype autocast asks for; float64 is left alone, as PyTorch's own autocast does."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return None


# Coefficients on a GPU: their version when they were last looked at, and whether they were zero.
_seen_zero: WeakIdKeyDictionary = WeakIdKeyDictionary()


def frozen_at_zero(h: torch.Tensor) -> bool:
    """Whether h can be left out with all its pairs: it is not trained and every entry is zero.

    On a GPU looking would wait for the device, so there a parameter is looked at when its version
    or its memory has changed (a write through ``.data`` changes neither), and never while a graph
    is captured; other tensors are not looked at.
    """
    if h.requires_grad or torch.compiler.is_compiling() or not h.numel():
        return False
    if h.device.type == "cpu":
        return type(h) in (torch.Tensor, torch.nn.Parameter) and not bool(h.any())
    if not h.is_cuda or not isinstance(h, torch.nn.Parameter):
        return False
    state = (h._version, h.data_ptr())
    seen = _seen_zero.get(h)
    if torch.cuda.is_current_stream_capturing():
        return False
    if seen is None or seen[0] != state:
        seen = _seen_zero[h] = (state, not bool(h.any()))
    return seen[1]


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Inside, operations keep the dtypes they are given."""
    # Entering torch.autocast costs several microseconds: not where there is nothing to turn off.
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def pera_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    h: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    terms: Terms = "full",
    dropout_p: float = 0.0,
    backend: str = "auto",
    plan: str = "auto",
) -> torch.Tensor:
    """A frozen linear layer with PERA (Eq. 4, 9): y = x W0ᵀ + bias + s · (x̂ φ(A)ᵀ ∘ c) φ(B)ᵀ.

    Args:
        x: ``(..., N)``, any strides.
        weight: frozen W0 ``(M, N)`` in the dtype of ``x``.
        A: ``(r, N)``; B: ``(M, r)``, of one dtype: that of ``x``, or float32 under half-precision
            ``x``.
        h: the coefficients ``(L,)`` in the order of ``torch.triu_indices`` (offset 1 for
            ``"cross"``); None for ``"linear"``.
        bias: frozen ``(M,)`` in the dtype of ``x``, added once.
        scale: s, usually ``alpha / r``.
        terms: ``"full"`` (Eq. 9), ``"square"`` (Eq. 10), ``"cross"`` (Eq. 11) or ``"linear"``
            (LoRA, Eq. 8).
        dropout_p: dropout on ``x`` in the adapter's branch only, in [0, 1). Its mask is a function
            of a seed drawn from the default generator; it is never stored.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.
        plan: ``"factored"`` adds the update to the base output; ``"composed"`` builds W0 + ΔW
            first, which rounds it to the weight's dtype: in half precision it loses entries of ΔW
            below half an ulp of W0. It takes no dropout. ``"auto"`` composes in float32 and float64
            on a CPU where there are so many tokens that it is faster (``pera_kernels/plans.py``).

    Returns:
        ``(..., M)`` in the dtype of ``x`` (of autocast, where that is on). Differentiable once in
        ``x``, ``A``, ``B`` and ``h``; gradients have the dtype of what they belong to.

    Raises:
        TypeError, ValueError: an argument that does not fit, named with what came and what is
            accepted, before anything is computed.
    """
    check_adapter(A, B, h, terms)
    return linear_or_update(x, weight, bias, None, A, B, h, scale, terms, dropout_p, backend, plan)


def linear_or_update(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    base_out: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    h: torch.Tensor | None,
    scale: float,
    terms: Terms,
    dropout_p: float,
    backend: str,
    plan: str,
) -> torch.Tensor:
    """:func:`pera_linear` on a dense ``weight`` or on ``base_out``, any base layer's output."""
    check_scale(scale)
    check_dropout(dropout_p)
    check_backend(backend)
    check_plan(plan)
    _check_input(x, weight, bias, base_out, A, B)
    autocast = _autocast_dtype(x)
    if autocast is not None:
        x = x.to(autocast)
        base_out = None if base_out is None else base_out.to(autocast)
    else:
        _check_same_dtype(x, weight, bias, base_out)
    composed = plan == "composed"
    if composed and dropout_p > 0.0:
        raise ValueError(f"plan='composed' takes no dropout; got dropout_p={dropout_p}")
    if composed and weight is None:
        raise ValueError(
            "plan='composed' needs a plain dense base weight; this base layer has none"
        )
    dtypes = (x.dtype, A.dtype) if h is None else (x.dtype, A.dtype, h.dtype)
    name = resolve(backend, x.device, dtypes)
    if h is not None and frozen_at_zero(h):
        h, terms = None, "linear"
    if plan == "auto" and name == "torch" and weight is not None and dropout_p == 0.0:
        composed = _composes(x, weight, A, B, h)
    seed = draw_seed(x.device) if dropout_p > 0.0 else None
    with _without_autocast(x.device.type):
        if name == "torch" and not _tracked(x, base_out, A, B, h):
            y, _ = implementation(name).linear_forward(
                x,
                in_dtype_of(x, weight),
                in_dtype_of(x, bias),
                base_out,
                A,
                B,
                h,
                seed,
                float(scale),
                terms,
                float(dropout_p),
                composed,
                keep_u=False,
            )
            return y
        if name != "reference":
            settings = Settings(float(scale), terms, name, float(dropout_p), composed)
            return PeraLinearFunction.apply(x, weight, bias, base_out, A, B, h, seed, settings)
        if composed:
            assert weight is not None
            delta = reference.delta_weight(
                A.to(x.dtype), B.to(x.dtype), h, scale=scale, terms=terms
            )
            return torch.nn.functional.linear(
                x, (weight + delta).to(x.dtype), None if bias is None else bias.to(x.dtype)
            )
        update = reference.update(
            x, A, B, h, scale=scale, terms=terms, dropout_p=dropout_p, seed=seed
        )
        if base_out is None:
            assert weight is not None
            bias = None if bias is None else bias.to(x.dtype)
            base_out = torch.nn.functional.linear(x, weight.to(x.dtype), bias)
        return base_out + update


def _tracked(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will ask for a backward."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _composes(
    x: torch.Tensor,
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    h: torch.Tensor | None,
) -> bool:
    """What ``plan="auto"`` means. Compiled graphs stay factored: T is symbolic there."""
    if torch.compiler.is_compiling() or not x.dtype == weight.dtype == A.dtype:
        return False
    lanes = A.shape[0] + (0 if h is None else h.shape[0])
    trains = _tracked(A, B, h)
    (M, N), T = weight.shape, x.shape[:-1].numel()
    return plans.composes(T, N, M, lanes, x.dtype, x.device, trains)


def linear_group(
    x: torch.Tensor,
    layers: Sequence[Layer],
    scale: float,
    terms: Terms,
    dropout_p: float,
    backend: str,
) -> tuple[torch.Tensor, ...]:
    """:func:`pera_linear` of several layers of one rank on the same x, read once; a tuple of y.

    They share the dropout mask. The backend must not be the reference, which knows no groups.
    """
    for weight, bias, A, B, _ in layers:
        _check_input(x, weight, bias, None, A, B)
    autocast = _autocast_dtype(x)
    if autocast is not None:
        x = x.to(autocast)
    else:
        for weight, bias, _, _, _ in layers:
            _check_same_dtype(x, weight, bias, None)
    tensors = [t for layer in layers for t in layer[2:] if t is not None]
    name = resolve(backend, x.device, (x.dtype, *{t.dtype for t in tensors}))
    hs = [h for *_, h in layers if h is not None]
    if hs and all(frozen_at_zero(h) for h in hs):
        layers, terms = [(*layer[:4], None) for layer in layers], "linear"
    seed = draw_seed(x.device) if dropout_p > 0.0 else None
    settings = Settings(float(scale), terms, name, float(dropout_p))
    with _without_autocast(x.device.type):
        if name == "torch" and not _tracked(x, *tensors):
            weights, biases, As, Bs, members = zip(*layers, strict=True)
            *ys, _ = implementation(name).group_forward(
                x,
                [in_dtype_of(x, weight) for weight in weights],
                [in_dtype_of(x, bias) for bias in biases],
                As,
                Bs,
                members,
                seed,
                float(scale),
                terms,
                float(dropout_p),
                keep_u=False,
            )
            return tuple(ys)
        return PeraGroupFunction.apply(x, seed, settings, *(t for layer in layers for t in layer))


def delta_weight(
    A: torch.Tensor,
    B: torch.Tensor,
    h: torch.Tensor | None,
    *,
    scale: float = 1.0,
    terms: Terms = "full",
    backend: str = "auto",
) -> torch.Tensor:
    """ΔW = s φ(B) diag(1, h) φ(A) ``(M, N)`` (Eq. 4, 9), differentiable once in A, B and h.

    A is ``(r, N)``, B ``(M, r)``, h ``(L,)`` or None; the result has the dtype of ``A``. Raises
    TypeError or ValueError for arguments that do not fit.
    """
    check_adapter(A, B, h, terms)
    check_scale(scale)
    check_backend(backend)
    dtypes = (A.dtype,) if h is None else (A.dtype, h.dtype)
    name = resolve(backend, A.device, dtypes)
    with _without_autocast(A.device.type):
        if name == "reference":
            return reference.delta_weight(A, B, h, scale=scale, terms=terms)
        return DeltaWeight.apply(A, B, h, Settings(float(scale), terms, name))


def expand_factors(
    A: torch.Tensor,
    B: torch.Tensor,
    h: torch.Tensor | None,
    *,
    scale: float = 1.0,
    terms: Terms = "full",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same adapter as a plain LoRA of rank K: ``lora_A (K, N)``, ``lora_B (M, K)``.

    ``lora_B @ lora_A`` is ΔW: s and the coefficients are folded into ``lora_B``. Products are
    formed in float32 (float64 for float64 factors) and rounded once to the dtype of ``A``. Plain
    PyTorch, differentiable.
    """
    check_adapter(A, B, h, terms)
    check_scale(scale)
    phi_A, phi_B = reference.expanded_factors(A, B, h, terms)
    return phi_A.to(A.dtype), (scale * phi_B).to(B.dtype)
