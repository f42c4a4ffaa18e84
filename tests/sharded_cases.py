"""What each rank does in the tests of calls on sharded models."""

import contextlib
import json
import time
import warnings
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

import pera_kernels as pk
from pera_kernels import parallel
from pera_kernels.adapters import ranks
from pera_kernels.adapters.files import read_safetensors
from pera_kernels.adapters.ranks import exchange
from tests.parallel_cases import (
    TARGETS,
    Model,
    batch,
    compare,
    loss_of,
    model,
    own_rows,
    refused,
    trained_parameters,
    whole,
    wrapped,
)
from tests.tensor_parallel_cases import plan, tensor_parallel


def sharded(how, **options):
    net = model(**options)
    return tensor_parallel(net) if how == "tp" else wrapped(net, how)


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

    before, ranks.PATIENCE = ranks.PATIENCE, seconds
    try:
        yield
    finally:
        ranks.PATIENCE = before


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


def tied_weights():
    """A weight that two layers hold is not merged into, sharded or not."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].weight = net[0].weight
    pk.inject(net, ["0"], 2)
    fully_shard(net)
    refused(ValueError, "shared", lambda: pk.merge(net))


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


class ToldLate:
    """What is not told before an event."""

    def __init__(self, event):
        self.event = event

    def __reduce__(self):
        dist.distributed_c10d._get_default_store().wait([self.event])
        return int, ()


def one_comes_late():
    """All ranks get one answer, which names the one that was late; the next call works."""
    rank, group = dist.get_rank(), tuple(range(dist.get_world_size()))
    late = group[-1]
    # On a busy machine others are late too, and named: they are given more time then.
    for attempt, patience in enumerate((0.3, 2.0, 10.0)):
        answered, answer = f"attempt {attempt} is answered", ""
        if rank != late:
            time.sleep(0.8 * patience * rank / late)
        try:
            # It is told when another has been answered, and some still wait.
            exchange(group, "a test", ToldLate(answered) if rank == late else rank, patience)
        except TimeoutError as error:
            answer = str(error)
        dist.distributed_c10d._get_default_store().set(answered, "")
        answers = [""] * len(group)
        dist.all_gather_object(answers, answer)
        assert all(answers), answers
        told = exchange(group, "a test", 10 * rank)
        assert told == {other: 10 * other for other in group}
        if len(set(answers)) == 1 and f"rank {late} of" in answers[0]:
            return
    raise AssertionError(answers)


def two_dimensions():
    """FSDP2 around tensor parallelism, on four ranks."""
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
    parts = parallelize_module(
        nn.Sequential(nn.Linear(8, 8)), mesh, {"0": parallel.ColwiseParallel()}
    )
    config = PeraConfig(r=3, target_modules=["0"])
    refused(
        ValueError, "sharded: use pera_kernels.inject", lambda: peft.get_peft_model(parts, config)
    )
