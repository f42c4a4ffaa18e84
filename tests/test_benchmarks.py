"""``benchmarks``: what is judged, timed, kept and shown, at tiny sizes. No test asserts a time."""

import contextlib
import itertools
import json
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import pera_kernels as pk
from benchmarks import __main__ as program
from benchmarks import kernels, layers, roofline, rows, timing
from benchmarks.contenders import FROZEN, Layer, Pera
from benchmarks.gate import judge_all
from benchmarks.layers import CONTENDERS, PHASES, phase_call
from benchmarks.memory import memory
from benchmarks.peers import PEER_ALLOWED, Released
from pera_kernels.testing import Case, make_inputs

CPU = torch.device("cpu")
CASE = Case(terms="full", r=4, T=10, N=24, M=16, scale=1.0)
TINY = "--device cpu --shapes 24x16 --T 8 --ranks 3 --dtypes float32 --rounds 2".split()
MIB = 2**20


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(timing, "CPU_CACHE_BYTES", 2_000)
    monkeypatch.setattr(timing, "CPU_SAMPLE_MS", 0.01)
    monkeypatch.setattr(roofline, "COPY_BYTES", {"cpu": 2**10, "cuda": 2**10})
    monkeypatch.setattr(roofline, "GEMM_SIDE", {"cpu": 16, "cuda": 16})
    monkeypatch.setenv("PERA_COMMIT", "0123456789ab")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def failures(contenders, case=CASE):
    judged = judge_all(contenders, case, make_inputs(case), CPU)
    return {name: judgement.failure for name, judgement in judged.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("terms, dropout", [("full", 0.0), ("square", 0.25), ("linear", 0.0)])
def test_every_contender_that_can_run_here_passes_the_gate(terms, dropout, dtype):
    case = replace(CASE, terms=terms, dropout_p=dropout, dtype=dtype)
    # Kernels have tests of their own in the interpreter, and compiling takes long.
    names = set(CONTENDERS) - {"triton", "triton-composed", "reference-compiled"}
    chosen, reasons = layers.select(case, CPU, names)
    assert [own.name for own in chosen][0] == FROZEN
    assert {"reference", "auto", "torch"} <= {own.name for own in chosen}
    assert ("merged" in reasons) == (dropout > 0) and ("released" in reasons) == (terms != "full")
    assert ("released-amp" in reasons) == (terms != "full" or dtype == torch.float32)
    assert set(failures(chosen, case).values()) == {None}


def test_the_gate_refuses_what_is_wrong():
    @dataclass(frozen=True)
    class Wrong(Pera):
        how: str = ""

        def build(self, case, inputs):
            layer = super().build(case, inputs)
            if self.how == "raises":
                raise RuntimeError("out of registers")
            if self.how == "forgets":
                return Layer(layer.module, {"dA": layer.trains["dA"]})
            layer.module.register_forward_hook(lambda module, args, y: 1.01 * y)
            return layer

    found = failures([Wrong(how, how=how) for how in ("raises", "forgets", "scales")])
    assert found["raises"] == "RuntimeError: out of registers"
    assert found["forgets"] == "no dB, dh"
    assert "y: max error" in found["scales"]


def test_a_peer_that_adds_the_bias_twice_is_refused():
    class Twice(Released):
        def build(self, case, inputs):
            layer = super().build(case, inputs)
            layer.module.register_forward_hook(lambda module, args, y: y + inputs.bias)
            return layer

    case = replace(CASE, dtype=torch.bfloat16)
    own = Twice("twice", allowed=PEER_ALLOWED)
    assert "y: max error" in failures([own], case)["twice"]


@pytest.mark.parametrize("name", [FROZEN, "merged", "reference", "peft-lora", "released", "auto"])
def test_phases_compute_what_they_say(name):
    if name == "peft-lora":
        pytest.importorskip("peft")
    inputs = make_inputs(CASE)
    inputs.x.requires_grad_()
    layer = CONTENDERS[name].build(CASE, inputs)
    given = layer, inputs.x, inputs.dy
    backward = phase_call(*given, "backward")
    first, again, both = backward(), backward(), phase_call(*given, "both")()
    assert len(first) == 1 + len(layer.trains)
    for a, b, c in zip(first, again, both, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(a, c, rtol=0, atol=0)
    y = phase_call(*given, "eval")()
    assert not y.requires_grad and not layer.module.training
    assert phase_call(*given, "forward")().requires_grad and layer.module.training


def test_a_run_appends_a_row_for_each_contender_and_phase(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    words = [*TINY, "--phases", ",".join(PHASES), "--only", "auto,reference", "--out", str(out)]
    assert program.main(words) == 0
    found = rows.read(out)
    assert {(row["contender"], row["phase"]) for row in found} == {
        (name, phase) for name in (FROZEN, "auto", "reference") for phase in PHASES
    }
    for row in found:
        assert (row["T"], row["n"], row["m"], row["r"]) == (8, 24, 16, 3)
        assert row["commit"] == "0123456789ab" and row["torch"] == torch.__version__
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["rounds"] == 2
        seconds = row["median_ms"] / 1e3
        case = replace(CASE, r=3, T=8)
        flops = roofline.work(row["plan"], case, row["phase"]).flops
        assert row["tflops"] == pytest.approx(flops / seconds / 1e12, rel=1e-3)
    saved = {row["contender"]: row["saved_mib"] for row in found}
    # u of the forward, in 16 lanes at most.
    assert saved[FROZEN] == 0.0 and 0 < saved["auto"] <= 8 * 16 * 4 / MIB
    frozen = {row["phase"]: row["peak_mib"] for row in found if row["contender"] == FROZEN}
    y, dx = 8 * 16 * 4 / MIB, 8 * 24 * 4 / MIB
    wanted = {"forward": y, "eval": y, "backward": y + dx, "both": y + dx}
    assert frozen == pytest.approx(wanted, rel=1e-3)

    assert program.main([*words, "--resume"]) == 0
    assert len(rows.read(out)) == len(found) and "done before" in capsys.readouterr().out


def test_a_failure_and_a_budget_show_in_the_output_and_the_exit_status(
    tmp_path, monkeypatch, capsys
):
    class Broken(Pera):
        def build(self, case, inputs):
            raise RuntimeError("no")

    monkeypatch.setitem(CONTENDERS, "auto", Broken("auto"))
    out = tmp_path / "rows.jsonl"
    words = [*TINY, "--only", "auto", "--T", "8,9", "--phases", "both", "--out", str(out)]
    ticks = iter(range(0, 1000, 10))
    monkeypatch.setattr(program.time, "monotonic", lambda: next(ticks))
    assert program.main([*words, "--budget", "25"]) == 1
    assert [(row["contender"], row["phase"], row["status"]) for row in rows.read(out)] == [
        ("auto", "gate", "failed"),
        (FROZEN, "both", rows.environment(CPU)["status"]),
    ]
    printed = capsys.readouterr().out
    assert "FAILED: RuntimeError: no" in printed and "left out:\n  {'terms'" in printed


def test_defaults_time_no_backend_twice():
    assert not {"torch", "triton", "reference-compiled"} & set(layers.DEFAULT)
    gpu = program.parser().parse_args(["--device", "cpu"])
    gpu.device = torch.device("cuda", 0)
    assert [(c.T, c.N, c.dtype, c.factor_dtype) for c in program.cases(gpu)] == [
        (T, 4096, torch.bfloat16, adapters)
        for adapters in (torch.float32, torch.bfloat16)
        for T in (16384, 4096, 512)
    ]
    words = "--device cpu --dtypes bfloat16+float32 --shapes 8x16 --T 4 --terms square".split()
    (case,) = program.cases(program.parser().parse_args(words))
    assert (case.N, case.M, case.terms, case.factor_dtype) == (8, 16, "square", torch.float32)


def test_contenders_take_turns_on_rotated_inputs(monkeypatch):
    monkeypatch.setattr(timing, "interpreting", lambda: False)
    seen = []
    calls = {
        name: [lambda name=name, k=k: seen.append((name, k)) for k in range(3)] for name in "ab"
    }
    found = timing.time_calls(calls, 4, CPU)
    assert [len(found[name].samples) for name in "ab"] == [4, 4]
    assert {seen.count((name, k)) > 1 for name in "ab" for k in range(3)} == {True}
    slow, base = timing.Timing(samples=[2.0, 30.0, 6.0]), timing.Timing(samples=[1.0, 10.0, 2.0])
    assert (slow.ratio_to(base), slow.median) == (3.0, 6.0)


@dataclass
class FakeGpu:
    """Events, graphs and capture that only keep count, to follow that path without a GPU: a call
    takes 2 ms one by one and 1 ms in a graph. The third capture fails.
    """

    clock: float = 0.0
    capturing: bool = False
    captured: list = field(default_factory=list)

    def call(self):
        if self.capturing:
            self.captured[-1] += 1
        else:
            self.clock += 2.0

    @contextlib.contextmanager
    def capture(self, graph, stream):
        self.captured.append(0)
        self.capturing = True
        yield
        self.capturing = False
        if len(self.captured) == 3:
            raise RuntimeError("cannot be captured")
        graph.calls = self.captured[-1]

    def graph(self):
        made = SimpleNamespace()
        made.replay = lambda: setattr(self, "clock", self.clock + made.calls)
        return made

    def event(self, enable_timing):
        made = SimpleNamespace(synchronize=lambda: None)
        made.record = lambda: setattr(made, "at", self.clock)
        made.elapsed_time = lambda end: end.at - made.at
        return made


@pytest.fixture
def fake_gpu(monkeypatch):
    gpu = FakeGpu()
    monkeypatch.setattr(timing, "interpreting", lambda: False)
    for name, stand_in in {
        "CUDAGraph": gpu.graph,
        "graph": gpu.capture,
        "Event": gpu.event,
        "current_stream": lambda: None,
        "synchronize": lambda device=None: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return gpu


def test_on_a_gpu_everybody_has_the_same_number_of_calls_replayed_and_eager(fake_gpu):
    names = ("fast", "slow", "refused", "eager")
    calls = {name: [fake_gpu.call] * 3 for name in names}
    found = timing.time_calls(calls, 2, torch.device("cuda"), eager=["eager"])
    # 40 calls, rounded up to whole rotations over three sets of inputs.
    assert fake_gpu.captured == [42, 42, 42]
    assert [own.graph for own in found.values()] == [True, True, False, False]
    assert "cannot be captured" in found["refused"].note and found["fast"].note == ""
    assert [own.samples for own in found.values()] == [[1.0, 1.0]] * 2 + [[2.0, 2.0]] * 2
    assert [own.eager.samples for own in found.values()] == [[2.0, 2.0]] * 4
    keys = found["fast"].keys()
    assert (keys["median_ms"], keys["eager_ms"], keys["calls"]) == (1.0, 2.0, 42)
    assert found["refused"].ratio_to(found["fast"]) == 2.0
    assert found["refused"].eager.ratio_to(found["fast"].eager) == 1.0


@pytest.mark.parametrize("seconds, count, words", [(0.0, 42, ""), (0.05, 9, "9 calls in a sample")])
def test_how_slow_calls_are_changes_their_number_only_past_a_budget(
    fake_gpu, monkeypatch, seconds, count, words
):
    monkeypatch.setattr(timing, "GPU_BUDGET_S", 20.0)
    ticks = itertools.count(0, 3 * seconds)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    calls = {name: [fake_gpu.call] * 3 for name in "ab"}
    found = timing.time_calls(calls, 2, torch.device("cuda"))
    assert fake_gpu.captured == [count] * 2
    assert {own.calls for own in found.values()} == {count}
    assert all(
        own.note.startswith(words) and bool(own.note) == bool(words) for own in found.values()
    )


def test_a_row_of_a_gpu_has_eager_keys_and_one_of_a_cpu_none(monkeypatch):
    inputs = make_inputs(CASE)
    pair = (inputs.x.requires_grad_(), inputs.dy)
    built = {name: [CONTENDERS[name].build(CASE, inputs)] for name in (FROZEN, "reference")}
    new = {"eager_ms", "eager_ratio_to_frozen", "calls"}
    for own in layers.measure_phase(built, [pair], "both", 2).values():
        assert not new & set(own)

    def timed(calls, rounds, device, eager):
        both = [timing.Timing(samples=[ms, ms]) for ms in (1.0, 3.0)]
        for own, ms in zip(both, (4.0, 8.0), strict=True):
            own.eager = timing.Timing(samples=[ms, ms])
        return dict(zip(calls, both, strict=True))

    monkeypatch.setattr(timing, "time_calls", timed)
    frozen, own = layers.measure_phase(built, [pair], "both", 2).values()
    assert (frozen["eager_ratio_to_frozen"], frozen["eager_ms"]) == (1.0, 4.0)
    assert (own["ratio_to_frozen"], own["eager_ratio_to_frozen"], own["eager_ms"]) == (
        3.0,
        2.0,
        8.0,
    )


def test_memory_counts_blocks_of_known_size():
    def call():
        first, second = (torch.empty(n * MIB, dtype=torch.uint8) for n in (1, 2))
        del first
        third = torch.empty(4 * MIB, dtype=torch.uint8)
        del second
        return third

    found = memory(call, CPU)
    assert (found.held, found.peak) == (4 * MIB, 6 * MIB)
    with pytest.raises(ZeroDivisionError):
        memory(lambda: 1 // 0, CPU)
    assert memory(call, CPU) == found


@pytest.mark.parametrize("terms, pairs", [("full", 10), ("cross", 6), ("linear", 0)])
def test_work_is_what_pytorch_counts(terms, pairs):
    case = replace(CASE, terms=terms)
    inputs = make_inputs(case)
    leaves = [t.requires_grad_() for t in (inputs.x, inputs.A, inputs.B, inputs.h) if t is not None]
    with FlopCounterMode(display=False) as forward:
        y = pk.pera_linear(
            inputs.x, inputs.weight, inputs.A, inputs.B, inputs.h, terms=terms, backend="reference"
        )
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(y, leaves, inputs.dy)
    elementwise = pairs * (24 + 16 + 10), pairs * (4 * 24 + 4 * 16 + 3 * 10)
    for phase, counter, rest in zip(
        ("forward", "backward"), (forward, backward), elementwise, strict=True
    ):
        found = roofline.work("factored", case, phase).flops
        assert found == counter.get_total_flops() + rest
    adapter = sum(t.nbytes for t in leaves[1:])
    dense = inputs.x.nbytes + inputs.weight.nbytes + inputs.bias.nbytes + inputs.dy.nbytes
    assert roofline.work("dense", case, "forward").bytes == dense
    assert roofline.work("factored", case, "forward").bytes == dense + adapter


def test_kernels_pass_the_gate_and_run_dry(triton_backend, device, tmp_path, monkeypatch, capsys):
    if device.type == "cuda":
        pytest.skip("on a GPU kernels are timed, not run dry")
    out = tmp_path / "kernels.jsonl"
    words = "--device cpu --T 17 --size 24 --rank 3 --rounds 2".split()
    assert kernels.main([*words, "--out", str(out)]) == 0
    found = {row["contender"]: row for row in rows.read(out)}
    ours = ("x φᵀ, φ(A) on chip", "y += u φ", "dφ(B) to dB and dh", "expand both", "W0 + ΔW")
    for name in (f"kernel:{name}" for name in ours):
        assert found[name]["status"] == "dry run" and 0 <= found[name]["error_ratio"] <= 1
    cublas = found["kernel:x φᵀ, cuBLAS"]
    seconds, lanes = cublas["median_ms"] / 1e3, 16
    assert cublas["tflops"] == pytest.approx(2 * 17 * lanes * 24 / seconds / 1e12, rel=1e-3)


def test_a_wrong_kernel_is_not_timed(triton_backend):
    operands = kernels.Operands(replace(CASE, N=24, M=24, dtype=torch.bfloat16), CPU, seed=0)
    good = kernels.kernels(operands)["y = u φ"]
    assert kernels.judgement(good, torch.bfloat16).failure is None
    wrong = replace(good, truth=lambda: (good.truth()[0] * 1.1,))
    assert "result 0: max error" in kernels.judgement(wrong, torch.bfloat16).failure


def test_rows_keep_five_digits_and_are_only_appended(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    rows.append(path, {"median_ms": 1.23456789, "T": 3})
    rows.append(path, {"note": "φ"})
    assert rows.read(path) == [{"median_ms": 1.2346, "T": 3}, {"note": "φ"}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows.read(path)


def test_bad_arguments_exit_2_and_say_what_there_is(capsys):
    for words, message in (
        (["--only", "nobody"], "'nobody' is none of frozen, merged"),
        (["--shapes", "24"], "invalid shape list value: '24'"),
        (["--dtypes", "float64"], "'float64' is none of float32"),
    ):
        with pytest.raises(SystemExit) as stop:
            program.main(words)
        assert stop.value.code == 2 and message in capsys.readouterr().err
