"""The same job on several processes, which torchrun or accelerate starts."""

import copy
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, NoReturn, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from pera_kernels.parallel import ColwiseParallel, RowwiseParallel, check
from tools.finetune.model import Attention, Block

Parallel = Literal["ddp", "fsdp", "tp"]
PARALLEL: tuple[Parallel, ...] = get_args(Parallel)
# How long a rank waits for another that does not answer.
PATIENCE = timedelta(minutes=2)
STYLES: dict[str, Callable[[], Any]] = {
    **dict.fromkeys(["q_proj", "k_proj", "v_proj", "up_proj"], ColwiseParallel),
    **dict.fromkeys(["o_proj", "down_proj"], RowwiseParallel),
}


class Ranks:
    """What one process does among others; by itself it does everything."""

    rank, count = 0, 1
    parallel: Parallel | None = None

    def rows(self, batch: Tensor) -> Tensor:
        """This rank's part of a batch that every rank drew."""
        return batch

    def mean(self, loss: Tensor) -> float:
        """The loss over all ranks' parts."""
        return loss.item()

    def by(self, parallel: Parallel) -> "Ranks":
        """The same ranks, parallel in this way."""
        other = copy.copy(self)
        other.parallel = self.parallel and parallel
        return other

    def check(self, model: nn.Module) -> None:
        """Raises on every rank if they have different adapters."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it trains on several ranks, in place or around it."""
        return model

    @property
    def is_first(self) -> bool:
        """Whether this process shows and writes what all have."""
        return self.rank == 0

    @property
    def saves(self) -> bool:
        """Whether this process calls what saves a model: all do where each has a part."""
        return self.is_first or self.parallel in ("fsdp", "tp")


class SeveralRanks(Ranks):
    """A rank of the process group that there is."""

    def __init__(self, parallel: Parallel, device: torch.device) -> None:
        self.parallel = parallel
        self.device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def rows(self, batch: Tensor) -> Tensor:
        return batch if self.parallel == "tp" else batch.chunk(self.count)[self.rank]

    def mean(self, loss: Tensor) -> float:
        total = loss.detach().double()
        dist.all_reduce(total)
        return total.item() / self.count

    def check(self, model: nn.Module) -> None:
        check(model)

    def wrap(self, model: nn.Module) -> nn.Module:
        if self.parallel == "ddp":
            return DistributedDataParallel(model)
        if self.parallel == "fsdp":
            if not fsdp_averages(self.device):
                raise RuntimeError(
                    "FSDP2 of this PyTorch adds up gradients over gloo and does not average them: "
                    "use --parallel ddp, or a newer PyTorch"
                )
            for module in list(model.modules()):
                if isinstance(module, Block):
                    fully_shard(module)
            fully_shard(model)
            return model
        mesh = init_device_mesh(self.device.type, (self.count,))
        plan = {
            name: STYLES[name.rpartition(".")[2]]()
            for name, _ in model.named_modules()
            if name.rpartition(".")[2] in STYLES
        }
        for module in model.modules():
            if isinstance(module, Attention):
                module.heads //= self.count
        return parallelize_module(model, mesh, plan)


def fsdp_averages(device: torch.device) -> bool:
    """Whether FSDP2 averages gradients over ranks; that of PyTorch 2.8 does not over gloo."""
    probe = nn.Linear(1, 1, device=device)
    fully_shard(probe)
    probe(torch.ones(1, 1, device=device)).sum().backward()
    grad: Any = probe.bias.grad
    return bool((grad.full_tensor() == 1.0).all())


@contextmanager
def started(parallel: Parallel | None, device: torch.device) -> Iterator[Ranks]:
    """The group of processes, for as long as the job takes."""
    if parallel is None:
        yield Ranks()
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield SeveralRanks(parallel, device)
    finally:
        dist.destroy_process_group()


def lost_a_rank(error: Exception) -> bool:
    """Whether it says that another rank ended or did not answer; gloo has no exception for that."""
    return isinstance(error, (dist.DistError, TimeoutError)) or "gloo" in str(error)


def leave(status: int) -> NoReturn:
    """Ends this process at once. While a sum over ranks is unfinished, taking the group down can
    wait for ever: PyTorch waits for gloo's thread, which waits for Python's lock.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def world_size() -> int:
    """How many processes torchrun or accelerate says that there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Which of this computer's processes this is."""
    return int(os.environ.get("LOCAL_RANK", "0"))
