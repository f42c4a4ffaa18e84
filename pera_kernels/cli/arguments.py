"""What the command line takes: one line about every mistake, exit status 2."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch

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
  python -m pera_kernels inspect runs/adapter --json | jq '.modules[].quadratic_share'""",
    "export-lora": """examples:
  python -m pera_kernels export-lora runs/adapter runs/lora
  python -m pera_kernels export-lora runs/adapter runs/lora --dtype bfloat16 --prune-zero
  python -m pera_kernels export-lora runs/adapter runs/lora --rank 64   # lossy, says how much""",
    "merge": """examples:
  python -m pera_kernels merge models/base runs/adapter models/merged
  python -m pera_kernels merge models/base runs/adapter models/merged --dtype bfloat16""",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _whole(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return value


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

    own = command("inspect", "What an adapter folder holds, module by module.")
    own.add_argument("adapter", metavar="ADAPTER", help="folder of save_adapter or of PEFT")
    json_switch(own)

    own = command("export-lora", "Write an adapter as plain LoRA, which PEFT and engines load.")
    own.add_argument("adapter", metavar="ADAPTER", help="folder of save_adapter or of PEFT")
    own.add_argument("out", metavar="OUT", help="folder to write")
    add = own.add_argument
    add("--pad-to", type=_whole, default=16, help="the rank is a multiple of it (16)")
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

    # It parses what follows itself: see __main__.
    found.add_parser("verify", help="Outputs and gradients against float64, for every op.")
    return parser
