"""What each rank does in the tests of several processes."""

import contextlib
import functools
import json
import os
import re
import time
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import pera_kernels as pk
from pera_kernels import parallel
from pera_kernels.adapters.files import read_safetensors
from pera_kernels.testing import judge

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


class Block(nn.Module):
    """A block with what a transformer's has: projections that share their input, two in a row."""

    def __init__(self, n=8, hidden=12):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(n, n) for _ in range(3))
        self.o_proj = nn.Linear(n, n)
        self.up_proj, self.down_proj = nn.Linear(n, hidden), nn.Linear(hidden, n)

    def forward(self, x):
        mixed = self.q_proj(x) * torch.sigmoid(self.k_proj(x)) + self.v_proj(x)
        x = x + self.o_proj(mixed)
        return x + self.down_proj(F.gelu(self.up_proj(x)))


class Model(nn.Module):
    """Two blocks and a head that trains whole; ``way`` is how activations are checkpointed."""

    def __init__(self, way=None):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 5)
        self.way = way

    def forward(self, x):
        for block in self.blocks:
            if self.way is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.way == "reentrant")
        return self.head(x)


def model(way=None, dtype=torch.float32, dropout=0.0, terms="full", seed=1, fill=True):
    torch.manual_seed(seed)
    built = Model(way)
    pk.inject(built, TARGETS, 3, dropout=dropout, terms=terms, modules_to_save=["head"])
    if fill:
        with torch.no_grad():
            for p in pk.adapter_parameters(built):
                p.normal_(std=0.3)
    # The same values in every dtype, up to rounding.
    return built.to(dtype)


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, 4, 8, generator=generator, dtype=torch.float32).to(dtype)


def trained_parameters(net):
    return {
        pk.adapters.inject.base_name(n).removeprefix("module."): p
        for n, p in net.named_parameters()
        if p.requires_grad
    }


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def loss_of(net, x):
    return net(x).square().mean()


@functools.lru_cache
def alone(dtype, backend="torch", dropout=0.0):
    """Loss and gradients of one process on the whole batch."""
    net = model(dtype=dtype, dropout=dropout)
    for layer in pk.adapted_modules(net).values():
        layer.backend = backend
    torch.manual_seed(11)
    loss = loss_of(net, batch(dtype).requires_grad_())
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in trained_parameters(net).items()}}


def compare(found, dtype=torch.float32, dropout=0.0):
    """The project's numeric rule: one process in the same dtype is the measure."""
    truth = alone(torch.float64, "reference", dropout)
    reference = alone(dtype, "reference", dropout)
    assert set(found) == set(truth)
    for name, got in found.items():
        verdict = judge(name, got.to(reference[name].dtype), reference[name], truth[name], dtype)
        assert verdict.passed, verdict
        # The measure is one: both compute the same up to rounding.
        torch.testing.assert_close(got.double(), truth[name], rtol=1e-3, atol=1e-5)


def wrapped(net, how, mesh=None):
    if how == "ddp":
        return DistributedDataParallel(net)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if how == "fsdp bf16" else None
    options = {} if policy is None else {"mp_policy": policy}
    if how == "fsdp offloaded":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if how == "fsdp of adapters":
        options["ignored_params"] = {p for p in net.parameters() if not p.requires_grad}
    for block in net.blocks:
        if how == "fsdp of layers":
            for child in block.children():
                fully_shard(child)
        fully_shard(block, **options)
    return fully_shard(net, **options)


def own_rows(x):
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def gradients(net, x, steps=1, how="ddp"):
    """Loss and gradients on the whole batch of which each rank has a part, in ``steps`` parts."""
    total = torch.zeros((), dtype=torch.float64)
    for step, part in enumerate(own_rows(x).chunk(steps)):
        last = step == steps - 1
        if how == "ddp":
            context = contextlib.nullcontext() if last else net.no_sync()
        else:
            net.set_requires_gradient_sync(last)
            context = contextlib.nullcontext()
        with context:
            loss = loss_of(net, part.clone().requires_grad_()) / steps
            loss.backward()
        total += loss.detach().double()
    dist.all_reduce(total)
    found = {n: whole(p.grad) for n, p in trained_parameters(net).items()}
    return {"loss": total / dist.get_world_size(), **found}


