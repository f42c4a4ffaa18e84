"""``python -m pera_kernels inspect --update``: the spectra of the difference of two checkpoints."""

import json
import os
import weakref

import pytest
import torch

from pera_kernels.cli import updates
from pera_kernels.cli.checkpoints import Stored
from pera_kernels.cli.worth import worth
from tests.inspected import inspected, printed, refused

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("rich")


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


def test_against_the_difference(pair, capsys):
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


def test_what_products_are_worth(tmp_path, capsys):
    torch.manual_seed(0)
    delta = torch.randn(160, 128)
    base = write(tmp_path / "base.safetensors", {"w": torch.zeros(160, 128)})
    tuned = write(tmp_path / "tuned.safetensors", {"w": delta})
    own = inspected(capsys, "--update", base, tuned)["weights"]["w"]
    sigma = torch.linalg.svdvals(delta.double())
    for r in (8, 16):
        assert own[f"worth_at_{r}"] == pytest.approx(worth(sigma, r, "full", (160, 128)), rel=1e-3)
    assert 1 < own["worth_at_8"] < own["worth_at_16"] and own["worth_at_32"] is None
    out = printed(capsys, "--update", base, tuned)
    assert "r=16" in out and "r=32" not in out and "docs/capacity.md" in out


def test_for_people(pair, tmp_path, capsys):
    changed(pair[1], extra=torch.ones(2))
    out = printed(capsys, "--update", *pair)
    assert "48x32" in out and "40x64" in out and "median" in out and "-0.5" in out
    assert "2 2-D weights changed, 1 did not. Singular values in float32" in out
    assert f"Only in {pair[1]}: extra" in out and "round" not in out


def test_every_kind_of_checkpoint(pair, tmp_path, capsys):
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


def test_modules_are_chosen(pair, capsys):
    found = inspected(capsys, "--update", *pair, "--modules", r"^b\.")
    assert list(found["weights"]) == ["b.weight"] and found["unchanged"] == 0


def test_float64_stays_float64(pair, tmp_path, capsys):
    """An update that float32 would not have."""
    base = {"w": torch.randn(20, 20).double()}
    tuned = {"w": base["w"] + 1e-12 * power_law(20, 20, -0.5, 1.0)}
    paths = write(tmp_path / "b.pt", base), write(tmp_path / "t.pt", tuned)
    own = inspected(capsys, "--update", *paths)["weights"]["w"]
    assert own["svd_dtype"] == "float64"
    assert own["log_slope"] == pytest.approx(-0.5, abs=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_how_much_rounding_makes(dtype, tmp_path, capsys):
    base = 0.02 * torch.randn(256, 256)
    exact = base + power_law(256, 256, -1.0, 2e-3)
    paths = (
        write(tmp_path / "b.safetensors", {"w": base}),
        write(tmp_path / "t.safetensors", {"w": exact.to(dtype)}),
    )
    own = inspected(capsys, "--update", *paths)["weights"]["w"]
    noise = float((exact.to(dtype).float() - exact).norm())
    assert own["rounding"] * own["delta_norm"] == pytest.approx(noise, rel=0.02)


def test_spectra_that_rounding_made_flat_are_told(tmp_path, capsys):
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


def test_one_weight_at_a_time(pair, monkeypatch):
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


def test_picture(pair, tmp_path, capsys):
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
