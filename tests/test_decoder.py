"""PERA in a transformers decoder layer, and that layer's benchmark, at tiny sizes. No times."""

import copy
import functools
import importlib
import importlib.util
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers", reason="the decoder layer needs transformers")

import pera_kernels as pk  # noqa: E402
from benchmarks import results  # noqa: E402
from benchmarks import timing as timing_module  # noqa: E402
from benchmarks.decoder import __main__ as program  # noqa: E402
from benchmarks.decoder import adapters, measure, report  # noqa: E402
from benchmarks.decoder.adapters import CONTENDERS, contenders  # noqa: E402
from benchmarks.decoder.gate import Gate, exact, outputs  # noqa: E402
from benchmarks.decoder.layer import TARGETS, Base, Problem, projections  # noqa: E402
from benchmarks.gate import Judgement  # noqa: E402
from pera_kernels import backends  # noqa: E402

CPU = torch.device("cpu")
if backends.unavailable("triton", CPU) is None:
    # Now: kernels that a test imports first while TRITON_INTERPRET is unset are never interpreted.
    importlib.import_module("pera_kernels.launch")
TINY = Problem(hidden=32, intermediate=112, heads=4, kv_heads=2, batch=2, sequence=7, r=8)
SIZES = ["--hidden", "32", "--intermediate", "112", "--heads", "4", "--kv-heads", "2"]
ARGUMENTS = [*SIZES, "--batch", "2", "--sequence", "7", "--rank", "3", "--rounds", "2"]
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="PEFT's LoRA needs peft"
)


@pytest.fixture(autouse=True)
def compiled_kernels(monkeypatch):
    """To the program kernels count as compiled, whatever the environment says."""
    monkeypatch.setattr(program, "backends", SimpleNamespace(interpreting=lambda: False))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def find(name, problem=TINY):
    return next(own for own in contenders(problem) if own.name == name)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def gradients_of(module, x, dy, seed=3):
    """y, dx and the gradient of every adapter parameter."""
    leaf = x.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    y = module(leaf)
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [leaf, *parameters], dy)]


def test_inject_adapts_the_projections_and_changes_nothing_at_first():
    base = Base(TINY, CPU)
    frozen, adapted = (find(name).build(base).module for name in ("frozen", "torch"))
    fresh = base.copy()
    assert pk.inject(fresh, TARGETS, r=8, backend="torch") is fresh
    assert {name.rpartition(".")[2] for name in pk.adapted_modules(fresh)} == set(TARGETS)
    tables = (frozen.cos, frozen.sin)
    torch.testing.assert_close(
        fresh(base.x, position_embeddings=tables), frozen(base.x), rtol=1e-5, atol=1e-5
    )
    assert (adapted(base.x) - frozen(base.x)).abs().max() > 0.1