def data_parallel(how, way, steps, compiled):
    """Losses and gradients equal those of one process on the same batch."""
    net = wrapped(model(way), how)
    call = torch.compile(net, backend="aot_eager") if compiled else net
    if compiled:
        loss = loss_of(call, own_rows(batch()).requires_grad_())
        loss.backward()
        total = loss.detach().double()
        dist.all_reduce(total)
        found = {n: whole(p.grad) for n, p in trained_parameters(net).items()}
        compare({"loss": total / dist.get_world_size(), **found})
        torch._dynamo.reset()
        return
    compare(gradients(net, batch(), steps, how))


def meta_start():
    """A model that is made on the meta device has the values of one that is made here."""
    truth = model(fill=False)
    with torch.device("meta"):
        net = Model()
        pk.inject(net, TARGETS, 3, modules_to_save=["head"])
    wrapped(net, "fsdp")
    net.to_empty(device="cpu")
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, pk.PeraLinear):
            module.reset_adapter()
    torch.manual_seed(1)
    Model()
    # What is drawn is drawn as one process draws it, layer after layer.
    for name, layer in pk.adapted_modules(net).items():
        A = truth.get_submodule(name).pera_A
        assert layer.pera_A.full_tensor().shape == A.shape
        assert not layer.pera_B.full_tensor().any()
    first = next(iter(pk.adapted_modules(net).values()))
    torch.manual_seed(3)
    first.reset_adapter()
    torch.manual_seed(3)
    alone = pk.PeraLinear.from_linear(nn.Linear(8, 8), 3)
    torch.manual_seed(3)
    alone.reset_adapter()
    assert torch.equal(first.pera_A.full_tensor(), alone.pera_A)


PAIRS = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "up_proj": 0, "down_proj": 1}


def plan(sequence=False, dims=PAIRS):
    """Styles for every linear layer of the blocks, adapted or not."""
    from torch.distributed.tensor import Replicate, Shard

    from pera_kernels.parallel import ColwiseParallel, RowwiseParallel

    come = {"input_layouts": Shard(1) if sequence else Replicate()}
    go = {"output_layouts": Shard(1) if sequence else Replicate()}
    return {
        f"blocks.{i}.{name}": RowwiseParallel(**go) if dim else ColwiseParallel(**come)
        for i in range(2)
        for name, dim in dims.items()
    }


def tensor_parallel(net, sequence=False, dims=PAIRS):
    from torch.distributed.tensor.parallel import parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(net, mesh, plan(sequence, dims))


def sharded(how, **options):
    net = model(**options)
    return tensor_parallel(net) if how == "tp" else wrapped(net, how)


def tp_gradients(dropout=0.0, way=None, backend="torch", sequence=False, before=False):
    """Outputs and gradients of a tensor-parallel model equal those of one that is not."""
    if before:
        torch.manual_seed(1)
        net = tensor_parallel(Model(way))
        pk.inject(net, TARGETS, 3, dropout=dropout, modules_to_save=["head"])
        source = pk.adapter_state_dict(model())
        for name, layer in pk.adapted_modules(net).items():
            for part in ("pera_A", "pera_B", "pera_h"):
                pk.sharded.write(layer, part, source[f"{name}.{part}"])
    else:
        net = tensor_parallel(model(way, dropout=dropout), sequence)
    for layer in pk.adapted_modules(net).values():
        layer.backend = backend
    x = batch().requires_grad_()
    # Ranks whose generators are not alike have one mask all the same.
    torch.manual_seed(11 + dist.get_rank())
    if sequence:
        part = x.detach().chunk(dist.get_world_size(), 1)[dist.get_rank()]
        blocks = net.blocks
        y = blocks[1](blocks[0](part))
        loss = net.head(y).square().sum() / (8 * 4 * 5)
        loss.backward()
        for parameter in net.head.parameters():
            dist.all_reduce(parameter.grad)
        dist.all_reduce(loss.detach())
    else:
        loss = loss_of(net, x)
        loss.backward()
    found = {n: whole(p.grad) for n, p in trained_parameters(net).items()}
    compare({"loss": loss.detach(), **found}, dropout=dropout)
    if dropout == 0.0 and not sequence:
        reference = model(way)
        want = batch().requires_grad_()
        loss_of(reference, want).backward()
        torch.testing.assert_close(x.grad, want.grad, rtol=1e-5, atol=1e-7)


