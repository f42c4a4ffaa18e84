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
    assert 18.5 < equal_rank(lora, runs["pera_full"]) < 19.5
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

    topics = report.results(report.RESULTS, "topics")
    for r, least, most in ((16, 4, 5), (4, 0.4, 0.6)):
        assert least <= round(report.worth(topics, "full", r, "test"), 1) <= most
        gain, half = report.difference(topics, "full", r, "test")
        more, _ = report.difference(topics, "lora_half_more", r, "test")
        assert half < gain < more
    by_rule = {
        (row["setting"], row["rule"]): row for row in rows.read(report.RESULTS / "rates.jsonl")
    }
    default = {setting: row for (setting, rule), row in by_rule.items() if rule == "default"}
    over = {s: row["validation"] - by_rule[s, "LoRA"]["validation"] for s, row in default.items()}
    assert len(over) > 4 and over.pop("75 steps") < 0.002 and max(over.values()) < 0
    shares = [row["shares"][-1] for row in default.values()]
    assert 0.27 < min(shares) and max(shares) < 1.6
    grown = [row["B_in_lr"] for row in default.values()]
    assert 4 < min(grown) and max(grown) < 13.5
    # Fixed multiples: next to nothing in one setting, too much in another.
    assert by_rule["lr / 4", "30 × lr"]["shares"][-1] < 0.04
    assert by_rule["width 128", "30000 × lr"]["validation"] > 4


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
