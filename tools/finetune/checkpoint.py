"""What an adaptation has reached, in a folder that any number of ranks goes on from."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from tools.finetune.ranks import Ranks

# The base is in base.pt.
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


class Checkpoints:
    """One checkpoint in ``folder``, replaced by the next when that is whole."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder = folder
        self.ranks = ranks
        self.pointer = folder / "latest.json"

    def latest(self) -> dict[str, Any] | None:
        """What was told with the last whole checkpoint; None where there is none.

        Raises:
            ValueError: the file that says so is damaged.
        """
        if not self.pointer.exists():
            return None
        told = json.loads(self.pointer.read_text())
        if not isinstance(told, dict) or not (self.folder / str(told.get("folder"))).is_dir():
            raise ValueError("it names no folder that is there")
        return told

    def forget(self) -> None:
        """Let no job go on from what an earlier one wrote here, for this one writes over it."""
        if self.ranks.is_first and self.folder.exists():
            self.pointer.unlink(missing_ok=True)

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, name: str, told: dict[str, Any]
    ) -> None:
        """Write what trains and its optimizer to a folder ``name``, on every rank; then ``told``,
        on the first.
        """
        own, state = get_state_dict(model, optimizer, options=TRAINED)
        dcp.save({"model": own, "optimizer": state}, checkpoint_id=self.folder / name)
        if not self.ranks.is_first:
            return
        partial = self.pointer.with_suffix(".partial")
        partial.write_text(json.dumps({**told, "folder": name}) + "\n")
        partial.replace(self.pointer)
        for other in self.folder.iterdir():
            if other.is_dir() and other.name != name:
                shutil.rmtree(other)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, name: str) -> None:
        """Read a folder into the model and the optimizer, on every rank."""
        own, state = get_state_dict(model, optimizer, options=TRAINED)
        dcp.load({"model": own, "optimizer": state}, checkpoint_id=self.folder / name)
        set_state_dict(
            model, optimizer, model_state_dict=own, optim_state_dict=state, options=TRAINED
        )