@contextlib.contextmanager
def gathered_at_once():
    """How many whole tensors there are, whenever one more is gathered."""
    alive, counts, full_tensor = [], [], DTensor.full_tensor

    def counted(self, **options):
        alive[:] = [there for there in alive if there() is not None]
        counts.append(len(alive) + 1)
        found = full_tensor(self, **options)
        alive.append(weakref.ref(found))
        return found

    DTensor.full_tensor = counted
    try:
        yield counts
    finally:
        DTensor.full_tensor = full_tensor


def assert_same_files(one, other):
    configs = [
        json.loads((Path(folder) / "adapter_config.json").read_text()) for folder in (one, other)
    ]
    for config in configs:
        # PEFT writes a set, and the class of the model, which FSDP2 changes.
        config["target_modules"].sort()
        config.pop("auto_mapping", None)
    assert configs[0] == configs[1]
    files = [Path(folder) / "adapter_model.safetensors" for folder in (one, other)]
    (tensors, told), (others, expected) = map(read_safetensors, files)
    assert told == expected
    assert list(tensors) == list(others)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


def calls(how, folder, terms):
    """Save, load, merge, export and the rest on a sharded model are those of a whole one."""
    net, same = sharded(how, terms=terms), model(terms=terms)
    x = batch()
    with torch.no_grad():
        expected = same(x)
        torch.testing.assert_close(net(x), expected)
    for name, tensor in pk.adapter_state_dict(net).items():
        assert torch.equal(tensor, pk.adapter_state_dict(same)[name])
    layers = zip(pk.adapted_modules(net).values(), pk.adapted_modules(same).values(), strict=True)
    for layer, other in layers:
        assert layer.quadratic_share() == other.quadratic_share()
        assert torch.equal(layer.delta_weight(), other.delta_weight())
        layer.delta_weight().sum().backward()
        other.delta_weight().sum().backward()
        assert torch.equal(layer.pera_A.grad.full_tensor(), other.pera_A.grad)
    net.zero_grad()
    with gathered_at_once() as alive:
        pk.save_adapter(net, f"{folder}/saved")
    # One layer's A, B and h; the first rank keeps what it will write.
    assert dist.get_rank() == 0 or 1 <= max(alive) <= 3
    pk.export_lora(net, f"{folder}/lora", quiet=True)
    if dist.get_rank() == 0:
        pk.save_adapter(same, f"{folder}/same")
        pk.export_lora(same, f"{folder}/same_lora", quiet=True)
        assert_same_files(f"{folder}/saved", f"{folder}/same")
        assert_same_files(f"{folder}/lora", f"{folder}/same_lora")
    dist.barrier()
    other = sharded(how, seed=2, terms=terms)
    pk.load_adapter(other, f"{folder}/saved", overwrite=True)
    # What is not adapted is drawn anew: its weights are not in the file.
    for name, tensor in pk.adapter_state_dict(other).items():
        assert torch.equal(tensor, pk.adapter_state_dict(same)[name])
    assert torch.equal(whole(other.head.weight), same.head.weight)
    merges(net, same, x, expected, keep_base=True)
    merges(net, same, x, expected, keep_base=False)
    pk.unload(net)
    pk.unload(same)
    kinds = [type(m).__name__.removeprefix("FSDP") for m in net.modules()]
    assert kinds == [type(m).__name__ for m in same.modules()]
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in same.named_parameters()]
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected)
    loss_of(net, x.clone().requires_grad_()).backward()
    for (name, one), other in zip(net.named_parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(whole(one), other, msg=name)


def merges(net, same, x, expected, keep_base):
    before = {n: whole(layer.weight).clone() for n, layer in pk.adapted_modules(net).items()}
    with torch.no_grad():
        # Whole parameters stay at the outermost module, which merging must not be misled by.
        net(x)
        pk.merge(net, keep_base=keep_base)
        pk.merge(same, keep_base=keep_base)
        for name, layer in pk.adapted_modules(net).items():
            other = same.get_submodule(name)
            torch.testing.assert_close(whole(layer.weight), other.weight, rtol=1e-6, atol=1e-7)
            if keep_base:
                assert torch.equal(whole(layer.base_weight()), other.base_weight())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # It holds W0 and the adapter apart.
            held = net.state_dict()
        for name, weight in before.items():
            torch.testing.assert_close(whole(held[f"{name}.weight"]), weight)
        torch.testing.assert_close(net(x), expected)
        pk.unmerge(net)
        pk.unmerge(same)
        torch.testing.assert_close(net(x), expected)
    pk.adapter_state_dict(net)
    for name, layer in pk.adapted_modules(net).items():
        if keep_base:
            assert torch.equal(whole(layer.weight), before[name])


@contextlib.contextmanager
def little_patience(seconds=0.2):
    from pera_kernels.adapters import ranks

    before, ranks.PATIENCE = ranks.PATIENCE, seconds
    try:
        yield
    finally:
        ranks.PATIENCE = before


def refused(kind, match, call):
    """``call`` raises on this rank."""
    with pytest.raises(kind, match=match):
        call()


CALLS = {
    "save_adapter": lambda net, folder: pk.save_adapter(net, folder),
    "load_adapter": lambda net, folder: pk.load_adapter(net, folder, overwrite=True),
    "adapter_state_dict": lambda net, folder: pk.adapter_state_dict(net),
    "merge": lambda net, folder: pk.merge(net),
    "unmerge": lambda net, folder: pk.unmerge(net),
    "unload": lambda net, folder: pk.unload(net),
    "export_lora": lambda net, folder: pk.export_lora(net, folder, quiet=True),
    "parallel.check": lambda net, folder: parallel.check(net),
}


def one_rank_alone(how, folder):
    """A call that one rank makes alone ends, and nothing is changed or left over."""
    net = sharded(how)
    before = pk.adapter_state_dict(net)
    # Tensor parallelism goes the same way.
    some = CALLS if how == "fsdp" else {name: CALLS[name] for name in ("merge", "load_adapter")}
    with little_patience():
        for name, call in some.items():
            if dist.get_rank() == 0:
                refused(TimeoutError, f"{name}.*rank 1 of 2 did not", lambda c=call: c(net, folder))
            dist.barrier()
    for name, tensor in pk.adapter_state_dict(net).items():
        assert torch.equal(tensor, before[name])
    pk.merge(net)
    pk.unmerge(net)


def different_calls():
    """Ranks that make different calls get an error each."""
    net = sharded("fsdp")
    with little_patience():
        if dist.get_rank() == 0:
            refused(TimeoutError, "^merge is for", lambda: pk.merge(net))
        else:
            refused(TimeoutError, "^adapter_state_dict is for", lambda: pk.adapter_state_dict(net))
    dist.barrier()
    pk.merge(net)


def files_that_fail(folder):
    """What fails on one rank fails on all: writing, reading, and what is not finite."""
    net, rank = sharded("fsdp"), dist.get_rank()
    (Path(folder) / "a_file").touch()
    kind = OSError if rank == 0 else RuntimeError
    refused(kind, "a_file", lambda: pk.save_adapter(net, f"{folder}/a_file/in"))
    pk.save_adapter(net, f"{folder}/saved")
    missing = f"{folder}/saved" if rank == 0 else f"{folder}/nowhere"
    kind = RuntimeError if rank == 0 else FileNotFoundError
    refused(kind, "no file", lambda: pk.load_adapter(net, missing, overwrite=True))
    refused(ValueError, "hold something", lambda: pk.load_adapter(net, f"{folder}/saved"))
    with torch.no_grad():
        net.blocks[0].q_proj.pera_B.to_local().fill_(1e30 if rank == 1 else 0.0)
        net.blocks[0].q_proj.pera_A.to_local().fill_(1e30)
    refused(ValueError, "infinite or NaN", lambda: pk.merge(net))
    assert not any(layer.merged for layer in pk.adapted_modules(net).values())
    refused(ValueError, "infinite or NaN", lambda: pk.unload(net))
    kind = ValueError if rank == 0 else RuntimeError
    refused(kind, "overflows", lambda: pk.export_lora(net, f"{folder}/lora"))
    dist.barrier()
    assert not (Path(folder) / "lora").exists()


def ranks_that_differ():
    """``parallel.check`` raises on every rank."""
    rank = dist.get_rank()
    parallel.check(model())
    refused(
        ValueError, "values between rank 0 and rank 1", lambda: parallel.check(model(seed=rank))
    )
    other = model(terms="full" if rank == 0 else "square")
    refused(ValueError, "options between rank 0 and rank 1", lambda: parallel.check(other))
    head = model()
    with torch.no_grad():
        head.head.bias += rank
    refused(ValueError, "values between.*: head.bias", lambda: parallel.check(head))
    one = model()
    if rank == 1:
        one = pk.inject(Model(), ["q_proj"], 3, modules_to_save=["head"])
    refused(ValueError, "options between", lambda: parallel.check(one))
    refused(ValueError, "no adapter to check", lambda: parallel.check(nn.Linear(2, 2)))
    refused(ValueError, "must have this one", lambda: parallel.check(one, ranks=[1 - rank]))
    for how in ("fsdp", "tp"):
        parallel.check(sharded(how))


def fsdp1():
    """Its flat parameter trains what is frozen, which is refused; without adapters it works."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    own = {"use_orig_params": True, "device_id": torch.device("cpu")}
    net = FullyShardedDataParallel(model(), **own)
    refused(ValueError, "leave the adapters out.*use FSDP2", lambda: net(batch()))
    net = model()
    trained = [p for p in net.parameters() if p.requires_grad]
    net = FullyShardedDataParallel(net, ignored_states=trained, **own)
    loss = loss_of(net, own_rows(batch()).requires_grad_())
    loss.backward()
    found = {}
    for name, p in trained_parameters(net).items():
        dist.all_reduce(p.grad)
        found[name] = p.grad / dist.get_world_size()
    total = loss.detach().double()
    dist.all_reduce(total)
    compare({"loss": total / dist.get_world_size(), **found})


def tied_weights():
    """A weight that two layers hold is not merged into, sharded or not."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].weight = net[0].weight
    pk.inject(net, ["0"], 2)
    fully_shard(net)
    refused(ValueError, "shared", lambda: pk.merge(net))


def page(path, folder):
    """The code of a page."""
    os.chdir(folder)
    names = {}
    for code in re.findall(r"```py\n(.*?)```", Path(path).read_text(), re.DOTALL):
        exec(compile(code, path, "exec"), names)
    dist.barrier()
    assert (Path(folder) / "adapter" / "adapter_model.safetensors").exists()


def adapters_after_wrapping():
    for how in ("ddp", "fsdp"):
        net = wrapped(Model(), how)
        refused(ValueError, "before it is wrapped", lambda n=net: pk.inject(n, ["q_proj"]))
    net = fully_shard(Model())
    for _ in range(2):
        refused(ValueError, "before it is wrapped", lambda: pk.inject(net.blocks, ["q_proj"]))
        with torch.no_grad():
            # Its parameters are whole now.
            net(batch())


def a_part_of_what_is_wrapped():
    """What fully_shard around it keeps whole is sharded again before it is written."""
    net, same, x = fully_shard(model()), model(), batch()
    with torch.no_grad():
        expected = same(x)
        for call in (pk.merge, pk.unmerge):
            net(x)
            call(net.blocks)
            net.reshard()
            torch.testing.assert_close(net(x), expected)
        layer, other = net.blocks[0].q_proj, same.blocks[0].q_proj
        layer.merge()
        net.reshard()
        other.merge()
        torch.testing.assert_close(whole(layer.weight), other.weight)
        layer.unmerge()
        torch.manual_seed(3)
        net(x)
        layer.reset_adapter()
        net.reshard()
        assert not whole(layer.pera_B).any()


def merged_before_it_is_wrapped():
    """W0 that was kept whole is that of each rank's part."""
    net, same = model(), model()
    pk.merge(net)
    wrapped(net, "fsdp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = net.state_dict()
    for name, layer in pk.adapted_modules(same).items():
        assert torch.equal(whole(held[f"{name}.weight"]), layer.weight)
    pk.unmerge(net)
    for name, layer in pk.adapted_modules(same).items():
        assert torch.equal(whole(net.get_submodule(name).weight), layer.weight)


def files_that_differ(folder):
    """Ranks that read different files, as from disks of their own, are refused."""
    own = f"{folder}/{dist.get_rank()}"
    pk.save_adapter(model(seed=dist.get_rank()), own)
    net = sharded("fsdp")
    refused(
        ValueError,
        "files differ between ranks",
        lambda: pk.load_adapter(net, own, overwrite=True),
    )


def one_comes_late():
    """All ranks get one answer, which names the one that did not come; the next call works."""
    from pera_kernels.adapters.ranks import exchange

    rank, group = dist.get_rank(), tuple(range(dist.get_world_size()))
    late = group[-1]
    for pause in (0.0, 0.15, 0.25):
        if rank == late:
            time.sleep(0.6)
        else:
            time.sleep(pause * rank / late)
            with little_patience(0.3):
                refused(TimeoutError, f"rank {late} of ", lambda: exchange(group, "a test", rank))
        dist.barrier()
        assert exchange(group, "a test", 10 * rank) == {other: 10 * other for other in group}


def sizes_that_do_not_divide():
    net = pk.inject(nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 8)), ["0", "1"], 2)
    mesh = init_device_mesh("cpu", (2,))
    from torch.distributed.tensor.parallel import parallelize_module

    for name, style in (("0", parallel.ColwiseParallel()), ("1", parallel.RowwiseParallel())):
        refused(
            ValueError,
            "must be a multiple of the number of ranks.*=5 and a mesh of ",
            lambda n=name, s=style: parallelize_module(net, mesh, {n: s}),
        )
    merged = pk.merge(pk.inject(nn.Sequential(nn.Linear(8, 4)), ["0"], 2))
    style = {"0": parallel.ColwiseParallel()}
    refused(ValueError, "unmerge first", lambda: parallelize_module(merged, mesh, style))
    called = nn.Sequential(nn.Linear(8, 4))
    called[0].register_forward_hook(lambda *_: None)
    pk.inject(called, ["0"], 2)
    refused(TypeError, "plain nn.Linear", lambda: parallelize_module(called, mesh, style))
    layer = parallelize_module(pk.inject(nn.Sequential(nn.Linear(8, 4)), ["0"], 2), mesh, style)[0]
    refused(TypeError, "must be a DTensor", lambda: layer.forward(torch.ones(2, 8)))
    plain = pk.PeraLinear(8, 4, 2)
    with_parts = DTensor.from_local(torch.ones(2, 8), mesh)
    refused(TypeError, "DTensor", lambda: plain(with_parts))
    refused(TypeError, "DTensor", lambda: pk.delta_weight(layer.pera_A, layer.pera_B, layer.pera_h))
    net = sharded("fsdp")
    refused(TypeError, "DTensor", lambda: net.blocks[0].q_proj(torch.ones(2, 8)))


