"""Tables, statements and the picture of the pages say what results and sources say."""

import json
import re
from pathlib import Path

import pytest

from pera_kernels.adapters.export import vllm_max_lora_rank
from pera_kernels.terms import TERMS, expanded_rank

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def part(page, name):
    return re.search(rf"<!-- {name}: generated -->\n(.*?)\n<!-- end -->", page, re.DOTALL)[1]


@pytest.fixture(scope="module")
def finetune():
    return json.loads((ROOT / "benchmarks/results/finetune/results.json").read_text())


def test_the_table_of_the_fine_tune(finetune):
    pytest.importorskip("rich")
    from tools.finetune.report import markdown_table

    assert part((DOCS / "finetune.md").read_text(), "finetune") == markdown_table(finetune)


def test_what_is_said_of_the_fine_tune(finetune):
    """docs/finetune.md says this in words."""
    pytest.importorskip("rich")
    from tools.finetune.report import equal_rank

    runs = {run["key"]: run["metrics"] for run in finetune["methods"]}
    loss = {key: metrics["held_out_bits_per_byte"] for key, metrics in runs.items()}
    assert loss["pera_full"] < loss["lora"] < loss["pera_square"]
    assert loss["lora_half_more"] < loss["pera_full"] < loss["lora_matched"]
    count = {key: metrics["trainable_parameters"] for key, metrics in runs.items()}
    assert count["lora_matched"] >= count["pera_full"] < 1.025 * count["lora"]
    assert count["lora_half_more"] == 1.5 * count["lora"]
    assert runs["lora_matched"]["rank"] == runs["lora"]["rank"] + 1 == 17
    assert runs["lora"]["step_ms"] < runs["pera_full"]["step_ms"]
    assert finetune["settings"]["lr_h"] is None
    lora = [run for key, run in runs.items() if key.startswith("lora")]
    assert round(equal_rank(lora, runs["pera_full"])) == runs["lora_quarter_more"]["rank"] == 20
    assert loss["lora_quarter_more"] == pytest.approx(loss["pera_full"], abs=0.001)
    assert equal_rank(lora, runs["pera_square"]) is None


def test_the_interactions_of_the_fine_tune():
    pytest.importorskip("rich")
    pytest.importorskip("tqdm")
    from tools.interactions import table

    told = json.loads((ROOT / "benchmarks/results/finetune/interactions.json").read_text())
    assert part((DOCS / "finetune.md").read_text(), "interactions") == table(told)
    beside = {name: own["off_diagonal"] for name, own in told["means"].items()}
    assert beside["base"] < beside["LoRA"] == pytest.approx(beside["PERA full"], rel=0.02)


def test_the_tables_of_the_ablation():
    for package in ("matplotlib", "pandas", "rich", "tqdm"):
        pytest.importorskip(package)
    from tools.ablation import report

    for path, text in report.pages(report.RESULTS).items():
        assert path.read_text() == text, "run python -m tools.ablation --report"


