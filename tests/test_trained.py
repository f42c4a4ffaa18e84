"""What is saved is what was trained, beside the adapters too."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import pera_kernels as pk
from tests.adapted import Classifier, filled, layer, plain_model, refused, trained


def test_wrappers_are_no_part_of_a_name(tmp_path):
    pytest.importorskip("safetensors")
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def wrapped():
        model = plain_model()
        model[0] = torch.compile(model[0], backend="eager")
        model[1] = checkpoint_wrapper(model[1])
        return model

    x, model = torch.randn(2, 24), trained(wrapped(), targets=["up"])
    with torch.no_grad():
        model[1].down.bias.requires_grad_(True).add_(0.5)
    pk.save_adapter(model, tmp_path)
    filled = pk.inject(wrapped(), ["up"], r=3)
    for loaded in (plain_model(), wrapped(), filled):
        assert pk.load_adapter(loaded, tmp_path) == ([], [])
        torch.testing.assert_close(loaded(x), model(x))


def test_a_trained_head_is_saved(tmp_path):
    pytest.importorskip("safetensors")
    model, x = pk.inject(Classifier(), ["body"], r=2, modules_to_save=["classifier"]), None
    filled(model)
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
        model.body.bias.requires_grad_(True).add_(0.5)
    x = torch.randn(4, 8)
    pk.save_adapter(model, tmp_path)
    fresh = Classifier()
    assert pk.load_adapter(fresh, tmp_path) == ([], [])
    assert torch.equal(fresh.classifier(x), model.classifier(x))
    assert torch.equal(fresh.body.bias, model.body.bias)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == trains
    again = pk.inject(Classifier(), ["body"], r=2, modules_to_save=())
    pk.load_adapter(again, tmp_path)
    assert torch.equal(again.classifier(x), model.classifier(x))


def test_a_head_that_the_model_lacks_or_has_in_another_shape(tmp_path):
    pytest.importorskip("safetensors")
    model = filled(pk.inject(Classifier(), ["body"], r=2, modules_to_save=["classifier"]))
    pk.save_adapter(model, tmp_path)
    wide, without = Classifier(), Classifier()
    wide.classifier = nn.Linear(8, 4)
    del without.classifier
    refused(wide, r"classifier.weight \(\(3, 8\) for", lambda m: pk.load_adapter(m, tmp_path))
    refused(without, "parameters that the model lacks", lambda m: pk.load_adapter(m, tmp_path))
    missing, unexpected = pk.load_adapter(without, tmp_path, strict=False)
    assert not missing and unexpected == ["classifier.weight", "classifier.bias"]


class Normed(Classifier):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.classifier(self.norm(self.body(x)))


def test_a_trained_module_is_saved_with_its_buffers_and_trains_on_in_peft(tmp_path):
    pytest.importorskip("safetensors")
    peft = pytest.importorskip("peft")
    import pera_kernels.peft

    assert pera_kernels.peft.PeraConfig
    model = filled(pk.inject(Normed(), ["body"], r=2, modules_to_save=["classifier", "norm"]))
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
    for _ in range(3):
        model(torch.randn(9, 8))
    model.eval()
    x = torch.randn(4, 8)
    pk.save_adapter(model, tmp_path / "own")
    fresh = Normed().eval()
    pk.load_adapter(fresh, tmp_path / "own")
    assert torch.equal(fresh(x), model(x))
    loaded = peft.PeftModel.from_pretrained(Normed(), tmp_path / "own", is_trainable=True).eval()
    torch.testing.assert_close(loaded(x), model(x))
    loaded.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(Normed(), tmp_path / "again").eval()
    torch.testing.assert_close(again(x), model(x))


class Tied(nn.Module):
    def __init__(self, tied):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.body = nn.Embedding(6, 8), nn.Linear(8, 8)
        self.classifier = nn.Linear(8, 6, bias=False)
        if tied:
            self.classifier.weight = self.emb.weight

    def forward(self, x):
        return self.classifier(self.body(self.emb(x)))


def test_heads_across_tied_and_untied_models(tmp_path):
    pytest.importorskip("safetensors")
    x = torch.arange(6)
    given = {"r": 2, "modules_to_save": ["emb", "classifier"]}
    for tied in (False, True):
        model = filled(pk.inject(Tied(tied), ["body"], **given))
        with torch.no_grad():
            model.classifier.weight.add_(1.0)
        pk.save_adapter(model, tmp_path / str(tied))
        if tied:
            fresh = Tied(False)
            pk.load_adapter(fresh, tmp_path / "True")
            assert torch.equal(fresh(x), model(x))
    match = "emb.weight and classifier.weight differ in the file and are one tensor"
    refused(Tied(True), match, lambda m: pk.load_adapter(m, tmp_path / "False"))


def test_a_file_without_the_head_that_trains_is_refused(tmp_path):
    pytest.importorskip("safetensors")
    pk.save_adapter(filled(pk.inject(Classifier(), ["body"], r=2, modules_to_save=())), tmp_path)
    model = pk.inject(Classifier(), ["body"], r=2, modules_to_save=["classifier"])
    with pytest.raises(ValueError, match=r"missing in the file \(2\): classifier.weight"):
        pk.load_adapter(model, tmp_path)
    missing, _ = pk.load_adapter(model, tmp_path, strict=False)
    assert missing == ["classifier.weight", "classifier.bias"]


class Nested(Classifier):
    """With a child of its own that has the name of ours."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(8, 3)
        self.classifier.base_layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.classifier.base_layer(self.classifier(self.body(x)))


