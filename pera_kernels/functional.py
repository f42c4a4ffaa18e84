"""The public functions: check the arguments, choose how to compute, and dispatch to a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.autograd import forward_ad

from . import checks, reference, torch_backend
from .autograd import (
    DeltaWeight,
    Onto,
    PeraFunction,
    SharedInput,
    autocast_dtype,
    rows_of,
    without_autocast,
)
from .backends import implementation, resolve
from .dropout import draw_seed
from .operands import Base, Factors, Options, tokens
from .terms import Terms

__all__ = ["delta_weight", "expand_factors", "pera_linear"]


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
    keep: str = "u",
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
            on a CPU where there are so many tokens that it is faster; it depends on shapes, dtypes
            and device alone.
        keep: what stays in memory for the gradients of ``B`` and ``h``: ``"u"`` is x̂ φ(A)ᵀ
            ``(T, K)``; ``"x"`` is ``x``, which that of ``A`` needs anyway, and the backward makes u
            again by one more projection, with the same bits. The composed plan always keeps ``x``;
            the reference leaves it to autograd.

    Returns:
        ``(..., M)`` in the dtype of ``x`` (of autocast, where that is on). Differentiable once in
        ``x``, ``A``, ``B`` and ``h``; gradients have the dtype of what they belong to.

    Raises:
        TypeError, ValueError: an argument that does not fit, named with what came and what is
            accepted, before anything is computed.
    """
    options = Options(terms, scale, dropout_p, plan, backend, keep)
    return apply(x, Base(weight, bias), Factors(A, B, h), options)


def apply(
    x: torch.Tensor,
    base: Base,
    adapter: Factors,
    options: Options,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`pera_linear` on a dense weight or on the output of any base layer.

    ``seed`` is that of the dropout; None means a new one.
    """
    checks.check_adapter(*adapter, options.terms)
    checks.check_options(options)
    checks.check_input(x, base, adapter)
    x, base = _as_autocast_says(x, base)
    options = _chosen(options, x, base, adapter)
    if seed is None and options.dropout_p > 0.0:
        seed = draw_seed(x.device)
    with without_autocast(x.device.type):
        if options.backend == "reference":
            y = _reference(tokens(x), rows_of(base, x.dtype), adapter, seed, options)
        else:
            y = PeraFunction.apply(x, *base, *adapter, seed, options)
    return _shaped(y, x)


def apply_together(
    x: torch.Tensor, bases: Sequence[Base], adapters: Sequence[Factors], options: Options
) -> list[Callable[[], torch.Tensor]] | None:
    """:func:`apply`, without dropout, for dense layers of one rank on one x: kernels read it once.

    What is returned for each layer gives its output when it is called, with an autograd node of its
    own: gradients flow as they do for layers apart. None where a layer alone would compose, or is
    transformed by ``torch.func``.
    """
    checks.check_options(options)
    for base, adapter in zip(bases, adapters, strict=True):
        checks.check_adapter(*adapter, options.terms)
        checks.check_input(x, base, adapter)
    x, _ = _as_autocast_says(x, bases[0])
    pairs = list(zip(bases, adapters, strict=True))
    options, *others = {_chosen(options, x, base, adapter) for base, adapter in pairs}
    # Transformed tensors go through the reference, which has nothing to share.
    if others or options.plan == "composed" or options.backend == "reference":
        return None
    with torch.no_grad(), without_autocast(x.device.type):
        rows = [rows_of(base, x.dtype) for base in bases]
        backend = implementation(options.backend)
        ys, us = backend.forward(tokens(x), rows, adapters, None, options)
    # float16 and float32 add gradients as they do for layers apart, see the kernels' steps.
    adds = options.backend == "triton" and x.dtype == torch.bfloat16
    onto = Onto() if adds and x.requires_grad and torch.is_grad_enabled() else None
    xs = [x] * len(pairs) if onto is None else SharedInput.apply(x, len(pairs), onto)
    return [
        partial(_finish, own, pair, options, (y, u, onto))
        for own, pair, y, u in zip(xs, pairs, ys, us, strict=True)
    ]


def _finish(
    x: torch.Tensor,
    pair: tuple[Base, Factors],
    options: Options,
    computed: tuple[torch.Tensor, torch.Tensor, Onto | None],
) -> torch.Tensor:
    base, adapter = pair
    return _shaped(PeraFunction.apply(x, *base, *adapter, None, options, computed), x)


def _shaped(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``(T, M)`` with the leading dimensions of x.

    As in ``F.linear`` it is no view: under FSDP2 a view that is changed in place loses its hooks.
    """
    if x.dim() == 2:
        return y
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1]))  # type: ignore[no-any-return]


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
    checks.check_adapter(A, B, h, terms)
    checks.check_scale(scale)
    dtypes = (A.dtype,) if h is None else (A.dtype, h.dtype)
    name = _resolved(backend, A.device, dtypes)
    with without_autocast(A.device.type):
        if name == "reference":
            return reference.delta_weight(A, B, h, scale=scale, terms=terms)
        options = Options(terms, float(scale), backend=name)
        return DeltaWeight.apply(A, B, h, options)


