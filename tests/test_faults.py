"""Faults: killed, full, read-only, corrupted, hostile, out of memory. Nothing is half done."""

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pera_kernels as pk
from pera_kernels.adapters.checkpoint import read_adapter
from tests.adapted import plain_model, state, trained

ROOT = Path(__file__).resolve().parents[1]
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def in_another_process(function, *arguments):
    """What a function of this file returns there."""
    program = (
        f"import json, sys; from tests.test_faults import {function.__name__} as function;"
        "print(json.dumps(function(*json.loads(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(arguments, default=str)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def quietly_read(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_adapter(folder)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# ---- saving


def killed_while_saving(folder, kills):
    """After each kill of a process that writes one adapter over another, whether the new one is
    there; else it is the old one.
    """
    torch.set_num_threads(1)
    models = {r: trained(plain_model(n=64, hidden=256), r=r, seed=r) for r in (3, 8)}
    pk.save_adapter(models[3], folder)
    began = time.perf_counter()
    pk.save_adapter(models[8], folder)
    a_save = time.perf_counter() - began
    chance, found = random.Random(7), []
    for _ in range(kills):
        old, new = chance.sample((3, 8), 2)
        told, tell = os.pipe()
        if (child := os.fork()) == 0:
            pk.save_adapter(models[old], folder)
            os.write(tell, b".")
            pk.save_adapter(models[new], folder)
            signal.pause()
        os.close(tell)
        assert os.read(told, 1) == b"."
        os.close(told)
        time.sleep(chance.uniform(0.0, 1.5 * a_save))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        read = quietly_read(folder)
        (r,) = {own["r"] for own in read.options.values()}
        expected = pk.adapter_state_dict(models[r])
        own = {f"{n}.{part}": t for n, parts in read.tensors.items() for part, t in parts.items()}
        assert own.keys() == expected.keys()
        assert all(torch.equal(own[name], t) for name, t in expected.items())
        found.append(r == new)
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_a_save_that_is_killed_leaves_the_old_checkpoint_or_the_new_one(kills, tmp_path):
    pytest.importorskip("safetensors")
    found = in_another_process(killed_while_saving, tmp_path / "adapter", kills)
    assert len(found) == kills


def saved_without_room(folder):
    """The error of a save of which only 20,000 bytes fit into a file."""
    import resource

    big = trained(plain_model(n=256, hidden=512), r=16)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        pk.save_adapter(big, folder)
    except OSError as error:
        return str(error)


def test_no_room_left(tmp_path):
    """The limit on a file's size stands for a full disk: a write fails in the middle."""
    pytest.importorskip("safetensors")
    pk.save_adapter(trained(), tmp_path)
    before = contents(tmp_path)
    assert "File too large" in in_another_process(saved_without_room, tmp_path)
    assert contents(tmp_path) == before


def test_places_that_cannot_be_written(tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/pera_kernels")):
        with pytest.raises(OSError, match=folder.name if folder.name != "below" else "file"):
            pk.save_adapter(trained(), folder)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root writes everywhere")
def test_a_read_only_folder(tmp_path):
    pytest.importorskip("safetensors")
    pk.save_adapter(trained(), tmp_path)
    before = contents(tmp_path)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PermissionError):
            pk.save_adapter(trained(r=2), tmp_path)
    finally:
        tmp_path.chmod(0o755)
    assert contents(tmp_path) == before


# ---- loading


def corrupted(data, chance):
    """Cut short, bits flipped, bytes overwritten, inserted or taken out."""
    data, place, count = bytearray(data), chance.randrange(len(data)), chance.randrange(1, 16)
    kind = chance.choice(["cut", "flip", "overwrite", "insert", "remove"])
    if kind == "cut":
        del data[place:]
    elif kind == "flip":
        for _ in range(chance.choice((1, 1, 1, 8))):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == "overwrite":
        data[place : place + count] = chance.randbytes(min(count, len(data) - place))
    elif kind == "insert":
        data[place:place] = chance.randbytes(count)
    else:
        del data[place : place + count]
    return bytes(data)


def test_200_random_corruptions_are_refused_or_load_exactly(tmp_path):
    pytest.importorskip("safetensors")
    pk.save_adapter(trained(), tmp_path)
    good, files = read_adapter(tmp_path), contents(tmp_path)
    (header_size,) = struct.unpack("<Q", files[TENSORS][:8])
    chance, refused = random.Random(11), 0
    for number in range(200):
        # Most of the bytes are tensors: the header and the readable file get their share.
        name = CONFIG if number % 4 == 3 else TENSORS
        end = 8 + header_size if number % 4 == 1 else len(files[name])
        bad = corrupted(files[name][:end], chance) + files[name][end:]
        (tmp_path / name).write_bytes(bad)
        try:
            read = quietly_read(tmp_path)
        except (ValueError, FileNotFoundError):
            refused += 1
        else:
            assert read.options == good.options and read.tensors.keys() == good.tensors.keys()
            for module, own in good.tensors.items():
                assert all(torch.equal(read.tensors[module][part], t) for part, t in own.items())
        (tmp_path / name).write_bytes(files[name])
    # A change of the readable file alone may load, with a warning: the stored one counts.
    assert 100 < refused <= 200


def header(entries, size=None, data=b""):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(shape, begin=0, end=0, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "size of everything": header({}, size=2**63),
    "size of a terabyte": header({}, size=2**40),
    "huge shape": header({"a.pera_A": entry([10**6, 10**6], 0, 4)}, data=b"1234"),
    "overflowing shape": header({"a.pera_A": entry([2**32, 2**32], 0, 0)}),
    "huge offsets": header({"a.pera_A": entry([2**40], 0, 2**42)}),
    "negative shape": header({"a.pera_A": entry([-4, -1], 0, 16)}, data=bytes(16)),
    "overlap": header(
        {"a.pera_A": entry([4], 0, 16), "a.pera_B": entry([4], 8, 24)}, data=bytes(24)
    ),
    "hole": header({"a.pera_A": entry([1], 0, 4), "a.pera_B": entry([1], 8, 12)}, data=bytes(12)),
    "unknown dtype": header({"a.pera_A": entry([4], 0, 16, "F128")}, data=bytes(16)),
    "nested": header(b"[" * 10**6),
    "not text": header(b"\xff\xfe\x00{}"),
    "a million names": header({f"a{i}.pera_A": entry([0]) for i in range(10**5)}),
}


def loaded_with_two_gib(folders):
    """The error of each load in a process that may grow by 2 GiB; any but ValueError ends it."""
    import resource

    model = plain_model()
    before, errors = state(model), []
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = held + 2 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for folder in folders:
        try:
            pk.load_adapter(model, folder)
        except ValueError as error:
            errors.append(str(error)[:300])
        else:
            errors.append("loaded")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    return errors


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_hostile_files_do_not_exhaust_memory(tmp_path):
    """Each is refused by name."""
    pytest.importorskip("safetensors")
    config = {"format": "pera_kernels", "format_version": 1, "r": 10**12, "alpha": 1.0,
              "terms": "full", "dropout": 0.0, "target_modules": ["a"]}  # fmt: skip
    folders = [tmp_path / str(number) for number in range(len(HOSTILE))]
    for folder, data in zip(folders, HOSTILE.values(), strict=True):
        folder.mkdir()
        (folder / TENSORS).write_bytes(data)
        (folder / CONFIG).write_text(json.dumps(config))
    errors = in_another_process(loaded_with_two_gib, folders)
    for name, folder, error in zip(HOSTILE, folders, errors, strict=True):
        assert str(folder) in error, f"{name}: {error}"


# ---- out of memory


class FailAt(TorchDispatchMode):
    """Out of memory at operation number ``at``."""

    def __init__(self, at):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at + 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return function(*args, **(kwargs or {}))


# At every operation, or at every seventh.
EVERY = pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])


