"""Tables, targets and plots from rows made up here, whose numbers show where they go."""

import json
from xml.etree import ElementTree

import pytest

from benchmarks import cells, report, results, tables, targets
from benchmarks.cells import Case, Cells

NAMES = ("frozen", "merged", "reference", "reference-compiled", "peft-lora", "released", "auto")
# Ratios to the frozen layer, such that a target's quotient is easy to know.
RATIO = dict(zip(NAMES, (1.0, 1.0, 2.0, 1.6, 1.2, 3.2, 1.25), strict=True))


def row(contender, **changes):
    values = {
        "plan": "factored",
        "terms": "full",
        "r": 16,
        "T": 64,
        "n": 2048,
        "m": 2048,
        "dtype": "float32",
        "dropout": 0.0,
        "phase": "both",
        "median_ms": 2.0 * RATIO.get(contender, 1.0),
        "p20_ms": 1.9,
        "p80_ms": 2.1,
        "ratio_to_frozen": RATIO.get(contender, 1.0),
        "peak_mib": 10.0 * RATIO.get(contender, 1.0),
        "saved_mib": 1.0,
        "tflops": 0.05,
        "gbps": 5.0,
        "roofline_share": 0.5,
        "ceiling_tflops": 0.1,
        "ceiling_gbps": 20.0,
        "device": "a machine",
        "torch": "2.0",
        "triton": None,
        "commit": "abc",
        "date": "2030-01-02T03:04:05+00:00",
    }
    return vars(results.Row(contender=contender, **{**values, **changes}))


def grid(names=NAMES, **changes):
    return [
        row(name, T=T, dtype=dtype, phase=phase, **changes)
        for name in names
        for T in (1, 64, 512)
        for dtype in ("float32", "bfloat16")
        for phase in ("both", "eval")
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "RESULTS", tmp_path)
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def line_of(text, start):
    return next(line for line in text.splitlines() if line.startswith(f"| {start}"))


def test_the_latest_row_of_a_cell_counts_and_a_failure_takes_it_back():
    case = Case("full", 16, 64, 2048, 2048, "float32", 0.0)
    first, second = row("auto", median_ms=3.0), row("auto", median_ms=4.0)
    assert Cells([first, second]).value(case, "auto", "both", "median_ms") == 4.0
    failed = row("auto", phase="gate", status="failed", median_ms=None)
    assert Cells([first, failed]).find(case, "auto", "both") is None
    assert Cells([failed, first]).find(case, "auto", "both") == first


def test_of_one_run_the_replayed_frozen_layer_is_shown():
    case = Case("full", 16, 64, 2048, 2048, "float32", 0.0)
    replayed, eager = row("frozen", graph=True, median_ms=1.0), row("frozen", median_ms=5.0)
    later = row("frozen", median_ms=6.0, date="2030-02-02T03:04:05+00:00")
    assert Cells([replayed, eager]).find(case, "frozen", "both") == replayed
    assert Cells([replayed, eager, later]).find(case, "frozen", "both") == later


def test_rows_without_the_newer_keys_are_read(tmp_path):
    old = {k: v for k, v in row("torch").items() if k not in ("tflops", "launches", "host_us")}
    write(tmp_path / "old.jsonl", [old])
    assert results.read(tmp_path / "old.jsonl") == [{**row("torch"), "tflops": None}]


def test_the_compact_table_has_contenders_down_and_sizes_across():
    other = row("frozen", n=1024, m=1024)
    text = tables.compact(Cells([*grid(), other, row("auto", dtype="bfloat16+float32")]))
    sizes = "float32, T=1 | float32, T=64 | float32, T=512 | bfloat16, T=1 | bfloat16, T=64"
    assert text.splitlines()[0] == f"| contender | {sizes} | bfloat16, T=512 |"
    assert line_of(text, "released").count("3.20 (6.4)") == 6
    assert [line.split()[1] for line in text.splitlines()[2:9]] == list(NAMES[:4]) + [
        "peft-lora",
        "released",
        "auto",
    ]
    assert "2048→2048, r=16" in text and "a machine, torch 2.0, commit abc, 2030-01-02." in text