def mixed_precision():
    """bfloat16 parameters in the forward of float32 ones: gradients near those of float32."""
    net = wrapped(model(), "fsdp bf16")
    found = gradients(net, batch(), how="fsdp")
    reference = alone_in_bfloat16()
    truth = alone(torch.float64, "reference")
    for name, got in found.items():
        assert got.dtype == (torch.float64 if name == "loss" else torch.float32)
        verdict = judge(name, got.bfloat16(), reference[name], truth[name], torch.bfloat16)
        assert verdict.passed, verdict


@functools.lru_cache
def alone_in_bfloat16():
    """What one process computes with parameters in bfloat16, of each rank's rows."""
    net, total = model(dtype=torch.bfloat16), 0.0
    for rows in batch(torch.bfloat16).chunk(dist.get_world_size()):
        loss = loss_of(net, rows) / dist.get_world_size()
        loss.backward()
        total += loss.detach()
    return {"loss": total, **{n: p.grad for n, p in trained_parameters(net).items()}}


def two_dimensions():
    """FSDP2 around tensor parallelism, on four ranks."""
    from torch.distributed.tensor.parallel import parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    net = parallelize_module(model(), mesh["tensor"], plan())
    for block in net.blocks:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(net, mesh=mesh["data"])
    x = batch()
    part = x.chunk(2)[mesh.get_local_rank("data")]
    loss = loss_of(net, part.clone().requires_grad_())
    loss.backward()
    total = loss.detach().double()
    dist.all_reduce(total)
    found = {n: whole(p.grad) for n, p in trained_parameters(net).items()}
    compare({"loss": total / 4, **found})
    same = model()
    for name, tensor in pk.adapter_state_dict(net).items():
        assert torch.equal(tensor, pk.adapter_state_dict(same)[name])
    with torch.no_grad():
        merges(net, same, x, same(x), keep_base=True)
        merges(net, same, x, same(x), keep_base=False)


