"""``tools.capacity``: the measurement on tiny matrices, its page, and the formula made from it."""

import json
import math
from collections import defaultdict

import pytest
import torch

pytest.importorskip("pandas", reason="the tables need pandas")
pytest.importorskip("tqdm", reason="the program shows its progress")

from pera_kernels.cli.worth import FITTED, worth  # noqa: E402
from pera_kernels.reference import expand  # noqa: E402
from pera_kernels.terms import TERMS, circular_order, coefficient_count  # noqa: E402
from tools.capacity import __main__ as program  # noqa: E402
from tools.capacity import report  # noqa: E402
from tools.capacity.fit import Problem, extra_ranks, fit, phi, spectrum, tail  # noqa: E402


@pytest.fixture(scope="module")
def rows():
    return report.load()


@pytest.fixture(scope="module")
def cells(rows):
    return report.cells(rows)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("r", [1, 4, 5])
def test_products_stand_in_circular_order(terms, r):
    factor = torch.randn(2, r, 7)
    found = phi(factor, terms)
    order = torch.cat([torch.arange(r), r + circular_order(r, terms)])
    for own, wanted in zip(found, factor, strict=True):
        assert torch.equal(own, expand(wanted, terms)[order])


def test_an_error_in_ranks():
    sigma = spectrum("0.5", 12)
    errors = tail(sigma)
    W = torch.diag(sigma)
    W[:5] = 0
    assert errors[5] == pytest.approx(float(W.square().sum() / sigma.square().sum()))
    assert extra_ranks(float(errors[5]), sigma, 3) == pytest.approx(2)
    assert extra_ranks(float(errors[5] + errors[6]) / 2, sigma, 3) == pytest.approx(2.5)
    assert extra_ranks(0.0, sigma, 3) == pytest.approx(9)
    assert extra_ranks(2.0, sigma, 3) == -3


def test_spectra_fall_and_the_gaussian_one_is_that_of_a_random_matrix():
    for name in (*report.SPECTRA, "exponential", "spiked"):
        assert (spectrum(name, 40).diff() <= 0).all(), name
    drawn = torch.linalg.svdvals(torch.randn(300, 300, dtype=torch.float64)) / 300**0.5
    torch.testing.assert_close(spectrum("gaussian", 300), drawn, atol=0.05, rtol=0)


def test_lora_is_fitted_to_its_exact_error():
    for row in fit(Problem(20, 30, 3, "0.5", "linear", 2, (0.1, math.inf), 400)):
        assert abs(row["worth"]) < 0.01 and row["share"] == 0
        assert all(abs(worth) < 0.1 for worth in row["worths"])


def test_squares_are_worth_a_rank_each_where_all_directions_are_equal():
    (row,) = fit(Problem(24, 24, 3, "0", "square", 1, (0.1,), 600))
    assert 2.9 < row["worth"] < 3.01
    assert row["share"] == pytest.approx(1, abs=0.05)
    assert row["error"] == pytest.approx(1 - 6 / 24, abs=0.01)