def test_the_adapted_layer_compiles_as_one_graph():
    torch._dynamo.reset()
    base = Base(TINY, CPU)
    module = find("torch").build(base).module
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    eager, traced = (gradients_of(m, base.x, base.dy) for m in (module, compiled))
    assert len(eager) == 2 + 3 * len(TARGETS)
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_checkpointing_repeats_the_same_masks(dropout):
    base = Base(replace(TINY, dropout=dropout), CPU)
    plain = find("torch").build(base).module
    again = copy.deepcopy(plain)
    again.checkpointing = True
    for a, b in zip(*(gradients_of(m, base.x, base.dy) for m in (plain, again)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_checkpointing_as_transformers_does_it():
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=13,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = pk.inject(LlamaModel(config), TARGETS, r=3, dropout=0.25, backend="torch").train()
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


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_contender_that_can_run_here_passes_the_gate(dtype, dropout):
    problem = replace(TINY, dtype=dtype, dropout=dropout)
    base = Base(problem, CPU)
    gate = Gate(base)
    found = {
        (own.name, report.dtype_name(own, problem)): gate.judgement(own, own.build(base)).failure
        for own in contenders(problem)
        if own.unavailable(problem, CPU) is None
    }
    assert set(found.values()) == {None}
    name = str(dtype).removeprefix("torch.")
    ours = {("reference", name), ("torch", name), ("released", name), ("frozen", name)}
    if dtype != torch.float32:
        mixed = f"{name}+float32"
        ours |= {("reference", mixed), ("torch", mixed), ("released-amp", mixed)}
    assert ours <= set(found)


def test_a_backend_passes_the_gate_in_the_layer(backend, device):
    # Small enough for Triton's interpreter.
    sizes = {"hidden": 16, "intermediate": 20, "heads": 2, "kv_heads": 1, "batch": 1, "sequence": 5}
    problem = Problem(**sizes, r=8, dtype=torch.bfloat16, dropout=0.25)
    base = Base(problem, device)
    mixed = [own for own in contenders(problem) if own.name == backend][-1]
    assert mixed.adapter_dtype == torch.float32
    judgement = Gate(base).judgement(mixed, mixed.build(base))
    assert judgement.failure is None and judgement.error_ratio <= 1.0


def test_the_gate_tells_another_function_from_rounding():
    problem = replace(TINY, dtype=torch.bfloat16)
    base = Base(problem, CPU)
    gate = Gate(base)
    for name in ("torch", "released"):
        own = find(name, problem)
        layer = own.build(base)
        with torch.no_grad():
            layer.trains["v_proj.dh"].zero_()
        judgement = gate.judgement(own, layer)
        assert "results are wrong, the worst is " in judgement.failure
        assert judgement.error_ratio > 4.0
        layer.trains.pop("q_proj.dB")
        assert gate.judgement(own, layer).failure == "no q_proj.dB"


def test_truth_is_float64_throughout():
    layer = find("reference").build(Base(TINY, CPU))
    truth = exact(layer)
    assert {p.dtype for p in truth.module.parameters()} == {torch.float64}
    assert set(map(id, truth.trains.values())) <= set(map(id, truth.module.parameters()))
    assert {p.dtype for p in layer.module.parameters()} == {torch.float32}
    x, dy = (torch.randn(2, 7, 32, dtype=torch.float64) for _ in range(2))
    # A norm that went through float32 would answer to a change of 1e-11 in steps, or not at all.
    y, moved = (outputs(truth, x * (1 + scale), dy)["y"] for scale in (0.0, 1e-11))
    assert 0 < (moved - y).abs().max() < 1e-9


class HandWrittenLora(nn.Module):
    def __init__(self, base, A, B, dtype):
        super().__init__()
        self.base = base
        self.A, self.B = (nn.Parameter(t.to(dtype)) for t in (A, B))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))


@needs_peft
@pytest.mark.parametrize("name", ["peft-lora", "peft-lora-amp"])
def test_peft_is_a_hand_written_lora(name):
    problem = TINY if name == "peft-lora" else replace(TINY, dtype=torch.bfloat16)
    own = find(name, problem)
    base = Base(problem, CPU)
    layer = base.copy()
    dtype = own.adapter_dtype or problem.dtype
    trains = {}
    for owner in (layer.self_attn, layer.mlp):
        for target in set(TARGETS) & set(dict(owner.named_children())):
            factors = base.factors[target]
            lora = HandWrittenLora(getattr(owner, target), factors.A, factors.B, dtype)
            setattr(owner, target, lora)
            trains |= {f"{target}.dA": lora.A, f"{target}.dB": lora.B}
    written = replace(own, adapt=lambda *given: trains, autocast=False)
    written = replace(own.build(base), trains=trains, module=written.build(base).module)
    written.module.layer = layer
    expected = outputs(written, base.x, base.dy)
    got = outputs(own.build(base), base.x, base.dy)
    assert set(got) == set(expected) and len(got) == 2 + 2 * len(TARGETS)
    tolerance = 1e-5 if problem.dtype == torch.float32 else 0.05
    for key, value in expected.items():
        assert got[key].dtype == value.dtype
        scale = float(value.abs().max())
        torch.testing.assert_close(got[key], value, rtol=0, atol=tolerance * scale)


def test_contenders_share_the_weights_and_nothing_else():
    base = Base(TINY, CPU)
    one, two = (find("torch").build(base) for _ in range(2))
    pointers = [{p.data_ptr() for p in layer.module.layer.parameters()} for layer in (one, two)]
    frozen = {p.data_ptr() for p in base.layer.parameters()}
    assert pointers[0] & pointers[1] == frozen
    assert not any(p.requires_grad for p in base.layer.parameters())


def test_a_step_moves_the_adapters_and_leaves_no_gradient():
    base = Base(TINY, CPU)
    layer = find("torch").build(base)
    before = {name: t.detach().clone() for name, t in layer.trains.items()}
    weights = [p.detach().clone() for p in base.layer.parameters()]
    measure.phase_call(layer, base.x, base.dy, "step")()
    assert not any(torch.equal(before[name], t) for name, t in layer.trains.items())
    assert all(torch.equal(*pair) for pair in zip(weights, base.layer.parameters(), strict=True))
    assert base.x.grad is None and all(t.grad is None for t in layer.trains.values())
    gradients = measure.phase_call(layer, base.x, base.dy, "both")()
    assert [g.shape for g in gradients] == [t.shape for t in (base.x, *layer.trains.values())]