def compiled_parts():
    """A tensor-parallel model is compiled without a break, and computes the same."""
    net = tensor_parallel(model(dropout=0.3))
    torch._dynamo.reset()
    call = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.manual_seed(11)
    loss = loss_of(call, batch().requires_grad_())
    loss.backward()
    found = {n: whole(p.grad) for n, p in trained_parameters(net).items()}
    compare({"loss": loss.detach(), **found}, dropout=0.3)
    torch._dynamo.reset()


def reduced_once():
    """A row-wise layer reduces its output, and dB and dh; a column-wise one dx, dA and dh."""
    from torch.distributed.tensor.debug import CommDebugMode

    from pera_kernels.parallel import ColwiseParallel, RowwiseParallel

    for style, rows in ((ColwiseParallel, 0), (RowwiseParallel, 1)):
        layer = nn.Sequential(nn.Linear(8, 12))
        pk.inject(layer, ["0"], 3)
        mesh = init_device_mesh("cpu", (2,))
        from torch.distributed.tensor.parallel import parallelize_module

        parallelize_module(layer, mesh, {"0": style()})
        x = torch.randn(4, 4 if rows else 8, requires_grad=True)
        counts = CommDebugMode()
        with counts:
            layer(x).sum().backward()
        assert counts.get_total_counts() == 3, counts.get_comm_counts()


