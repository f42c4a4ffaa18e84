"""``python -m pera_kernels inspect``: what an adapter is made of."""

import math
import re
import sys

import pytest
import torch
from torch import nn

import pera_kernels as pk
from tests.adapted import plain_model, trained
from tests.inspected import inspected, printed, refused

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("rich")


def saved(folder, h=1.0, **options):
    """A trained adapter whose coefficients are scaled by ``h``; the model."""
    model = trained(**options)
    with torch.no_grad():
        for layer in pk.adapted_modules(model).values():
            if layer.pera_h is not None:
                layer.pera_h.mul_(h)
    pk.save_adapter(model, folder)
    return model


class TestAdapter:
    @pytest.mark.parametrize("terms", pk.terms.TERMS)
    def test_against_the_update_written_out(self, terms, tmp_path, capsys):
        model = saved(tmp_path / "a", r=2, terms=terms)
        modules = inspected(capsys, tmp_path / "a")["modules"]
        for name, layer in pk.adapted_modules(model).items():
            own, delta = modules[name], layer.double().delta_weight().detach()
            sigma = torch.linalg.svdvals(delta)
            linear = layer.scale * (layer.pera_B @ layer.pera_A).detach()
            K = own["expanded_rank"]
            assert own["singular_values"] == pytest.approx(sigma[:K].tolist(), rel=1e-9)
            of_linear = torch.linalg.svdvals(linear)[:2].tolist()
            assert own["singular_values_linear"] == pytest.approx(of_linear, rel=1e-9)
            assert own["numerical_rank"] == K
            assert own["delta_norm"] == pytest.approx(float(delta.norm()))
            assert own["linear_norm"] == pytest.approx(float(linear.norm()))
            products = float((delta - linear).norm())
            assert (own["products_norm"] or 0.0) == pytest.approx(products, abs=1e-12)
            assert own["quadratic_share"] == pytest.approx(layer.quadratic_share())
            of_terms = {"full": (1, 1), "square": (1, 0), "cross": (0, 1), "linear": (0, 0)}[terms]
            assert of_terms == tuple(own[f"{p}_norm"] is not None for p in ("square", "cross"))

    def test_what_it_says_is_lost_is_what_an_export_loses(self, tmp_path, capsys):
        model = saved(tmp_path / "a", r=3)
        found = inspected(capsys, tmp_path / "a")
        for rank in (3, 6, 12):
            done = pk.export_lora(model, tmp_path / str(rank), rank=rank, quiet=True)
            for name, own in found["modules"].items():
                lost = own["error_of_rank"][str(rank)]
                assert lost == pytest.approx(done.errors[name], rel=1e-5, abs=1e-6)
        assert found["largest_error_at_r"] == pytest.approx(
            max(own["error_of_rank"]["3"] for own in found["modules"].values())
        )

    def test_which_pairs_it_uses(self, tmp_path, capsys):
        model = trained(r=4)
        layer = model[0].up
        with torch.no_grad():
            layer.pera_h.fill_(1e-4)
            layer.pera_h[pk.terms.pairs(4).index((1, 3))] = 2.0
            layer.pera_h[pk.terms.pairs(4).index((2, 2))] = -1.0
        pk.save_adapter(model, tmp_path / "a")
        own = inspected(capsys, tmp_path / "a")["modules"]["0.up"]
        first, second, third = own["top_pairs"]
        assert sorted([first["pair"], second["pair"]]) == [[1, 3], [2, 2]]
        A, B = layer.pera_A.detach().double(), layer.pera_B.detach().double()
        norm = {
            (1, 3): 2.0 * (B[:, 1] * B[:, 3]).norm() * (A[1] * A[3]).norm() * layer.scale,
            (2, 2): (B[:, 2] ** 2).norm() * (A[2] ** 2).norm() * layer.scale,
        }
        assert first["norm"] == pytest.approx(float(norm[tuple(first["pair"])]))
        assert first["energy"] + second["energy"] == pytest.approx(1.0) and third["energy"] < 1e-6
        share = first["norm"] ** 2 / (first["norm"] ** 2 + second["norm"] ** 2)
        assert own["pairs_for_90_percent"] == (1 if share >= 0.9 else 2)
        i, j = first["pair"]
        assert f"{i}·{j} {first['energy']:.0%}" in printed(capsys, tmp_path / "a")

    def test_products_that_do_nothing_are_told(self, tmp_path, capsys):
        saved(tmp_path / "a")
        share = inspected(capsys, tmp_path / "a")["quadratic_share"]
        saved(tmp_path / "weak", h=0.009 / share)
        found = inspected(capsys, tmp_path / "weak")
        assert found["quadratic_share"] == pytest.approx(0.009)
        line = printed(capsys, tmp_path / "weak").strip().splitlines()[-1]
        assert line.startswith("The products do nothing: they are 0.90% of BA.")
        assert "parameter_groups" in line and "export-lora --rank 3 loses at most" in line
        assert f"{found['largest_error_at_r']:.2%} of ΔW" in line
        for folder, options in (("more", {"h": 0.011 / share}), ("lora", {"terms": "linear"})):
            saved(tmp_path / folder, **options)
            assert "do nothing" not in printed(capsys, tmp_path / folder)

    @pytest.mark.parametrize("broken", ["0.up", "1.up"])
    def test_what_is_not_finite_spoils_nothing_else(self, broken, tmp_path, capsys):
        model = saved(tmp_path / "a")
        expected = inspected(capsys, tmp_path / "a")["modules"]
        with torch.no_grad():
            pk.adapted_modules(model)[broken].pera_h[0] = torch.inf
        pk.save_adapter(model, tmp_path / "b")
        found = inspected(capsys, tmp_path / "b")
        own = found["modules"].pop(broken)
        assert own["top_pairs"] == [] and own["pairs_for_90_percent"] is None
        assert found["modules"] == {n: own for n, own in expected.items() if n != broken}
        assert found["largest_error_at_r"] == max(
            own["error_of_rank"]["3"] for own in found["modules"].values()
        )
        assert f"Not finite: {broken}" in printed(capsys, tmp_path / "b")

    def test_large_values_do_not_overflow(self, tmp_path, capsys):
        """What float32 cannot hold."""
        model = trained(r=2, targets=["0.up"])
        with torch.no_grad():
            model[0].up.pera_A.mul_(1e25)
            model[0].up.pera_B.mul_(1e15)
        pk.save_adapter(model, tmp_path / "a")
        found = inspected(capsys, tmp_path / "a")
        (own,) = found["modules"].values()
        assert own["delta_norm"] > 1e60 and 0 < found["largest_error_at_r"] < 1
        assert found["largest_error_at_r"] == pytest.approx(own["error_of_rank"]["2"])

    def test_one_share_for_all_modules(self, tmp_path, capsys):
        """Of norms over all modules: one strong module counts."""
        saved(tmp_path / "a")
        found = inspected(capsys, tmp_path / "a")
        norms = [(own["products_norm"], own["linear_norm"]) for own in found["modules"].values()]
        products, linear = (math.hypot(*own) for own in zip(*norms, strict=True))
        assert found["quadratic_share"] == pytest.approx(products / linear)

    def test_an_adapter_that_was_not_trained(self, tmp_path, capsys):
        pk.save_adapter(pk.inject(plain_model(), ["up"], 2), tmp_path / "a")
        own = inspected(capsys, tmp_path / "a")["modules"]["0.up"]
        assert own["effective_rank"] == own["numerical_rank"] == own["error_of_rank"]["2"] == 0
        assert own["top_pairs"] == [] and own["pairs_for_90_percent"] == 0
        assert "ΔW is zero: nothing was trained." in printed(capsys, tmp_path / "a")
        assert "nothing to draw" in refused(capsys, tmp_path / "a", "--plot", tmp_path / "a.png")

    @pytest.mark.parametrize("columns", [120, 80])
    def test_numbers_stay_whole_in_a_terminal(self, columns, tmp_path, capsys, monkeypatch):
        name = "model_layers_0_self_attention"
        saved(tmp_path / "a", r=16, model=nn.ModuleDict({name: plain_model()}))
        own = inspected(capsys, tmp_path / "a")["modules"][f"{name}.0.up"]
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        out = re.sub(r"\x1b\[[\d;]*m", "", printed(capsys, tmp_path / "a"))
        tables = out.split("All:")[0].splitlines()
        assert "…" not in out and max(map(len, tables)) <= columns
        for key in ("delta_norm", "square_norm", "quadratic_share", "effective_rank"):
            assert f"{own[key]:.3g}" in out, key
        assert "median" in out


