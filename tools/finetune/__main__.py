"""`python -m tools.finetune`: pretrain once, adapt with each method, compare."""

import argparse
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from pera_kernels.cli.arguments import Parser
from tools.finetune.adapters import Adapters, PeftAdapters
from tools.finetune.data import CorpusError, load_corpora
from tools.finetune.job import Job
from tools.finetune.model import HEADS
from tools.finetune.ranks import PARALLEL, leave, local_rank, lost_a_rank, started, world_size
from tools.finetune.report import print_report
from tools.finetune.train import TERMS, Settings, Terms

EXAMPLES = """
examples:
  python -m tools.finetune
  python -m tools.finetune --terms linear,full --rank 8
  python -m tools.finetune --lr 5e-3 --seed 1 --out seed1
  python -m tools.finetune --steps 20 --pretrain-steps 20 --out quick
  python -m tools.finetune.report finetune_out/results.json --markdown
  torchrun --nproc-per-node=2 -m tools.finetune --parallel fsdp
  torchrun --nproc-per-node=4 -m tools.finetune --parallel fsdp --resume
  accelerate launch --multi_gpu --num_processes 2 -m tools.finetune --parallel ddp --peft
"""


def whole_number(minimum: int) -> Callable[[str], int]:
    """A parser of whole numbers from `minimum`."""

    def parse(text: str) -> int:
        if not (text.isdecimal() and minimum <= int(text) < 2**63):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {minimum}")
        return int(text)

    return parse


