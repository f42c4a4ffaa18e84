"""Every launch through Triton's own binder and launcher, without a GPU.

The CUDA driver is a stub whose calls succeed and do nothing; CPU tensors stand for GPU ones.
Kernels are compiled and launched with the arguments that ship, never run: a signature, a constant
or an option that this Triton does not take is found here.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tools import stub_driver

pytest.importorskip("triton", reason="there is no Triton whose launcher could be tried")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not sys.platform.startswith("linux") or shutil.which("gcc") is None,
        reason="the stub of the CUDA driver is built by gcc on Linux",
    ),
]

LAUNCHES = """
import itertools, sys
import torch
from tools import stub_driver

count = stub_driver.install()
from pera_kernels.kernels import ops, plan, tiles
from pera_kernels.kernels.launch import recorded
from pera_kernels.operands import Base, Factors, Options, Saved
from pera_kernels.terms import TERMS, coefficient_count

dtype, own = (getattr(torch, name) for name in sys.argv[1:])
seed = torch.zeros(1, dtype=torch.int64)

def launches(call):
    # What the driver is asked to launch is what the launchers say, one for one, also by the plan
    # that is there from the third call on.
    with recorded() as said:
        call()
    plan._plans.clear()
    for _ in range(3):
        before = count()
        call()
        assert count() - before == len(said), (count() - before, said)
    assert all(plan._plans.values())
    return len(said)

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
    assert group > 1 or plan == "composed" or (1 <= forward <= 3 and 1 <= backward <= 5)
    print(terms, plan, p, T, N, group, forward, backward, flush=True)
    return adapter, options

for terms, p in itertools.product(TERMS, (0.0, 0.1)):
    adapter, options = layer(terms, p=p)
    launches(lambda: ops.delta_forward(adapter, options))
    G, needs = torch.zeros(48, 64, dtype=own), [True, True, adapter.h is not None]
    launches(lambda: ops.delta_backward(G, adapter, options, needs))
layer("full", plan="composed")
# Sizes that nothing divides, one token, layers that share their input, expansions in memory.
layer("full", T=31, N=71, M=51, r=3)
layer("full", T=1, N=4096)
layer("full", group=3)
for choices in (
    tiles.Choices(products=0),
    tiles.Choices(products=0, base_last=1),
    tiles.Choices(products=0, base_last=1, library_projection=1, library_update=1),
):
    tiles.choices = lambda device: choices
    layer("full")
    layer("full", group=3)
"""


@pytest.mark.parametrize(
    "dtypes", ["bfloat16 bfloat16", "float16 float16", "float32 float32", "bfloat16 float32"]
)
def test_every_launch_passes_the_launcher(dtypes, tmp_path):
    environment = os.environ | stub_driver.environment(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", LAUNCHES, *dtypes.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_benchmark_of_the_host(tmp_path):
    pytest.importorskip("peft", reason="LoRA is PEFT's")
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "benchmarks.host", "--rounds", "2", "--dtypes", "bfloat16"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {"frozen", "peft-lora", "torch", "triton"} <= {row["contender"] for row in rows}
    assert all(row["median_ms"] > 0 and row["phase"] == "host" for row in rows)
