"""``PeraConfig``: what PEFT stores in ``adapter_config.json``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig

from pera_kernels.checks import check_alpha, check_dropout, check_keep
from pera_kernels.terms import Terms, check_rank, check_terms

__all__ = ["PERA", "PeraConfig"]

INIT_WEIGHTS = (True, False, "kaiming", "gaussian")
BIASES = ("none", "all", "pera_only")


class _PeftType(str):
    """A member of PEFT's enumeration of methods, as far as PEFT looks at it."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str(self)

    @property
    def name(self) -> str:
        return str(self)


PERA = _PeftType("PERA")


@dataclass
class PeraConfig(PeftConfig):
    """Configuration of a PERA adapter for PEFT (Eq. 4, 9 to 11).

    Args:
        r: rank, any integer >= 1.
        pera_alpha: numerator of the scale s = alpha / r (alpha / √r with ``use_rslora``); None
            means r.
        pera_dropout: probability in [0, 1) on the adapter's input, in training.
        terms: ``"full"``, ``"square"``, ``"cross"`` or ``"linear"`` (LoRA).
        init_weights: of A: True or ``"kaiming"`` (uniform, a = √5) or ``"gaussian"`` (standard
            deviation 1 / r); B and h are zero. False makes all three random: for tests.
        use_rslora: scale by alpha / √r.
        target_modules, exclude_modules: names (ends of module paths), or a regular expression of
            whole paths; ``"all-linear"`` for every linear layer but the output.
        layers_to_transform, layers_pattern: only layers of these indices, as in LoRA; with a list
            of target_modules.
        rank_pattern, alpha_pattern: exceptions from ``r`` and ``pera_alpha`` by module name.
        modules_to_save: further modules to train and save whole.
        bias: ``"none"``, ``"all"`` or ``"pera_only"``: which biases train.
        fan_in_fan_out: the base stores its weight (in, out), as Conv1D does; corrected where it is
            wrong.
        keep: see :func:`pera_kernels.pera_linear`. It says how to compute and is not saved.

    Raises:
        TypeError, ValueError: an option that does not fit, named.
    """

    r: int = field(default=16, metadata={"help": "Rank."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to adapt: names, a pattern, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave alone: names or a pattern."}
    )
    pera_alpha: float | None = field(
        default=None, metadata={"help": "Numerator of the scale; None means the rank."}
    )
    pera_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    terms: Terms = field(default="full", metadata={"help": "full, square, cross or linear."})
    init_weights: bool | str = field(
        default=True, metadata={"help": "True, 'kaiming', 'gaussian', or False (random)."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r)."})
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "The base stores its weight (in, out)."}
    )
    bias: str = field(default="none", metadata={"help": "'none', 'all' or 'pera_only'."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers that is indexed."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Ranks of modules that differ from r."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Alphas of modules that differ."}
    )
    keep: str = field(
        default="u", metadata={"help": "'u' or 'x': what the gradients of B and h are made of."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PERA  # type: ignore[assignment]
        check_rank(self.r)
        check_alpha(self.pera_alpha, "pera_alpha")
        check_dropout(self.pera_dropout, "pera_dropout")
        check_terms(self.terms)
        check_keep(self.keep)
        for pattern, rank in (self.rank_pattern or {}).items():
            check_rank(rank, f"rank_pattern[{pattern!r}]")
        for pattern, alpha in (self.alpha_pattern or {}).items():
            check_alpha(alpha, f"alpha_pattern[{pattern!r}]")
        if self.init_weights not in INIT_WEIGHTS:
            raise ValueError(
                f"init_weights must be True, False, 'kaiming' or 'gaussian'; "
                f"got {self.init_weights!r}"
            )
        if self.bias not in BIASES:
            raise ValueError(
                f"bias must be one of {', '.join(map(repr, BIASES))}; got {self.bias!r}"
            )
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} goes with a list of target_modules; got {self.target_modules!r}: "
                        "list the modules, or say the layers in a pattern"
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform; got None")

    def to_dict(self) -> dict[str, Any]:
        """What ``adapter_config.json`` holds."""
        return {key: value for key, value in super().to_dict().items() if key != "keep"}