def learning_rate(text: str) -> float:
    """A positive finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def term_names(text: str) -> tuple[Terms, ...]:
    """Names from `TERMS`, separated by commas."""
    names = text.split(",")
    for name in names:
        if name not in TERMS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(TERMS)}")
    return tuple(terms for terms in TERMS if terms in names)


def device_name(text: str) -> torch.device:
    """The CPU or a CUDA device that is there; "auto" prefers CUDA, of several processes each its
    own.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    text = ("cuda" if count else "cpu") if text == "auto" else text
    text = f"cuda:{local_rank()}" if text == "cuda" and world_size() > 1 else text
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, cuda:N")
    device = torch.device(text)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise argparse.ArgumentTypeError(
            f"there is no {text!r} here: PyTorch sees {count} CUDA devices"
        )
    return device


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m tools.finetune",
        description="Train a small byte-level transformer on the source of Python's standard\n"
        "library, freeze it, adapt it to the English of Python's help topics with LoRA and\n"
        "with PERA from one seed and in one data order, and compare.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name: str, parse: Callable[[str], Any], default: Any, text: str) -> None:
        shown = "" if default is None else " (default: %(default)s)"
        parser.add_argument(name, type=parse, default=default, help=text + shown)

    count = whole_number(1)
    add("--rank", count, 16, "rank of the adapters")
    terms = f"which adapters to train, of {','.join(TERMS)}; linear is LoRA: at this rank, with "
    terms += "as many parameters as PERA, and with a quarter and half as many ranks more"
    add("--terms", term_names, "linear,square,full", terms)
    add("--steps", count, 300, "steps of adaptation")
    add("--pretrain-steps", count, 700, "steps of training the base model")
    add("--batch", count, 8, "windows of 128 bytes a step")
    add("--lr", learning_rate, 1.5e-2, "learning rate of A and B")
    own_rate = "one learning rate for every h, not a multiple"
    add("--lr-h", learning_rate, None, f"{own_rate} (default: by the rule of parameter_groups)")
    add("--device", device_name, "auto", "auto (cuda where there is one), cpu, cuda or cuda:N")
    threads = "CPU threads; more can be a little faster, and much slower on a busy computer"
    add("--threads", count, 1, threads)
    add("--seed", whole_number(0), 0, "seed of everything")
    files = "folder for results.json, loss.png, base.pt, adapter_*/ and checkpoint/"
    add("--out", Path, Path("finetune_out"), files)
    how = "train on the processes that torchrun or accelerate starts: ddp (each its part of the"
    how += " batch), fsdp (parameters sharded too), tp (every layer split)"
    parser.add_argument("--parallel", choices=PARALLEL, help=how)
    often = "steps between checkpoints (default: 100 with --parallel, else none)"
    add("--checkpoint-every", count, None, often)
    again = "go on from the checkpoint in --out, with any number of processes"
    parser.add_argument("--resume", action="store_true", help=again)
    through = "make the adapters through PEFT"
    parser.add_argument("--peft", action="store_true", help=through)
    return parser


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Makes SIGTERM end the job the way that Ctrl-C does."""
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0, 1 without the texts, 2 for bad options, 130 after an interrupt."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    refuse_ranks(parser, options)
    settings = Settings(
        rank=options.rank,
        terms=options.terms,
        steps=options.steps,
        pretrain_steps=options.pretrain_steps,
        batch=options.batch,
        lr=options.lr,
        lr_h=options.lr_h,
        seed=options.seed,
    )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: cannot make {options.out}: {error.strerror}")
    try:
        corpora = load_corpora()
    except CorpusError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    torch.set_num_threads(options.threads)
    adapters = PeftAdapters() if options.peft else Adapters()
    with started(options.parallel, options.device) as ranks:
        every = options.checkpoint_every or (100 if options.parallel else None)
        job = Job(settings, options.device, options.out, corpora, adapters, ranks, every)
        told = to_resume(parser, job) if options.resume else None
        if every and ranks.is_first:
            # Said before, too: processes that are killed say nothing.
            print(
                f"Checkpoints: every {every} steps of adaptation in {job.checkpoints.folder}; "
                "the same command with --resume goes on from the last"
            )
        status = 0
        try:
            job.train(told)
        except KeyboardInterrupt:
            print(f"\nInterrupted: {kept(job)}", file=sys.stderr)
            status = 130
        except (RuntimeError, TimeoutError) as error:
            if ranks.count == 1:
                raise
            # torchrun ends the processes that are left while these say what there is.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            lost = lost_a_rank(error)
            why = "another rank ended or does not answer" if lost else "of an error"
            print(f"\nRank {ranks.rank} stopped because {why}: {kept(job)}", file=sys.stderr)
            if not lost:
                raise
            status = 1
        finally:
            job.plot()
        if status and ranks.count > 1:
            leave(status)
        if status == 0 and ranks.is_first:
            print_report(job.results())
            print(f"Written to {options.out}: results.json, loss.png and the adapters")
    return status


def kept(job: Job) -> str:
    """What there is, and how to go on."""
    # Before the first run there is none but that of an earlier job.
    told = job.checkpoints.latest() if job.runs else None
    if told is None:
        return f"what was trained so far is in {job.out}"
    step, label = len(told["run"]["loss"]), told["run"]["label"]
    return (
        f"the last checkpoint, step {step} of {label}, is in {job.checkpoints.folder}; the same "
        "command with --resume goes on from it"
    )


def to_resume(parser: Parser, job: Job) -> dict[str, Any]:
    """What the checkpoint told; ends the program where this job cannot go on from one."""
    try:
        told = job.checkpoints.latest()
    except ValueError as error:
        parser.error(f"argument --resume: cannot read {job.checkpoints.pointer}: {error}")
    if told is None or not (job.out / "base.pt").exists():
        parser.error(f"argument --resume: there is no checkpoint in {job.out}")
    own, conditions = job.conditions(), told.get("conditions", {})
    different = [
        f"{name.replace('_', ' ')} {conditions.get(name)!r}"
        for name in own
        if conditions.get(name) != own[name]
    ]
    if different:
        parser.error(
            f"argument --resume: the checkpoint in {job.out} was made with {', '.join(different)}"
        )
    return told


def refuse_ranks(parser: Parser, options: argparse.Namespace) -> None:
    """Ends the program where the processes do not fit what is asked of them."""
    count = world_size()
    if options.parallel is None and count > 1:
        parser.error(f"there are {count} processes: say --parallel {', '.join(PARALLEL)}")
    if options.parallel is None:
        return
    if "RANK" not in os.environ:
        parser.error(
            "argument --parallel: needs processes: torchrun --nproc-per-node=2 -m tools.finetune "
            f"--parallel {options.parallel}"
        )
    if options.batch % count:
        parser.error(
            f"argument --batch: must be a multiple of the {count} processes; got {options.batch}"
        )
    if options.parallel == "tp" and HEADS % count:
        parser.error(
            f"argument --parallel: tp splits {HEADS} heads, which {count} processes do not divide"
        )
    if options.parallel == "tp" and options.peft:
        parser.error("argument --peft: goes with --parallel ddp or fsdp")


if __name__ == "__main__":
    sys.exit(main())