class TestPicture:
    @pytest.fixture(autouse=True)
    def matplotlib(self):
        pytest.importorskip("matplotlib")

    @pytest.mark.parametrize("terms", pk.terms.TERMS)
    def test_of_an_adapter(self, terms, tmp_path, capsys):
        saved(tmp_path / "a", r=3, terms=terms)
        printed(capsys, tmp_path / "a", "--plot", tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

    def test_of_modules_that_differ(self, tmp_path, capsys):
        """In rank and terms; one that is zero and one that is not finite are left out."""
        model = trained(trained(r=2, targets=["0.up"]), r=5, targets=["1.down"], terms="cross")
        model = trained(model, r=3, targets=["0.down", "1.up"])
        with torch.no_grad():
            model[0].down.pera_B.zero_()
            model[1].up.pera_B.fill_(torch.nan)
        pk.save_adapter(model, tmp_path / "a")
        printed(capsys, tmp_path / "a", "--plot", tmp_path / "a.svg")
        assert "2 modules" in (tmp_path / "a.svg").read_text()

    def test_of_products_without_a_linear_part(self, tmp_path, capsys):
        model = trained(r=2, terms="cross", targets=["0.up"])
        with torch.no_grad():
            model[0].up.pera_A[1] = -model[0].up.pera_A[0]
            model[0].up.pera_B[:, 1] = model[0].up.pera_B[:, 0]
        pk.save_adapter(model, tmp_path / "a")
        own = inspected(capsys, tmp_path / "a", "--plot", tmp_path / "a.png")["modules"]["0.up"]
        assert own["linear_norm"] == 0.0 and own["quadratic_share"] == "inf"

    def test_what_is_drawn(self, tmp_path, capsys):
        from matplotlib.figure import Figure

        from pera_kernels.cli import plots

        saved(tmp_path / "a", r=2)
        modules = inspected(capsys, tmp_path / "a")["modules"]
        spectra, shares, pairs = Figure().subplots(1, 3)
        plots._spectra(spectra, modules.values())
        lines = {line.get_label(): line.get_ydata() for line in spectra.lines}
        for key, label in (("singular_values", "ΔW"), ("singular_values_linear", "BA alone")):
            own = [torch.tensor(m[key]) / m["singular_values"][0] for m in modules.values()]
            middle = torch.stack(own).quantile(0.5, 0).tolist()
            assert lines[label].tolist() == pytest.approx(middle, rel=1e-5)
        plots._shares(shares, modules)
        widths = torch.tensor([bar.get_width() for bar in shares.patches]).view(3, len(modules))
        norms = [
            [m[f"{part}_norm"] for m in modules.values()] for part in ("linear", "square", "cross")
        ]
        wanted = torch.tensor(norms, dtype=torch.float64)
        torch.testing.assert_close(widths, wanted / wanted.sum(0))
        image = plots._pairs(pairs, modules.values()).get_array()
        total = sum(sum(m["term_norms"][2:]) / m["linear_norm"] for m in modules.values())
        upper = torch.triu(torch.as_tensor(image))
        assert float(upper.sum()) == pytest.approx(total / len(modules))

    def test_names_are_no_formulas(self, tmp_path, capsys):
        name = "$\\frac$"
        saved(tmp_path / name, model=nn.ModuleDict({name: plain_model()}))
        printed(capsys, tmp_path / name, "--plot", tmp_path / "a.svg")
        assert (tmp_path / "a.svg").exists()

    def test_files_that_cannot_be_drawn(self, tmp_path, capsys, monkeypatch):
        saved(tmp_path / "a")
        for name, match in (
            ("a.xyz", "the name must end in one of"),
            ("a", "the name must end in one of"),
            ("none/a.png", "there is no folder"),
        ):
            assert match in refused(capsys, tmp_path / "a", "--plot", tmp_path / name)
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        line = refused(capsys, tmp_path / "a", "--plot", tmp_path / "a.png")
        assert 'pip install "pera_kernels[cli]"' in line
