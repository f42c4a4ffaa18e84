"""The dropout mask: one function of seed and position in every backend."""

import pytest
import torch

import pera_kernels as pk
from pera_kernels.dropout import draw_seed, keep_mask


def kept_by_a_kernel(T, N, p, seed):
    """With A the identity the projection of ones is the dropped input: the mask."""
    from pera_kernels.kernels.launch import Dropout, in_memory
    from pera_kernels.kernels.project import project

    x, identity = torch.ones(T, N, device=seed.device), torch.eye(N, device=seed.device)
    u = torch.empty(T, N, device=seed.device)
    project(x, in_memory(identity), out=u, dropout=Dropout(p, seed))
    return u != 0


@pytest.mark.parametrize("value", [0, 1, 2**31 + 5, 2**61 + 12345])
def test_triton_kernels_draw_the_bits_of_the_definition(value, triton_backend, device):
    T, N, p, seed = 77, 32, 0.3, torch.tensor([value], device=device)
    assert torch.equal(kept_by_a_kernel(T, N, p, seed), keep_mask(seed, T, N, p))


def test_the_kernels_threshold_is_that_of_the_definition(triton_backend, device):
    T, N, p, seed = 8192, 16, 2.0**-16, torch.tensor([3], device=device)
    expected = keep_mask(seed, T, N, p)
    assert not torch.equal(expected, keep_mask(seed, T, N, 2 * p))
    assert torch.equal(kept_by_a_kernel(T, N, p, seed), expected)


@pytest.mark.parametrize("p", [0.05, 0.25, 0.9])
def test_rate_and_independence(p):
    T, N = 512, 512
    keep = keep_mask(torch.tensor([1234]), T, N, p).double()
    spread = (p * (1 - p) / (T * N)) ** 0.5
    assert abs(keep.mean() - (1 - p)) < 5 * spread
    centred = keep - (1 - p)
    for other in (
        centred.roll(1, 0),
        centred.roll(1, 1),
        centred.flip(1),
        keep_mask(torch.tensor([1235]), T, N, p).double() - (1 - p),
    ):
        correlation = (centred * other).mean() / (p * (1 - p))
        assert abs(correlation) < 6 / (T * N) ** 0.5
    # Rows and columns keep their share too: no stripe is favoured.
    for share in (keep.mean(0), keep.mean(1)):
        assert (share - (1 - p)).abs().max() < 6 * (p * (1 - p) / 512) ** 0.5


def test_an_element_whose_lot_is_the_threshold_survives():
    """No lot is below 0, so that a probability of less than half a lot drops nothing."""
    seed, T, N = torch.tensor([3]), 1024, 1024
    assert keep_mask(seed, T, N, 2.0**-18).all()
    # The masks of growing probabilities are nested, and lot 1 is there to tell them apart.
    one, two = (keep_mask(seed, T, N, n * 2.0**-16) for n in (1, 2))
    assert 0 < int((~one).sum()) < int((~two).sum()) and bool((one | ~two).all())


def test_mask_of_a_row_does_not_depend_on_the_batch():
    seed = torch.tensor([99])
    assert torch.equal(keep_mask(seed, 64, 40, 0.5)[:10], keep_mask(seed, 10, 40, 0.5))


def test_an_odd_number_of_columns():
    seed = torch.tensor([7])
    assert torch.equal(keep_mask(seed, 9, 33, 0.4), keep_mask(seed, 9, 34, 0.4)[:, :33])


def test_seed_follows_the_default_generator(device):
    torch.manual_seed(1)
    first, second = draw_seed(device), draw_seed(device)
    torch.manual_seed(1)
    assert torch.equal(draw_seed(device), first) and not torch.equal(first, second)
    assert first.device.type == device.type


def test_backends_agree_for_one_seed(backend, device):
    layer = pk.PeraLinear(30, 14, r=3, dropout=0.5, backend=backend, device=device)
    torch.nn.init.normal_(layer.pera_B)
    x = torch.randn(8, 30, device=device)
    torch.manual_seed(4)
    got = layer(x)
    layer.backend = "reference"
    torch.manual_seed(4)
    torch.testing.assert_close(got, layer(x), rtol=1e-4, atol=1e-4)


def test_no_dropout_in_eval_mode(backend, device):
    layer = pk.PeraLinear(30, 14, r=3, dropout=0.5, backend=backend, device=device).eval()
    torch.nn.init.normal_(layer.pera_B)
    x = torch.randn(8, 30, device=device)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
