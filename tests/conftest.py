"""Where there is no GPU the Triton kernels run in Triton's interpreter, on CPU tensors."""

import functools
import importlib.util
import inspect
import os

# The tensors are small: a second thread would cost more than it gives. For PyTorch in every thread
# and process of the tests, so before it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Before anything imports the kernels: they are decorated for one mode or the other.
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402

from pera_kernels import functional  # noqa: E402
from pera_kernels.backends import unavailable  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def builtins_are_listed_once():
    """Triton's interpreter lists the members of its language anew for every call of a helper, which
    is a quarter of its time. Here it does so once; the rest is as it was.
    """
    if HAS_GPU or importlib.util.find_spec("triton") is None:
        return
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def builtins(package):
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtin(package, *rest):
        for name in builtins(package):
            if is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, *rest)

    interpreter._patch_builtin = patch_builtin


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(params=["torch", "triton"])
def backend(request, device) -> str:
    """Both fast backends; one that cannot run here skips with its reason."""
    reason = unavailable(request.param, device)
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture
def triton_backend(device) -> str:
    """The Triton backend; skips with its reason where it cannot run."""
    if (reason := unavailable("triton", device)) is not None:
        pytest.skip(f"backend triton: {reason}")
    return "triton"


@pytest.fixture
def poison():
    """Every freshly allocated tensor is filled with NaN (integers with their maximum)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def together(monkeypatch):
    """How many layers each joint evaluation of layers with a shared input computed."""
    sizes = []
    original = functional.apply_together

    def counted(x, bases, adapters, options):
        sizes.append(len(bases))
        return original(x, bases, adapters, options)

    monkeypatch.setattr(functional, "apply_together", counted)
    return sizes


def _ranks(count):
    from tests.ranks import Ranks

    ranks = Ranks(count)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def one_rank():
    """One process with a group of its own."""
    yield from _ranks(1)


@pytest.fixture(scope="session")
def two_ranks():
    """Two processes over gloo."""
    yield from _ranks(2)


@pytest.fixture
def averages(two_ranks):
    """FSDP2 averages gradients, as it should."""
    from tools.finetune.ranks import fsdp_averages

    if not all(two_ranks.run(fsdp_averages, torch.device("cpu"))):
        pytest.skip("FSDP2 of this PyTorch adds gradients up over gloo, with any model")


@pytest.fixture(scope="session")
def four_ranks():
    """Four processes over gloo."""
    yield from _ranks(4)
