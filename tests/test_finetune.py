"""The job of `tools.finetune` at sizes that take a second or two."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the tools need matplotlib")
pytest.importorskip("rich", reason="the tools need rich")
pytest.importorskip("tqdm", reason="the tools need tqdm")

import pera_kernels as pk
from pera_kernels.adapters.checkpoint import read_adapter
from tools.finetune import __main__ as program
from tools.finetune import data, measure, report, train
from tools.finetune.model import TARGET_MODULES, ByteTransformer

SETTINGS = train.Settings(
    rank=3,
    terms=("linear", "square", "full"),
    steps=4,
    pretrain_steps=2,
    batch=2,
    lr=1e-2,
    lr_h=10.0,
    seed=5,
)


@pytest.fixture(autouse=True)
def restore_process_settings():
    """The program sets signal handlers and the number of threads, and leaves them so."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def small_corpora(monkeypatch):
    text = data.load_corpora(20_000)
    small = data.Corpora(text.source, text.training[:20_000], text.held_out[:1_500])
    monkeypatch.setattr(program, "load_corpora", lambda: small)
    return small


def small_model() -> ByteTransformer:
    torch.manual_seed(0)
    return ByteTransformer(context=16, width=32, layers=2, heads=2)


def run_program(out: Path, *options: str) -> int:
    sizes = ["--steps", "4", "--pretrain-steps", "2", "--batch", "2", "--rank", "3"]
    return program.main([*sizes, "--device", "cpu", "--out", str(out), *options])


def test_corpora_are_repeatable_and_the_held_out_text_is_not_in_the_others():
    corpora = data.load_corpora(200_000)
    assert corpora == data.load_corpora(200_000)
    assert len(corpora.source) == 200_000
    assert len(corpora.training) > 5 * len(corpora.held_out) > 50_000
    paragraphs = set(corpora.training.split(b"\n\n"))
    assert paragraphs.isdisjoint(corpora.held_out.split(b"\n\n"))


