"""Own checkpoints: what is saved comes back, and what is bad changes nothing."""

import json
import pickle
import shutil

import pytest
import torch
from torch import nn

import pera_kernels as pk
from pera_kernels.adapters import checkpoint, files
from tests.adapted import plain_model, refused, trained

pytest.importorskip("safetensors")


@pytest.fixture
def x():
    return torch.randn(7, 24, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("terms", pk.terms.TERMS)
def test_round_trip_into_a_plain_model(terms, tmp_path, x):
    model = trained(terms=terms, dropout=0.1)
    pk.save_adapter(model, tmp_path / "new" / "folder", base_model="some/base")
    loaded = plain_model()
    assert pk.load_adapter(loaded, tmp_path / "new" / "folder") == ([], [])
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    layer = pk.adapted_modules(loaded)["1.up"]
    assert (layer.r, layer.alpha, layer.terms, layer.dropout) == (3, 2.0, terms, 0.1)
    config = json.loads((tmp_path / "new" / "folder" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base" and config["terms"] == terms
    assert config["peft_type"] == "PERA" and config["target_modules"][0] == "0.up"


def test_round_trip_into_adapters(tmp_path, x):
    model = trained()
    pk.save_adapter(model, tmp_path)
    fresh = pk.inject(plain_model(), ["up", "down"], 3)
    pk.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))
    assert pk.adapted_modules(fresh)["0.up"].alpha == 2.0


def test_ranks_and_terms_of_every_module(tmp_path, x):
    model = trained(trained(r=2, targets=["0.up"]), r=5, terms="square", targets=["1.down"])
    pk.save_adapter(model, tmp_path)
    loaded = plain_model()
    pk.load_adapter(loaded, tmp_path)
    own = {name: (m.r, m.terms) for name, m in pk.adapted_modules(loaded).items()}
    assert own == {"0.up": (2, "full"), "1.down": (5, "square")}
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, tmp_path):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    model = trained(plain_model().to(dtype), adapter_dtype=wide)
    pk.save_adapter(model, tmp_path)
    loaded = plain_model().to(dtype)
    pk.load_adapter(loaded, tmp_path)
    assert {p.dtype for p in pk.adapter_parameters(loaded)} == {wide}
    single = plain_model()
    pk.load_adapter(single, tmp_path)
    assert single(torch.randn(2, 24)).dtype == torch.float32


def test_a_merged_model_is_saved_as_what_it_is(tmp_path, x):
    model = trained()
    expected = model(x)
    pk.merge(model)
    pk.save_adapter(model, tmp_path)
    loaded = plain_model()
    pk.load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(x), expected)


def test_an_adapter_loaded_into_merged_layers_counts_alone(tmp_path, x):
    model, other = trained(), trained(seed=7)
    base = plain_model()(x)
    pk.save_adapter(model, tmp_path)
    pk.merge(other)
    pk.load_adapter(other, tmp_path, overwrite=True)
    assert torch.equal(other(x), model(x)) and not torch.equal(other(x), base)


def test_names_of_wrapped_models(tmp_path, x):
    model = trained()
    pk.save_adapter(torch.compile(model, backend="eager"), tmp_path)
    loaded = plain_model()
    pk.load_adapter(nn.DataParallel(loaded), tmp_path)
    assert torch.equal(loaded(x), model(x))


def test_one_module_under_two_names(tmp_path, x):
    def tied():
        model = plain_model()
        model[1].up = model[0].up
        return model

    model = trained(tied(), targets=["up"])
    pk.save_adapter(model, tmp_path)
    loaded = tied()
    pk.load_adapter(loaded, tmp_path)
    assert loaded[1].up is loaded[0].up and isinstance(loaded[0].up, pk.PeraLinear)
    assert torch.equal(loaded(x), model(x))


def test_state_dict_has_the_models_names():
    model = trained(terms="linear")
    own = pk.adapter_state_dict(model)
    assert set(own) == {k for k in model.state_dict() if "pera_" in k} and len(own) == 8
    assert own["0.up.pera_A"].data_ptr() == pk.adapted_modules(model)["0.up"].pera_A.data_ptr()


