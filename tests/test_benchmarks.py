"""The benchmark suite at tiny sizes: what it refuses, writes and compares. No times."""

import contextlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks import contenders, results, timing
from benchmarks.contenders import CONTENDERS, FROZEN, Gate, Layer, find
from tools.numerics import Case, make_inputs

CPU = torch.device("cpu")
CASE = Case(r=3, T=9, N=20, M=12, scale=1.0)
TINY = ["--device", "cpu", "--T", "5", "--shapes", "24x16", "--ranks", "3", "--rounds", "2"]


@pytest.fixture(autouse=True)
def small_and_compiled(monkeypatch):
    """Few input sets and short samples; kernels count as compiled, on the CPU as unavailable."""
    monkeypatch.setattr(timing, "MAX_SETS", 2)
    monkeypatch.setattr(timing, "SAMPLE_MS", 0.01)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_appends_one_row_for_each_contender_and_phase(tmp_path, capsys):
    out = tmp_path / "new" / "rows.jsonl"
    assert program.main([*TINY, "--out", str(out)]) == 0
    rows = rows_of(out)
    names = {"frozen", "merged", "reference", "torch", "torch-composed"}
    assert {(row["contender"], row["phase"]) for row in rows} == {
        (name, phase) for name in names for phase in timing.PHASES
    }
    assert len(rows) == len(names) * len(timing.PHASES)
    for row in rows:
        assert list(row) == list(results.Row.__dataclass_fields__)
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["ratio_to_frozen"] > 0 and row["status"] == "timed"
        assert row["ratio_to_frozen"] == 1.0 or row["contender"] != FROZEN
        assert row["peak_mib"] is None and row["graph"] is False
        assert (row["T"], row["n"], row["m"], row["r"]) == (5, 24, 16, 3)
        assert row["dtype"] == "float32" and row["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "triton: not timed: its kernels need a GPU" in printed
    assert max(map(len, printed.splitlines())) <= 120
    program.main([*TINY, "--only", "torch", "--phases", "both", "--out", str(out)])
    assert [row["contender"] for row in rows_of(out)[len(rows) :]] == ["frozen", "torch"]


def test_composed_plans_run_below_float32_only_if_asked(tmp_path):
    out = tmp_path / "rows.jsonl"
    arguments = [*TINY, "--dtypes", "bfloat16", "--phases", "forward", "--out", str(out)]
    assert program.main(arguments) == 0
    assert "torch-composed" not in {row["contender"] for row in rows_of(out)}
    assert program.main([*arguments, "--only", "torch-composed"]) == 0
    assert rows_of(out)[-1]["contender"] == "torch-composed"


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
    assert sum(row["contender"] == "reference" for row in rows) == 3
    assert "torch: y: max error" in capsys.readouterr().out


def test_the_gate_wants_every_gradient_and_takes_an_exception_as_a_failure():
    good, gate = find("torch"), Gate(CPU)

    def forgets(case, inputs):
        layer = good.build(case, inputs)
        return Layer(layer.module, {"dA": layer.trains["dA"]})

    def raises(case, inputs):
        raise RuntimeError("out of registers")

    assert gate.failure(good, CASE) is None
    assert gate.failure(replace(good, build=forgets), CASE) == "no dB, dh"
    assert gate.failure(replace(good, build=raises), CASE) == "RuntimeError: out of registers"


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("terms", ["full", "square", "cross", "linear"])
def test_every_contender_that_can_run_here_passes_the_gate(terms, dropout):
    case = replace(CASE, terms=terms, dropout_p=dropout)
    gate = Gate(CPU)
    available = [c for c in CONTENDERS if c.unavailable(case, CPU) is None]
    assert {"frozen", "reference", "torch"} <= {c.name for c in available}
    assert ("merged" in {c.name for c in available}) == (dropout == 0.0)
    assert [gate.failure(contender, case) for contender in available] == [None] * len(available)


@pytest.mark.parametrize("name", ["frozen", "reference", "torch", "torch-composed"])
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
    saved = {n: timing.saved_mib(find(n).build(case, inputs), inputs) for n in ("frozen", "torch")}
    assert saved == {"frozen": 0.0, "torch": u / 2**20}
    assert timing.saved_mib(find("reference").build(case, inputs), inputs) >= saved["torch"]


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--T", "0"], "'0' is not a whole number from 1"),
        (["--shapes", "1024"], "'1024' is not of the form 1024x4096"),
        (["--terms", "full,cubic"], "'cubic' is none of full, square, cross, linear"),
        (["--dtypes", "int8"], "'int8' is none of float32"),
        (["--dropout", "1"], "'1' is not a number in [0, 1)"),
        (["--phases", "sideways"], "'sideways' is none of forward, backward, both"),
        (["--only", "lora"], "'lora' is none of frozen, merged"),
        (["--rounds", "1"], "'1' is not a whole number from 2"),
        (["--device", "tpu"], "'tpu' is none of auto, cpu, cuda"),
        (["--out", "."], "cannot write ."),
        (["--preset", "huge"], "invalid choice: 'huge'"),
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