def test_windows_predict_every_byte_once_and_batches_shift_by_one():
    tokens = data.as_tokens(bytes(range(50)))
    windows = data.consecutive_windows(tokens, 7)
    assert windows[:, 1:].flatten().tolist() == list(range(1, 50))
    assert data.consecutive_windows(tokens, 7, 3)[:, 0].tolist() == [0, 14, 28]
    inputs, targets = data.random_batch(tokens, 5, 7, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (5, 7)
    assert torch.equal(inputs + 1, targets)


def test_model_is_causal():
    model = small_model()
    tokens = torch.randint(256, (2, 16))
    changed = tokens.clone()
    changed[:, 9:] = 0
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_methods_start_from_the_same_factors_and_count_their_parameters():
    base = small_model()
    methods = {method.key: method for method in train.methods_to_compare(SETTINGS, base)}
    assert list(methods) == [
        "lora",
        "lora_matched",
        "lora_half_more",
        "pera_square",
        "pera_full",
    ]
    started = {key: train.Adaptation(base, methods[key], SETTINGS) for key in methods}
    reference = pk.adapter_state_dict(started["lora"].model)
    for key in ("pera_square", "pera_full"):
        tensors = pk.adapter_state_dict(started[key].model)
        for name, tensor in reference.items():
            assert torch.equal(tensor, tensors[name]), f"{key} starts from another {name}"
        assert all(not tensors[name].any() for name in tensors if name.endswith(("_B", "_h")))
    counts = {key: run.run.metrics["trainable_parameters"] for key, run in started.items()}
    assert counts["pera_full"] - counts["lora"] == 2 * len(TARGET_MODULES) * 6
    assert counts["lora_matched"] >= counts["pera_full"] > counts["lora"]
    assert methods["lora_matched"].rank == 4
    assert counts["lora_matched"] * 3 == counts["lora"] * 4


def test_matching_rank_can_need_more_than_one_extra_rank():
    # Coefficients beyond one rank's worth: 10 layers with R (R + 1) / 2 each.
    shapes = 2 * [*3 * [(32, 32)], *2 * [(32, 128)]]
    per_rank = 2 * (3 * 64 + 2 * 160)
    for rank in (8, 16, 30):
        matched = train.matched_rank(shapes, rank)
        target = rank * per_rank + 10 * rank * (rank + 1) // 2
        assert matched * per_rank >= target > (matched - 1) * per_rank


def test_merge_check_restores_and_refuses_what_is_not_restored(monkeypatch):
    model = small_model()
    pk.inject(model, TARGET_MODULES, r=3)
    with torch.no_grad():
        for parameter in pk.adapter_parameters(model):
            parameter.normal_(std=0.2)
    windows = torch.randint(256, (6, 17))
    found = measure.merge_check(model, windows)
    assert 0 < found["merged_logit_difference"] < 1e-4
    unmerged = measure.bits_per_byte(model, windows)
    assert found["merged_held_out_bits_per_byte"] == pytest.approx(unmerged, abs=1e-4)
    monkeypatch.setattr(pk.PeraLinear, "unmerge", lambda self: None)
    with pytest.raises(RuntimeError, match="bit for bit"):
        measure.merge_check(model, windows)


def test_program_writes_results_adapters_plot_and_markdown(tmp_path, small_corpora, capsys):
    assert run_program(tmp_path, "--terms", "full,linear") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["status"] == "finished"
    assert results["settings"]["lr_h"] is None
    assert results["environment"]["pera_kernels"] == pk.__version__
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    keys = [run["key"] for run in results["methods"]]
    assert keys == ["lora", "lora_matched", "lora_half_more", "pera_full"]
    for run in results["methods"]:
        assert run["status"] == "finished"
        assert len(run["loss"]) == len(run["step_ms"]) == 4
        assert run["held_out"][0] == [0, pytest.approx(run["held_out"][0][1])]
        assert run["held_out"][-1] == [4, run["metrics"]["held_out_bits_per_byte"]]
        adapter = read_adapter(tmp_path / f"adapter_{run['key']}")
        size = sum(t.numel() for own in adapter.tensors.values() for t in own.values())
        assert size == run["metrics"]["trainable_parameters"]
    # B = 0 at the start: every method begins as the base model, and learns from the same bytes.
    assert len({run["held_out"][0][1] for run in results["methods"]}) == 1
    assert len({run["loss"][0] for run in results["methods"]}) == 1
    assert results["methods"][3]["metrics"]["quadratic_share"] > 0
    assert results["methods"][0]["metrics"]["quadratic_share"] == 0

    capsys.readouterr()
    assert report.main([str(tmp_path / "results.json"), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "| --- |" + " ---: |" * (len(report.COLUMNS) - 1)
    table = [line.split(" | ") for line in lines if line.startswith("| ")]
    assert [len(row) for row in table] == [len(report.COLUMNS)] * 6
    assert table[2][4] == f"{results['methods'][0]['metrics']['held_out_bits_per_byte']:.4f}"


def test_same_seed_same_results(tmp_path, small_corpora):
    for out in ("first", "second"):
        assert run_program(tmp_path / out, "--terms", "square", "--seed", "3") == 0
    first, second = (
        json.loads((tmp_path / out / "results.json").read_text())["methods"][0]
        for out in ("first", "second")
    )
    assert first["loss"] == second["loss"]
    assert first["held_out"] == second["held_out"]


def test_a_diverging_method_is_reported_and_the_others_go_on(tmp_path, small_corpora, capsys):
    assert run_program(tmp_path, "--terms", "linear,full", "--lr-h", "1e38") == 0
    runs = json.loads((tmp_path / "results.json").read_text())["methods"]
    assert [run["status"] for run in runs] == ["finished"] * 3 + ["diverged"]
    runs.reverse()
    assert "held_out_bits_per_byte" not in runs[0]["metrics"]
    assert "PERA full (diverged)" in capsys.readouterr().out


def test_sigterm_keeps_what_there_is(tmp_path, small_corpora, monkeypatch, capsys):
    calls = 0
    optimizer_step = torch.optim.AdamW.step

    def step_then_signal(self, *arguments, **named):
        nonlocal calls
        calls += 1
        # Two steps of pretraining, four of LoRA, and the third of LoRA with more parameters.
        if calls == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return optimizer_step(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_then_signal)
    assert run_program(tmp_path) == 130
    assert str(tmp_path) in capsys.readouterr().err
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["status"] == "interrupted"
    assert [run["status"] for run in results["methods"]] == ["finished", "interrupted"]
    assert len(results["methods"][1]["loss"]) == 2
    assert read_adapter(tmp_path / "adapter_lora_matched").tensors
    assert "(interrupted)" in report.markdown_table(results)


def test_ctrl_c_during_pretraining(tmp_path, small_corpora, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "random_batch", interrupted)
    assert run_program(tmp_path) == 130
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["methods"] == []
    assert len(results["base"]["held_out"]) == 1
    assert (tmp_path / "loss.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "0"], "'0' is not a whole number from 1"),
        (["--steps", "many"], "'many' is not a whole number from 1"),
        (["--terms", "full,cubic"], "'cubic' is none of linear, square, cross, full"),
        (["--lr", "-1"], "'-1' is not a positive number"),
        (["--lr-h", "inf"], "'inf' is not a positive number"),
        (["--device", "tpu"], "'tpu' is none of auto, cpu, cuda, cuda:N"),
        (["--device", "cuda:99"], "there is no 'cuda:99' here"),
        (["--seed", "-1"], "'-1' is not a whole number from 0"),
        (["--out", __file__], "cannot make"),
    ],
)
def test_bad_values_are_refused_in_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as refusal:
        program.main(options)
    assert refusal.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_rank_at_which_a_loss_is_reached():
    points = [(4, 3.0), (5, 2.0), (8, 1.4), (10, 1.6)]
    assert [report.crossing(points, level) for level in (3.0, 2.5, 1.7)] == [4, 4.5, 6.5]
    assert report.crossing(points, 3.1) is report.crossing(points, 1.3) is None
    # What is no better than a smaller rank tells nothing.
    noisy = [(16, 2.0), (17, 2.1), (20, 2.0), (24, 1.8)]
    assert [report.crossing(noisy, level) for level in (2.05, 2.0, 1.9)] == [
        *(None, 16),
        pytest.approx(20),
    ]


def test_report_refuses_what_it_cannot_read(tmp_path, capsys):
    for text, message in (
        ("{", "cannot read"),
        ("{}", "no result of"),
        ("[]", "no result of"),
        ('{"methods": [null]}', "no result of"),
    ):
        (tmp_path / "results.json").write_text(text)
        for options in ([], ["--markdown"]):
            with pytest.raises(SystemExit) as refusal:
                report.main([str(tmp_path / "results.json"), *options])
            error = capsys.readouterr().err
            assert refusal.value.code == 2 and message in error and error.count("\n") == 1
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "missing.json")])
    assert "missing.json: [Errno" in capsys.readouterr().err