def test_what_is_said_of_the_ablation():
    """docs/ablation.md, docs/choosing.md and README.md say this in words."""
    for package in ("matplotlib", "pandas", "rich", "tqdm"):
        pytest.importorskip(package)
    from tools import rows
    from tools.ablation import report

    topics, verses = (report.results(report.RESULTS, task) for task in ("topics", "verses"))

    def sure(runs, method, r, other="lora"):
        """Whether the method's test loss is below the other's, for sure: 1, 0 or -1."""
        own = runs[(runs.r == r) & runs.method.isin((method, other))]
        gain, half = report.difference(own.replace({"method": {other: "lora"}}), method, r, "test")
        return (gain > half) - (gain < -half)

    # Full PERA against LoRA, as it was chosen and at the default rate of h, and a larger LoRA.
    for runs, r, of_full, of_default in (
        *((topics, r, 1, 1) for r in (4, 8)),
        (topics, 16, 1, 0),
        (verses, 4, -1, 0),
        (verses, 16, 1, 1),
    ):
        full = runs[(runs.method == "full") & (runs.r == r)]
        assert len(full) == 5 and sure(runs, "full", r) == of_full
        chosen = set(full.multiple)
        assert (chosen == {1.0}) == ("full_default" not in set(runs[runs.r == r].method))
        if chosen != {1.0}:
            assert sure(runs, "full_default", r) == of_default
        lora = runs[(runs.method == "lora") & (runs.r == r)].parameters.iloc[0]
        assert 1.001 < full.parameters.iloc[0] / lora < 1.022
    (multiple,) = set(verses[(verses.method == "full") & (verses.r == 4)].multiple)
    assert multiple == 3.0 and report.difference(verses, "full_default", 4, "test")[0] < 0
    for r, ranks, said in ((4, 0.5, "0.2"), (8, 0.8, "0.8"), (16, 4.0, "3.4")):
        assert round(report.worth(topics, "full", r, "test")[0], 1) == ranks
        assert report.predicted(topics, "full", r) == said
        larger = report.difference(topics, "lora_half_more", r, "test")[0]
        assert larger > report.difference(topics, "full", r, "test")[0]
        assert sure(topics, "lora_parameters", r, "full") == {4: 1, 8: 0, 16: -1}[r]
        assert sure(topics, "cross", r, "full") == 0
        square, cross, full = (
            report.difference(topics, key, r, "test")[0] for key in ("square", "cross", "full")
        )
        assert 0 < square < cross and square < full
    assert [sure(verses, "cross", r, "full") for r in (4, 16)] == [1, 0]
    for r in (4, 16):
        assert float(report.predicted(verses, "full", r)) < 0.5
        assert sure(verses, "lora_parameters", r) == sure(verses, "lora_half_more", r) == 0
    by_rule = {
        (row["setting"], row["rule"]): row for row in rows.read(report.RESULTS / "rates.jsonl")
    }
    default = {setting: row for (setting, rule), row in by_rule.items() if rule == "default"}
    over = {s: row["validation"] - by_rule[s, "LoRA"]["validation"] for s, row in default.items()}
    assert len(over) == 9 and 0 < over.pop("75 steps") < 0.002 and max(over.values()) < 0
    shares = [row["shares"][-1] for row in default.values()]
    assert 0.27 < min(shares) and max(shares) < 1.6
    every = {s: row for (s, rule), row in by_rule.items() if rule == "normalised at every step"}
    assert all(row["validation"] < by_rule[s, "LoRA"]["validation"] for s, row in every.items())
    assert sum(row["validation"] < default[s]["validation"] for s, row in every.items()) == 5
    assert all(0.32 < row["shares"][-1] < 0.475 for row in every.values()) and len(every) == 9
    grown = [row["B_in_lr"] for row in default.values()]
    assert 4 < min(grown) and max(grown) < 13.5
    # Fixed multiples: next to nothing in one setting, too much in another.
    losses = {rule: by_rule["verses, width 384", rule]["validation"] for _, rule in by_rule}
    assert min(losses, key=losses.get) == "30000 × lr"
    widths = ("width 64", "width 128", "width 256")
    assert all(by_rule[width, "30000 × lr"]["validation"] > 4 for width in widths)
    # Far below LoRA's best lr, the higher the rate of h the better.
    rising = ("LoRA", "30 × lr", "1000 × lr", "default", "30000 × lr")
    losses = [by_rule["lr / 4", rule]["validation"] for rule in rising]
    assert losses == sorted(losses, reverse=True)
    assert by_rule["width 128", "30 × lr"]["shares"][-1] > 0.2
    assert by_rule["verses, width 384", "30 × lr"]["shares"][-1] == pytest.approx(0.001, abs=5e-4)


def test_what_is_said_of_capacity():
    """README.md and docs/choosing.md: parts of r for singular values that fall as k^−0.5."""
    pytest.importorskip("pandas")
    from tools.capacity import report

    cells = report.cells(report.load())
    cells = cells[(cells.terms == "full") & (cells.spectrum == "0.5") & cells.grid]
    parts = (cells["mean"] / cells.r).groupby(cells.n // cells.r).agg(["min", "max"])
    assert 0.4 < parts.loc[8, "min"] and parts.loc[8, "max"] < 0.7
    assert 1 / 9 < parts.loc[16, "min"] and parts.loc[16, "max"] < 1 / 5
    assert parts.loc[32, "max"] < 1 / 30


def test_the_table_of_ranks():
    head = ["r", *(f'K, terms="{terms}"' for terms in TERMS), "K′ (full)", "vLLM --max-lora-rank"]
    lines = [f"| {' | '.join(head)} |", f"|{'---:|' * len(head)}"]
    for r in (2, 4, 8, 12, 16, 20, 24, 28, 32, 64):
        K = [expanded_rank(r, terms) for terms in TERMS]
        padded = -(-K[0] // 16) * 16
        cells = [r, *K, padded, vllm_max_lora_rank(padded) or "none"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    assert part((DOCS / "serving.md").read_text(), "ranks") == "\n".join(lines)


def test_the_picture_shows_todays_files_and_imports():
    pytest.importorskip("matplotlib")
    from tools import picture

    shown = picture.PICTURE.read_text()
    assert picture.described(picture.arrows()) in shown, "run python -m tools.picture"


def test_files_that_the_architecture_page_names_exist():
    text = (DOCS / "architecture.md").read_text()
    for path in re.findall(r"`([\w/]+\.py|\w+/)`", text):
        assert (ROOT / "pera_kernels" / path).exists(), path


def test_functions_that_the_architecture_page_names_exist():
    found = re.findall(r"`([\w/]+\.py)` \((`[^)]*)\)", (DOCS / "architecture.md").read_text())
    assert found
    for path, names in found:
        source = (ROOT / "pera_kernels" / path).read_text()
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(def|class) {name}\b|^{name}\b", source, re.M), (path, name)