def test_cpu_targets_say_held_or_by_how_much_they_missed():
    text = targets.cpu(Cells(grid()))
    held = line_of(text, "time over the reference's")
    assert "0.625 at" in held and "worst of 12" in held
    assert "held in 12 of 96 cases, others not measured" in held
    assert "1.04" in line_of(text, "eval over PEFT's LoRA")
    speed = line_of(text, "speed over the released formula's")
    assert "2.56 at T=1" in speed and "held in 8 of 48" in speed
    assert "not measured" in line_of(text, "forward + backward over frozen, float32, T=2048")
    slow = [row("auto", ratio_to_frozen=2.1, T=512), row("auto", ratio_to_frozen=1.62, T=64)]
    text = targets.cpu(Cells([*grid(), *slow]))
    assert "**missed** in 1 of 12, by at most 5.0 %" in line_of(text, "time over the reference's")
    assert "2 of 12, by at most 31.2 %" in line_of(text, "time over the compiled reference's")
    text = targets.cpu(Cells([row("auto", ratio_to_frozen=3.0, T=64, dtype="bfloat16")]))
    missed = line_of(text, "forward + backward over frozen, bfloat16, T=64")
    assert "3 at T=64" in missed and "**missed** in 1 of 1, by at most 7.1 %" in missed


def test_ours_is_compared_with_the_best_of_the_peers_variants():
    names = ("frozen", "peft-lora", "auto")
    faster = row("peft-lora-amp", phase="eval", ratio_to_frozen=0.5)
    text = targets.cpu(Cells([*grid(names), faster]))
    assert "2.5 at T=64" in line_of(text, "eval over PEFT's LoRA")


def gpu_rows():
    big = {"n": 4096, "m": 4096, "dtype": "bfloat16", "launches": 4, "device": "a GPU"}
    timed = [
        row(name, T=T, phase=phase, **big)
        for name in NAMES
        for T in (1, 16, 64, 512, 4096, 16384)
        for phase in ("forward", "both", "eval")
    ]
    return [*timed, row("auto", T=16384, r=32, ratio_to_frozen=1.3, **big)]


def test_gpu_targets_come_from_rows_and_from_the_decoder_layer():
    step = [
        row("triton", phase="step", peak_mib=90.0),
        row("peft-lora", phase="step", peak_mib=100),
    ]
    text = targets.gpu(Cells(gpu_rows()), Cells(step))
    assert "**missed** in 1 of 1, by at most 11.6 %" in line_of(
        text, "forward + backward, T=16384:"
    )
    assert "not measured" in line_of(text, "forward + backward, T=16384, square-only")
    assert line_of(text, "forward + backward, T=512").endswith("held |")
    assert "1.3 at T=16384" in line_of(text, "forward + backward, T=16384, r=32")
    assert "worst of 3" in line_of(text, "forward only (eval)")
    assert line_of(text, "merged").endswith("| held |")
    assert "1.04 at" in line_of(text, "time over that of PEFT's LoRA")
    assert "0.781 at" in line_of(text, "time over that of the compiled reference")
    assert "0.9 at" in line_of(text, "peak memory over PEFT's LoRA, decoder layer")


def test_the_slowest_memory_bound_kernel_counts():
    def kernel(name, gbps, note):
        return row(
            f"kernel:{name}",
            phase="kernel",
            gbps=gbps,
            ceiling_gbps=4000.0,
            note=note,
            ratio_to_frozen=None,
        )

    rows = [
        kernel("accumulate", 3500.0, "memory-bound, met"),
        kernel("sum", 3000.0, "memory-bound, MISSED"),
        kernel("contract-A", 400.0, "bound by its operations"),
    ]
    line = line_of(targets.gpu(Cells(rows), Cells([])), "each memory-bound kernel")
    assert "0.75 at kernel:sum" in line and "**missed** in 1 of 2, by at most 6.2 %" in line


def test_a_merged_layer_outside_the_frozen_layers_spread_is_a_miss():
    rows = [row("frozen"), row("merged", ratio_to_frozen=1.25)]
    line = line_of(targets.gpu(Cells(rows), Cells([])), "merged")
    # The spread is 0.2 / 2.0: 0.25 is two and a half of it.
    assert "2.5 at 1.250, T=64" in line and "**missed** in 1 of 1, by at most 150.0 %" in line


