"""``python -m pera_kernels inspect``: what an adapter is made of, and any other update."""

import json
import math
import os
import re
import sys
import weakref

import pytest
import torch
from torch import nn

import pera_kernels as pk
from pera_kernels.__main__ import main
from pera_kernels.cli import updates
from pera_kernels.cli.checkpoints import Stored
from pera_kernels.cli.worth import worth
from tests.adapted import plain_model, trained

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("rich")


def run(*arguments):
    return main(["inspect", *map(str, arguments)])


def inspected(capsys, *arguments):
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def printed(capsys, *arguments):
    assert run(*arguments) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1
    return lines[0]


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


def power_law(M, N, power, scale=1e-2):
    """A matrix whose singular values fall as a power of k."""
    U, S, V = torch.linalg.svd(torch.randn(M, N).double(), full_matrices=False)
    return (scale * (U * torch.arange(1, len(S) + 1) ** power) @ V).float()


@pytest.fixture
def pair(tmp_path):
    """Paths of two checkpoints, each of a.weight, b.weight, a bias and an index."""
    base = {
        "a.weight": torch.randn(48, 32),
        "b.weight": torch.randn(40, 64),
        "a.bias": torch.zeros(48),
        "positions": torch.arange(6).view(2, 3),
    }
    tuned = {
        **base,
        "a.weight": base["a.weight"] + power_law(48, 32, -0.5),
        "b.weight": base["b.weight"] + power_law(40, 64, -1.0),
        "a.bias": torch.ones(48),
    }
    return write(tmp_path / "base.safetensors", base), write(tmp_path / "tuned.safetensors", tuned)


def write(path, tensors):
    if path.suffix == ".safetensors":
        safetensors.save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


def changed(path, **tensors):
    """The checkpoint with these tensors in place of its own; None removes one."""
    new = {**safetensors.load_file(path), **tensors}
    return write(path, {name: own for name, own in new.items() if own is not None})