def exact_delta_weight(
    adapter: Factors, *, scale: float, terms: Terms, like: torch.Tensor, backend: str = "auto"
) -> torch.Tensor:
    """ΔW in float32 (float64 for a float64 ``like``) on the device of ``like``: the precision of a
    merge.
    """
    work = torch.promote_types(like.dtype, torch.float32)
    A, B, h = (None if t is None else t.to(like.device, work) for t in adapter)
    assert A is not None and B is not None
    # The kernels compute in float32, and refuse every transform, also of what is constant.
    plain = work == torch.float64 or _transformed()
    own = "auto" if plain else backend
    return delta_weight(A, B, h, scale=scale, terms=terms, backend=own)


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
    checks.check_adapter(A, B, h, terms)
    checks.check_scale(scale)
    phi_A, phi_B = reference.expanded_factors(A, B, h, terms)
    # Without products φ(A) is A: what is returned has memory of its own.
    return phi_A.to(A.dtype, copy=phi_A.shape == A.shape), (scale * phi_B).to(B.dtype)


def _as_autocast_says(x: torch.Tensor, base: Base) -> tuple[torch.Tensor, Base]:
    """x and the base's output in the dtype that autocast asks for; float64 is left alone, as
    PyTorch's own autocast does. Without autocast all dtypes must agree.
    """
    dtype = autocast_dtype(x.device.type)
    if dtype is not None and x.dtype != torch.float64:
        out = None if base.out is None else base.out.to(dtype)
        return x.to(dtype), Base(base.weight, base.bias, out)
    checks.check_same_dtype(x, base)
    return x, base


def _transformed() -> bool:
    """Whether a ``torch.func`` transform or forward-mode differentiation is active."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _resolved(backend: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str:
    """The backend to use. Every transform goes through the reference's plain operators."""
    if not _transformed():
        return resolve(backend, device, dtypes)
    if backend == "triton":
        raise ValueError(
            "backend='triton' has first derivatives in reverse mode, and no rules for torch.func "
            "transforms and forward mode; use 'auto', 'torch' or 'reference' there"
        )
    return "reference"


def _chosen(options: Options, x: torch.Tensor, base: Base, adapter: Factors) -> Options:
    """The options with a backend and a plan in place of "auto".

    That depends on shapes, dtypes and the device alone, so that a forward gives the same bits with
    and without gradients. A compiled graph stays factored: its number of tokens is symbolic.
    """
    o = options
    A, B, h = adapter
    dtypes = (x.dtype, A.dtype, B.dtype) if h is None else (x.dtype, A.dtype, B.dtype, h.dtype)
    backend, plan = _resolved(o.backend, x.device, dtypes), o.plan
    if plan == "composed" and o.dropout_p > 0.0:
        raise ValueError(f"plan='composed' takes no dropout; got dropout_p={o.dropout_p}")
    if plan == "composed" and base.weight is None:
        raise ValueError(
            "plan='composed' needs a plain dense base weight; this base layer has none"
        )
    if plan == "auto":
        K = A.shape[0] + (0 if h is None else h.shape[0])
        composed = (
            backend == "torch"
            and base.weight is not None
            and o.dropout_p == 0.0
            and not torch.compiler.is_compiling()
            and A.dtype == x.dtype
            and torch_backend.composes(x, base.weight, K)
        )
        plan = "composed" if composed else "factored"
    return Options(o.terms, float(o.scale), float(o.dropout_p), plan, backend, o.keep)


def _reference(
    x: torch.Tensor,
    base: Base,
    adapter: Factors,
    seed: torch.Tensor | None,
    options: Options,
) -> torch.Tensor:
    (weight, bias, out), (A, B, h), o = base, adapter, options
    if o.plan == "composed":
        assert weight is not None
        A, B = A.to(x.dtype), B.to(x.dtype)
        delta = reference.delta_weight(A, B, h, scale=o.scale, terms=o.terms)
        return torch.nn.functional.linear(x, (weight + delta).to(x.dtype), bias)
    update = reference.update(
        x, A, B, h, scale=o.scale, terms=o.terms, dropout_p=o.dropout_p, seed=seed
    )
    if out is None:
        assert weight is not None
        out = torch.nn.functional.linear(x, weight, bias)
    return out + update