def one_sum_of_dx():
    """Column-wise layers on an x that was prepared for all leave the sum of dx to it."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.distributed.tensor.parallel import PrepareModuleInput, parallelize_module

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(8, 12), nn.Linear(8, 12)

        def forward(self, x):
            return self.q_proj(x) + self.k_proj(x)

    counts, mesh = [], init_device_mesh("cpu", (2,))
    for adapted in (False, True):
        torch.manual_seed(0)
        net = Parent().requires_grad_(False)
        if adapted:
            pk.inject(net, ["q_proj", "k_proj"], 3)
        prepared = PrepareModuleInput(
            input_layouts=(Shard(0),), desired_input_layouts=(Replicate(),)
        )
        style = parallel.ColwiseParallel
        parallelize_module(net, mesh, {"": prepared, "q_proj": style(), "k_proj": style()})
        x = torch.randn(4, 8, requires_grad=True)
        with CommDebugMode() as counted:
            net(x).sum().backward()
        counts.append((counted.get_total_counts(), x.grad))
    # dA and dh of each layer, and nothing else more.
    assert counts[1][0] == counts[0][0] + 4
    torch.testing.assert_close(counts[1][1], counts[0][1])


def resumed(folder, save):
    """Train, save by torch.distributed.checkpoint, and go on with another number of ranks."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    net = wrapped(model(), "fsdp") if dist.get_world_size() > 1 else model()
    optimizer = torch.optim.AdamW(pk.parameter_groups(net, 1e-2))
    how = "fsdp" if dist.get_world_size() > 1 else "one"

    def step():
        optimizer.zero_grad()
        if how == "one":
            loss = loss_of(net, batch())
            loss.backward()
        else:
            loss = gradients(net, batch(), how="fsdp")["loss"]
        optimizer.step()
        return float(loss)

    if save:
        losses = [step() for _ in range(3)]
    own, state = get_state_dict(net, optimizer)
    if save:
        dcp.save({"model": own, "optimizer": state}, checkpoint_id=folder)
        return losses + [step() for _ in range(2)]
    dcp.load({"model": own, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(net, optimizer, model_state_dict=own, optim_state_dict=state)
    return [step() for _ in range(2)]


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=16))


