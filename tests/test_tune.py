"""``tools.tune`` without a GPU: candidates, the model's inputs, tables, the search, the command."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="tuning needs the triton package")

from pera_kernels import configs  # noqa: E402
from pera_kernels.configs import Tile  # noqa: E402
from tools.tune import limits, measure, precompile, sass, search, static, tables  # noqa: E402
from tools.tune.__main__ import main  # noqa: E402
from tools.tune.candidates import AXES, candidates  # noqa: E402
from tools.tune.chips import chip_named  # noqa: E402
from tools.tune.offline import Compiled, Launch, Recorded, recorded  # noqa: E402
from tools.tune.problems import Operands, Problem, representative, using  # noqa: E402
from tools.tune.search import Clock, OutOfTime, Score, Search, TimedScorer  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CHIP = chip_named("sm_90")
TINY = {"r": 5, "T": 19, "N": 40, "M": 24}
TABLE = configs.load_table("generic")
SHIPPED = [(kernel, kind) for kernel, kind in TABLE if kind != "mixed"]


def tile_of(kernel, kind):
    return TABLE.get((kernel, kind)) or TABLE[kernel, "half"]


@pytest.mark.parametrize("kernel, kind", SHIPPED)
def test_candidates_are_distinct_powers_of_two_nearest_first(kernel, kind):
    present = tile_of(kernel, kind)
    found = candidates(kernel, kind, present, CHIP.shared_limit, 30)
    assert found[0] == present and len(set(found)) == len(found) == 31
    for tile in found:
        assert all((n := getattr(tile, axis)) > 0 and n & (n - 1) == 0 for axis in AXES[:4])
    assert candidates(kernel, kind, present, CHIP.shared_limit, 5) == found[:6]
    deep = candidates(kernel, kind, present, CHIP.shared_limit, 30, num_stages=present.num_stages)
    assert {tile.num_stages for tile in deep} == {present.num_stages}


def test_candidates_fit_the_shared_memory():
    present = tile_of("compose", "half")
    most = max(t.block_n for t in candidates("compose", "half", present, 232448, 1000))
    few = candidates("compose", "half", present, 20000, 1000)
    assert most == 256
    assert all((t.block_t + t.block_n) * t.block_k * 2 <= 20000 for t in few[1:])


@pytest.mark.parametrize("kind", configs.CLASSES)
@pytest.mark.parametrize("kernel", [*configs.KERNELS, "sum"])
def test_kernels_match_their_truth(kernel, kind, triton_backend, device):
    for factor in "AB":
        problem = Problem(kernel, kind, factor=factor, **TINY)
        assert measure.wrong(problem, [None], "", device) == [""]


def test_a_wrong_tile_is_noticed(triton_backend, device, monkeypatch):
    problem = Problem("accumulate", "half", **TINY)
    tiles = [tile_of("accumulate", "half"), Tile(16, 32, 16, 4, 1)]
    table = configs.architecture(device)
    original = Operands.outputs
    assert measure.wrong(problem, tiles, table, device) == ["", ""]

    def spoiled(self):
        outputs = original(self)
        if configs.load_table(table)["accumulate", "half"] == tiles[1]:
            outputs["out"][3, 5] += 1.0
        return outputs

    monkeypatch.setattr(Operands, "outputs", spoiled)
    right, wrong = measure.wrong(problem, tiles, table, device)
    assert right == "" and "worst at (3, 5)" in wrong


def test_operands_repeat_and_differ_by_seed():
    problem = Problem("contract", "half", **TINY)
    first, again, other = (Operands(problem, "cpu", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.x, again.x) and not torch.equal(first.x, other.x)
    assert not torch.equal(first.x[:, :15].float(), first.u[:, :15].float())


def test_using_a_tile_ends():
    before = configs.tile_for("project", torch.device("meta"), torch.bfloat16, torch.bfloat16)
    tile = replace(before, num_warps=2)
    with using("generic", "project", "half", tile):
        inside = configs.tile_for("project", torch.device("meta"), torch.bfloat16, torch.bfloat16)
    after = configs.tile_for("project", torch.device("meta"), torch.bfloat16, torch.bfloat16)
    assert inside == tile and after == before


def test_launches_are_recorded_as_the_compiler_tells_them_apart():
    problem = Problem("accumulate", "half")
    one, two, ragged = (
        recorded(Operands(replace(problem, T=T), "meta").launch, CHIP)[0]
        for T in (4096, 8192, 4097)
    )
    assert one.launch == two.launch != ragged.launch
    assert one.grid != two.grid and one.sizes["T"] == 4096
    arguments = dict(one.launch.arguments)
    assert arguments["y_ptr"] is torch.bfloat16
    assert arguments["BLOCK_T"] == one.sizes["BLOCK_T"] and "num_warps" in arguments


def test_what_the_benchmarks_launch_is_recorded():
    found = precompile.launches(tuple(precompile.PURPOSES), CHIP)
    names = {own.launch.kernel for own in found}
    assert names == {
        f"{name}_kernel" for name in ("accumulate", "compose", "contract", "expand", "project")
    } | {"sum_partials_kernel"}
    distinct = {own.launch for own in found}
    assert 20 < len(distinct) < len(found)
    assert {dict(own.arguments).get("MEMBERS", 1) for own in distinct} == {1, 3}


LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0020*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64] ;
        /*0040*/                   HMMA.16816.F32.BF16 R12, R4, R6, R12 ;
        /*0050*/               @P1 BRA 0x20 ;
        /*0060*/                   FFMA R8, R8, R9, RZ ;
        /*0070*/                   STG.E.128 desc[UR4][R2.64], R8 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
        /*00a0*/                   NOP ;
"""


