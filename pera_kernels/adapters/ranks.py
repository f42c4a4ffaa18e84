"""What the processes that share a model agree on, in bounded time.

They tell each other by the key-value store of ``torch.distributed``, whatever the backend is.
"""

from __future__ import annotations

import contextlib
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..checks import check_model
from ..sharded import is_dtensor, is_partition, refuse_active, whole
from .engines import is_fsdp

__all__ = ["Together", "all_ranks", "exchange", "ranks_of", "together"]

ResultT = TypeVar("ResultT")

# How long one process waits for the others, in seconds.
PATIENCE = 300.0

_turns: Counter[tuple[str, tuple[int, ...]]] = Counter()


def all_ranks() -> tuple[int, ...]:
    """Every process of ``torch.distributed``; () where it is not used."""
    if dist.is_available() and dist.is_initialized():
        return tuple(range(dist.get_world_size()))
    return ()


def exchange(ranks: Sequence[int], call: str, told: Any) -> dict[int, Any]:
    """What each of these processes tells, by rank.

    Raises:
        TimeoutError: some did not make this call within ``PATIENCE`` seconds.
    """
    turns, own = (call, tuple(ranks)), dist.get_rank()
    turn, place = _turns[turns], f"pera_kernels/{call}/{'-'.join(map(str, ranks))}"
    store = dist.PrefixStore(place, dist.distributed_c10d._get_default_store())
    keys = {rank: f"{turn}/{rank}" for rank in ranks}
    store.set(keys[own], pickle.dumps(told))  # type: ignore[arg-type]
    try:
        store.wait(list(keys.values()), timedelta(seconds=PATIENCE))
    except RuntimeError:
        missing = [str(rank) for rank, key in keys.items() if not store.check([key])]
        # As if this process had not come: who comes later waits for a new call of it.
        store.delete_key(keys[own])
        if not missing:
            raise
        raise TimeoutError(
            f"{call} is for every process that holds a part of the model: rank "
            f"{', '.join(missing)} of {len(ranks)} did not call it within {PATIENCE:g} s of rank "
            f"{own}'s call"
        ) from None
    # One message for all, where the store can.
    every = list(keys.values())
    at_once = store.has_extended_api()  # type: ignore[attr-defined]
    found = store.multi_get(every) if at_once else [store.get(key) for key in every]
    _turns[turns] += 1
    # Everybody who is here has read what was told in the turn before.
    if turn:
        store.delete_key(f"{turn - 1}/{own}")
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
        """What every process does by itself within this context, such as reading a file, fails in
        all if it fails in one.
        """
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        if self.ranks:
            self._agree(failure, None)
        elif failure is not None:
            raise failure

    def on_first(self, action: Callable[[], ResultT]) -> ResultT:
        """The result of what the first process alone does, for all. If it fails there, it fails
        in all.
        """
        if not self.ranks:
            return action()
        result = failure = None
        if self.is_first:
            try:
                result = action()
            except Exception as error:
                # Raised once the others know.
                failure = error
        return self._agree(failure, result)[0]  # type: ignore[no-any-return]

    def _agree(self, failure: Exception | None, result: Any) -> list[Any]:
        """The results of all processes, or one's failure in all."""
        text = None if failure is None else f"{type(failure).__name__}: {failure}"
        told = exchange(self.ranks, f"the end of {self.call}", (text, result))
        if failure is not None:
            raise failure
        for rank, (text, _) in told.items():
            if text is not None:
                raise RuntimeError(f"{self.call} failed on rank {rank}: {text}")
        return [value for _, value in told.values()]


@contextlib.contextmanager
def together(model: nn.Module, call: str) -> Iterator[Together]:
    """Within this context ``call`` is made for a model that may be sharded: by every process that
    holds a part of it, else it ends in a TimeoutError.
    """
    check_model(model)
    for module in model.modules():
        # After a forward the outermost module keeps whole parameters: a write would be lost.
        if is_fsdp(module):
            module.reshard()  # type: ignore[operator]
    refuse_active(model.parameters())
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
