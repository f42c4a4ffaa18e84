"""The time of a training step of each method, all on the same batches, taking turns."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import pera_kernels as pk
from pera_kernels.cli import describe
from tools import rows
from tools.ablation.runs import adapted, methods
from tools.ablation.task import Task

__all__ = ["measure"]

TURNS = 25
WARM = 5


def measure(task: Task, ranks: Sequence[int], file: Path, turns: int = TURNS) -> None:
    """Add a row for each method: the median of its steps, forward, backward and optimizer.

    Raises:
        RowsError: the file is damaged.
    """
    rows.read(file)  # before minutes of work
    compared = [method for r in ranks for method in methods(task, r)]
    steps = []
    for method in compared:
        model = adapted(task, r=method.rank, terms=method.terms)[0]
        steps.append((model, torch.optim.AdamW(pk.parameter_groups(model, task.rates[0]))))
    times: list[list[float]] = [[] for _ in compared]
    for turn, batch in enumerate(itertools.islice(task.batches(0), WARM + turns)):
        for (model, optimizer), own in zip(steps, times, strict=True):
            started = time.perf_counter()
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
            if turn >= WARM:
                own.append(1000 * (time.perf_counter() - started))
    for method, own in zip(compared, times, strict=True):
        row = {"task": task.name, "method": method.key, "r": method.r, "rank": method.rank}
        row |= {"step_ms": statistics.median(own), "threads": torch.get_num_threads()}
        rows.append(file, {**row, "torch": torch.__version__, "commit": describe.commit()})
