"""Where there is no GPU the Triton kernels run in Triton's interpreter, on CPU tensors."""

import datetime
import json
import os
from collections import Counter, defaultdict

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Before anything imports the kernels: they are decorated for one mode or the other.
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402

from pera_kernels.backends import unavailable  # noqa: E402


def pytest_addoption(parser):
    parser.addoption(
        "--record", metavar="FILE", help="append what tests counted, as the promises page shows it"
    )


def append(path, test, **figures):
    where = torch.cuda.get_device_name() if HAS_GPU else "cpu"
    row = {"test": test, **figures, "device": where, "torch": torch.__version__}
    row["date"] = datetime.date.today().isoformat()
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


class Outcomes:
    """How many tests of each file passed, failed and were skipped, for ``--record``."""

    def __init__(self, path):
        self.path, self.counts = path, defaultdict(Counter)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            file = report.nodeid.partition("::")[0].rpartition("/")[2]
            self.counts[file][report.outcome] += 1

    def pytest_sessionfinish(self):
        for file, counts in sorted(self.counts.items()):
            append(self.path, file, **{k: counts[k] for k in ("passed", "failed", "skipped")})


def pytest_configure(config):
    path = config.getoption("--record")
    # The workers of pytest-xdist report to the process that started them.
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(path))


@pytest.fixture
def record(request):
    """Append figures of this test to the file of ``--record``."""
    path = request.config.getoption("--record")
    test = request.node.nodeid.rpartition("/")[2]
    return lambda **figures: append(path, test, **figures) if path is not None else None


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
