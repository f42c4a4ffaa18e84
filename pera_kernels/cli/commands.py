"""The commands."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from ..adapters.beside import beside_of
from ..adapters.checkpoint import read_adapter
from ..adapters.export import AdapterView, LoraExport, export_views
from . import describe, diagnosis, plots, updates
from .merging import add_to
from .tables import progress, table
from .verify import verify

__all__ = ["COMMANDS"]


def _print_json(value: Any) -> None:
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False, default=str, allow_nan=False))


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become the strings "nan", "inf" and "-inf"."""
    if isinstance(value, dict):
        return {key: _finite(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(own) for own in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def info(given: argparse.Namespace) -> int:
    found = describe.installation()
    if given.json:
        _print_json(found)
        return 0
    plain = {k: v for k, v in found.items() if not isinstance(v, dict)}
    table("", ["this installation", ""], [[k.replace("_", " "), str(v)] for k, v in plain.items()])
    rows = [[name, reason or "ready"] for name, reason in found["backends"].items()]
    table("", ["backend", "state"], rows)
    rows = [[name, version or "not installed"] for name, version in found["versions"].items()]
    table("", ["package", "version"], rows)
    return 0


def inspect(given: argparse.Namespace) -> int:
    if (given.adapter is None) == (given.update is None):
        raise ValueError("give either ADAPTER or --update BASE TUNED")
    if given.modules is not None and given.update is None:
        raise ValueError("--modules goes with --update")
    if given.plot is not None:
        # Before what may take long.
        plots.check(given.plot)
    bar = iter if given.json else partial(progress, what="spectra")
    if given.update is None:
        found = diagnosis.adapter(read_adapter(given.adapter), bar)
        show, draw = diagnosis.show, partial(plots.adapter, found)
    else:
        base, tuned = given.update
        found, sigmas = updates.update(base, tuned, given.modules, bar)
        show, draw = updates.show, partial(plots.update, sigmas)
    if given.plot is not None:
        draw(given.plot)
    if given.json:
        _print_json(found)
    else:
        show(found)
    return 0


def export_lora(given: argparse.Namespace) -> int:
    read = read_adapter(given.adapter)
    views = {
        name: AdapterView(
            own["pera_A"],
            own["pera_B"],
            own.get("pera_h"),
            read.options[name]["alpha"] / read.options[name]["r"],
            read.options[name]["terms"],
            merged=False,
            fan_in_fan_out=bool(read.config.get("fan_in_fan_out")),
        )
        for name, own in read.tensors.items()
    }
    _refuse_filled(Path(given.out))
    done = export_views(
        views,
        given.out,
        list(views),
        given.base_model or read.base_model,
        given.pad_to,
        given.dtype,
        exact_scale=given.exact_scale,
        prune_zero=given.prune_zero,
        rank=given.rank,
        beside=beside_of(read, read.config.get("modules_to_save") or ()),
    )
    if given.json:
        _print_json(_told(done))
    else:
        print(done)
    return 0


def _told(done: LoraExport) -> dict[str, Any]:
    return {**vars(done), "folder": str(done.folder), "dtype": str(done.dtype)}


def _refuse_filled(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: nothing is overwritten")
    if file := next((above for above in out.parents if above.is_file()), None):
        raise ValueError(f"{out} cannot be made: {file} is a file")


# What a model's folder holds besides its weights and what saving writes again.
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.index.json")


def _loaded(architecture: Any, base: Path, dtype: Any) -> Any:
    """The base model with all of its weights."""
    from safetensors import SafetensorError

    try:
        model, report = architecture.from_pretrained(
            base, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
        )
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{base} cannot be loaded: {error}") from error
    if lacking := sorted(report["missing_keys"]):
        more = ", ..." if len(lacking) > 4 else ""
        raise ValueError(
            f"{base} lacks {len(lacking)} weights of {architecture.__name__}, which would be "
            f"random: {', '.join(lacking[:4])}{more}"
        )
    return model


def merge(given: argparse.Namespace) -> int:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            'merge needs the transformers package: pip install "pera_kernels[cli]"'
        ) from error
    base, out = Path(given.base), Path(given.out)
    if not base.is_dir():
        raise ValueError(f"there is no folder {base}")
    _refuse_filled(out)
    read = read_adapter(given.adapter)
    config = transformers.AutoConfig.from_pretrained(base, local_files_only=True)
    names = [n for n in getattr(config, "architectures", None) or () if hasattr(transformers, n)]
    if not names:
        raise ValueError(
            f"{base} names no architecture that transformers has: "
            f"{getattr(config, 'architectures', None)}"
        )
    model = _loaded(getattr(transformers, names[0]), base, given.dtype)
    add_to(model, read)
    out.parent.mkdir(parents=True, exist_ok=True)
    # The folder appears when it is whole.
    new = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        model.save_pretrained(new)
        for file in base.iterdir():
            weights = any(file.match(pattern) for pattern in _WEIGHTS)
            if file.is_file() and not weights and not (new / file.name).exists():
                shutil.copy2(file, new / file.name)
        new.chmod(0o755)
        if out.exists():
            out.rmdir()
        new.rename(out)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    told = {"out": str(out), "modules": len(read.tensors), "architecture": names[0]}
    if given.json:
        _print_json(told)
    else:
        print(f"{told['modules']} modules merged into {names[0]}: {out}")
    return 0


COMMANDS = {
    "info": info,
    "inspect": inspect,
    "export-lora": export_lora,
    "merge": merge,
    "verify": verify,
}
