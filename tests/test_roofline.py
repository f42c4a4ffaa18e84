"""``tools.roofline``: work of launches by hand, and documents that are of today's launches."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the launches are those of the Triton backend")

from benchmarks.roofline import work  # noqa: E402
from pera_kernels.kernels.launch import Launch  # noqa: E402
from pera_kernels.kernels.plan import Recorder  # noqa: E402
from pera_kernels.terms import expanded_rank  # noqa: E402
from pera_kernels.testing import Case  # noqa: E402
from tools.roofline import __main__ as page  # noqa: E402
from tools.roofline import model  # noqa: E402

H100, H200 = model.CARDS[:2]


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_the_work_of_a_launch_by_hand():
    kernel = SimpleNamespace(fn=SimpleNamespace(__name__="project_kernel"))
    x, phi, u = meta(100, 250), meta(32, 250, dtype=torch.float32), meta(100, 32)
    sizes = {"T": 100, "N": 250, "LANES": 32, "PRECISION": "ieee", "seed_ptr": None}
    blocks = {"BLOCK_T": 64, "BLOCK_N": 32, "PIECES": 3, "BLOCK_K": 16}
    launch = Launch(kernel, (2, 10), {"x_ptr": x, "tuple": (phi, (u,)), **sizes, **blocks})
    step = model._step(launch, 14 / 16, [])
    assert step.live == 2 * 100 * 250 * 28
    assert step.issued == 2 * 128 * 256 * 48
    assert step.moved == 2 * 100 * 250 + 4 * 32 * 250 + 2 * 100 * 32
    # 20 programs on 132 multiprocessors: one of them has one, the average 20 / 132.
    floor = step.moved / 3.0e6
    assert H100.floor(step.live, step.moved) == pytest.approx(floor)
    assert H100.model(step) == pytest.approx(floor * 132 / 20 + model.LAUNCH_US)


def test_a_block_of_lanes_in_unequal_pieces_counts_once():
    kernel = SimpleNamespace(fn=SimpleNamespace(__name__="project_kernel"))
    given = {"T": 16, "N": 64, "LANES": 160, "BLOCK_T": 16, "BLOCK_N": 64, "BLOCK_K": 160}
    given |= {"PIECES": ((0, 128), (128, 32)), "PRECISION": "ieee"}
    assert model._step(Launch(kernel, (1,), given), 1.0, []).issued == 2 * 16 * 64 * 160


def test_a_kernel_with_unknown_products_is_refused():
    kernel = SimpleNamespace(fn=SimpleNamespace(__name__="new_kernel"))
    assert model._step(Launch(kernel, (1,), {"x_ptr": meta(8)}), 1.0, []).moved == 16
    with pytest.raises(ValueError, match="new_kernel computes products"):
        model._step(Launch(kernel, (1,), {"PRECISION": "ieee"}), 1.0, [])


@pytest.mark.parametrize("T", [16, 512, 4096, 16384])
@pytest.mark.parametrize("terms, r", [("full", 4), ("full", 16), ("square", 64)])
def test_a_layer_has_the_work_of_its_formula(terms, r, T):
    """However it is launched: two base products, and six of the expanded rank."""
    job = model.job_of(terms, r, T)
    own, N = model.layer("sm_90", 132, job), model.FEATURES
    live = 2 * 2 * T * N * N + 6 * 2 * T * N * expanded_rank(r, terms)
    assert sum(step.live for step in own.steps) == pytest.approx(live)
    assert all(step.issued >= step.live for step in own.steps)
    dtypes = {"dtype": torch.bfloat16, "adapter_dtype": torch.float32}
    case, bias = Case(terms=terms, r=r, T=T, N=N, M=N, **dtypes), 2 * N
    assert own.moved == work("factored", case, "both").bytes - bias
    assert own.frozen_moved == work("dense", case, "both").bytes - bias
    assert own.frozen_operations == work("dense", case, "both").flops
    for card in (H100, H200):
        assert 1 < own.floor(card) <= own.floor_of_steps(card)


@pytest.mark.parametrize("T", [16, 512, 16384])
def test_to_keep_x_costs_one_projection(T):
    own = model.layer("sm_90", 132, model.job_of("full", 16, T))
    again = model.layer("sm_90", 132, model.job_of("full", 16, T, "layer that keeps x"))
    more = sum(step.live for step in again.steps) - sum(step.live for step in own.steps)
    assert more == pytest.approx(2 * T * model.FEATURES * expanded_rank(16))
    names = [[step.name for step in steps] for steps in (own.steps, again.steps)]
    assert names[1].count("project_kernel") == names[0].count("project_kernel") + 1 == 3
    assert len(names[1]) - len(names[0]) == 2
    for card in (H100, H200):
        assert own.model(card) < again.model(card)
    assert page.not_kept("full", 16, T) == 2 * T * 160 / 1e6
    if T == 16384:
        # What docs/memory.md says.
        assert [f"{layer.model(H100):.2f}" for layer in (own, again)] == ["1.22", "1.26"]


def test_how_many_programs_a_multiprocessor_holds():
    assert H100.resident(warps=8, registers=255, shared=0) == 1
    assert H100.resident(warps=8, registers=128, shared=49152) == 2
    assert H100.resident(warps=4, registers=32, shared=73728) == 3
    assert H100.resident(warps=4, registers=20, shared=0) == 16
    assert H100.resident(warps=4, registers=20, shared=240_000) == 0


def test_operators_of_pytorch_stand_among_the_launches_in_order():
    x, weight, y = meta(8, 16), meta(4, 16), meta(8, 4)
    with Recorder() as recorder:
        y.addmm_(x, weight.t())
        recorder.steps.append("launch")
        torch.mm(x, weight.t(), out=y)
        torch.cat([x, x]).view(-1)
        x.new_empty(3)
    calls = recorder.steps
    names = [c if isinstance(c, str) else c.operator.overloadpacket.__name__ for c in calls]
    assert names == ["addmm_", "launch", "mm", "cat"]
    added, product, copied = (model._step(calls[n], 0.5, [4, 8, 16]) for n in (0, 2, 3))
    assert added.live == product.live == product.issued == 2 * 8 * 16 * 4
    assert added.moved - product.moved == y.nbytes
    assert product.moved == x.nbytes + weight.nbytes + y.nbytes
    assert (copied.issued, copied.moved) == (0, 4 * x.nbytes)


def test_measured_ratios_stand_beside_the_model(tmp_path, monkeypatch):
    row = {"contender": "auto", "phase": "both", "dtype": "bfloat16+float32", "status": "timed"}
    row |= {"n": 4096, "m": 4096, "dropout": 0.0, "terms": "full", "r": 16, "T": 512}
    row |= {"device": "NVIDIA H200", "ratio_to_frozen": 1.5}
    changes = (
        {},
        {"ratio_to_frozen": 1.625},
        {"phase": "eval"},
        {"n": 64},
        {"device": "NVIDIA T4"},
    )
    (tmp_path / "results").mkdir()
    lines = [json.dumps({**row, **change}) for change in changes]
    (tmp_path / "results" / "gpu-h200.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(page, "BENCHMARKS", tmp_path)
    assert page.measured() == {("H200", "full", 16, 512): 1.625}
    cells = {
        line.split(" | ")[0]: line.split(" | ")[-1] for line in page.headline(H200).split("\n")
    }
    assert (cells["| 512"], cells["| 64"]) == ("1.62 |", "not measured |")


def test_the_documents_are_of_todays_launches():
    """In a process of its own: these tests may run with interpreted kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.roofline", "--check"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
