"""What each rank does in the tests of several processes."""

import contextlib
import functools
import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import pera_kernels as pk
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


def refused(kind, match, call):
    """``call`` raises on this rank."""
    with pytest.raises(kind, match=match):
        call()


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
    """A model that is made on the meta device has the adapters of one that is made here."""
    same = model(fill=False)
    with torch.device("meta"):
        net = Model()
        pk.inject(net, TARGETS, 3, modules_to_save=["head"])
    wrapped(net, "fsdp")
    net.to_empty(device="cpu")
    for one in (net, same):
        torch.manual_seed(3)
        for layer in pk.adapted_modules(one).values():
            layer.reset_adapter()
    expected = pk.adapter_state_dict(same)
    for name, tensor in pk.adapter_state_dict(net).items():
        assert torch.equal(tensor, expected[name])
    assert any(tensor.any() for tensor in expected.values())


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


def page(path, folder):
    """The code of a page."""
    os.chdir(folder)
    names = {}
    for code in re.findall(r"```py\n(.*?)```", Path(path).read_text(), re.DOTALL):
        exec(compile(code, path, "exec"), names)
    dist.barrier()
    assert (Path(folder) / "adapter" / "adapter_model.safetensors").exists()
