"""Layers whose weight is read by code that does not call them."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import pera_kernels as pk
from tests.adapted import (
    Head,
    filled,
    plain_model,
    refused,
    trained,
)


def test_encoder_layers_keep_calling_in_evaluation():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
    x, mask = torch.randn(2, 5, 32), torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    for layers in ("linear1", "linear2"), ("linear2",):
        model = filled(pk.inject(copy.deepcopy(encoder), list(layers), r=4)).eval()
        for own in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            for given in (None, mask):
                with torch.no_grad():
                    got = own(x, src_key_padding_mask=given)
                expected = own(x.requires_grad_(), src_key_padding_mask=given)
                kept = slice(None) if given is None else ~mask
                torch.testing.assert_close(got[kept], expected[kept], rtol=1e-4, atol=1e-4)
        pk.unload(model)
        assert model.use_nested_tensor == encoder.use_nested_tensor
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Direct(Head):
    def forward(self, x):
        return self.body(x) @ self.lm_head.weight.t()


class Inherited(Direct):
    def forward(self, x):
        return super().forward(x) + 1


class ByMethod(Head):
    def loss(self, x):
        return nn.functional.linear(x, self.lm_head.weight)

    def forward(self, x):
        return self.loss(self.body(x))


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Head()

    def forward(self, x):
        return self.model.body(x) @ self.model.lm_head.weight.t()


@pytest.mark.parametrize("kind", [Direct, Inherited, ByMethod, Around])
def test_a_parent_that_reads_a_weight_is_refused(kind):
    refused(kind(), r"lm_head \(by ", lambda m: pk.inject(m, ["lm_head"], r=2))
    pk.inject(kind(), ["body"], r=2)


def test_a_forward_put_on_an_instance_is_read_as_well():
    model = Head()
    model.forward = Direct.forward.__get__(model)
    with pytest.raises(ValueError, match="lm_head"):
        pk.inject(model, ["lm_head"], r=2)


class Sometimes(Head):
    def forward(self, x, fused=False):
        dtype = self.body.weight.dtype
        x = self.body(x.to(dtype))
        return x @ self.lm_head.weight.t() if fused else self.lm_head(x)


def test_a_parent_that_reads_a_weight_on_some_paths_is_told():
    with pytest.warns(UserWarning, match=r"on some paths.*lm_head \(by Sometimes\)"):
        pk.inject(Sometimes(), ["lm_head"], r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pk.inject(Sometimes(), ["body"], r=2)


class Hidden(Head):
    def forward(self, x):
        return self.body(x) @ self._modules["lm_head"].weight.t()


def test_adapters_that_were_not_called_are_named_after_the_first_forward():
    model = pk.inject(Hidden(), ["body", "lm_head"], r=2)
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError):
        model(torch.randn(2, 9))
    with pytest.warns(UserWarning, match="1 adapted layers were not called.*: lm_head"):
        model(torch.randn(2, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 8))
        called = trained()
        called(torch.randn(2, 24))
    with pytest.warns(UserWarning, match="lm_head"):
        twin(torch.randn(2, 8))
    assert not model._forward_hooks


class Penalized(nn.TransformerEncoderLayer):
    def forward(self, x):
        return super().forward(x) + self.linear1.weight.square().sum()


class Rewritten(nn.TransformerEncoderLayer):
    def forward(self, x):
        return x @ self.linear1.weight.t()


def test_an_encoder_layer_of_ones_own_is_read_as_others_are():
    with pytest.warns(UserWarning, match=r"linear1 \(by Penalized\)"):
        pk.inject(Penalized(8, 2, 8), ["linear1", "linear2"], r=2)
    with pytest.raises(ValueError, match=r"linear1 \(by Rewritten\)"):
        pk.inject(Rewritten(8, 2, 8), ["linear1"], r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pk.inject(nn.TransformerEncoderLayer(8, 2, 8), ["linear1", "linear2"], r=2)


class HandedOn(Head):
    def forward(self, x):
        penalty = self.lm_head.weight.square().sum()
        return checkpoint(self.lm_head, self.body(x), use_reentrant=False) + penalty


class ByAnotherName(Head):
    def forward(self, x):
        head = self.lm_head
        return head(self.body(x)) + self.lm_head.weight.sum()


@pytest.mark.parametrize("kind", [HandedOn, ByAnotherName])
def test_a_layer_that_is_handed_on_may_be_called(kind):
    with pytest.warns(UserWarning, match="on some paths"):
        model = pk.inject(kind(), ["lm_head"], r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(torch.randn(2, 8))


def test_parts_that_are_compiled_are_not_said_to_be_uncalled():
    model = trained()
    model[0].compile(backend="eager")
    model[1] = torch.compile(model[1], backend="eager")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model(torch.randn(2, 24))
    assert not [w for w in seen if "not called" in str(w.message)]


def test_layers_that_are_offloaded_are_refused():
    pytest.importorskip("accelerate")
    from accelerate import cpu_offload

    model = cpu_offload(plain_model(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"0\.up is offloaded"):
        pk.inject(model, ["up"], r=2)
    assert type(model[0].up) is nn.Linear


def test_state_space_blocks_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        vocab_size=20, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=2
    )
    model = transformers.MambaForCausalLM(config)
    match = r"dt_proj \(by MambaMixer\)"
    refused(model, match, lambda m: pk.inject(m, ["in_proj", "dt_proj"], r=2))