def test_checkpointing_keeps_the_generator_alone_for_the_backward():
    base = Base(TINY, CPU)
    kept = {}
    for checkpointing in (False, True):
        base.problem = replace(TINY, checkpointing=checkpointing)
        kept[checkpointing] = measure.saved_bytes(find("torch").build(base), base.x, CPU)
    assert kept[True] == torch.get_rng_state().nbytes < kept[False]


def test_flops_of_the_frozen_layer_are_those_counted():
    from torch.utils.flop_counter import FlopCounterMode

    # Without the causal half of attention: the counter cannot know the mask.
    problem = replace(TINY, batch=1, sequence=1)
    base = Base(problem, CPU)
    layer = find("frozen").build(base)
    with FlopCounterMode(display=False) as counter:
        layer.module(base.x).backward(base.dy)
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    attention = 6 * problem.T * problem.sequence * problem.hidden
    assert report.flops(find("frozen"), problem) == products + attention


def test_a_run_appends_one_row_for_each_contender_and_phase(tmp_path, capsys):
    out = tmp_path / "new" / "rows.jsonl"
    run = [*ARGUMENTS, "--device", "cpu", "--dtypes", "float32,bfloat16", "--out", str(out)]
    assert program.main(run) == 0
    rows = rows_of(out)
    expected = {
        (own.name, report.dtype_name(own, problem), phase)
        for problem in (TINY, replace(TINY, dtype=torch.bfloat16))
        for own in contenders(problem)
        if own.unavailable(problem, CPU) is None
        for phase in measure.PHASES
    }
    assert {(row["contender"], row["dtype"], row["phase"]) for row in rows} == expected
    assert len(rows) == len(expected)
    for row in rows:
        assert list(row) == list(results.Row.__dataclass_fields__)
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["ratio_to_frozen"] > 0 and row["status"] == "timed"
        assert row["ratio_to_frozen"] == 1.0 or row["contender"] != "frozen"
        assert row["peak_mib"] > row["saved_mib"] > 0 and row["tflops"] > 0
        assert (row["T"], row["n"], row["m"], row["r"]) == (14, 32, 112, 3)
        assert row["launches"] is None and row["gbps"] is None and row["roofline_share"] is None
    printed = capsys.readouterr().out
    assert "triton: not timed: its kernels need a GPU" in printed
    assert max(map(len, printed.splitlines())) <= 120
    again = ["--only", "torch", "--dtypes", "float32", "--checkpointing", "--dropout", "0.25"]
    assert program.main([*run, *again]) == 0
    last = rows_of(out)[len(rows) :]
    assert [row["contender"] for row in last[:2]] == ["frozen", "torch"]
    assert all("activation checkpointing" in row["note"] for row in last)
    assert last[1]["saved_mib"] < rows[-1]["saved_mib"]


def test_what_fails_the_gate_is_not_timed(tmp_path, monkeypatch, capsys):
    good = find("torch")

    def adapt(*given):
        trains = good.adapt(*given)
        with torch.no_grad():
            trains["v_proj.dB"].mul_(1.5)
        return trains

    def raises(*given):
        raise RuntimeError("out of registers")

    everyone = (
        *(own for own in CONTENDERS if own.name in ("frozen", "reference")),
        replace(good, adapt=adapt),
        replace(find("released"), adapt=raises),
    )
    monkeypatch.setattr(adapters, "CONTENDERS", everyone)
    out = tmp_path / "rows.jsonl"
    arguments = [*ARGUMENTS, "--device", "cpu", "--dtypes", "float32", "--out", str(out)]
    assert program.main(arguments) == 1
    failed = [row for row in rows_of(out) if row["status"] == "failed"]
    assert [(row["contender"], row["phase"], row["median_ms"]) for row in failed] == [
        ("torch", "gate", None),
        ("released", "gate", None),
    ]
    assert failed[1]["note"].endswith(": RuntimeError: out of registers")
    assert "results are wrong" in capsys.readouterr().out
    assert "| torch | float32 | fails the gate, not timed |" in report.table(out)


