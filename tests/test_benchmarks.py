"""The benchmark suite at tiny sizes: what it refuses, writes and compares. No times."""

import contextlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks import ceilings, contenders, overhead, peers, presets, results, timing
from benchmarks.contenders import CONTENDERS, FROZEN, Layer, find
from benchmarks.gate import Gate
from pera_kernels.verify.numerics import Case, make_inputs

CPU = torch.device("cpu")
CASE = Case(r=3, T=9, N=20, M=12, scale=1.0)
TINY = ["--device", "cpu", "--T", "5", "--shapes", "24x16", "--ranks", "3", "--rounds", "2"]
TINY += ["--dtypes", "float32"]
QUICKLY = ("merged", "reference", "peft-lora", "released", "auto", "torch", "torch-composed")


@pytest.fixture(autouse=True)
def small_and_compiled(monkeypatch):
    """Few input sets and short samples; kernels count as compiled, on the CPU as unavailable."""
    monkeypatch.setattr(timing, "MAX_SETS", 2)
    monkeypatch.setattr(timing, "SAMPLE_MS", 0.01)
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setitem(ceilings.GEMM_SIDE, "cpu", 32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def ratios(judgements):
    return {name: judged.error_ratio for name, judged in judgements.items()}


def failure(contender, case=CASE):
    return Gate(case, CPU).judge_all([contender])[contender.name].failure


def test_a_run_appends_one_row_for_each_contender_and_phase(tmp_path, capsys):
    out = tmp_path / "new" / "rows.jsonl"
    assert program.main([*TINY, "--only", ",".join(QUICKLY), "--out", str(out)]) == 0
    rows = rows_of(out)
    names = {FROZEN, *QUICKLY}
    assert {(row["contender"], row["phase"]) for row in rows} == {
        (name, phase) for name in names for phase in timing.PHASES
    }
    assert len(rows) == len(names) * len(timing.PHASES)
    for row in rows:
        assert list(row) == list(results.Row.__dataclass_fields__)
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["ratio_to_frozen"] > 0 and row["status"] == "timed"
        assert row["ratio_to_frozen"] == 1.0 or row["contender"] != FROZEN
        assert row["peak_mib"] > 0 and row["saved_mib"] >= 0 and row["graph"] is False
        assert row["launches"] is None and row["host_us"] is None
        assert row["tflops"] > 0 and row["gbps"] > 0 and row["roofline_share"] > 0
        assert (row["error_ratio"] is None) == (row["contender"] == FROZEN)
        assert (row["T"], row["n"], row["m"], row["r"]) == (5, 24, 16, 3)
        assert row["dtype"] == "float32" and row["torch"] == torch.__version__
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 120
    program.main([*TINY, "--only", "torch", "--phases", "both", "--out", str(out)])
    assert [row["contender"] for row in rows_of(out)[len(rows) :]] == ["frozen", "torch"]


def test_shares_of_the_roofline_follow_from_a_row(tmp_path):
    out = tmp_path / "rows.jsonl"
    program.main([*TINY, "--only", "torch", "--phases", "forward", "--out", str(out)])
    for row in rows_of(out):
        sides = row["tflops"] / row["ceiling_tflops"], row["gbps"] / row["ceiling_gbps"]
        assert row["roofline_share"] == pytest.approx(max(sides), rel=1e-3)
        if row["contender"] == FROZEN:
            assert row["tflops"] * row["median_ms"] * 1e9 == pytest.approx(
                2 * 5 * 24 * 16, rel=1e-3
            )


def test_who_cannot_run_is_named_with_the_reason(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    arguments = [*TINY, "--phases", "forward", "--only", "torch,triton,peft-lora,released-amp"]
    assert program.main([*arguments, "--out", str(tmp_path / "rows.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "triton: not timed: its kernels need a GPU" in printed
    assert "peft-lora: not timed: the peft package is not installed" in printed
    assert "released-amp: not timed: autocast is for half precision" in printed


def test_a_compiled_reference_is_timed_but_not_backward_alone(tmp_path, capsys):
    if reason := find("reference-compiled").unavailable(CASE, CPU):
        pytest.skip(reason)
    out = tmp_path / "rows.jsonl"
    arguments = ["--only", "reference-compiled", "--phases", "backward,both,eval"]
    assert program.main([*TINY, *arguments, "--out", str(out)]) == 0
    compiled = [r for r in rows_of(out) if r["contender"] == "reference-compiled"]
    assert [row["phase"] for row in compiled] == ["both", "eval"]
    assert compiled[0]["error_ratio"] <= 1
    assert "reference-compiled: no backward alone" in capsys.readouterr().out


def test_resume_skips_what_the_file_has_of_this_commit(tmp_path, capsys, monkeypatch):
    out = tmp_path / "rows.jsonl"
    arguments = [*TINY, "--only", "torch", "--phases", "both", "--out", str(out), "--resume"]
    for expected in (2, 2):
        assert program.main(arguments) == 0
        assert len(rows_of(out)) == expected
    assert "done before" in capsys.readouterr().out
    assert program.main([*arguments, "--phases", "both,eval"]) == 0
    assert len(rows_of(out)) == 6
    monkeypatch.setattr(results, "commit", lambda: "another")
    assert program.main(arguments) == 0
    assert len(rows_of(out)) == 8


def test_a_budget_stops_between_cases_and_says_what_is_left(tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 10_000, 40))
    monkeypatch.setattr(program.time, "monotonic", lambda: next(clock))
    out = tmp_path / "rows.jsonl"
    arguments = [*TINY, "--T", "2,3,4", "--only", "torch", "--phases", "forward"]
    # A case takes 40 s by this clock, and the first starts at 40: a second would end after 120.
    assert program.main([*arguments, "--budget", "119", "--out", str(out)]) == 0
    assert {row["T"] for row in rows_of(out)} == {2}
    printed = capsys.readouterr().out
    assert "the budget of 119 s is used up; left out, 2:" in printed
    assert "T=3  n=24" in printed and "T=4  n=24" in printed


def test_presets_plan_every_case_once_and_take_an_axis_from_the_command_line():
    for preset in presets.PRESETS.values():
        for grids in preset.grids.values():
            planned = presets.plan(grids, {})
            assert len({p.case for p in planned}) == len(planned) > 0
    targets = presets.plan(presets.PRESETS["targets"].grids["cpu"], {})
    assert len(targets) == 4 * 2 * 3 * 2 and {p.phases for p in targets} == {("both", "eval")}
    narrowed = presets.plan(presets.PRESETS["gpu"].grids["cuda"], {"T": (7,), "phases": ("eval",)})
    assert {p.case.T for p in narrowed} == {7} and {p.phases for p in narrowed} == {("eval",)}
    everything = presets.plan(presets.PRESETS["grid"].grids["cuda"], {})
    assert len(everything) == 8 * 4 * 4 * 5 * 4 * 2


def test_composed_plans_run_below_float32_only_if_asked(tmp_path):
    out = tmp_path / "rows.jsonl"
    case = replace(CASE, dtype=torch.bfloat16)
    chosen, reasons = contenders.select(case, CPU, None)
    assert "torch-composed" not in {own.name for own in chosen}
    assert "rounds W0 + ΔW to torch.bfloat16" in reasons["torch-composed"]
    arguments = [*TINY, "--dtypes", "bfloat16", "--phases", "forward", "--out", str(out)]
    assert program.main([*arguments, "--only", "torch-composed"]) == 0
    assert rows_of(out)[-1]["contender"] == "torch-composed"


def test_a_preset_leaves_out_whom_it_names_unless_asked():
    without = ("torch",)
    chosen, reasons = contenders.select(CASE, CPU, None, without)
    assert "torch" not in {own.name for own in chosen}
    assert reasons["torch"] == "the preset leaves it out of this case"
    assert [own.name for own in contenders.select(CASE, CPU, ("torch",), without)[0]] == [
        FROZEN,
        "torch",
    ]


def test_what_fails_the_gate_is_not_timed(tmp_path, monkeypatch, capsys):
    good = find("torch")

    def build(case, inputs):
        layer = good.build(case, inputs)
        layer.module.register_forward_hook(lambda module, args, y: 1.01 * y)
        return layer

    everyone = (*(c for c in CONTENDERS if c is not good), replace(good, build=build))
    monkeypatch.setattr(contenders, "CONTENDERS", everyone)
    out = tmp_path / "rows.jsonl"
    assert program.main([*TINY, "--only", "torch,reference", "--out", str(out)]) == 1
    rows = rows_of(out)
    bad = [row for row in rows if row["contender"] == "torch"]
    assert [(row["status"], row["phase"], row["median_ms"]) for row in bad] == [
        ("failed", "gate", None)
    ]
    assert "y: max error" in bad[0]["note"]
    assert sum(row["contender"] == "reference" for row in rows) == len(timing.PHASES)
    assert "torch: y: max error" in capsys.readouterr().out


def test_the_gate_wants_every_gradient_and_takes_an_exception_as_a_failure():
    good = find("torch")

    def forgets(case, inputs):
        layer = good.build(case, inputs)
        return Layer(layer.module, {"dA": layer.trains["dA"]})

    def raises(case, inputs):
        raise RuntimeError("out of registers")

    assert failure(good) is None
    assert failure(replace(good, build=forgets)) == "no dB, dh"
    assert failure(replace(good, build=raises)) == "RuntimeError: out of registers"


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("terms", ["full", "square", "cross", "linear"])
def test_every_contender_that_can_run_here_passes_the_gate(terms, dropout):
    case = replace(CASE, terms=terms, dropout_p=dropout)
    # Compiling takes long: the compiled reference has a test of its own.
    slow = "reference-compiled"
    available = [c for c in CONTENDERS if c.unavailable(case, CPU) is None and c.name != slow]
    names = {own.name for own in available}
    assert {FROZEN, "reference", "auto", "torch", "peft-lora"} <= names
    assert ("merged" in names) == (dropout == 0.0) and ("released" in names) == (terms == "full")
    judged = Gate(case, CPU).judge_all(available)
    assert [judgement.failure for judgement in judged.values()] == [None] * len(available)
    assert [name for name, ratio in ratios(judged).items() if ratio is None] == [FROZEN]


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_peers_compute_the_same_function_within_our_own_rule(adapter_dtype):
    case = replace(CASE, dtype=torch.bfloat16, adapter_dtype=adapter_dtype, T=64)
    available = [c for c in peers.PEERS if c.unavailable(case, CPU) is None]
    names = {own.name for own in available}
    working = {"peft-lora", "released"} if adapter_dtype == torch.bfloat16 else set()
    assert names == {"peft-lora-amp", "released-amp"} | working
    found = ratios(Gate(case, CPU).judge_all(available))
    assert all(0 < found[name] < 1 for name in names)


def test_a_peer_that_adds_the_bias_twice_is_refused():
    good = find("released")
    case = replace(CASE, dtype=torch.bfloat16)

    def build(case, inputs):
        layer = good.build(case, inputs)
        layer.module.register_forward_hook(lambda module, args, y: y + inputs.bias)
        return layer

    judged = Gate(case, CPU).judge_all([replace(good, build=build)])["released"]
    assert judged.error_ratio > 2 * peers.PEER_ALLOWED and "y: max error" in judged.failure


def test_peers_apply_dropout_in_training_only():
    case = replace(CASE, dropout_p=0.5)
    inputs = make_inputs(case, CPU)
    for name in ("peft-lora", "released"):
        module = find(name).build(case, inputs).module
        assert not torch.equal(module(inputs.x), module(inputs.x))
        module.eval()
        torch.testing.assert_close(module(inputs.x), module(inputs.x), rtol=0, atol=0)


@pytest.mark.parametrize("name", [FROZEN, *QUICKLY])
def test_a_backward_can_be_repeated_and_leaves_what_it_reads(name):
    inputs = timing.input_sets(make_inputs(CASE, CPU), CPU)[0]
    layer = find(name).build(CASE, inputs)
    backward = timing.phase_call(layer, inputs, "backward")
    first, second, both = backward(), backward(), timing.phase_call(layer, inputs, "both")()
    assert len(first) == 1 + len(layer.trains)
    for a, b, c in zip(first, second, both, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(a, c, rtol=0, atol=0)


def test_saved_memory_counts_what_the_inputs_do_not_hold():
    case = replace(CASE, T=64)
    inputs = timing.input_sets(make_inputs(case, CPU), CPU)[0]
    u = case.T * (2 * case.r + case.r * (case.r - 1) // 2) * 4

    def saved(name):
        return timing.saved_mib(find(name).build(case, inputs), inputs, CPU)

    assert (saved("frozen"), saved("torch")) == (0.0, u / 2**20)
    assert saved("reference") >= saved("torch")


def test_the_peak_of_a_frozen_layer_is_its_output_or_its_gradient():
    case = replace(CASE, T=64)
    inputs = timing.input_sets(make_inputs(case, CPU), CPU)[0]
    layer = find(FROZEN).build(case, inputs)
    y, dx = case.T * case.M * 4 / 2**20, case.T * case.N * 4 / 2**20
    peak = {phase: timing.peak_mib(layer, inputs, phase, CPU) for phase in timing.PHASES}
    assert peak == {"forward": y, "eval": y, "backward": y + dx, "both": y + dx}


def test_the_eval_phase_computes_y_alone_without_dropout():
    case = replace(CASE, dropout_p=0.5)
    inputs = timing.input_sets(make_inputs(case, CPU), CPU)[0]
    layer = find("torch").build(case, inputs)
    evaluate = timing.phase_call(layer, inputs, "eval")
    y = evaluate()
    assert not y.requires_grad and not layer.module.training
    torch.testing.assert_close(y, evaluate(), rtol=0, atol=0)
    train = timing.phase_call(layer, inputs, "forward")
    assert train().requires_grad and not torch.equal(train(), train())


def test_input_sets_are_apart_and_outgrow_the_cache(monkeypatch):
    monkeypatch.setattr(timing, "MAX_SETS", 64)
    monkeypatch.setattr(timing, "CPU_CACHE_BYTES", 10_000)
    inputs = make_inputs(CASE, CPU)
    sets = timing.input_sets(inputs, CPU)
    assert sum(s.x.nbytes + s.weight.nbytes for s in sets) >= 30_000
    assert len({s.x.data_ptr() for s in sets} | {s.weight.data_ptr() for s in sets}) == 2 * len(
        sets
    )
    assert all(s.x.requires_grad and torch.equal(s.x, inputs.x) for s in sets)


def test_ratios_are_taken_round_by_round():
    slow = timing.Timing("slow", False, samples=[2.0, 30.0, 6.0])
    base = timing.Timing(FROZEN, False, samples=[1.0, 10.0, 2.0])
    assert slow.ratio_to(base) == 3.0
    assert slow.median == 6.0


@pytest.fixture
def fake_cuda(monkeypatch):
    """Events, graphs and capture that only keep count, to follow the CUDA path without a GPU."""
    state = SimpleNamespace(capturing=False, replays=0)

    @contextlib.contextmanager
    def capture(graph, stream):
        state.capturing = True
        try:
            yield
        finally:
            state.capturing = False

    def replay():
        state.replays += 1

    event = SimpleNamespace(
        record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 0.5
    )
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=replay))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(timing, "GRAPH_BELOW_MS", 1e9)
    return state


def test_what_cannot_be_captured_is_compared_with_an_eager_frozen_layer(fake_cuda):
    class Uncapturable(torch.nn.Module):
        def forward(self, x):
            if fake_cuda.capturing:
                raise RuntimeError("operation not permitted when stream is capturing")
            return 2 * x

    sets = timing.input_sets(make_inputs(CASE, CPU), CPU)
    layers = {
        name: [find(name).build(CASE, inputs) for inputs in sets]
        for name in (FROZEN, "torch", "reference")
    }
    layers["other"] = [Layer(Uncapturable(), {}) for _ in sets]
    found = timing.time_phase(
        layers,
        sets,
        "forward",
        rounds=3,
        device=torch.device("cuda"),
        capturable=frozenset({FROZEN, "torch", "other"}),
    )
    assert sorted((timing_.name, timing_.graph) for timing_ in found) == [
        (FROZEN, False),
        (FROZEN, True),
        ("other", False),
        ("reference", False),
        ("torch", True),
    ]
    notes = {timing_.name: timing_.note for timing_ in found if timing_.note}
    assert list(notes) == ["other"] and "stream is capturing" in notes["other"]
    assert all(len(timing_.samples) == 3 for timing_ in found)
    # Two graphs, three rounds, one replay before each timed one.
    assert fake_cuda.replays == 12


def test_launches_are_counted_between_markers():
    mark = "at::cuda::spin_kernel(long)"
    names = [mark, "gemm", "Memset", mark, mark, "gemm", mark]
    assert overhead.count_between_markers(names, 3) == [2, 0, 1]
    assert overhead.count_between_markers(names[:-1], 3) == [None] * 3
    assert overhead.launches({"one": lambda: None}, CPU) == {"one": None}
    assert overhead.host_us(lambda: None, CPU) is None


def test_a_slow_phase_has_fewer_rounds(monkeypatch):
    monkeypatch.setattr(timing, "PHASE_SECONDS", 0.0)
    sets = timing.input_sets(make_inputs(CASE, CPU), CPU)
    layers = {FROZEN: [find(FROZEN).build(CASE, inputs) for inputs in sets]}
    found = timing.time_phase(layers, sets, "forward", rounds=50, device=CPU)
    assert [len(own.samples) for own in found] == [timing.MIN_ROUNDS]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--T", "0"], "'0' is not a whole number from 1"),
        (["--shapes", "1024"], "'1024' is not of the form 1024x4096"),
        (["--terms", "full,cubic"], "'cubic' is none of full, square, cross, linear"),
        (["--dtypes", "int8"], "'int8' is none of float32"),
        (["--dropout", "1"], "'1' is not a number in [0, 1)"),
        (["--phases", "sideways"], "'sideways' is none of forward, backward, both, eval"),
        (["--only", "lora"], "'lora' is none of frozen, merged"),
        (["--rounds", "1"], "'1' is not a whole number from 2"),
        (["--device", "tpu"], "'tpu' is none of auto, cpu, cuda"),
        (["--out", "."], "cannot write ."),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--preset", "gpu"], "--preset gpu is for cuda; the device is cpu"),
        (["--budget", "0"], "'0' is not a whole number from 1"),
    ],
)
def test_bad_arguments_exit_2_with_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        program.main(["--device", "cpu", *arguments])
    printed = capsys.readouterr().err
    assert exit_.value.code == 2 and message in printed and printed.count("\n") == 1


def test_interpreted_kernels_are_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as exit_:
        program.main([*TINY, "--out", str(tmp_path / "rows.jsonl")])
    assert exit_.value.code == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
