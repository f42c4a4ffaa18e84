"""The commands."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..adapters import merge as merging
from ..adapters.checkpoint import place, read_adapter
from ..adapters.export import AdapterView, LoraExport, export_views
from . import describe
from .tables import progress, shown, table
from .verify import verify

__all__ = ["COMMANDS"]


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


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
    found = describe.adapter(read_adapter(given.adapter))
    if given.json:
        _print_json(found)
        return 0
    modules = found["modules"].values()
    keys = {
        "in_features": "in",
        "out_features": "out",
        "r": "r",
        "terms": "terms",
        "expanded_rank": "K",
        "scale": "scale",
        "dropout": "dropout",
        "dtype": "dtype",
        "zero_coefficients": "h = 0",
        "delta_norm": "‖ΔW‖",
        "quadratic_share": "quadratic",
    }
    # What all modules have in common is said once.
    common = {
        key: next(iter(modules))[key]
        for key in keys
        if key not in ("delta_norm", "quadratic_share") and len({own[key] for own in modules}) == 1
    }
    told = [key for key in keys if key not in common]
    rows = [[name, *(own[key] for key in told)] for name, own in found["modules"].items()]
    table(found["path"], ["module", *(keys[key] for key in told)], rows)
    vllm = found["vllm_max_lora_rank"]
    if common:
        print("All: " + ", ".join(f"{keys[key]} {shown(value)}" for key, value in common.items()))
    print(
        f"{found['parameters']:,} parameters in {len(rows)} modules"
        + (f", for {found['base_model']}" if found["base_model"] else "")
        + f". As plain LoRA: rank {found['lora_rank']}, "
        + (f"vLLM --max-lora-rank {vllm}." if vllm else "more than any --max-lora-rank of vLLM.")
    )
    broken = [name for name, own in found["modules"].items() if not own["finite"]]
    if broken:
        print(f"Not finite: {', '.join(broken)}")
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


# What a model's folder holds besides its weights and what saving writes again.
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.index.json")


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
    model = getattr(transformers, names[0]).from_pretrained(
        base, dtype=given.dtype or "auto", local_files_only=True
    )
    place(model, read, strict=True, overwrite=False, backend="auto")
    merging.unload(model, progress=lambda items: progress(items, "merging"))
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
