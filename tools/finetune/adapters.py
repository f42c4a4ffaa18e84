"""How adapters get into a model, are merged, and are saved: by this package, or through PEFT."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

import pera_kernels as pk
from pera_kernels.module import quadratic_share
from tools.finetune.model import TARGET_MODULES


class Adapters:
    """Those of ``pera_kernels.inject``."""

    source = "pera_kernels"

    def put(self, model: nn.Module, rank: int, terms: Any) -> nn.Module:
        """The model with new adapters."""
        return pk.inject(model, TARGET_MODULES, rank, alpha=rank, terms=terms)

    def groups(self, model: nn.Module, lr: float, lr_h: float | None) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer."""
        return pk.parameter_groups(model, lr, lr_h=lr_h)

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights that merging changes."""
        return {name: layer.weight for name, layer in pk.adapted_modules(model).items()}

    def merge(self, model: nn.Module) -> None:
        pk.merge(model)

    def unmerge(self, model: nn.Module) -> None:
        pk.unmerge(model)

    def shares(self, model: nn.Module) -> list[float]:
        """The quadratic share of every layer."""
        return [layer.quadratic_share() for layer in pk.adapted_modules(model).values()]

    def save(self, model: nn.Module, folder: Path, is_first: bool) -> None:
        """Write the adapters; what is sharded is gathered, and the first rank writes."""
        pk.save_adapter(model, folder, base_model="base.pt beside this folder")


class PeftAdapters(Adapters):
    """Those of ``peft.get_peft_model``."""

    source = "PEFT"

    def put(self, model: nn.Module, rank: int, terms: Any) -> nn.Module:
        import peft

        from pera_kernels.peft import PeraConfig

        return peft.get_peft_model(  # type: ignore[no-any-return]
            model, PeraConfig(r=rank, terms=terms, target_modules=TARGET_MODULES)
        )

    def groups(self, model: nn.Module, lr: float, lr_h: float | None) -> list[dict[str, Any]]:
        from pera_kernels.peft import parameter_groups

        return parameter_groups(model, lr, lr_h=lr_h)

    def _layers(self, model: Any) -> dict[str, Any]:
        from pera_kernels.peft import PeraLayer

        return {name: m for name, m in model.named_modules() if isinstance(m, PeraLayer)}

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: layer.base_layer.weight for name, layer in self._layers(model).items()}

    def merge(self, model: Any) -> None:
        model.merge_adapter()

    def unmerge(self, model: Any) -> None:
        model.unmerge_adapter()

    def shares(self, model: nn.Module) -> list[float]:
        views = [layer.pera_view() for layer in self._layers(model).values()]
        return [quadratic_share(view.A, view.B, view.h, view.terms) for view in views]

    def save(self, model: Any, folder: Path, is_first: bool) -> None:
        model.save_pretrained(folder, is_main_process=is_first)