def test_not_strict(tmp_path, x):
    pk.save_adapter(trained(targets=["up"]), tmp_path)
    fresh = pk.inject(plain_model(), ["0.up", "down"], 3)
    refused(
        fresh, r"missing in the file \(6\): 0\.down\.pera_A", lambda m: pk.load_adapter(m, tmp_path)
    )
    refused(fresh, r"unexpected \(3\): 1\.up\.pera_A", lambda m: pk.load_adapter(m, tmp_path))
    missing, unexpected = pk.load_adapter(fresh, tmp_path, strict=False)
    assert missing[:3] == [f"0.down.pera_{part}" for part in "ABh"] and len(missing) == 6
    assert unexpected == [f"1.up.pera_{part}" for part in "ABh"]
    assert torch.equal(fresh[0].up.pera_A, trained(targets=["up"])[0].up.pera_A)
    smaller = nn.Sequential(plain_model()[0])
    refused(smaller, r"lacks \(1\): 1\.up", lambda m: pk.load_adapter(m, tmp_path))
    assert pk.load_adapter(smaller, tmp_path, strict=False).unexpected_keys == unexpected


def test_another_architecture(tmp_path):
    pk.save_adapter(trained(), tmp_path)
    refused(
        plain_model(n=32),
        r"0\.up \(adapter of \(24, 40\), Linear",
        lambda m: pk.load_adapter(m, tmp_path),
    )
    refused(nn.Sequential(nn.ReLU()), "model lacks", lambda m: pk.load_adapter(m, tmp_path))
    wider = pk.inject(plain_model(), ["up", "down"], 4)
    refused(
        wider, r"0\.up\.pera_A \(\(3, 24\) for \(4, 24\)\)", lambda m: pk.load_adapter(m, tmp_path)
    )
    other = pk.inject(plain_model(), ["up", "down"], 3, terms="cross")
    refused(
        other,
        "terms 'full' for a layer of 'cross'",
        lambda m: pk.load_adapter(m, tmp_path, strict=False),
    )


def test_loaded_twice(tmp_path, x):
    model = trained()
    pk.save_adapter(model, tmp_path)
    loaded = plain_model()
    pk.load_adapter(loaded, tmp_path)
    refused(loaded, "overwrite=True", lambda m: pk.load_adapter(m, tmp_path))
    with torch.no_grad():
        loaded[0].up.pera_A.zero_()
    pk.load_adapter(loaded, tmp_path, overwrite=True)
    assert torch.equal(loaded(x), model(x))


def test_missing_files(tmp_path):
    refused(plain_model(), "there is no file", lambda m: pk.load_adapter(m, tmp_path / "none"))
    with pytest.raises(ValueError, match="no adapter to save"):
        pk.save_adapter(plain_model(), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(TypeError, match="model must be an nn.Module"):
        pk.load_adapter("model", tmp_path)


def test_the_stored_configuration_counts(tmp_path, x):
    """An interrupted save leaves new tensors beside the old readable configuration."""
    model = trained()
    pk.save_adapter(trained(r=2), tmp_path)
    old = (tmp_path / "adapter_config.json").read_text()
    pk.save_adapter(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text(old)
    loaded = plain_model()
    with pytest.warns(UserWarning, match="differs from the configuration stored"):
        pk.load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(x), model(x))
    (tmp_path / "adapter_config.json").unlink()
    loaded = plain_model()
    pk.load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("step", ["write_bytes", "replace", "json"])
def test_an_interrupted_save_leaves_the_old_checkpoint(step, tmp_path, monkeypatch, x):
    model = trained()
    pk.save_adapter(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if step == "replace":
        monkeypatch.setattr(files.os, "replace", fail)
    elif step == "json":
        monkeypatch.setattr(files, "write_json", fail)
    else:
        monkeypatch.setattr(checkpoint.Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space left"):
        pk.save_adapter(trained(r=2), tmp_path)
    monkeypatch.undo()
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    if step == "json":
        loaded = plain_model()
        with pytest.warns(UserWarning, match="differs"):
            pk.load_adapter(loaded, tmp_path)
        assert pk.adapted_modules(loaded)["0.up"].r == 2
    else:
        assert after == before


def corrupt(folder, change):
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    path.write_bytes(bytes(change(data)))


def flipped(position):
    def change(data):
        data[position] ^= 4
        return data

    return change


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda data: data[:100], "truncated or not a safetensors file"),
        (lambda data: data[:-1], "truncated or not a safetensors file"),
        (lambda data: b"", "truncated or not a safetensors file"),
        (lambda data: b"\xff" * 64, "truncated or not a safetensors file"),
        (flipped(-5), "corrupted: its digest"),
    ],
)
def test_a_damaged_file(change, match, tmp_path):
    pk.save_adapter(trained(), tmp_path)
    corrupt(tmp_path, change)
    refused(plain_model(), match, lambda m: pk.load_adapter(m, tmp_path))