def test_machine_code_is_counted():
    code = sass.read(LISTING)
    assert code.loop == sass.Count(4, 2 * 16 * 8 * 16, 0, 32 * 16, 1, 0)
    assert code.rest == sass.Count(6, 0, 32, 32 * 8 + 32 * 16, 1, 1)
    group = sass.read("/*0000*/ HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;\n/*0010*/ EXIT ;")
    assert group.rest.matrix == 64 * 128 * 16 // 4 and group.loop == sass.Count()
    with pytest.raises(ValueError, match="no instructions"):
        sass.read("")


def test_cost_follows_instructions_blocks_and_occupancy():
    sizes = {"BLOCK_T": 64, "BLOCK_M": 64, "BLOCK_K": 16, "lanes": 160, "num_warps": 4}
    launch = Launch("accumulate_kernel", ())
    loop, rest = sass.Count(100, 4096, 0, 512, 1, 0), sass.Count(200, 0, 0, 1024, 2, 0)
    compiled = Compiled(64, 0, 16384, "", sass.Code(loop, rest))
    made = Recorded(launch, (132 * 8,), sizes)
    found = static.cost(made, compiled, CHIP)
    # 64 x 64 x 160 products over 4 warps are 40 passes; 8 blocks of 4 warps on 4 schedulers.
    assert found.slots == 8 * (40 * 100 + 200)
    assert found.cycles == found.slots
    one_more = static.cost(Recorded(launch, (132 * 8 + 1,), sizes), compiled, CHIP)
    assert one_more.slots == found.slots * 9 / 8
    crowded = replace(compiled, shared_bytes=CHIP.shared_limit - 1024)
    assert static.cost(made, crowded, CHIP).cycles == 2 * found.cycles


def test_table_round_trip_keeps_what_was_not_tuned(tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "TABLES", tmp_path)
    old = {"project": {"half": asdict(Tile(64, 64, 64, 8, 2, 3))}}
    table = {"architecture": "sm_90", "basis": "Guessed.", "tiles": old}
    (tmp_path / "sm_90.json").write_text(json.dumps(table))
    new = {("contract", "half"): Tile(32, 64, 64, 4, 3, 2)}
    path = tables.write_table("sm_90", new, "Timed on X", tmp_path)
    written = json.loads(path.read_text())
    assert written["tiles"]["project"] == old["project"]
    assert Tile(**written["tiles"]["contract"]["half"]) == new["contract", "half"]
    assert written["basis"] == "Timed on X: contract half. The rest: Guessed."
    # Once everything was timed, the old basis goes.
    both = {**new, ("project", "half"): Tile(64, 64, 64, 8, 2, 4)}
    path = tables.write_table("sm_90", both, "Timed on Y", tmp_path)
    assert json.loads(path.read_text())["basis"] == "Timed on Y: contract half, project half."
    assert [file.name for file in tmp_path.iterdir()] == ["sm_90.json"]