def test_the_table_takes_the_latest_rows(tmp_path):
    out = tmp_path / "rows.jsonl"
    host = results.host(CPU)
    problem = replace(TINY, dtype=torch.bfloat16)

    def row(own, phase, ms, ratio=1.5, **changes):
        timing = measure.Timing(own.name, False, samples=[ms, ms])
        return report.timed_row(
            own,
            replace(problem, **changes),
            host,
            phase,
            timing,
            ratio=ratio,
            peak=2.0,
            saved=1.0,
            launches=7,
            error_ratio=0.5,
        )

    ours, mixed = (own for own in contenders(problem) if own.name == "torch")
    first = [row(ours, "step", 1234.0), row(ours, "both", 3.0), row(mixed, "step", 5.0)]
    results.append(out, first)
    results.append(out, [row(ours, "step", 4.0, ratio=1.25)])
    results.append(out, [row(ours, "step", 6.0, checkpointing=True)])
    text = report.table(out)
    assert "1,234" not in text
    assert "| torch | bfloat16 | 4.00 | 1.250 | 3.00 | 1.500 | 2.0 | 1.0 |" in text
    assert "| torch | float32 | 5.00 | 1.500 | - | - | 2.0 | 1.0 |" in text
    assert text.count("| contender |") == 2 and "activation checkpointing" in text
    wrong = Judgement(3.0, "y: max error")
    results.append(out, [report.failed_row(ours, problem, host, wrong)])
    assert "| torch | bfloat16 | fails the gate, not timed |" in report.table(out)
    results.append(out, [row(ours, "step", 8.0)])
    assert "| torch | bfloat16 | 8.00 | 1.500 | - | - |" in report.table(out)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(ValueError, match="empty.jsonl holds no row"):
        report.table(empty)


def test_gpu_samples_follow_an_untimed_call(monkeypatch):
    seen = []
    event = SimpleNamespace(
        record=lambda: seen.append("record"),
        synchronize=lambda: seen.append("wait"),
        elapsed_time=lambda end: 0.5,
    )
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    calls = {name: lambda name=name: seen.append(name) for name in ("a", "b")}
    timings = measure.time_calls(calls, 3, torch.device("cuda"))
    assert timings["a"].samples == timings["b"].samples == [0.5] * 3
    turns = [seen[i : i + 5] for i in range(0, len(seen), 5)]
    assert len(turns) == 6
    assert all(turn == [turn[0], "record", turn[0], "record", "wait"] for turn in turns)


def test_slow_steps_have_fewer_rounds(monkeypatch):
    monkeypatch.setattr(measure, "PHASE_SECONDS", 0.0)
    timings = measure.time_calls({"a": lambda: None, "b": lambda: None}, 20, CPU)
    assert {len(timing.samples) for timing in timings.values()} == {timing_module.MIN_ROUNDS}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden", "0"], "'0' is not a whole number from 1"),
        (["--hidden", "30"], "--hidden 30 is not an even multiple of --heads 8"),
        (["--kv-heads", "3"], "--heads 8 is not a multiple of --kv-heads 3"),
        (["--dtypes", "int8"], "'int8' is none of float32, bfloat16, float16"),
        (["--dropout", "1"], "'1' is not a number in [0, 1)"),
        (["--only", "lora"], "'lora' is none of frozen, peft-lora"),
        (["--rounds", "1"], "'1' is not a whole number from 2"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--out", "."], "cannot write ."),
    ],
)
def test_bad_arguments_exit_2_with_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        program.main(["--device", "cpu", *arguments])
    printed = capsys.readouterr().err
    assert exit_.value.code == 2 and message in printed and printed.count("\n") == 1


def test_interpreted_kernels_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(program, "backends", backends)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as exit_:
        program.main(ARGUMENTS)
    assert exit_.value.code == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_what_is_not_installed_is_named(monkeypatch, tmp_path, capsys):
    installed = importlib.util.find_spec
    absent = {"peft"}
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in absent else installed(name, *rest),
    )
    out = tmp_path / "rows.jsonl"
    arguments = [*ARGUMENTS, "--device", "cpu", "--dtypes", "float32", "--out", str(out)]
    assert program.main([*arguments, "--only", "peft-lora"]) == 0
    assert 'peft-lora: not timed: it needs peft: pip install -e ".[bench]"' in (
        capsys.readouterr().out
    )
    assert {row["contender"] for row in rows_of(out)} == {"frozen"}
    absent.add("transformers")
    with pytest.raises(SystemExit) as exit_:
        program.main(arguments)
    printed = capsys.readouterr().err
    assert exit_.value.code == 2 and printed.count("\n") == 1
    assert 'it needs transformers: pip install -e ".[bench]"' in printed


def test_targets_are_found_by_their_last_name():
    found = projections(Base(TINY, CPU).layer)
    assert list(found) == list(TARGETS)
    assert found["down_proj"].in_features == 112 and found["k_proj"].out_features == 16
