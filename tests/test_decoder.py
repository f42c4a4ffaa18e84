"""PERA in a transformers decoder layer, and the benchmark of that layer, at tiny sizes."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers", reason="the decoder layer needs transformers")

import pera_kernels as pk  # noqa: E402
from benchmarks import decoder, rows, timing  # noqa: E402
from benchmarks.contenders import Pera  # noqa: E402
from benchmarks.decoder import TARGETS, Adapted, Base, Size, everybody  # noqa: E402
from benchmarks.gate import outputs  # noqa: E402
from benchmarks.layers import CONTENDERS, phase_call  # noqa: E402
from pera_kernels.testing import Case  # noqa: E402

CPU = torch.device("cpu")
# Small enough for Triton's interpreter.
TINY = Size(hidden=32, intermediate=40, heads=4, kv_heads=2, batch=2, sequence=7)
AUTO = Adapted(CONTENDERS["auto"])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(timing, "CPU_SAMPLE_MS", 0.01)
    monkeypatch.setitem(decoder.SIZES, "tiny", TINY)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_base(dtype=torch.float32, r=8, device=CPU):
    return Base(TINY, Case(r=r, T=14, N=32, M=40, dtype=dtype, scale=1.0), device)


def failure(base, adapted):
    wanted = decoder.expected(base, adapted.judged_as(base))
    return decoder.judgement(base, adapted, wanted).failure


def test_inject_adapts_the_projections_and_changes_nothing_at_first():
    base = make_base()
    fresh = copy.deepcopy(base.layer)
    assert pk.inject(fresh, TARGETS, r=8) is fresh
    assert {name.rpartition(".")[2] for name in pk.adapted_modules(fresh)} == set(TARGETS)
    torch.testing.assert_close(fresh(base.x), base.layer(base.x), rtol=1e-5, atol=1e-5)
    assert (AUTO.build(base).module(base.x) - base.layer(base.x)).abs().max() > 0.1


def test_the_adapted_layer_compiles_as_one_graph():
    torch._dynamo.reset()
    base = make_base()
    layer = AUTO.build(base)
    compiled = replace(
        layer, module=torch.compile(layer.module, fullgraph=True, backend="aot_eager")
    )
    eager, traced = (outputs(own, base.x, base.dy, seed=0) for own in (layer, compiled))
    assert len(eager) == 2 + 3 * len(TARGETS)
    for name, value in eager.items():
        torch.testing.assert_close(traced[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_checkpointing_repeats_the_same_bits(dropout):
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=13,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = pk.inject(LlamaModel(config), TARGETS, r=3, dropout=dropout).train()
    for parameter in pk.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(13, (2, 7))
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            # transformers' own switch: a flag and a function on every decoder layer.
            checkpointed = functools.partial(checkpoint, use_reentrant=False)
            model._set_gradient_checkpointing(True, checkpointed)
        model.zero_grad()
        torch.manual_seed(5)
        out = model(tokens, use_cache=False).last_hidden_state
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in pk.adapter_parameters(model))])
    assert len(found[0]) == 1 + 2 * 3 * len(TARGETS)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_backend_passes_the_gate_in_the_layer(backend, device):
    base = make_base(torch.bfloat16, device=device)
    assert failure(base, Adapted(CONTENDERS[backend], torch.float32)) is None


def test_the_gate_tells_another_function_from_rounding():
    class Wrong(Pera):
        def build(self, case, inputs):
            layer = super().build(case, inputs)
            with torch.no_grad():
                layer.trains["dh"][0] += 10
            return layer

    class Forgets(Pera):
        def build(self, case, inputs):
            layer = super().build(case, inputs)
            return replace(layer, trains={"dA": layer.trains["dA"]})

    base = make_base(torch.bfloat16)
    assert "y: max error" in failure(base, Adapted(Wrong("wrong")))
    assert failure(base, Adapted(Forgets("forgets"))).startswith("no down_proj.dB, down_proj.dh")


def test_truth_is_float64_throughout():
    base = make_base()
    truth = decoder._exact(AUTO.build(base))
    assert {p.dtype for p in truth.module.parameters()} == {torch.float64}
    assert set(map(id, truth.trains.values())) <= set(map(id, truth.module.parameters()))
    # A norm that went through float32 would answer to a change of 1e-11 in steps, or not at all.
    x, dy = base.x.detach().double(), base.dy.double()
    y, moved = (outputs(truth, x * (1 + d), dy, seed=0)["y"] for d in (0.0, 1e-11))
    assert 0 < (moved - y).abs().max() < 1e-9


def test_a_step_moves_the_adapters_and_leaves_no_gradient():
    base = make_base()
    layer, other = AUTO.build(base), AUTO.build(base)
    before = {name: t.detach().clone() for name, t in layer.trains.items()}
    phase_call(layer, base.x, base.dy, "step")()
    for name, value in before.items():
        assert not torch.equal(value, layer.trains[name])
        assert torch.equal(value, other.trains[name])
    assert base.x.grad is None and all(t.grad is None for t in layer.trains.values())
    shared = {p.data_ptr() for p in base.layer.parameters()}
    assert shared <= {p.data_ptr() for p in layer.module.parameters()}


def test_a_run_appends_a_row_for_each_contender_and_phase(tmp_path, monkeypatch):
    pytest.importorskip("peft")

    class Broken(Pera):
        def build(self, case, inputs):
            raise RuntimeError("no")

    def with_a_broken_one(case):
        return [*everybody(case), Adapted(Broken("broken"))]

    monkeypatch.setattr(decoder, "everybody", with_a_broken_one)
    out = tmp_path / "decoder.jsonl"
    words = "--device cpu --size tiny --dtypes bfloat16 --rounds 2".split()
    assert decoder.main([*words, "--out", str(out)]) == 1
    failed, *timed = rows.read(out)
    assert (failed["contender"], failed["phase"], failed["status"]) == ("broken", "gate", "failed")
    assert failed["note"] == "RuntimeError: no"
    half, mixed = "bfloat16", "bfloat16+float32"
    wanted = [("frozen", half), ("peft-lora-amp", mixed), ("peft-lora", half)]
    wanted += [("released-amp", mixed), ("released", half), ("auto", half), ("auto", mixed)]
    wanted += [("auto-apart", half)]
    for phase in decoder.PHASES:
        own = [row for row in timed if row["phase"] == phase]
        assert [(row["contender"], row["dtype"]) for row in own] == wanted
    assert timed[1]["terms"] == "linear" and timed[0]["ratio_to_frozen"] == 1.0
    assert all(row["peak_mib"] > 0 and row["saved_mib"] > 0 for row in timed)
    assert timed[0]["note"] == "batch 2 x sequence 7, 4 heads, 2 key-value heads"


def test_query_key_and_value_are_evaluated_together_unless_apart():
    base = make_base()
    for together in (True, False):
        module = Adapted(CONTENDERS["auto"], together=together).build(base).module
        members = [module.get_submodule(f"layer.self_attn.{name}") for name in TARGETS[:3]]
        assert [own.shared_inputs is not None for own in members] == [together] * 3
