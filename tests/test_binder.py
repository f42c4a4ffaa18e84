"""Every launch through Triton's own binder and launcher, without a GPU.

The CUDA driver is a stub whose calls succeed and do nothing; CPU tensors stand for GPU ones.
Kernels are compiled and launched with the arguments that ship, never run: a signature, a constant
or an option that this Triton does not take is found here.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="there is no Triton whose launcher could be tried")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not sys.platform.startswith("linux") or shutil.which("gcc") is None,
        reason="the stub of the CUDA driver is built by gcc on Linux",
    ),
]

LAUNCHES = """
import ctypes, itertools, os, sys
import torch
torch.cuda.get_device_capability = lambda device=None: (9, 0)
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

class Stub(CudaDriver):
    def __init__(self):
        super().__init__()
        self.get_device_capability = lambda device=None: (9, 0)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0

driver.set_active(Stub())
from pera_kernels.kernels import ops, tiles
from pera_kernels.kernels.launch import recorded
from pera_kernels.operands import Base, Factors, Options, Saved
from pera_kernels.terms import TERMS, coefficient_count

tiles.architecture, tiles.processor_count = (lambda device: "sm_90"), (lambda device: 132)
stub = ctypes.CDLL(os.path.join(os.environ["TRITON_LIBCUDA_PATH"], "libcuda.so.1"))
dtype, own = (getattr(torch, name) for name in sys.argv[1:])
seed = torch.zeros(1, dtype=torch.int64)

def launches(call):
    # What the driver was asked to launch is what the launchers say, one for one.
    with recorded() as said:
        call()
    before = stub.stub_launches()
    call()
    asked = stub.stub_launches() - before
    assert asked == len(said), (asked, said)
    return asked

def layer(terms, plan="factored", p=0.0, T=33, N=64, M=48, r=4, group=1):
    x, dy, weight = (torch.zeros(s, dtype=dtype) for s in ((T, N), (T, M), (M, N)))
    h = None if terms == "linear" else torch.zeros(coefficient_count(r, terms), dtype=own)
    adapter = Factors(torch.zeros(r, N, dtype=own), torch.zeros(M, r, dtype=own), h)
    options = Options(terms, 0.5, p, plan, "triton")
    needs = [True, True, True, h is not None]
    _, us = ops.forward(x, [Base(weight)] * group, [adapter] * group, seed, options)
    saved = Saved(x, us[-1] if plan == "factored" else None, weight, adapter, seed)
    forward = launches(
        lambda: ops.forward(x, [Base(weight)] * group, [adapter] * group, seed, options)
    )
    backward = launches(lambda: ops.backward(dy, saved, options, needs))
    assert group > 1 or plan == "composed" or (1 <= forward <= 3 and 1 <= backward <= 6)
    print(terms, plan, p, T, N, group, forward, backward, flush=True)
    return adapter, options

for terms, p in itertools.product(TERMS, (0.0, 0.1)):
    adapter, options = layer(terms, p=p)
    launches(lambda: ops.delta_forward(adapter, options))
    G, needs = torch.zeros(48, 64, dtype=own), [True, True, adapter.h is not None]
    launches(lambda: ops.delta_backward(G, adapter, options, needs))
layer("full", plan="composed")
# Sizes that nothing divides, expansions in memory, one token, layers that share their input.
layer("full", T=31, N=71, M=51, r=3)
layer("full", T=ops.EXPANDED_TOKENS)
layer("full", T=1, N=4096)
layer("full", group=3)
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """The folder of the stub, built against the headers in Triton's wheel."""
    folder = tmp_path_factory.mktemp("stub")
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = Path(__file__).with_name("stub_cuda.c")
    library = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-o", library, source, "-I", headers]
    subprocess.run(command, check=True)
    (folder / "libcuda.so").symlink_to(library)
    return folder


@pytest.mark.parametrize(
    "dtypes", ["bfloat16 bfloat16", "float16 float16", "float32 float32", "bfloat16 float32"]
)
def test_every_launch_passes_the_launcher(dtypes, stub, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"LD_LIBRARY_PATH": str(stub), "TRITON_LIBCUDA_PATH": str(stub)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    # Launchers that were linked to the stub stay apart from those of a real driver.
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", LAUNCHES, *dtypes.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