def test_the_program_appends_what_is_missing(tmp_path, monkeypatch, capsys):
    quick = [Problem(24, 24, 3, "0.5", terms, 2, (0.1,), 50) for terms in program.TERMS]
    monkeypatch.setattr(program, "problems", lambda: quick)
    out = tmp_path / "new" / "rows.jsonl"
    assert program.main(["--out", str(out)]) == 0
    whole = out.read_text()
    lines = whole.splitlines()
    assert [json.loads(line)["terms"] for line in lines] == [
        terms for terms in program.TERMS for _ in range(2)
    ]
    # Two rows of the second problem are gone.
    out.write_text("\n".join(lines[:2] + lines[4:]) + "\n")
    assert program.main(["--out", str(out)]) == 0
    assert sorted(out.read_text().splitlines()) == sorted(lines)
    assert program.main(["--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) == len(lines)
    # A line whose writing was interrupted, a folder, and options that do not go together.
    out.write_text(lines[0][:20])
    for options, message in (
        (["--out", str(out)], "line 1, is not a row"),
        (["--out", str(tmp_path)], "Is a directory"),
        (["--check", "--out", str(out)], "not allowed with"),
    ):
        with pytest.raises(SystemExit) as refusal:
            program.main(options)
        assert refusal.value.code == 2 and message in capsys.readouterr().err


def test_the_rows_are_those_that_the_program_makes(rows):
    seeds = defaultdict(list)
    for row in rows.to_dict("records"):
        seeds[program.key(row)].append(row["seed"])
        assert max(row["worths"]) == pytest.approx(row["worth"], abs=1e-3)
    wanted = {program.key(vars(own)): list(range(own.seeds)) for own in program.problems()}
    assert seeds == wanted


def test_the_page_says_what_the_rows_say(capsys):
    assert program.main(["--check"]) == 0, capsys.readouterr().out


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    report.draw(tmp_path)
    for path in tmp_path.iterdir():
        assert "k^−0.75" in path.read_text()
        assert (report.FOLDER / path.name).exists()


def test_what_the_page_says_in_words(cells):
    grid = cells[cells.grid].set_index(["terms", "n", "r", "spectrum"])["mean"]
    for name in ("0.25", "0.5"):
        for n in (64, 128, 256):
            # r and n doubled double the worth; r alone does more.
            both, alone = (grid["full", 2 * n, 2 * 4, name], grid["full", n, 2 * 4, name])
            assert 1.4 < both / grid["full", n, 4, name] < 2.6, (name, n)
            assert alone > 1.4 * both
    for n, r, part in ((512, 32, 1 / 7), (256, 32, 1 / 2), (512, 16, 1 / 55)):
        assert grid["full", n, r, "0.5"] / r == pytest.approx(part, rel=0.3)
    for (n, r, name), full in grid["full"].items():
        if full > 1:
            if r > 4:
                assert 0.9 < grid["cross", n, r, name] / full < 1.15, (n, r, name)
            assert 0.25 < grid["square", n, r, name] / full < 0.7, (n, r, name)
    shares = cells[cells.grid & (cells.terms == "full")]
    used = shares[shares["mean"] > shares.r / 10].share
    assert 0.2 < used.min() and used.max() < 5 and 0.7 < used.median() < 1.5
    assert shares[shares["mean"] < 0.05].share.max() < 0.1
    assert worth(spectrum("0.5", 4096), 16) < 0.01
    others = cells[~cells.grid & (cells["mean"] >= report.LEAST)]
    off = (others.said / others["mean"]).map(math.log).abs().map(math.exp)
    assert 0.22 < (off > 1.5).mean() < 0.3 and 2.75 < off.max() < 2.85
    (large,) = others[(others.n == 1024) & (others.spectrum == "0.25")].itertuples()
    assert large.said / large.mean == pytest.approx(0.5, abs=0.05)


def test_the_formula_is_the_fit_to_the_rows(cells):
    for terms, weights in FITTED.items():
        found = report.fitted(report.chosen(cells, terms))
        assert weights == pytest.approx(found, abs=0.005), terms


def test_the_formula_in_cases_that_need_no_fit():
    flat = torch.ones(64)
    for terms in TERMS:
        count = coefficient_count(4, terms)
        assert (worth(flat, 4, terms) > 0.8 * min(count, 4)) == (terms != "linear")
        assert worth(flat, 4, terms) <= count
        assert worth([3.0, 2.0, 1.0, 0.0, 0.0], 3, terms) == worth(flat, 64, terms) == 0
    # A tail whose sixth power underflows is nothing.
    assert worth([1.0, 1e-60, 1e-60, 1e-60], 1) == 0
    falling = [worth(spectrum(name, 256), 16) for name in ("0", "0.25", "0.5", "0.75", "1")]
    assert falling == sorted(falling, reverse=True)
    sigma = spectrum("0.5", 64)
    assert worth(sigma, 8, shape=(64, 1024)) < worth(sigma, 8, shape=(64, 64)) == worth(sigma, 8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([1.0, 2.0], 1), "singular_values must be numbers >= 0 in falling order; got"),
        (([1.0, float("nan")], 1), "falling order"),
        (([1.0, -1.0], 1), "falling order"),
        (([[1.0]], 1), "falling order"),
        (([1.0, 0.5], 1, "full", (3, 4)), r"min\(M, N\) = 2 singular values; got \(3, 4\)"),
        (([1.0, 0.5], 0), "r must be an int >= 1"),
        (([1.0, 0.5], 1, "cubic"), "terms must be one of"),
    ],
)
def test_what_the_formula_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        worth(*arguments)


def test_the_drawing_of_the_method_is_todays(tmp_path):
    pytest.importorskip("matplotlib")
    from tools import method_figure

    method_figure.draw(tmp_path / "method.svg")
    for path in (tmp_path / "method.svg", method_figure.PICTURE):
        assert method_figure.described() in path.read_text(), "run python -m tools.method_figure"
