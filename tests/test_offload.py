"""What accelerate offloads to memory or disk is fetched for every call, and returned."""

import pytest
import torch

import pera_kernels as pk
from tests.adapted import filled, plain_model, trained

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(params=["memory", "disk"])
def offload(request, tmp_path):
    """A function that offloads a model."""

    def put(model):
        if request.param == "memory":
            return accelerate.cpu_offload(model, torch.device("cpu"))
        return accelerate.disk_offload(model, str(tmp_path / "offloaded"), torch.device("cpu"))

    return put


def assert_away(model):
    assert all(p.is_meta for p in model.parameters())


@torch.no_grad()
def test_every_call_is_that_of_a_model_that_is_here(offload, tmp_path):
    same, net, x = trained(), offload(trained()), torch.randn(3, 24)
    expected = same(x)
    torch.testing.assert_close(net(x), expected)
    for name, tensor in pk.adapter_state_dict(net).items():
        assert torch.equal(tensor, pk.adapter_state_dict(same)[name])
    for name, layer in pk.adapted_modules(net).items():
        other = same.get_submodule(name)
        assert layer.quadratic_share() == other.quadratic_share()
        assert torch.equal(layer.delta_weight(), other.delta_weight())
    pk.save_adapter(net, tmp_path / "saved")
    pk.export_lora(net, tmp_path / "lora", quiet=True)
    assert_away(net)
    read = pk.adapters.checkpoint.read_adapter(tmp_path / "saved")
    for name, own in read.tensors.items():
        for part, tensor in own.items():
            assert torch.equal(tensor, getattr(same.get_submodule(name), part))
    for keep_base in (True, False):
        pk.merge(net, keep_base=keep_base)
        pk.merge(same, keep_base=keep_base)
        assert_away(net)
        assert torch.equal(net(x), same(x))
        pk.unmerge(net)
        pk.unmerge(same)
        assert_away(net)
        assert torch.equal(net(x), same(x))
    net = pk.unload(net)
    pk.unload(same)
    assert [type(m) for m in net.modules()] == [type(m) for m in same.modules()]
    assert torch.equal(net(x), same(x))
    assert_away(net)


@torch.no_grad()
def test_an_adapter_is_loaded_into_what_is_offloaded(offload, tmp_path):
    source, x = trained(seed=4), torch.randn(3, 24)
    pk.save_adapter(source, tmp_path / "saved")
    net = offload(trained())
    with pytest.raises(ValueError, match="hold something"):
        pk.load_adapter(net, tmp_path / "saved")
    pk.load_adapter(net, tmp_path / "saved", overwrite=True)
    assert_away(net)
    assert torch.equal(net(x), source(x))


def test_a_merge_that_fails_changes_nothing(offload):
    net = filled(pk.inject(plain_model(), ["up", "down"], 3))
    with torch.no_grad():
        net[1].down.pera_B.fill_(1e30)
        net[1].down.pera_A.fill_(1e30)
    weights = {n: layer.weight.clone() for n, layer in pk.adapted_modules(net).items()}
    offload(net)
    with pytest.raises(ValueError, match=r"1\.down.*infinite"):
        pk.merge(net)
    assert_away(net)
    for name, layer in pk.adapted_modules(net).items():
        assert not layer.merged
        with pk.sharded.here(layer, ["weight"]):
            assert torch.equal(layer.weight, weights[name])


def test_new_adapters_are_refused(offload):
    net = offload(plain_model())
    with pytest.raises(ValueError, match="offloaded by accelerate"):
        pk.inject(net, ["up"])


@torch.no_grad()
def test_under_peft(offload, tmp_path):
    peft = pytest.importorskip("peft")
    from pera_kernels.peft import PeraConfig

    def adapted():
        torch.manual_seed(0)
        net = peft.get_peft_model(plain_model(), PeraConfig(r=3, target_modules=["up", "down"]))
        for name, p in net.named_parameters():
            if ".pera_" in name:
                p.normal_(std=0.3)
        return net.eval()

    same, net, x = adapted(), adapted(), torch.randn(3, 24)
    offload(net)
    expected = same(x)
    assert torch.equal(net(x), expected)
    assert_away(net)
    pk.export_lora(net, tmp_path / "lora", quiet=True)
    for layer, other in zip(*(m.base_model._layers().values() for m in (net, same)), strict=True):
        assert torch.equal(layer.get_delta_weight("default"), other.get_delta_weight("default"))
    net.merge_adapter()
    torch.testing.assert_close(net(x), expected)
    net.unmerge_adapter()
    assert torch.equal(net(x), expected)
    assert_away(net)


@torch.no_grad()
def test_peft_adapters_in_what_is_offloaded_already(offload, tmp_path):
    peft = pytest.importorskip("peft")
    from pera_kernels.peft import PeraConfig

    config = PeraConfig(r=3, target_modules=["up", "down"], init_weights=False)
    torch.manual_seed(0)
    same, x = peft.get_peft_model(plain_model(), config).eval(), torch.randn(3, 24)
    same.save_pretrained(tmp_path / "saved")
    net = peft.PeftModel.from_pretrained(offload(plain_model()), tmp_path / "saved").eval()
    assert torch.equal(net(x), same(x))
    torch.manual_seed(0)
    new = peft.get_peft_model(offload(plain_model()), config).eval()
    assert torch.equal(new(x), same(x))


def test_a_tied_weight_is_not_merged(tmp_path):
    net = filled(pk.inject(plain_model(), ["up"], 3))
    net[1].up.weight = net[0].up.weight
    accelerate.cpu_offload(net, torch.device("cpu"))
    with pytest.raises(ValueError, match="shared"):
        pk.merge(net)


def test_an_offloading_hook_around_a_layer_is_refused():
    net = trained()
    accelerate.cpu_offload(net, torch.device("cpu"), preload_module_classes=["Block"])
    with pytest.raises(RuntimeError, match=r"0\.up is offloaded by a hook of a module around it"):
        pk.merge(net)


def test_another_hook_beside(offload):
    from accelerate.hooks import ModelHook, add_hook_to_module

    same, net, x = trained(), trained(), torch.randn(3, 24)
    for layer in pk.adapted_modules(net).values():
        add_hook_to_module(layer, ModelHook())
    offload(net)
    pk.merge(net)
    torch.testing.assert_close(net(x), same(x))
    assert_away(net)


def test_a_trained_head_is_saved_and_exported(offload, tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 3))
    filled(pk.inject(net, ["0"], 2, modules_to_save=["1"]))
    weight = net[1].weight.detach().clone()
    offload(net)
    pk.save_adapter(net, tmp_path / "saved")
    pk.export_lora(net, tmp_path / "lora", quiet=True)
    read = pk.adapters.checkpoint.read_adapter(tmp_path / "saved")
    assert torch.equal(read.parameters["1.weight"], weight)