def test_names_like_ours_are_left_alone(tmp_path):
    pytest.importorskip("safetensors")
    model = filled(pk.inject(Nested(), ["body"], r=2, modules_to_save=["classifier"]))
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.add_(1.0)
    pk.save_adapter(model, tmp_path)
    fresh, x = Nested(), torch.randn(2, 8)
    pk.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))
    assert all(p.requires_grad for p in fresh.classifier.parameters())


@pytest.mark.parametrize("bias", ["all", "pera_only"])
def test_a_peft_folder_with_trained_biases_runs(bias, tmp_path):
    peft = pytest.importorskip("peft")
    from pera_kernels.peft import PeraConfig

    own = PeraConfig(r=2, target_modules=["up"], bias=bias, init_weights=False)
    model = peft.get_peft_model(plain_model(), own)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    plain, x = plain_model(), torch.randn(3, 24)
    pk.load_adapter(plain, tmp_path)
    torch.testing.assert_close(plain(x), model(x))


def test_a_load_that_fails_late_takes_the_adapters_out_again(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    from pera_kernels.adapters import trained as beside

    pk.save_adapter(filled(pk.inject(Classifier(), ["body"], modules_to_save=())), tmp_path)

    def fail(self):
        raise RuntimeError("late")

    monkeypatch.setattr(beside.Places, "write", fail)
    model = Classifier()
    with pytest.raises(RuntimeError, match="late"):
        pk.load_adapter(model, tmp_path)
    assert type(model.body) is nn.Linear and all(p.requires_grad for p in model.parameters())


def test_a_head_on_the_meta_device(tmp_path):
    pytest.importorskip("safetensors")
    pk.save_adapter(
        filled(pk.inject(Classifier(), ["body"], r=2, modules_to_save=["classifier"])), tmp_path
    )
    model = Classifier().to("meta")
    pk.load_adapter(model, tmp_path)
    assert model(torch.randn(2, 8, device="meta")).shape == (2, 3)


def test_a_computed_factor_is_not_loaded_into(tmp_path):
    pytest.importorskip("safetensors")
    model = trained()
    pk.save_adapter(model, tmp_path)
    parametrizations.weight_norm(model[0].up, "pera_A")
    with pytest.raises(ValueError, match=r"0\.up\.pera_A \(computed from other tensors"):
        pk.load_adapter(model, tmp_path, overwrite=True)


def test_peft_loads_a_folder_of_save_adapter(tmp_path):
    pytest.importorskip("safetensors")
    peft = pytest.importorskip("peft")
    import pera_kernels.peft

    assert pera_kernels.peft.PeraConfig
    model = trained(trained(r=2, targets=["0.up"]), r=5, alpha=3.0, targets=["1.down"])
    with torch.no_grad():
        model[0].down.bias.requires_grad_(True).add_(0.5)
    pk.save_adapter(model, tmp_path / "own")
    x = torch.randn(4, 24)
    loaded = peft.PeftModel.from_pretrained(plain_model(), tmp_path / "own").eval()
    torch.testing.assert_close(loaded(x), model(x))
    mixed = trained(trained(r=2, targets=["0.up"]), r=2, terms="square", targets=["1.down"])
    pk.save_adapter(mixed, tmp_path / "mixed")
    with pytest.raises(ValueError, match="terms must be one of.*got 'mixed'"):
        peft.PeftModel.from_pretrained(plain_model(), tmp_path / "mixed")


@pytest.mark.parametrize("tied", [False, True])
def test_a_peft_folder_with_an_adapted_head(tied, tmp_path):
    peft = pytest.importorskip("peft")
    from tests.test_peft import config, llama, logits

    torch.manual_seed(1)
    model = peft.get_peft_model(llama(tied), config(target_modules=["q_proj", "lm_head"]))
    model.eval().save_pretrained(tmp_path)
    plain = llama(tied)
    pk.load_adapter(plain, tmp_path)
    torch.testing.assert_close(logits(plain), logits(model))
    assert not plain.lm_head.weight.requires_grad


def test_a_nan_is_no_zero():
    own = layer()
    with torch.no_grad():
        own.pera_B[0, 0] = float("nan")
    assert own.quadratic_share() != own.quadratic_share()
    linear = pk.PeraLinear(8, 6, r=2, terms="linear")
    with torch.no_grad():
        linear.pera_A[0, 0] = float("nan")
    assert linear.quadratic_share() != linear.quadratic_share()
