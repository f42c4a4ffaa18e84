"""``benchmarks.report``: tables, plots and documents from rows made up here."""

import json

import pytest

pytest.importorskip("pandas", reason="the tables of the benchmarks need pandas")

from benchmarks import report, rows  # noqa: E402

ROW = {
    "contender": "auto",
    "plan": "auto",
    "terms": "full",
    "r": 16,
    "T": 512,
    "n": 64,
    "m": 64,
    "dtype": "float32",
    "dropout": 0.0,
    "phase": "both",
    "median_ms": 2.0,
    "ratio_to_frozen": 1.25,
    "peak_mib": 3.0,
    "saved_mib": 1.0,
    "roofline_share": 0.5,
    "status": "timed",
    "note": "",
    "device": "a processor",
    "torch": "2.13",
    "commit": "0123456789ab",
    "date": "2026-11-27T10:00:00+00:00",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)

    def write(name, *changes):
        lines = [json.dumps({**ROW, **change}) for change in changes]
        (tmp_path / name).write_text("\n".join(lines) + "\n")

    return write


def test_the_latest_row_counts_and_a_failure_takes_it_back(folder):
    failed = {"status": "failed", "phase": "gate", "median_ms": None}
    folder(
        "cpu.jsonl",
        {"median_ms": 1.0},
        {"median_ms": 3.0},
        {"contender": "merged"},
        {"contender": "merged", **failed},
        {"contender": "released", **failed},
        {"contender": "released", "median_ms": 7.0},
        {"contender": "peft-lora", "status": "dry run"},
    )
    (frame,) = report.load("cpu*.jsonl")
    assert dict(zip(frame.contender, frame.median_ms, strict=True)) == {"auto": 3.0, "released": 7}


def test_tables_have_contenders_down_and_sizes_across(folder):
    folder(
        "cpu.jsonl",
        {"T": 512},
        {"T": 64, "ratio_to_frozen": 2.0},
        {"T": 64, "dtype": "bfloat16"},
        {"contender": "frozen", "T": 64, "ratio_to_frozen": 1.0, "median_ms": 1.0},
        {"n": 32, "T": 64, "ratio_to_frozen": 9.0},
        {"r": 8, "ratio_to_frozen": 9.0},
    )
    lines = report.PARTS_HERE["cpu benchmarks"]().splitlines()
    assert lines[0] == "| contender | float32, T=64 | float32, T=512 | bfloat16, T=64 |"
    assert lines[2] == "| frozen | 1.00 (1) |  |  |"
    assert lines[3] == "| auto | 2.00 (2) | 1.25 (2) | 1.25 (2) |"
    assert "64→64, r=16" in lines[5] and "a processor, torch 2.13" in lines[5]
    assert "9.00" not in "".join(lines)


def test_kernels_and_decoder_layers_have_tables(folder):
    kernel = {"contender": "kernel:copy", "phase": "kernel", "n": 4096, "median_ms": 0.05}
    folder("gpu-chip.jsonl", kernel, {**kernel, "T": 4096}, {"contender": "frozen"})
    assert "| copy | 50.0 (50%) | 50.0 (50%) |" in report.kernels()
    assert "| frozen | 1.25 (2) |" in report.PARTS["gpu benchmarks"]()
    layer = {"note": "batch 2", "dtype": "bfloat16+float32"}
    folder("decoder-cpu.jsonl", layer, {**layer, "phase": "step", "ratio_to_frozen": 1.5})
    assert "| auto | float32 | 1.25 (2) | 1.50 (2) | 3.0 | 1.0 |" in report.decoder()
    assert "hidden 64, intermediate 64, batch 2; adapters on" in report.decoder()


def test_eager_times_stand_behind_those_of_a_graph(folder):
    eager = {"eager_ms": 4.0, "eager_ratio_to_frozen": 3.0}
    kernel = {"contender": "kernel:copy", "phase": "kernel", "n": 4096, "median_ms": 0.05}
    folder("gpu-chip.jsonl", eager, {"contender": "frozen"}, {**kernel, "eager_ms": 0.07})
    shown = report.PARTS["gpu benchmarks"]()
    assert "| auto | 1.25 (2), eager 3.00 (4) |" in shown and "| frozen | 1.25 (2) |" in shown
    assert "eager: of the same calls, issued one by one. a processor" in shown
    assert "| copy | 50.0 (50%), eager 70.0 |" in report.kernels()
    folder("cpu.jsonl", {})
    assert "eager" not in report.PARTS_HERE["cpu benchmarks"]()


def test_without_rows_the_parts_say_so(folder):
    assert report.PARTS["gpu benchmarks"]() == report.kernels() == "Not measured on a GPU yet."
    assert report.decoder() == report.PARTS_HERE["cpu benchmarks"]() == "Not measured."


def test_plots_are_the_same_for_the_same_rows(folder, tmp_path):
    sizes = [{"T": T, "contender": name} for T in (64, 512) for name in ("frozen", "auto")]
    folder("cpu.jsonl", *sizes)
    texts = []
    for name in ("first", "second"):
        report.write_plots(tmp_path / name)
        written = sorted((tmp_path / name).glob("*.svg"))
        texts.append([path.read_text() for path in written])
    assert [path.stem for path in written] == ["cpu-memory-by-tokens", "cpu-ratio-by-tokens"]
    assert texts[0] == texts[1] and "64→64, r=16" in texts[0][0]


def test_documents_are_what_the_committed_rows_say():
    for path, text in report.documents().items():
        assert path.read_text() == text, f"{path.name}: run python -m benchmarks.report"
    with pytest.raises(ValueError, match="exactly one part marked 'gpu benchmarks'"):
        report.render("no markers", report.PARTS, "README.md")


def test_the_host_table_has_microseconds(folder):
    host = {"phase": "host", "triton": "3.9"}
    folder(
        "host.jsonl",
        {**host, "contender": "triton", "median_ms": 0.16},
        {**host, "contender": "frozen", "median_ms": 0.02},
        {**host, "contender": "frozen", "dtype": "bfloat16", "median_ms": 0.03},
    )
    table, caption = report.host().split("\n\n")
    assert table.splitlines()[2:] == ["| frozen | 30 | 20 |", "| triton |  | 160 |"]
    assert "triton 3.9" in caption and "0123456789ab" in caption
