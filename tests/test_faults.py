"""Faults: killed, full, read-only, corrupted, hostile, out of memory. Nothing is half done."""

import json
import os
import random
import struct
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from pera_kernels.checkpoint import read_adapter
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pera_kernels as pk
from tests.adapted import plain_model, state, trained

ROOT = Path(__file__).resolve().parents[1]
# What a file that is refused raises.
REFUSED = (ValueError, FileNotFoundError)


def python(code, *arguments, **environment):
    """Run code in a process of its own; what it printed as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


KILLED = """
import json, os, random, signal, sys, time, warnings
import torch
torch.set_num_threads(1)
import pera_kernels as pk
from pera_kernels.checkpoint import read_adapter
from tests.adapted import plain_model, trained

folder, kills = sys.argv[1], int(sys.argv[2])
models = [trained(plain_model(n=64, hidden=256), r=r, seed=r) for r in (3, 8)]
states = [pk.adapter_state_dict(model) for model in models]
pk.save_adapter(models[0], folder)
chance, found, stored = random.Random(7), {"0": 0, "1": 0}, 0
for _ in range(kills):
    child = os.fork()
    if child == 0:
        while True:
            for model in models[:: chance.choice((1, -1))]:
                pk.save_adapter(model, folder)
    time.sleep(chance.uniform(0.0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        read = read_adapter(folder)
    stored += any("which counts" in str(w.message) for w in told)
    own = {f"{name}.{part}": t for name, parts in read.tensors.items() for part, t in parts.items()}
    which = [
        i for i, s in enumerate(states)
        if s.keys() == own.keys() and all(torch.equal(s[k], own[k]) for k in s)
    ]
    assert len(which) == 1, "neither the old checkpoint nor the new one"
    assert {o["r"] for o in read.options.values()} == {(3, 8)[which[0]]}
    found[str(which[0])] += 1
print(json.dumps({"found": found, "between": stored}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_during_a_save_at_50_points(tmp_path, record):
    pytest.importorskip("safetensors")
    figures = python(KILLED, tmp_path / "adapter", 50)
    assert sum(figures["found"].values()) == 50
    assert min(figures["found"].values()) > 0
    record(
        kills=50, old=figures["found"]["0"], new=figures["found"]["1"], between=figures["between"]
    )


FULL = """
import json, resource, signal, sys
import torch, pera_kernels as pk
from tests.adapted import trained, plain_model
folder = sys.argv[1]
pk.save_adapter(trained(), folder)
before = open(folder + "/adapter_model.safetensors", "rb").read()
big = trained(plain_model(n=256, hidden=512), r=16)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    pk.save_adapter(big, folder)
    error = None
except OSError as raised:
    error = str(raised)
import os
print(json.dumps({
    "error": error,
    "same": before == open(folder + "/adapter_model.safetensors", "rb").read(),
    "files": sorted(os.listdir(folder)),
}))
"""


def test_no_room_left(tmp_path):
    """The limit on a file's size stands for a full disk: a write fails in the middle."""
    pytest.importorskip("safetensors")
    found = python(FULL, tmp_path / "adapter")
    assert "File too large" in found["error"] and found["same"]
    assert found["files"] == ["adapter_config.json", "adapter_model.safetensors"]


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
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PermissionError):
            pk.save_adapter(trained(r=2), tmp_path)
    finally:
        tmp_path.chmod(0o755)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def corrupted(data, chance):
    """Cut short, bits flipped, bytes overwritten, inserted or taken out."""
    data = bytearray(data)
    kind = chance.randrange(5)
    place = chance.randrange(len(data))
    if kind == 0:
        return bytes(data[:place])
    if kind == 1:
        for _ in range(chance.choice((1, 1, 1, 8))):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == 2:
        size = chance.randrange(1, 64)
        data[place : place + size] = chance.randbytes(min(size, len(data) - place))
    elif kind == 3:
        data[place:place] = chance.randbytes(chance.randrange(1, 16))
    else:
        del data[place : place + chance.randrange(1, 16)]
    return bytes(data)


def test_200_random_corruptions_are_refused_or_load_exactly(tmp_path, record):
    pytest.importorskip("safetensors")
    pk.save_adapter(trained(), tmp_path)
    good = read_adapter(tmp_path)
    files = {name: (tmp_path / name).read_bytes() for name in
             ("adapter_model.safetensors", "adapter_config.json")}  # fmt: skip
    chance, refused = random.Random(11), 0
    for number in range(200):
        # Most of the bytes are tensors: the header and the readable file get their share.
        name = "adapter_config.json" if number % 4 == 3 else "adapter_model.safetensors"
        data = files[name]
        if number % 4 == 1:
            (size,) = struct.unpack("<Q", data[:8])
            bad = corrupted(data[: 8 + size], chance) + data[8 + size :]
        else:
            bad = corrupted(data, chance)
        (tmp_path / name).write_bytes(bad)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read = read_adapter(tmp_path)
        except REFUSED:
            refused += 1
        else:
            assert read.options == good.options and read.tensors.keys() == good.tensors.keys()
            for module, own in good.tensors.items():
                assert all(torch.equal(read.tensors[module][part], t) for part, t in own.items())
        (tmp_path / name).write_bytes(data)
    # A change of the readable file alone may load, with a warning: the stored one counts.
    assert 100 < refused <= 200
    record(corruptions=200, refused=refused, loaded_exactly=200 - refused)


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

GIB_MORE = 2

# Any other error than ValueError ends the process, and fails the test.
LIMITED = """
import json, resource, sys
import pera_kernels as pk
from tests.adapted import plain_model, state
model = plain_model()
before = state(model)
limit = int(sys.argv[1]) << 30
with open("/proc/self/statm") as file:
    held = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + limit, held + limit))
found = {}
for folder in sys.argv[2:]:
    try:
        pk.load_adapter(model, folder)
        found[folder] = "loaded"
    except ValueError as error:
        found[folder] = str(error)[:300]
after = state(model)
assert all((after[k] == before[k]).all() for k in before)
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_hostile_files_do_not_exhaust_memory(tmp_path, record):
    """In a process that may grow by 2 GiB: each is refused by name."""
    pytest.importorskip("safetensors")
    config = {"format": "pera_kernels", "format_version": 1, "r": 10**12, "alpha": 1.0,
              "terms": "full", "dropout": 0.0, "target_modules": ["a"]}  # fmt: skip
    folders = []
    for number, data in enumerate(HOSTILE.values()):
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        (folders[-1] / "adapter_model.safetensors").write_bytes(data)
        (folders[-1] / "adapter_config.json").write_text(json.dumps(config))
    found = python(LIMITED, GIB_MORE, *folders)
    for name, folder in zip(HOSTILE, folders, strict=True):
        error = found[str(folder)]
        assert str(folder) in error, f"{name}: {error}"
    record(hostile_files=len(HOSTILE), refused=len(found), gib=GIB_MORE)


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


def every_fault(call, check, most=1000):
    """Let ``call`` run out of memory at its first operation, its second, and so on."""
    for at in range(most):
        try:
            with FailAt(at):
                call()
        except torch.OutOfMemoryError:
            check()
        else:
            return at
    raise AssertionError(f"more than {most} operations")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(24, 24)
        self.k = nn.Linear(24, 8)
        self.v = nn.Linear(24, 8)

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


@pytest.mark.parametrize("T", [2, 40])
@pytest.mark.parametrize("make", [plain_model, Attention], ids=["layers", "group"])
@pytest.mark.parametrize("phase", ["forward", "backward", "eval"])
def test_out_of_memory_leaves_the_module_usable(phase, make, T, record):
    targets = ["q", "k", "v"] if make is Attention else ["up", "down"]
    torch.manual_seed(0)
    model = trained(make(), r=8, targets=targets, backend="torch")
    model.train(phase != "eval")
    x = torch.randn(T, 24)
    parameters = list(pk.adapter_parameters(model))

    def whole():
        torch.manual_seed(3)
        if phase == "eval":
            with torch.no_grad():
                return [model(x)]
        y = model(x)
        return [y, *torch.autograd.grad(y.square().sum(), parameters)]

    expected, before = whole(), state(model)

    def check():
        assert all(torch.equal(a, b) for a, b in zip(whole(), expected, strict=True))
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())

    if phase == "backward":
        for at in range(400):
            torch.manual_seed(3)
            y = model(x)
            try:
                with FailAt(at):
                    torch.autograd.grad(y.square().sum(), parameters)
            except torch.OutOfMemoryError:
                check()
            else:
                break
        operations = at
    else:
        operations = every_fault(whole, check)
    assert operations > 5
    record(operations=operations)


CHANGES = {
    "merge": (lambda m: pk.merge(m), False),
    "merge without base": (lambda m: pk.merge(m, keep_base=False), False),
    "unmerge": (lambda m: pk.unmerge(m), True),
    "unload": (lambda m: pk.unload(m), False),
    "inject": (lambda m: pk.inject(m, ["head"], 2), False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_fails_leaves_the_state_as_it_was(name):
    call, merged = CHANGES[name]

    def make():
        model = trained(plain_model(), backend="reference")
        model.add_module("head", nn.Linear(24, 3))
        return pk.merge(model) if merged else model

    model = make()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    kinds = [type(m) for m in model.modules()]
    trains = [p.requires_grad for p in model.parameters()]
    done = 0
    for at in range(400):
        try:
            with FailAt(at):
                call(model)
        except torch.OutOfMemoryError:
            done += 1
            now = dict(model.named_parameters())
            assert [type(m) for m in model.modules()] == kinds
            assert [p.requires_grad for p in model.parameters()] == trains
            tolerance = (
                {} if name not in ("merge without base", "unload") else {"atol": 1e-6, "rtol": 1e-6}
            )
            for n, p in weights.items():
                torch.testing.assert_close(
                    now[n].detach(), p, **(tolerance or {"atol": 0, "rtol": 0})
                )
            assert all(m.merged is merged for m in pk.adapted_modules(model).values())
            assert merged or all(m.merged_base is None for m in pk.adapted_modules(model).values())
        else:
            break
    assert done > 3


def test_an_exception_inside_disabled():
    layer = pk.PeraLinear(8, 8, 2)
    nn.init.normal_(layer.pera_B)
    x = torch.randn(3, 8)
    y = layer(x)
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), layer.disabled(), layer.disabled():
            raise error
    assert torch.equal(layer(x), y)


CACHE = """
import json, sys, warnings
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pera_kernels import triton_cache

@triton.jit
def kernel(p, n, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(p + o, o, mask=o < n)

class Compiled:
    device_caches = {"loaded": 1}
    def __getitem__(self, grid):
        def launch(**arguments):
            source = ASTSource(kernel, {"p": "*i32", "n": "i32", "B": "constexpr"}, {(2,): 64})
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
            self.size = len(made.asm["cubin"])
        return launch

own = Compiled()
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    triton_cache.run(own, (1,))
    triton_cache.run(own, (1,))
told = [str(w.message) for w in told if "Triton's cache" in str(w.message)]
print(json.dumps({"size": own.size, "told": told, "own": triton_cache._own}))
"""


def compiled(folder, script):
    # Triton reads a kernel's source from its file.
    script.write_text(CACHE)
    run = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    return python(run, TRITON_CACHE_DIR=str(folder), TRITON_INTERPRET="0")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache with one compiled kernel."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("cache")
    found = compiled(folder, tmp_path_factory.mktemp("script") / "script.py")
    assert found["size"] > 1000 and found["told"] == []
    return folder


@pytest.mark.parametrize("fault", ["a file in its place", "cannot be made", "damaged", "gone"])
def test_a_bad_triton_cache_is_survived(fault, cache, tmp_path, record):
    import shutil

    folder = tmp_path / "cache"
    if fault == "a file in its place":
        folder.write_text("")
        folder = folder / "below"
    elif fault == "cannot be made":
        folder = Path("/proc/pera_kernels")
    else:
        shutil.copytree(cache, folder)
        for path in folder.rglob("__grp__*"):
            path.write_text(path.read_text().replace(str(cache), str(folder)))
        for path in folder.rglob("kernel.json" if fault == "damaged" else "kernel.cubin"):
            path.write_text("{") if fault == "damaged" else path.unlink()
    found = compiled(folder, tmp_path / "script.py")
    assert found["size"] > 1000
    if fault == "gone" and not found["told"]:
        # From 3.9 on Triton itself compiles again what is missing.
        assert found["own"] is None and list(folder.rglob("kernel.cubin"))
    else:
        assert len(found["told"]) == 1 and str(folder) in found["told"][0]
        assert not Path(found["own"]).exists()
    record(faults=1)


def test_other_errors_of_a_launch_are_not_swallowed():
    triton_cache = pytest.importorskip("pera_kernels.triton_cache")

    class Broken:
        def __init__(self, error):
            self.error, self.calls = error, 0

        def __getitem__(self, grid):
            def launch(**arguments):
                self.calls += 1
                raise self.error

            return launch

    for error in (RuntimeError("out of resource: shared memory"), KeyError("n"), ValueError("x")):
        kernel = Broken(error)
        with pytest.raises(type(error)):
            triton_cache.run(kernel, (1,))
        assert kernel.calls == 1


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
