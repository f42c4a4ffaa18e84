"""What only a GPU can show: compiled kernels at real sizes, several devices, the backend chosen."""

import pytest
import torch

import pera_kernels as pk
from pera_kernels import testing
from pera_kernels.backends import resolve
from pera_kernels.testing import Case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LARGE = {"T": 1100, "N": 1000, "M": 520}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("terms, r", [("full", 16), ("square", 12), ("cross", 8), ("linear", 16)])
def test_numeric_rule_at_sizes_that_split(terms, r, dtype):
    case = Case(terms=terms, r=r, dtype=dtype, **LARGE)
    failed = [str(v) for v in testing.check(case, "triton", "cuda") if not v.passed]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("T", [1, 17, 64])
def test_few_tokens_split_over_the_features(T):
    case = Case(r=16, dtype=torch.bfloat16, T=T, N=4096, M=1024)
    failed = [str(v) for v in testing.check(case, "triton", "cuda") if not v.passed]
    assert not failed, "\n".join(failed)


def test_a_device_that_is_not_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    made = pk.PeraLinear(512, 256, r=8, device="cuda", dtype=torch.bfloat16).to("cuda:1")
    assert torch.cuda.current_device() == 0
    y = made(torch.randn(5, 512, device="cuda:1", dtype=torch.bfloat16))
    y.sum().backward()
    assert y.device.index == 1 and made.pera_A.grad.isfinite().all()


def test_auto_is_triton_on_a_gpu():
    assert resolve("auto", torch.device("cuda"), (torch.bfloat16,)) == "triton"
    assert resolve("auto", torch.device("cuda"), (torch.float64,)) == "torch"