class TestUpdate:
    def test_against_the_difference(self, pair, capsys):
        base, tuned = (safetensors.load_file(path) for path in pair)
        found = inspected(capsys, "--update", *pair)
        assert list(found["weights"]) == ["a.weight", "b.weight"] and found["unchanged"] == 1
        for (name, own), power in zip(found["weights"].items(), (-0.5, -1.0), strict=True):
            delta = (tuned[name] - base[name]).double()
            sigma = torch.linalg.svdvals(delta)
            assert own["shape"] == list(delta.shape) and own["svd_dtype"] == "float32"
            ratio = float(delta.norm() / base[name].double().norm())
            assert own["relative_norm"] == pytest.approx(ratio, rel=1e-5)
            for k in (4, 8, 16, 32):
                share = float(sigma[:k].square().sum() / sigma.square().sum())
                assert own[f"energy_top_{k}"] == pytest.approx(share, rel=1e-4)
            assert own["log_slope"] == pytest.approx(power, abs=1e-3)
            assert own["effective_rank"] == pytest.approx(
                float(sigma.square().sum() ** 2 / sigma.pow(4).sum()), rel=1e-3
            )
        slopes = [own["log_slope"] for own in found["weights"].values()]
        assert found["median"]["log_slope"] == pytest.approx(sum(slopes) / 2)

    def test_what_products_are_worth(self, tmp_path, capsys):
        torch.manual_seed(0)
        delta = torch.randn(160, 128)
        base = write(tmp_path / "base.safetensors", {"w": torch.zeros(160, 128)})
        tuned = write(tmp_path / "tuned.safetensors", {"w": delta})
        own = inspected(capsys, "--update", base, tuned)["weights"]["w"]
        sigma = torch.linalg.svdvals(delta.double())
        for r in (8, 16):
            assert own[f"worth_at_{r}"] == pytest.approx(
                worth(sigma, r, "full", (160, 128)), rel=1e-3
            )
        assert 1 < own["worth_at_8"] < own["worth_at_16"] and own["worth_at_32"] is None
        out = printed(capsys, "--update", base, tuned)
        assert "r=16" in out and "r=32" not in out and "docs/capacity.md" in out

    def test_for_people(self, pair, tmp_path, capsys):
        changed(pair[1], extra=torch.ones(2))
        out = printed(capsys, "--update", *pair)
        assert "48x32" in out and "40x64" in out and "median" in out and "-0.5" in out
        assert "2 2-D weights changed, 1 did not. Singular values in float32" in out
        assert f"Only in {pair[1]}: extra" in out and "round" not in out

    def test_every_kind_of_checkpoint(self, pair, tmp_path, capsys):
        expected = inspected(capsys, "--update", *pair)["weights"]
        base, tuned = (safetensors.load_file(path) for path in pair)
        (tmp_path / "one").mkdir()
        write(tmp_path / "one" / "model.safetensors", base)
        shards = tmp_path / "shards"
        shards.mkdir()
        write(shards / "m-1.safetensors", {n: t for n, t in tuned.items() if n[0] == "a"})
        write(shards / "m-2.safetensors", {n: t for n, t in tuned.items() if n[0] != "a"})
        names = {name: f"m-{1 if name[0] == 'a' else 2}.safetensors" for name in tuned}
        index = shards / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
        write(tmp_path / "base.pt", base)
        # Of before PyTorch 1.6.
        torch.save(tuned, tmp_path / "tuned.bin", _use_new_zipfile_serialization=False)
        for folders in ((tmp_path / "one", shards), (tmp_path / "base.pt", tmp_path / "tuned.bin")):
            weights = inspected(capsys, "--update", *folders)["weights"]
            # In the order of the file.
            assert {name: weights[name] for name in expected} == expected
        # Each tensor comes from the file that the index names, and from no other.
        write(shards / "m-1.safetensors", {**tuned, "b.weight": torch.ones(40, 64)})
        weights = inspected(capsys, "--update", tmp_path / "one", shards)["weights"]
        assert {name: weights[name] for name in expected} == expected
        names["b.bias"] = "m-1.safetensors"
        index.write_text(json.dumps({"weight_map": names}))
        line = refused(capsys, "--update", tmp_path / "one", shards)
        assert "index.json lists tensors that its files lack: b.bias" in line
        del names["b.bias"]
        names["b.weight"] = "../tuned.safetensors"
        index.write_text(json.dumps({"weight_map": names}))
        line = refused(capsys, "--update", tmp_path / "one", shards)
        assert '"weight_map" must map tensors to names of files' in line
        names["b.weight"] = "m-3.safetensors"
        index.write_text(json.dumps({"weight_map": names}))
        line = refused(capsys, "--update", tmp_path / "one", shards)
        assert "lacks m-3.safetensors, which model.safetensors.index.json lists" in line

    def test_modules_are_chosen(self, pair, capsys):
        found = inspected(capsys, "--update", *pair, "--modules", r"^b\.")
        assert list(found["weights"]) == ["b.weight"] and found["unchanged"] == 0

    def test_float64_stays_float64(self, pair, tmp_path, capsys):
        """An update that float32 would not have."""
        base = {"w": torch.randn(20, 20).double()}
        tuned = {"w": base["w"] + 1e-12 * power_law(20, 20, -0.5, 1.0)}
        paths = write(tmp_path / "b.pt", base), write(tmp_path / "t.pt", tuned)
        own = inspected(capsys, "--update", *paths)["weights"]["w"]
        assert own["svd_dtype"] == "float64"
        assert own["log_slope"] == pytest.approx(-0.5, abs=1e-2)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_how_much_rounding_makes(self, dtype, tmp_path, capsys):
        base = 0.02 * torch.randn(256, 256)
        exact = base + power_law(256, 256, -1.0, 2e-3)
        paths = (
            write(tmp_path / "b.safetensors", {"w": base}),
            write(tmp_path / "t.safetensors", {"w": exact.to(dtype)}),
        )
        own = inspected(capsys, "--update", *paths)["weights"]["w"]
        noise = float((exact.to(dtype).float() - exact).norm())
        assert own["rounding"] * own["delta_norm"] == pytest.approx(noise, rel=0.02)

    def test_spectra_that_rounding_made_flat_are_told(self, tmp_path, capsys):
        base = (0.02 * torch.randn(256, 256)).bfloat16()
        exact = base.float() + power_law(256, 256, -1.0, 1e-2)
        paths = (
            write(tmp_path / "b.safetensors", {"w": base}),
            write(tmp_path / "t.safetensors", {"w": exact.bfloat16()}),
        )
        slope = inspected(capsys, "--update", *paths)["median"]["log_slope"]
        assert "What bfloat16 rounds off is of the order of" in printed(capsys, "--update", *paths)
        write(paths[1], {"w": exact})
        assert inspected(capsys, "--update", *paths)["median"]["log_slope"] < slope - 0.2
        assert "rounds off" not in printed(capsys, "--update", *paths)

    def test_one_weight_at_a_time(self, pair, monkeypatch):
        alive, most = weakref.WeakSet(), []

        class Counted(torch.Tensor):
            pass

        def stored(path):
            own = {f"{n}.weight": torch.randn(16, 16) for n in range(5)}

            def read(tensor):
                copy = tensor.clone().as_subclass(Counted)
                alive.add(copy)
                most.append(len(alive))
                return copy

            return {
                name: Stored((16, 16), lambda tensor=tensor: read(tensor))
                for name, tensor in own.items()
            }

        monkeypatch.setattr(updates, "stored", stored)
        found, _ = updates.update(*pair)
        assert len(found["weights"]) == 5 and len(most) == 10 and max(most) <= 4

    def test_picture(self, pair, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        printed(capsys, "--update", *pair, "--plot", tmp_path / "u.png")
        assert (tmp_path / "u.png").read_bytes().startswith(b"\x89PNG")


def test_an_integer_that_did_not_change_is_nothing(pair, capsys):
    changed(pair[1], positions=torch.ones(2, 3, dtype=torch.int64))
    line = refused(capsys, "--update", *pair)
    assert "positions in" in line and "got int64: dequantize it" in line
    assert "positions" not in inspected(capsys, "--update", *pair, "--modules", "weight")["weights"]


CHANGES = {
    "nan": ({"b.weight": torch.full((40, 64), torch.nan)}, "b.weight in", "is not finite"),
    "infinite": ({"b.weight": torch.full((40, 64), torch.inf)}, "tuned", "is not finite"),
    "8 bits": ({"a.weight": torch.ones(48, 32, dtype=torch.int8)}, "got int8", "--modules"),
    "float8": (
        {"a.weight": torch.ones(48, 32).to(torch.float8_e4m3fn)},
        "got float8_e4m3fn",
        "float64, float32, bfloat16 or float16",
    ),
    "too large": (
        {"b.weight": torch.full((40, 64), 3e38)},
        "b.weight: the difference is too large",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_weights_that_have_no_spectrum(kind, pair, capsys):
    tensors, *matches = CHANGES[kind]
    changed(pair[1], **tensors)
    if kind == "too large":
        changed(pair[0], **{name: -tensor for name, tensor in tensors.items()})
    line = refused(capsys, "--update", *pair)
    assert all(match in line for match in matches), line


@pytest.mark.parametrize("shape", [(48, 31), (48,), (768, 1)])
def test_weights_of_other_shapes_are_left_out_and_told(shape, pair, capsys):
    """As of a vocabulary that grew."""
    changed(pair[1], **{"a.weight": torch.ones(shape)})
    found = inspected(capsys, "--update", *pair)
    assert list(found["weights"]) == ["b.weight"]
    assert found["other_shapes"] == {"a.weight": [[48, 32], list(shape)]}
    told = f"Left out, for their shapes differ: a.weight [48, 32] and {list(shape)}"
    assert told in printed(capsys, "--update", *pair)
    line = refused(capsys, "--update", *pair, "--modules", "a.weight|positions")
    assert "none of 1 2-D weights differs" in line and "1 have other shapes" in line


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_weights_without_dense_values_are_refused(kind, tmp_path, capsys):
    tensor = torch.eye(3).to_sparse() if kind == "sparse" else torch.ones(3, 3, device="meta")
    path = write(tmp_path / "w.pt", {"w": tensor})
    told = {"sparse": "got sparse_coo", "meta": "got no values"}[kind]
    assert told in refused(capsys, "--update", path, path)


class Code:
    """What makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def bad(tmp_path, pair):
    """Arguments that are no good, and what is said of them."""
    base, tuned = pair
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("no pickle")
    write(tmp_path / "code.pt", {"a.weight": torch.ones(48, 32), "b": Code(tmp_path / "made")})
    (tmp_path / "short.safetensors").write_bytes(base.read_bytes()[:200])
    nested = write(tmp_path / "nested.pt", {"model": {"w": torch.ones(2, 2)}, "step": 3})
    other = write(tmp_path / "other.safetensors", {"x.weight": torch.ones(2, 2)})
    update = ("--update", base)
    return [
        ((), "give either ADAPTER or --update BASE TUNED"),
        ((tmp_path / "empty", *update, tuned), "give either ADAPTER or --update BASE TUNED"),
        (update, "expected 2 arguments"),
        ((tmp_path / "empty", "--modules", "a"), "--modules goes with --update"),
        ((*update, tuned, "--modules", "("), "'(' is no regular expression"),
        ((*update, tuned, "--modules", "nothing"), "no 2-D weight whose name has 'nothing'"),
        ((*update, tuned, "--modules", "bias"), "share no 2-D weight whose name has 'bias'"),
        ((*update, base), "none of 3 2-D weights differs between"),
        ((*update, other), "no tensor of the same name: a.bias there, x.weight here"),
        ((*update, tmp_path / "none"), "there is no file or folder"),
        ((*update, tmp_path / "empty"), "neither model.safetensors nor"),
        ((*update, nested), "must hold a mapping of names to tensors; it holds model, step"),
        ((*update, tmp_path / "text.pt"), "neither a .safetensors file nor a state dict"),
        ((*update, tmp_path / "code.pt"), "weights_only=True"),
        ((*update, tmp_path / "short.safetensors"), "truncated or not a safetensors file"),
    ]


@pytest.mark.parametrize("number", range(15))
def test_bad_use(number, pair, tmp_path, capsys):
    arguments, match = bad(tmp_path, pair)[number]
    assert match in refused(capsys, *arguments)
    assert not (tmp_path / "made").exists()
