"""Every argument error: each names the argument, what came, and what is accepted."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from numbers import Real

import torch
from torch import nn

from .operands import Base, Factors, Options
from .terms import coefficient_count

PLAIN = (torch.Tensor, nn.Parameter)
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("auto", "triton", "torch", "reference")
PLANS = ("auto", "factored", "composed")
KEEPS = ("u", "x")
INITS = ("kaiming", "gaussian")


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(
            f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}"
        )


def check_plan(plan: str) -> None:
    if plan not in PLANS:
        raise ValueError(f"plan must be one of {', '.join(map(repr, PLANS))}; got {plan!r}")


def check_keep(keep: str) -> None:
    if keep not in KEEPS:
        raise ValueError(f"keep must be one of {', '.join(map(repr, KEEPS))}; got {keep!r}")


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Put a module's name before an error's message."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def some(names: Iterable[str], limit: int = 8) -> str:
    """The first names, and whether there are more."""
    found = list(names)
    return ", ".join(found[:limit]) + (", ..." if len(found) > limit else "")


def check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")


def _number(name: str, value: object, accepted: str) -> float:
    """A real number as a float, infinite where it is too large for one."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {accepted}; got {value!r} of type {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_scale(scale: object, name: str = "scale") -> None:
    # Written as a comparison: torch.compile traces it for a symbolic scale.
    if not abs(_number(name, scale, "a real number")) < math.inf:
        raise ValueError(f"{name} must be finite; got {shortened(scale)}")


def check_dropout(p: object, name: str = "dropout_p") -> None:
    if not 0.0 <= _number(name, p, "a number in [0, 1)") < 1.0:
        raise ValueError(f"{name} must be in [0, 1); got {shortened(p)}")


def check_alpha(alpha: object, name: str = "alpha") -> None:
    if alpha is not None and not 0.0 < _number(name, alpha, "a number > 0 or None") < math.inf:
        raise ValueError(f"{name} must be finite and > 0; got {shortened(alpha)}")


def check_rate(name: str, value: object) -> None:
    if not 0.0 <= _number(name, value, "a number >= 0") < math.inf:
        raise ValueError(f"{name} must be finite and >= 0; got {shortened(value)}")


def shortened(value: object) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) < 60 else f"{text[:40]}... ({len(text)} characters)"


def check_init(init: object) -> None:
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(map(repr, INITS))}; got {init!r}")


def check_adapter_dtype(dtype: object) -> None:
    if dtype is not None and dtype not in FLOATING:
        raise TypeError(
            f"adapter_dtype must be float64, float32, bfloat16, float16 or None; got {dtype!r}"
        )


def check_features(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an int >= 1; got {size!r}")
        if size < 1:
            raise ValueError(f"{name} must be an int >= 1; got {size}")


def check_options(options: Options) -> None:
    """The options of a call as the user gave them; "auto" is allowed."""
    check_scale(options.scale)
    check_dropout(options.dropout_p)
    check_backend(options.backend)
    check_plan(options.plan)
    check_keep(options.keep)


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor; asked without importing ``torch.distributed.tensor``."""
    return hasattr(type(tensor), "full_tensor")


def _check_tensor(name: str, value: object, ndim: int | None) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16; got {value.dtype}")
    if type(value) not in PLAIN and is_dtensor(value):
        raise TypeError(
            f"{name} must be a plain tensor; got a DTensor: call the module that fully_shard "
            "wrapped, use the styles of pera_kernels.parallel, or pass .full_tensor()"
        )
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor; got a {kind} one: call .to_dense() or pad")
    if ndim is not None and value.dim() != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions; got shape {tuple(value.shape)}")


def check_adapter(A: object, B: object, h: object, terms: object) -> None:
    """A ``(R, N)``, B ``(M, R)`` of one dtype and device, h ``(L,)`` as ``terms`` asks.

    Raises:
        TypeError: not a tensor, not floating point, or dtypes that do not go together.
        ValueError: unknown terms, a wrong shape or device.
    """
    if not isinstance(terms, str):
        raise TypeError(f"terms must be a string; got {terms!r} of type {type(terms).__name__}")
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
    if h is None and length == 0:
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


def check_input(x: torch.Tensor, base: Base, adapter: Factors) -> None:
    (weight, bias, base_out), (A, B, _) = base, adapter
    if weight is None and base_out is None:
        raise TypeError("weight must be a torch.Tensor; got NoneType")
    _check_tensor("x", x, None)
    M, N = B.shape[0], A.shape[1]
    if x.dim() < 1 or x.shape[-1] != N:
        raise ValueError(
            f"x must be (..., {N}) for A of shape {tuple(A.shape)}; got {tuple(x.shape)}"
        )
    if weight is not None:
        _check_tensor("weight", weight, 2)
        if weight.shape != (M, N):
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
    device = x.device
    for place, tensor in enumerate((weight, bias, base_out, A)):
        if tensor is not None and tensor.device != device:
            name = ("weight", "bias", "base_out", "A")[place]
            raise ValueError(f"{name} must be on the device of x, {device}; got {tensor.device}")
    if (A.dtype == torch.float64) != (x.dtype == torch.float64):
        raise TypeError(f"A must be float64 exactly where x is; got A {A.dtype} and x {x.dtype}")
    check_frozen(weight, bias)


def check_frozen(weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
    for tensor in (weight, bias):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            name = "weight" if tensor is weight else "bias"
            # FSDP1 cuts it out of one flat parameter, in which A, B and h train.
            mended = (
                f"call {name}.requires_grad_(False)"
                if isinstance(tensor, nn.Parameter)
                else "freeze what it is computed from; under FSDP1 leave the adapters out "
                "(ignored_states), or use FSDP2 (fully_shard)"
            )
            raise ValueError(
                f"{name} must not require grad: PERA trains A, B and h on a frozen base; {mended}"
            )


def check_same_dtype(x: torch.Tensor, base: Base) -> None:
    for place, tensor in enumerate(base):
        if tensor is not None and tensor.dtype != x.dtype:
            name = ("weight", "bias", "base layer's output")[place]
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}; got {tensor.dtype}")