def test_without_gpu_rows_the_parts_say_so_and_name_the_command(folder):
    write(folder / "cpu.jsonl", grid())
    assert report.gpu_benchmarks() == tables.NOT_MEASURED
    assert "tools/gpu_check.sh" in report.gpu_targets()
    assert report.gpu_targets().count("| not measured |") == 14
    assert report.decoder_layer() == "Decoder layer: **not measured**."
    assert "held" in report.cpu_targets() and "1.25 (2.5)" in report.cpu_benchmarks()


def test_every_device_has_its_own_part(folder):
    write(folder / "gpu-x.jsonl", [*gpu_rows(), *(r | {"device": "another"} for r in gpu_rows())])
    write(folder / "decoder-gpu-x.jsonl", [row("frozen", device="a GPU", phase="step")])
    assert report.gpu_benchmarks().count("| contender |") == 2
    assert report.gpu_targets().startswith("a GPU:") and "another:" in report.gpu_targets()


def test_the_model_is_roofline_and_launches():
    assert tables.model_ms(row("auto", median_ms=3.0, roofline_share=0.5)) == 1.5
    with_launches = row("auto", median_ms=3.0, roofline_share=0.5, launches=4)
    assert tables.model_ms(with_launches) == pytest.approx(1.51)
    assert tables.model_ms(row("auto", roofline_share=None)) is None
    text = tables.model(Cells(grid(("frozen", "auto"))))
    assert line_of(text, "float32, T=64") == "| float32, T=64 | 1.25 / 1.25 |"
    without = tables.model(Cells(grid(("frozen", "auto"), roofline_share=None)))
    assert without == "No committed row carries the ceilings that the model needs."


def test_plots_are_written_and_stay_the_same(folder):
    ranks = [row(name, r=r) for name in NAMES for r in (4, 8, 32)]
    write(folder / "cpu.jsonl", [*grid(), *ranks])
    written = report.write_plots(folder / "plots")
    names = ("ratio-by-tokens", "ratio-by-rank", "memory", "roofline")
    assert [path.name for path in written] == [f"cpu-{name}.svg" for name in names]
    before = {path: path.read_text() for path in written}
    for path, text in before.items():
        assert ElementTree.fromstring(text).tag.endswith("svg"), path
    report.write_plots(folder / "plots")
    assert {path: path.read_text() for path in written} == before
    assert report.shown_plots().count("](results/plots/cpu-") == 4


def test_what_was_not_measured_is_not_plotted(folder):
    write(folder / "cpu.jsonl", grid(peak_mib=None, ceiling_tflops=None, roofline_share=None))
    assert [path.name for path in report.write_plots(folder)] == ["cpu-ratio-by-tokens.svg"]


def test_check_reports_a_difference_and_changes_nothing(folder, tmp_path, monkeypatch, capsys):
    root = tmp_path / "root"
    (root / "benchmarks").mkdir(parents=True)
    monkeypatch.setattr(report, "ROOT", root)
    write(folder / "cpu.jsonl", grid())
    documents = {root / "README.md": report.PARTS, root / "benchmarks/README.md": report.PARTS_HERE}
    for path, parts in documents.items():
        marks = "".join(f"<!-- {part}: generated -->\n<!-- end -->\n" for part in parts)
        path.write_text(marks)
    before = [path.read_text() for path in documents]
    assert report.main(["--check"]) == 1
    assert "README.md is not what the rows say" in capsys.readouterr().out
    assert [path.read_text() for path in documents] == before and not (folder / "plots").exists()
    assert report.main([]) == 0 and report.main(["--check"]) == 0
    assert "1.25 (2.5)" in (root / "README.md").read_text()


def test_a_bad_argument_exits_2_with_one_line(capsys):
    with pytest.raises(SystemExit) as exit_:
        report.main(["--chek"])
    assert exit_.value.code == 2 and capsys.readouterr().err.count("\n") == 1
