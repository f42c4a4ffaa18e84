"""What each rank does in the tests of the fine-tune on several processes."""

import dataclasses
import json
from pathlib import Path

import torch
import torch.distributed as dist

from tools.finetune import data, train
from tools.finetune.adapters import Adapters, PeftAdapters
from tools.finetune.job import Job
from tools.finetune.ranks import Ranks, SeveralRanks

SETTINGS = train.Settings(
    rank=3, terms=("linear",), steps=6, pretrain_steps=3, batch=4, lr=1e-2, lr_h=10.0, seed=5
)


def corpora():
    text = data.load_corpora(20_000)
    return data.Corpora(text.source, text.training[:20_000], text.held_out[:1_500])


def settings(terms):
    # One method: the others of LoRA have ranks of their own.
    return dataclasses.replace(SETTINGS, terms=terms)


def job(out, how=None, peft=False, every=None, terms=("full",)):
    """The job of a rank, or of one process."""
    cpu = torch.device("cpu")
    ranks = Ranks() if how is None else SeveralRanks(how, cpu)
    adapters = PeftAdapters() if peft else Adapters()
    Path(out).mkdir(parents=True, exist_ok=True)
    return Job(settings(terms), cpu, Path(out), corpora(), adapters, ranks, every)


def losses(out, how=None, **options):
    """The curve of the pretraining and of one adaptation."""
    made = job(out, how, **options)
    made.train()
    if how is not None:
        dist.barrier()
    results = json.loads((Path(out) / "results.json").read_text())
    (method,) = results["methods"]
    assert method["status"] == "finished"
    return results["base"]["loss"] + method["loss"]


class Stopped(Exception):
    """What ends a run in the tests."""


def stopped(out, how, step):
    """A run that ends with an error after some steps of adaptation."""
    made = job(out, how, every=2)
    original = train.random_batch
    calls = 0

    def counted(*arguments):
        nonlocal calls
        calls += 1
        if calls > SETTINGS.pretrain_steps + step:
            raise Stopped
        return original(*arguments)

    train.random_batch = counted
    try:
        made.train()
    except Stopped:
        return
    finally:
        train.random_batch = original
    raise AssertionError("it went on")


def resumed(out, how):
    """The curve of a run that goes on from a checkpoint."""
    made = job(out, how, every=2)
    told = made.checkpoints.latest()
    made.train(told)
    if how is not None:
        dist.barrier()
    results = json.loads((Path(out) / "results.json").read_text())
    assert results["status"] == "finished"
    return told["folder"], results["base"]["loss"] + results["methods"][0]["loss"]