def fail_everywhere(call, check, step):
    """Let ``call`` run out of memory at operation 0, ``step`` and so on, until it ends.

    ``check`` runs after each failure; returns how many operations there were.
    """
    for at in range(0, 2000, step):
        try:
            with FailAt(at):
                call()
        except torch.OutOfMemoryError:
            check()
        else:
            return at
    raise AssertionError("more than 2000 operations")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(24, 24)
        self.key = nn.Linear(24, 8)
        self.value = nn.Linear(24, 8)

    def forward(self, x):
        return torch.cat([self.query(x), self.key(x), self.value(x)], -1)


@EVERY
@pytest.mark.parametrize("make", [plain_model, Attention], ids=["layers", "shared input"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_out_of_memory_leaves_the_module_usable(training, make, step):
    """At each operation of a forward and backward, or of a forward in evaluation."""
    targets = ["query", "key", "value"] if make is Attention else ["up", "down"]
    model = trained(make(), r=8, targets=targets, backend="torch").train(training)
    x = torch.randn(20, 24)
    parameters = list(pk.adapter_parameters(model))

    def call():
        with torch.set_grad_enabled(training):
            y = model(x)
        return [y, *torch.autograd.grad(y.square().sum(), parameters)] if training else [y]

    expected, before = call(), state(model)

    def check():
        assert all(torch.equal(a, b) for a, b in zip(call(), expected, strict=True))
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())

    assert fail_everywhere(call, check, step) > 5


CHANGES = {
    "merge": (lambda m: pk.merge(m), False),
    "merge without base": (lambda m: pk.merge(m, keep_base=False), False),
    "unmerge": (lambda m: pk.unmerge(m), True),
    "unload": (lambda m: pk.unload(m), False),
    "inject": (lambda m: pk.inject(m, ["head"], 2), False),
}


@EVERY
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_fails_leaves_the_state_as_it_was(name, step):
    change, merged = CHANGES[name]
    model = trained(plain_model(), backend="reference")
    model.add_module("head", nn.Linear(24, 3))
    model = pk.merge(model) if merged else model
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    kinds = [type(m) for m in model.modules()]
    trains = [p.requires_grad for p in model.parameters()]
    # Without a copy of the base, the merged weight minus the update is only nearly the base.
    tolerance = 1e-6 if name in ("merge without base", "unload") else 0.0

    def check():
        now = dict(model.named_parameters())
        assert [type(m) for m in model.modules()] == kinds
        assert [p.requires_grad for p in model.parameters()] == trains
        for n, p in weights.items():
            torch.testing.assert_close(now[n].detach(), p, atol=tolerance, rtol=tolerance)
        assert all(m.merged is merged for m in pk.adapted_modules(model).values())
        assert merged or all(m.merged_base is None for m in pk.adapted_modules(model).values())

    assert fail_everywhere(lambda: change(model), check, step) > 3


def test_an_exception_inside_disabled():
    layer = pk.PeraLinear(8, 8, 2)
    nn.init.normal_(layer.pera_B)
    x = torch.randn(3, 8)
    y = layer(x)
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), layer.disabled(), layer.disabled():
            raise error
    assert torch.equal(layer(x), y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_out_of_memory_leaves_the_layer_usable():
    layer = pk.PeraLinear(4096, 4096, 16, device="cuda", dtype=torch.bfloat16)
    nn.init.normal_(layer.pera_B, std=0.02)
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
    y = layer(x)
    free, _ = torch.cuda.mem_get_info()
    rows = free // (4096 * 2)
    with pytest.raises(torch.OutOfMemoryError):
        large = torch.empty(1, 4096, device="cuda", dtype=torch.bfloat16).expand(2 * rows, -1)
        layer(large)
    torch.cuda.empty_cache()
    assert torch.equal(layer(x), y)