def rewritten(folder, **changes):
    """The checkpoint with another stored configuration, other tensors, and no digest."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["pera_config"])
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors.update({checkpoint.PREFIX + k: t for k, t in changes.pop("tensors", {}).items()})
    config.update(changes)
    kept = {k: t for k, t in tensors.items() if t is not None}
    save_file(kept, path, {"pera_config": json.dumps(config)})
    (folder / "adapter_config.json").unlink()


BAD_CONFIGS = {
    "newer": ({"format_version": 3}, "format version 3; this package reads up to 2"),
    "version": ({"format_version": "1"}, '"format_version" must be an integer'),
    "format": ({"format": "lora"}, '"format" must be "pera_kernels"'),
    "rank": ({"r": 10**9}, "r is 1000000000 in the configuration, 3 in the tensors"),
    "alpha": ({"alpha": -1.0}, "alpha must be finite and > 0"),
    "huge alpha": ({"alpha": 10**400}, "alpha must be finite"),
    "no alpha": ({"alpha": None}, "alpha and dropout must be numbers"),
    "alpha text": ({"alpha": "2"}, "alpha must be a number"),
    "terms": ({"terms": "cubic"}, "terms must be one of"),
    "terms list": ({"terms": ["full"]}, "terms must be one of"),
    "other terms": ({"terms": "cross"}, "h must have shape"),
    "dropout": ({"dropout": 1.5}, "dropout must be in"),
    "targets": ({"target_modules": ["0.up"]}, "not in target_modules"),
    "targets text": ({"target_modules": "up"}, "target_modules and tensors disagree"),
    "modules": ({"modules": [1]}, '"modules" must be an object'),
    "lora": ({"peft_type": "LORA"}, '"peft_type" must be "PERA"'),
    "no B": ({"tensors": {"0.up.pera_B": None}}, "lacks pera_B"),
    "shape": ({"tensors": {"0.up.pera_B": torch.zeros(40, 2)}}, r"B must be \(out_features, 3\)"),
    "dimensions": ({"tensors": {"0.up.pera_A": torch.zeros(3)}}, "A must have 2 dimensions"),
    "dtype": ({"tensors": {"0.up.pera_A": torch.zeros(3, 24).int()}}, "A must be float64"),
    "name": ({"tensors": {"0.up.lora_A": torch.zeros(3, 24)}}, "those of an adapter end in"),
    "path": (
        {
            "tensors": {
                "../../etc.pera_A": torch.zeros(3, 24),
                "../../etc.pera_B": torch.zeros(40, 3),
                "../../etc.pera_h": torch.zeros(6),
            },
            "target_modules": ["0.up", "0.down", "1.up", "1.down", "../../etc"],
        },
        r"model lacks \(1\): \.\./\.\./etc",
    ),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_configuration_that_does_not_fit(name, tmp_path):
    changes, match = BAD_CONFIGS[name]
    pk.save_adapter(trained(), tmp_path)
    rewritten(tmp_path, **changes)
    refused(plain_model(), match, lambda m: pk.load_adapter(m, tmp_path))


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100000, "null"])
def test_a_configuration_that_is_no_object(text, tmp_path):
    pk.save_adapter(trained(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    refused(plain_model(), "adapter_config.json", lambda m: pk.load_adapter(m, tmp_path))


def test_a_huge_configuration(tmp_path, monkeypatch):
    pk.save_adapter(trained(), tmp_path)
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 100)
    refused(plain_model(), "too large for a configuration", lambda m: pk.load_adapter(m, tmp_path))


def test_without_safetensors(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pera_kernels\[checkpoints\]"):
        pk.save_adapter(trained(), tmp_path)


# ---- the released code's checkpoints


def released(x, weight, bias, A, B, h):
    """The released formula: outer products, their upper triangle, concatenated; scale 1."""
    i, j = torch.triu_indices(A.shape[0], A.shape[0])
    wide_A = torch.cat([A, (A[:, None] * A[None])[i, j]])
    wide_B = torch.cat([B, (B[:, :, None] * B[:, None])[:, i, j] * h], 1)
    return nn.functional.linear(x, weight, bias) + nn.functional.linear(
        nn.functional.linear(x, wide_A), wide_B
    )


def released_tensors(with_h=True, prefix="base_model.model.", suffix=""):
    torch.manual_seed(3)
    found = {}
    for name, n, m in (("0.up", 24, 40), ("1.down", 40, 24)):
        found[f"{prefix}{name}.lora_A{suffix}"] = 0.3 * torch.randn(4, n)
        found[f"{prefix}{name}.lora_B{suffix}"] = 0.3 * torch.randn(m, 4)
        if with_h:
            found[f"{prefix}{name}.lora_A_parameter{suffix}"] = 0.3 * torch.randn(1, 10)
    return found


@pytest.mark.parametrize("with_h", [True, False])
@pytest.mark.parametrize("prefix, suffix", [("base_model.model.", ""), ("", ".weight")])
@pytest.mark.parametrize("form", ["bin", "safetensors", "file"])
def test_released(form, prefix, suffix, with_h, tmp_path, x):
    tensors = released_tensors(with_h, prefix, suffix)
    if form == "safetensors":
        from safetensors.torch import save_file

        save_file(tensors, tmp_path / "adapter_model.safetensors")
    else:
        torch.save(tensors, tmp_path / "adapter_model.bin")
    model = plain_model()
    path = tmp_path / "adapter_model.bin" if form == "file" else tmp_path
    assert pk.load_released(model, path) == ([], [])
    base = plain_model()[0].up
    A, B = (tensors[f"{prefix}0.up.lora_{part}{suffix}"] for part in "AB")
    h = tensors.get(f"{prefix}0.up.lora_A_parameter{suffix}", torch.zeros(1, 10))[0]
    expected = released(x, base.weight, base.bias, A, B, h)
    torch.testing.assert_close(model[0].up(x), expected)
    assert model[0].up.scale == 1.0 and isinstance(model[0].down, nn.Linear)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_a_pickle_with_code_does_not_run(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({"a": Evil(marker)}))
    refused(plain_model(), "never executed", lambda m: pk.load_released(m, tmp_path))
    torch.save({"0.up.lora_A": Evil(marker)}, tmp_path / "adapter_model.bin")
    refused(plain_model(), "never executed", lambda m: pk.load_released(m, tmp_path))
    assert not marker.exists()


@pytest.mark.parametrize(
    "value, match",
    [
        ([1, 2], "mapping of names to tensors"),
        ({"0.up.other": torch.zeros(2)}, "end in lora_A"),
        ({"0.up.lora_A": 3}, "end in lora_A"),
        ({"0.up.lora_A": torch.zeros(4, 24)}, "lacks pera_B"),
        ({"0.up.lora_A": torch.zeros(4, 24), "0.up.lora_B": torch.zeros(40, 5)}, "B must be"),
        (
            {
                "0.up.lora_A": torch.zeros(4, 24),
                "0.up.lora_B": torch.zeros(40, 4),
                "0.up.lora_A_parameter": torch.zeros(1, 9),
            },
            "h must have shape",
        ),
        ({}, "holds no adapter"),
    ],
)
def test_released_that_does_not_fit(value, match, tmp_path):
    torch.save(value, tmp_path / "adapter_model.bin")
    refused(plain_model(), match, lambda m: pk.load_released(m, tmp_path))


def test_released_damaged(tmp_path):
    torch.save(released_tensors(), tmp_path / "adapter_model.bin")
    data = (tmp_path / "adapter_model.bin").read_bytes()
    for part in (data[:50], data[: len(data) // 2], b""):
        (tmp_path / "adapter_model.bin").write_bytes(part)
        refused(plain_model(), "adapter_model.bin", lambda m: pk.load_released(m, tmp_path))
    shutil.rmtree(tmp_path)
    refused(plain_model(), "there is no file", lambda m: pk.load_released(m, tmp_path))
