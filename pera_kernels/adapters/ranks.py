"""What the processes that share a model agree on, in bounded time.

They tell each other by the key-value store of ``torch.distributed``, whatever the backend is.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..checks import check_model
from ..operands import Factors
from ..sharded import is_dtensor, is_partition, refuse_active, reshard, whole
from .engines import refuse_offloaded_elsewhere

__all__ = ["Together", "all_ranks", "exchange", "ranks_of", "together"]

ResultT = TypeVar("ResultT")

# How long one process waits for the others, in seconds.
PATIENCE = 300.0
# And how long for the first one to have worked, which writes files for all.
WORK = 3600.0


def all_ranks() -> tuple[int, ...]:
    """Every process of ``torch.distributed``; () where it is not used."""
    if dist.is_available() and dist.is_initialized():
        return tuple(range(dist.get_world_size()))
    return ()


def exchange(
    ranks: Sequence[int], call: str, told: Any, patience: float | None = None
) -> dict[int, Any]:
    """What each of these processes tells, by rank.

    Whether all have come is decided once, by the first that knows, so that all get one answer. Who
    comes when it was decided that they had not all come waits for the next time.

    Args:
        patience: in seconds; None means ``PATIENCE``.

    Raises:
        TimeoutError: some did not make this call in time.
    """
    patience, own = PATIENCE if patience is None else patience, dist.get_rank()
    # Short, for it stands before every key.
    place = hashlib.sha256(f"{call} {tuple(ranks)}".encode()).hexdigest()[:16]
    calls = dist.PrefixStore(f"pera_kernels/{place}", dist.distributed_c10d._get_default_store())
    turn = calls.add(str(own), 1)
    while (store := dist.PrefixStore(str(turn), calls)).check(["outcome"]):
        turn = calls.add(str(own), 1)
    store.set(str(own), pickle.dumps(told))  # type: ignore[arg-type]
    names = [str(rank) for rank in ranks]
    outcome = "all"
    try:
        store.wait(names, timedelta(seconds=patience))
    except RuntimeError:
        missing = [name for name in names if not store.check([name])]
        outcome = ", ".join(missing) or outcome
    outcome = store.compare_set("outcome", "", outcome).decode()
    if outcome != "all":
        raise TimeoutError(
            f"{call} is for every process that holds a part of the model: rank {outcome} of "
            f"{len(ranks)} did not call it in {patience:g} s"
        )
    # One message for all, where the store can.
    at_once = store.has_extended_api()  # type: ignore[attr-defined]
    found = store.multi_get(names) if at_once else [store.get(name) for name in names]
    # Everybody who is here has read what was told the time before.
    if turn > 1:
        dist.PrefixStore(str(turn - 1), calls).delete_key(str(own))
    return dict(zip(ranks, map(pickle.loads, found), strict=True))


class Together:
    """A call that several processes make at once, each with its part of a model.

    With ``ranks`` empty the model is whole in this process, which does everything by itself.
    """

    def __init__(self, ranks: tuple[int, ...], call: str) -> None:
        self.ranks = ranks
        self.call = call

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files."""
        return not self.ranks or dist.get_rank() == self.ranks[0]

    def on_cpu(self, factors: Factors) -> Factors:
        """Of one layer what was gathered, on the CPU; as they are where the model is whole."""
        if not self.ranks:
            return factors
        A, B, h = (None if t is None else t.detach().to("cpu") for t in factors)
        return Factors(A, B, h)  # type: ignore[arg-type]

    def gather(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors whole, one after the other: in the first process on the CPU, none in the
        others. As they are where the model is whole.
        """
        if not self.ranks:
            return {name: tensor.detach() for name, tensor in tensors.items()}
        found = {}
        for name, tensor in tensors.items():
            value = whole(tensor).detach()
            if self.is_first:
                found[name] = value.to("cpu")
            del value
        return found

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """What processes do by themselves within this context, such as reading a file, fails in all
        if it fails in one.
        """
        failure = None
        try:
            yield
        except Exception as error:
            # Raised once the others know.
            failure = error
        if self.ranks:
            own = None if failure is None else f"{type(failure).__name__}: {failure}"
            told = exchange(self.ranks, f"the end of {self.call}", own, WORK)
            others = [f"rank {rank}: {text}" for rank, text in told.items() if text is not None]
            if failure is None and others:
                raise RuntimeError(f"{self.call} failed on {others[0]}")
        if failure is not None:
            raise failure

    def refuse_different(self, what: str, told: str) -> None:
        """Raise in all processes if they tell different things."""
        call = f"{what} of {self.call}"
        if self.ranks and len(set(exchange(self.ranks, call, told).values())) > 1:
            raise ValueError(f"{self.call}: {what} differ between ranks")

    def on_first(self, action: Callable[[], ResultT]) -> ResultT:
        """The result of what the first process alone does, for all. If it fails there, it fails
        in all.
        """
        result = None
        with self.failing_together():
            if self.is_first:
                result = action()
        if self.ranks:
            told = exchange(self.ranks, f"the result of {self.call}", result)
            result = told[self.ranks[0]]
        return result  # type: ignore[return-value]


@contextlib.contextmanager
def together(model: nn.Module, call: str) -> Iterator[Together]:
    """Within this context ``call`` is made for a model that may be sharded: by every process that
    holds a part of it, else it ends in a TimeoutError.
    """
    check_model(model)
    reshard(model.modules())
    refuse_active(model.parameters())
    refuse_offloaded_elsewhere(model)
    group = Together(ranks_of(model), call)
    if group.ranks:
        exchange(group.ranks, call, None)
    yield group


def ranks_of(model: nn.Module) -> tuple[int, ...]:
    """The processes that hold parts of a model; () where this one holds all of it."""
    ranks: set[int] = set()
    for parameter in model.parameters():
        if is_partition(parameter):
            return all_ranks()
        if is_dtensor(parameter):
            ranks.update(parameter.device_mesh.mesh.flatten().tolist())  # type: ignore[attr-defined]
    return tuple(sorted(ranks))
