"""What the command line takes: one line about every mistake, exit status 2."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..terms import TERMS
from . import verify

__all__ = ["DTYPES", "Parser", "build"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

EXAMPLES = {
    "pera_kernels": """examples:
  python -m pera_kernels info
  python -m pera_kernels inspect runs/adapter
  python -m pera_kernels export-lora runs/adapter runs/lora --dtype bfloat16
  python -m pera_kernels merge models/base runs/adapter models/merged
  python -m pera_kernels verify --ranks 16""",
    "info": """examples:
  python -m pera_kernels info
  python -m pera_kernels info --json | jq .backends""",
    "inspect": """examples:
  python -m pera_kernels inspect runs/adapter
  python -m pera_kernels inspect runs/adapter --plot adapter.png
  python -m pera_kernels inspect runs/adapter --json | jq '.modules[].quadratic_share'
  python -m pera_kernels inspect --update models/base models/tuned --modules 'attn|mlp'""",
    "export-lora": """examples:
  python -m pera_kernels export-lora runs/adapter runs/lora
  python -m pera_kernels export-lora runs/adapter runs/lora --dtype bfloat16 --prune-zero
  python -m pera_kernels export-lora runs/adapter runs/lora --rank 64   # lossy, says how much""",
    "merge": """examples:
  python -m pera_kernels merge models/base runs/adapter models/merged
  python -m pera_kernels merge models/base runs/adapter models/merged --dtype bfloat16""",
    "verify": """ops:
  pera_linear, the same with dropout, with plan="composed", or mixed: float32 adapters under
  half-precision activations; and delta_weight

examples:
  python -m pera_kernels verify
  python -m pera_kernels verify --backend triton --terms full --ranks 16 --dtypes bfloat16
  python -m pera_kernels verify --backend torch --dtypes float64 --shapes 33x70x50 128x64x96""",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _whole(text: str, least: int = 1) -> int:
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}")
    return int(text)


def _whole_or_zero(text: str) -> int:
    return _whole(text, least=0)


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d{1,9}x\d{1,9}x\d{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not TOKENSxINxOUT, as 33x70x50")
    return tuple(map(int, text.split("x")))


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def _dtype(text: str) -> torch.dtype:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[text]


def build(commands: Mapping[str, Callable[[argparse.Namespace], int]]) -> Parser:
    """The parser; ``run`` of what it returns is the chosen command."""

    def formatted(name: str, description: str) -> dict[str, Any]:
        return {
            "description": description,
            "epilog": EXAMPLES[name],
            "formatter_class": argparse.RawDescriptionHelpFormatter,
            "allow_abbrev": False,
        }

    parser = Parser(
        prog="python -m pera_kernels",
        **formatted("pera_kernels", "Look at, export and merge PERA adapters."),
    )
    found = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, description: str) -> Parser:
        own = found.add_parser(name, help=description, **formatted(name, description))
        own.set_defaults(run=commands[name])
        return own

    def json_switch(own: Parser) -> None:
        own.add_argument("--json", action="store_true", help="print JSON for programs")

    json_switch(command("info", "Device, backends, versions, and the tile table in use."))

    own = command("inspect", "What an adapter's updates are made of, or any other update.")
    add = own.add_argument
    add("adapter", metavar="ADAPTER", nargs="?", help="folder of save_adapter or of PEFT")
    add(
        "--update",
        nargs=2,
        type=Path,
        metavar=("BASE", "TUNED"),
        help="instead of ADAPTER: two checkpoints, whose difference is looked at; each a "
        ".safetensors file, a folder with model.safetensors or its shards, or a .pt state dict",
    )
    add("--modules", type=_pattern, metavar="REGEX", help="with --update: names to look at")
    add("--plot", type=Path, metavar="FILE.png", help="draw it, too")
    json_switch(own)

    own = command("export-lora", "Write an adapter as plain LoRA, which PEFT and engines load.")
    own.add_argument("adapter", metavar="ADAPTER", help="folder of save_adapter or of PEFT")
    own.add_argument("out", metavar="OUT", help="folder to write")
    add = own.add_argument
    add("--pad-to", type=_whole, help="the rank is a multiple of it (16; 1 with --rank)")
    add("--dtype", type=_dtype, help=f"{', '.join(DTYPES)} (that of the adapter)")
    add("--exact-scale", action="store_true", help="keep the scale out of lora_B")
    add("--prune-zero", action="store_true", help="drop pairs whose coefficient is zero")
    add("--rank", type=_whole, help="best approximation of at most this rank, no longer lossless")
    add("--base-model", metavar="NAME", help="name of the base model for the configuration")
    json_switch(own)

    own = command("merge", "Merge an adapter into a transformers model and write that.")
    own.add_argument("base", metavar="BASE", help="folder of the base model")
    own.add_argument("adapter", metavar="ADAPTER", help="folder of save_adapter or of PEFT")
    own.add_argument("out", metavar="OUT", help="folder to write; must be empty or missing")
    own.add_argument("--dtype", type=_dtype, help=f"{', '.join(DTYPES)} (that of the base)")
    json_switch(own)

    _verify(command("verify", "Outputs and gradients against float64, for every op."))
    return parser


def _verify(own: Parser) -> None:
    dtypes = tuple(verify.DTYPES)
    several: dict[str, Any] = {"nargs": "+", "action": _EachOnce}
    add = own.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add(
        "--backend",
        choices=verify.BACKENDS,
        help="default: both; one that is named and cannot run is a failure",
        **several,
    )
    add("--ops", choices=tuple(verify.OPS), **several)
    add("--terms", choices=TERMS, default=TERMS, **several)
    add("--ranks", type=_whole, default=verify.RANKS, metavar="R", **several)
    add(
        "--dtypes",
        choices=dtypes,
        default=dtypes[:-1],
        help="default: all but float64, which only the torch backend computes in",
        **several,
    )
    add("--shapes", type=_shape, metavar="TxNxM", help="tokens x in x out", **several)
    add("--seed", type=_whole_or_zero, default=0, help="of the inputs and the dropout (0)")
    add("--exhaustive", action="store_true", help="every op at every default shape: slow")
    add("--jobs", type=_whole_or_zero, help="processes; 0: this one; default: by cores and memory")
    add("--failures", action="store_true", help="print only what failed")


class _EachOnce(argparse.Action):
    """Several values, each kept once."""

    def __call__(self, parser: Any, given: Any, values: Any, option: str | None = None) -> None:
        setattr(given, self.dest, tuple(dict.fromkeys(values)))
