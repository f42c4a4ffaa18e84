"""What each rank does in the tests of tensor parallelism."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import PrepareModuleInput, parallelize_module

import pera_kernels as pk
from pera_kernels import parallel
from pera_kernels.parallel import ColwiseParallel, RowwiseParallel
from tests.parallel_cases import (
    TARGETS,
    Model,
    batch,
    compare,
    loss_of,
    model,
    refused,
    trained_parameters,
    whole,
    wrapped,
)

PAIRS = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "up_proj": 0, "down_proj": 1}


def plan(sequence=False, dims=PAIRS):
    """Styles for every linear layer of the blocks, adapted or not."""
    come = {"input_layouts": Shard(1) if sequence else Replicate()}
    go = {"output_layouts": Shard(1) if sequence else Replicate()}
    return {
        f"blocks.{i}.{name}": RowwiseParallel(**go) if dim else ColwiseParallel(**come)
        for i in range(2)
        for name, dim in dims.items()
    }


def tensor_parallel(net, sequence=False, dims=PAIRS):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(net, mesh, plan(sequence, dims))


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
    for style, rows in ((ColwiseParallel, 0), (RowwiseParallel, 1)):
        layer = nn.Sequential(nn.Linear(8, 12))
        pk.inject(layer, ["0"], 3)
        mesh = init_device_mesh("cpu", (2,))
        parallelize_module(layer, mesh, {"0": style()})
        x = torch.randn(4, 4 if rows else 8, requires_grad=True)
        counts = CommDebugMode()
        with counts:
            layer(x).sum().backward()
        assert counts.get_total_counts() == 3, counts.get_comm_counts()


def one_sum_of_dx():
    """Column-wise layers on an x that was prepared for all leave the sum of dx to it."""

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


def sizes_that_do_not_divide():
    net = pk.inject(nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 8)), ["0", "1"], 2)
    mesh = init_device_mesh("cpu", (2,))
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
    net = wrapped(model(), "fsdp")
    refused(TypeError, "DTensor", lambda: net.blocks[0].q_proj(torch.ones(2, 8)))


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