def test_table_is_replaced_at_once(tmp_path, monkeypatch):
    (tmp_path / "sm_90.json").write_text("old")

    def fails(*paths):
        raise OSError("no space")

    monkeypatch.setattr(tables.os, "replace", fails)
    with pytest.raises(OSError, match="no space"):
        tables.write_table("sm_90", {("expand", "half"): Tile(16, 64, 16, 4, 1)}, "T", tmp_path)
    assert (tmp_path / "sm_90.json").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["sm_90.json"]


def test_rows_are_appended(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert tables.read_rows(path) == []
    tables.append_rows(path, [{"what": "score", "T": 1}])
    tables.append_rows(path, [{"what": "decision", "T": 2}])
    assert [row["T"] for row in tables.read_rows(path)] == [1, 2]


def test_limits_that_follow_from_times():
    def times(*memory):
        return {2**k: {"chip": 1.0, "memory": value} for k, value in enumerate(memory)}

    assert limits.suggested(times(2.0, 1.5, 0.9, 0.8)) == 4
    assert limits.suggested(times(0.5, 1.5, 0.9, 0.8)) == 4
    assert limits.suggested(times(0.5, 1.5, 0.9, 1.1)) is None
    assert limits.suggested(times(1.0, 1.0, 1.0)) == 1


class NoCompilers:
    """Stands in for the worker processes; refuses some tiles at once or when they would ship."""

    chip = CHIP

    def __init__(self, spilling=(), unclean=()):
        self.spilling, self.unclean = spilling, unclean

    def compile(self, launches):
        for launch in launches:
            spills = _shape(dict(launch.arguments)) in self.spilling
            yield launch, Compiled(problem="spills 8 B" if spills else "")

    def problems(self, launches):
        for tile in launches:
            unclean = (tile.block_t, tile.block_n) in self.unclean
            yield "spills 4 B (elsewhere)" if unclean else ""


def _shape(arguments):
    return arguments["BLOCK_M"], arguments["BLOCK_N"]


class Prefers:
    """Scores by the area of a tile: the larger the better."""

    unit, threshold, worst, sees_stages = "ms", 0.99, 1.1, True

    def __init__(self, wrong=()):
        self.wrong = wrong

    def __call__(self, problem, tiles):
        areas = [tile.block_t * tile.block_n * tile.block_k for tile in tiles]
        wrong = ["no" if (t.block_t, t.block_n) in self.wrong else "" for t in tiles]
        return [
            Score(1e6 / area, areas[0] / area, wrong=reason)
            for area, reason in zip(areas, wrong, strict=True)
        ]


@pytest.fixture
def only_compose(monkeypatch):
    """The expansion that compose launches is not what is refused; what would ship is the tile."""
    original = search.recorded

    def compose_alone(call, chip):
        return [own for own in original(call, chip) if own.launch.kernel == "compose_kernel"]

    monkeypatch.setattr(search, "recorded", compose_alone)

    def shipped(*arguments):
        return [configs.load_table("sm_90")["compose", "half"]]

    monkeypatch.setattr(search.compile_report, "launches", shipped)


def run_search(compilers, scorer, clock=None):
    own = Search(compilers, scorer, clock or Clock(None), count=1000)
    return own.run("compose", "half"), own.rows


def test_the_best_clean_tile_is_chosen(only_compose):
    best, _ = run_search(NoCompilers(), Prefers())
    chosen = best.chosen
    assert chosen.block_t * chosen.block_n * chosen.block_k == 256 * 128 * 64
    assert best.ratio == pytest.approx(1 / 4)
    second, rows = run_search(
        NoCompilers(spilling=[(256, 128)], unclean=[(128, 256)]), Prefers(wrong=[(256, 64)])
    )
    chosen = second.chosen
    assert (chosen.block_t, chosen.block_n) == (128, 128) and chosen.block_k == 64
    reasons = [row["reason"] for row in rows if row["what"] in ("dropped", "wrong")]
    assert {"spills 8 B", "spills 4 B (elsewhere)", "no"} >= set(reasons)
    assert "spills 4 B (elsewhere)" in reasons
    assert second.dropped > 0


def test_the_present_tile_stays_unless_clearly_beaten(only_compose):
    scorer = Prefers()
    scorer.threshold = 0.2
    kept, rows = run_search(NoCompilers(), scorer)
    assert kept.chosen == kept.present and kept.ratio == 1.0
    assert {row["what"] for row in rows} == {"score"}
    json.dumps([*rows, kept.row()], allow_nan=False)


def test_a_present_tile_that_is_broken_is_an_error(only_compose):
    present = configs.load_table("sm_90")["compose", "half"]
    with pytest.raises(ValueError, match="is not clean"):
        run_search(NoCompilers(spilling=[(present.block_t, present.block_n)]), Prefers())
    with pytest.raises(ValueError, match="is wrong at"):
        run_search(NoCompilers(), Prefers(wrong=[(present.block_t, present.block_n)]))


def test_the_budget_ends_the_search(only_compose):
    with pytest.raises(OutOfTime):
        run_search(NoCompilers(), Prefers(), Clock(-1.0))


def test_timed_scores_are_relative_to_the_first_tile(triton_backend, device, monkeypatch):
    times = [measure.Timed((2.0, 4.0, 2.0)), measure.Timed((1.0, 2.0, 1.5))]
    monkeypatch.setattr(measure, "time_tiles", lambda *arguments: times)
    problem = Problem("project", "half", **TINY)
    tiles = [tile_of("project", "half"), Tile(16, 16, 16, 4, 1)]
    scores = TimedScorer(configs.architecture(device), device, 3)(problem, tiles)
    assert [score.ratio for score in scores] == [1.0, 0.5]
    assert [score.value for score in scores] == [2.0, 1.5]
    assert not any(score.wrong for score in scores)


def test_every_shipped_class_has_problems():
    for kernel, kind in TABLE:
        found = representative(kernel, kind)
        assert {problem.r for problem in found} == {4, 16, 32}
        assert max(problem.N for problem in found) == 14336
        assert all(problem.bytes() > 0 and problem.flops() > 0 for problem in found)
        assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--arch", "sm_10"], "'sm_10' is none of auto"),
        (["--kernels", "projekt"], "'projekt' is none of"),
        (["--candidates", "0"], "not a whole number from 1"),
        (["--static"], "--static reads machine code of sm_80, sm_89, sm_90; got auto"),
        (["--static", "--arch", "gfx942"], "got gfx942"),
        (["--static", "--arch", "sm_90", "--kernels", "compose", "--classes", "mixed"], "no tile"),
    ],
)
def test_bad_arguments(words, message, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_or_with_the_interpreter(monkeypatch, capsys):
    for value, message in (("0", "no GPU to time on"), ("1", "TRITON_INTERPRET is set")):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        with pytest.raises(SystemExit) as stop:
            main([])
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_static_search_for_real(tmp_path):
    """One small kernel: compiled in workers, ranked, written down, and not repeated."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    words = ["--static", "--arch", "sm_90", "--kernels", "expand", "--classes", "single"]
    words += ["--ranks", "4", "--candidates", "2", "--jobs", "2", "--out", str(tmp_path)]
    words += ["--resume", "--write", "--tables", str(tmp_path / "tiles")]
    command = [sys.executable, "-m", "tools.tune", *words]

    def run():
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300
        )

    first = run()
    assert first.returncode == 0, first.stdout + first.stderr
    rows = tables.read_rows(tmp_path / "tune-static-sm-90.jsonl")
    (decision,) = [row for row in rows if row["what"] == "decision"]
    assert decision["kernel"] == "expand" and decision["device"] == "static sm_90"
    scores = [row for row in rows if row["what"] == "score"]
    assert scores and all(row["cycles"] > 0 and row["issue_slots"] > 0 for row in scores)
    written = (tmp_path / "tiles" / "sm_90.json").exists()
    assert written == (decision["chosen"] != decision["present"])
    second = run()
    assert second.returncode == 0 and "done before" in second.stdout
    assert len(tables.read_rows(tmp_path / "tune-static-sm-90.jsonl")) == len(rows)