def of_transformers(folder):
    """Adapters in a model that transformers has sharded by its ``tp_plan``."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    if dist.get_rank() == 0:
        llama().save_pretrained(folder)
    dist.barrier()
    config = DistributedConfig(tp_size=2)
    net = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    same = AutoModelForCausalLM.from_pretrained(folder)
    for one in (net, same):
        torch.manual_seed(3)
        pk.inject(one, TARGETS, 3)
    assert parallel_kinds(net) == {"ColumnWise", "RowWise"}
    tokens = torch.arange(12).reshape(2, 6) % 32
    for name, layer in pk.adapted_modules(same).items():
        A, B, h = layer._factors()
        for part, tensor in (("pera_A", A), ("pera_B", B), ("pera_h", h)):
            torch.manual_seed(len(name))
            nn.init.normal_(tensor, std=0.3)
            pk.sharded.write(net.get_submodule(name), part, tensor.detach())
    outputs = [one(input_ids=tokens, labels=tokens) for one in (net, same)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.loss.backward()
    for (name, one), other in zip(net.named_parameters(), same.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(whole(one.grad), other.grad, rtol=1e-4, atol=1e-6, msg=name)
    with torch.no_grad():
        expected = same(input_ids=tokens).logits
        torch.testing.assert_close(net(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
        pk.merge(net)
        torch.testing.assert_close(net(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
        pk.unload(net)
        assert not parallel_kinds(net)
        torch.testing.assert_close(net(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)


def parallel_kinds(net):
    return {type(layer).__name__ for layer in pk.adapted_modules(net).values()}


def under_peft(folder):
    """PEFT's calls on a model that FSDP2 shards."""
    import peft

    from pera_kernels.peft import PeraConfig

    def adapted():
        torch.manual_seed(1)
        net = peft.get_peft_model(Model(), PeraConfig(r=3, target_modules=TARGETS))
        with torch.no_grad():
            for name, p in net.named_parameters():
                if ".pera_" in name:
                    p.normal_(std=0.3)
        return net

    same, net, x = adapted(), adapted(), batch()
    model = net.get_base_model()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    with torch.no_grad():
        expected = same(x)
        torch.testing.assert_close(net(x), expected)
    loss_of(net, own_rows(x)).backward()
    loss_of(same, x).backward()
    for (name, one), other in zip(net.named_parameters(), same.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(whole(one.grad), other.grad, rtol=1e-4, atol=1e-6, msg=name)
    before = {n: whole(p).clone() for n, p in net.named_parameters()}
    with torch.no_grad():
        net(x)
        net.merge_adapter()
        torch.testing.assert_close(net(x), expected)
        for layer in net.base_model._layers().values():
            assert torch.isfinite(layer.get_delta_weight("default")).all()
        net.unmerge_adapter()
        torch.testing.assert_close(net(x), expected)
    for block in [model, *model.blocks]:
        block.reshard()
    assert all(torch.equal(whole(p), before[n]) for n, p in net.named_parameters())
    outermost = fully_shard(adapted())
    with torch.no_grad():
        for call in (outermost.merge_adapter, outermost.unmerge_adapter):
            outermost(x)
            call()
            outermost.reshard()
            torch.testing.assert_close(outermost(x), expected)
    net.save_pretrained(f"{folder}/peft", is_main_process=dist.get_rank() == 0)
    pk.export_lora(net, f"{folder}/lora", quiet=True)
    if dist.get_rank() == 0:
        same.save_pretrained(f"{folder}/same")
        pk.export_lora(same, f"{folder}/same_lora", quiet=True)
        assert_same_files(f"{folder}/peft", f"{folder}/same")
        assert_same_files(f"{folder}/lora", f"{folder}/same_lora")
    dist.barrier()
    merged = net.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(x), expected)
    refused(
        ValueError,
        "before it is wrapped",
        lambda: peft.get_peft_model(merged, net.peft_config["default"]),
    )
    mesh = init_device_mesh("cpu", (2,))
    from torch.distributed.tensor.parallel import parallelize_module

    parts = parallelize_module(
        nn.Sequential(nn.Linear(8, 8)), mesh, {"0": parallel.ColwiseParallel()}
    )
    config = PeraConfig(r=3, target_modules=["0"])
    refused(
        ValueError, "sharded: use pera_kernels.inject", lambda: peft.get_peft_model(parts, config)
    )
