"""Break the kernels, the orders and autograd one line at a time, and see that a test notices.

    python -m tools.mutants [WORD]     all of them, or those whose description has the word in it

First the tests must pass on an unchanged copy. Exit status: 0 if every mutant was killed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

__all__ = ["MUTANTS", "Mutant", "broken"]

ROOT = Path(__file__).parents[1]


class Mutant(NamedTuple):
    """What is broken in a file of the package, the text that goes, what stands there instead, and
    the tests that must fail then.
    """

    breaks: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


# All gradients in float32 with dropout; in bfloat16; composed in float32; split over many tokens.
FACTORED = ("tests/test_numerics.py::test_triton_kernels[8-full]",)
HALF = ("tests/test_numerics.py::test_triton_kernels[5-full]",)
COMPOSED = ("tests/test_numerics.py::test_triton_kernels[4-full]",)
MANY_TOKENS = ("tests/test_numerics.py::test_variants[triton-many tokens]",)
CROSS = ("tests/test_numerics.py::test_triton_kernels[12-cross]",)
WAYS = ("tests/test_plans.py::test_every_way",)
SHARED = ("tests/test_shared_inputs.py::test_the_numeric_rule",)
STACKED = ("tests/test_kernels.py::test_many_factors_and_a_sum_in_one_launch",)
SUMS = ("tests/test_kernels.py::test_sums_of_few_and_of_more_parts_than_a_block_has",)
SIBLINGS = ("tests/test_shared_inputs.py",)
REQUESTED = ("tests/test_autograd.py::test_only_requested_gradients_and_the_same_ones",)
OVERFLOW = (
    "tests/test_numerics.py::test_half_precision_overflow_shows_where_the_reference_has_it",
)
DROPOUT = ("tests/test_dropout.py",)
SPREAD = ("tests/test_kernels.py::test_what_is_not_finite_in_a_factor_stays_with_its_pairs",)
FAR_LANES = ("tests/test_guarded_memory.py::test_operands_whose_rows_or_columns_lie_far_apart",)
FAR_SUMS = ("tests/test_guarded_memory.py::test_a_contraction_writes_far_partial_sums",)
PLANS = ("tests/test_plan.py",)
CHOICES = ("tests/test_choices.py",)
PARTS = ("tests/test_parallel.py::test_tensor_parallel",)
SAME_CALLS = ("tests/test_parallel.py::test_the_same_calls",)
STRIDED = ("tests/test_numerics.py::test_strided_inputs",)

# fmt: off
_TABLE: dict[str, tuple[tuple[str, str, str, tuple[str, ...]], ...]] = {
    "kernels/pair_tiles.py": (
        ("circular offsets start at 1: no squares",
         "tl.maximum(block - 1, 0)", "tl.maximum(block, 0)", FACTORED),
        ("the lanes that pad K hold pairs a second time", "live = offs_k < K",
         "live = offs_k >= 0", CROSS),
        ("h is read and written by columns of the triangle",
         "index = low * (2 * R - 1 - 2 * FIRST - low) // 2 + high - FIRST",
         "index = high * (high + 1) // 2 + low", FACTORED),
        ("products of factors are formed in their own dtype",
         "phi = phi.to(tl.float32) * partner.to(tl.float32)", "phi = phi * partner", HALF),
    ),
    "kernels/tile_math.py": (
        ("gradients are sent to their rows in bfloat16",
         "tl.static_range(3)", "tl.static_range(1)", FACTORED),
        ("factors come to their lanes in sixteen bits",
         "tl.constexpr = 3 if", "tl.constexpr = 2 if", FACTORED),
        ("what is not finite spreads over the rank",
         "tl.where(finite, part, large)", "part", SPREAD),
        ("half of the seed is not used",
         "(seed >> 32).to(tl.uint32)", "seed.to(tl.uint32)", DROPOUT),
        ("from the second block of columns on the mask is another",
         "pair = start // 2 + tl.arange", "pair = start + tl.arange", FACTORED),
        ("the lot at the threshold is dropped by the kernels",
         "lots.to(tl.int32) >= threshold", "lots.to(tl.int32) > threshold", DROPOUT),
    ),
    "kernels/accumulate.py": (
        ("dx is not rescaled by 1 / (1 - p)",
         "acc = tl.where(keep, acc * keep_scale, 0.0)", "acc = tl.where(keep, acc, 0.0)", FACTORED),
        ("float16 does not overflow where the specification does",
         "acc = overflow_as(overflow_as(acc, dtype) * scale, dtype)", "acc = acc * scale",
         OVERFLOW),
        ("the update is subtracted",
         "acc += base.to(tl.float32)", "acc = base.to(tl.float32) - acc", HALF),
        ("a slice of u is read as if it were all of it",
         "stride_u_t=u.stride(0)", "stride_u_t=lanes", SHARED),
    ),
    "kernels/compose.py": (
        ("s is left out of the composed weight",
         "acc = overflow_as(acc, dtype) * scale", "acc = overflow_as(acc, dtype)", COMPOSED),
    ),
    "kernels/contract.py": (
        ("dA is that of x without dropout",
         "x = tl.where(tl.trans(keep), x, 0.0)", "x = tl.where(tl.trans(keep), x, x)", FACTORED),
        ("squares count once in the gradient of a factor",
         "df = sum_to_columns(of_j, j, is_pair, df)",
         "df = sum_to_columns(of_j, j, is_pair & (i != j), df)", FACTORED),
        ("gradients of factors are those of h = 1",
         "scales *= load_coefficients(h_ptrs[0], i, j, is_pair, R, K, FIRST)", "scales *= 1.0",
         FACTORED),
        ("ranks below 16 get the sums of one copy of their columns",
         "df = sum_periods(df, tl.zeros((BLOCK_N, R), tl.float32))",
         "df = sum_periods(tl.where(offs_r < R, df, 0.0), tl.zeros((BLOCK_N, R), tl.float32))",
         FACTORED),
        ("partial sums of dh overwrite each other",
         "row = split_t * blocks_n + block_n", "row = block_n", MANY_TOKENS),
        ("lanes are addressed in 32 bits",
         "offs_k.to(tl.int64)[None, :] * stride_left_k", "offs_k[None, :] * stride_left_k",
         FAR_LANES),
        ("partial sums of a gradient are addressed in 32 bits",
         "split.to(tl.int64) * stride_df_split", "split * stride_df_split", FAR_SUMS),
    ),
    "kernels/plan.py": (
        ("a plan is taken for other strides",
         "layouts.append((t.shape, t.stride(), t.dtype))", "layouts.append((t.shape, t.dtype))",
         PLANS),
        ("a plan is taken for pointers that are not aligned",
         "if pointers % ALIGNMENT:", "if pointers < 0:", PLANS),
        ("scratch memory of one kernel is that of all",
         "scratch += -(-value", "scratch += 0 * -(-value", PLANS),
    ),
    "kernels/steps.py": (
        ("the base product that comes last replaces the update",
         "y.addmm_(x, weight.t())", "y.addmm_(x, weight.t(), beta=0.0)", CHOICES),
        ("float16 takes the base product last",
         "weight is not None and x.dtype == torch.bfloat16", "weight is not None", CHOICES),
    ),
    "kernels/expand.py": (
        ("members of a stack are written over each other",
         "number * lanes, N", "0 * lanes, N", STACKED),
    ),
    "kernels/project.py": (
        ("members of a stack read the rows of the first",
         "tl.where(member == other", "tl.where(member < 0", SHARED),
        ("s is left out of v, and so of dx and dA", "accs[piece] * scale", "accs[piece]", FACTORED),
        ("splits of the features overlap",
         "tl.minimum((split + 1) * n_per_split, N)", "N", WAYS),
        ("partial sums of u overwrite each other",
         "u_ptr + split * stride_u_split", "u_ptr + 0 * stride_u_split", WAYS),
        ("the columns of x are taken for neighbours in memory",
         "offs_n.to(tl.int64)[None, :] * stride_x_n", "offs_n.to(tl.int64)[None, :]", STRIDED),
    ),
    "kernels/reduce.py": (
        ("the last partial result is left out",
         "mask=(offs_p < parts)[:, None]", "mask=(offs_p < parts - 1)[:, None]", FACTORED),
        ("partial results beyond the first block are left out",
         "range(0, parts, BLOCK_P)", "range(0, tl.minimum(parts, BLOCK_P), BLOCK_P)", SUMS),
    ),
    "kernels/tiles.py": (
        ("the last, shorter split is not launched",
         "return -(-blocks // per_part), per_part * granule",
         "return max(1, blocks // per_part), per_part * granule",
         ("tests/test_launches.py::test_split_covers_everything_once",)),
    ),
    "terms.py": (
        ("lanes stand in another order than their coefficients",
         "(lane + lane // r + kept.start) % r", "(lane + lane // r + kept.start + 1) % r",
         ("tests/test_terms.py", "tests/test_torch_backend.py")),
    ),
    "autograd.py": (
        ("u is not kept for dh alone", "need_u = need_B or need_h", "need_u = need_B", REQUESTED),
        ("u is kept beside the x that it is made of again",
         "keep_u = need_u and not from_x", "keep_u = need_u",
         ("tests/test_memory_kept.py::test_a_plain_base",)),
        ("the gradient of x that layers share is that of the last one",
         "needs, ctx.onto.sum())", "needs, None)", SIBLINGS),
        ("a base layer that is called gets no gradient",
         "if need_out else None", "if False else None",
         ("tests/test_module.py",)),
    ),
    "sharded.py": (
        ("a part of a column-wise layer takes the rows of another rank",
         "factors.A[:, columns], factors.B[rows]",
         "factors.A[:, columns], factors.B.roll(1, 0)[rows]", SAME_CALLS),
        ("whole parameters of an outer module are written to", "group.reshard()", "pass",
         ("tests/test_parallel.py::test_a_part_of_what_is_wrapped_is_written",)),
        ("an offloaded weight that was merged is not returned",
         "for name in own if written else ():", "for name in ():", ("tests/test_offload.py",)),
    ),
    "tensor_parallel.py": (
        ("gradients that ranks add up are not added", "added.to_local(grad_placements=[Partial()])",
         "added.to_local()", PARTS),
        ("dx of a column-wise layer is one rank's",
         "whole.to_local(grad_placements=[Partial()])", "whole.to_local()", PARTS),
        ("every rank adds the bias", "if self.rank == 0 else None", "if self.rank >= 0 else None",
         PARTS),
        ("the mask of a row-wise layer begins anew on every rank", "first=self.rank * N",
         "first=0", PARTS),
        ("each rank has a mask of its own", "wait_tensor(broadcast(draw_seed(x.device), 0, mesh))",
         "draw_seed(x.device)", PARTS),
    ),
    "adapters/ranks.py": (
        ("a call that failed on another rank goes on", "if failure is None and others:",
         "if False:", ("tests/test_parallel.py::test_what_fails_on_one_rank_fails_on_all",)),
        ("every rank decides for itself who was late",
         'outcome = store.compare_set("outcome", "", outcome).decode()', "",
         ("tests/test_parallel.py::test_all_ranks_get_one_answer_about_one_that_is_late",)),
    ),
    "adapters/shared_inputs.py": (
        ("a waiting output is given out for another tensor",
         "waiting is None or x is not self.x", "waiting is None", SIBLINGS),
        ("a write to x between two calls is not seen", "x._version,", "0,", SIBLINGS),
        ("layers with dropout share a mask", "options.dropout_p == 0.0", "True", SIBLINGS),
    ),
}
# fmt: on
MUTANTS = tuple(
    Mutant(breaks, f"pera_kernels/{file}", old, new, tests)
    for file, rows in _TABLE.items()
    for breaks, old, new, tests in rows
)


def broken(mutant: Mutant, root: Path = ROOT) -> str:
    """The file's text with the mutant in it; its old text must stand there once."""
    source = (root / mutant.file).read_text(encoding="utf-8")
    if (count := source.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.old!r} stands {count} times in {mutant.file}, not once")
    return source.replace(mutant.old, mutant.new)


def passes(tests: tuple[str, ...], mutant: Mutant | None) -> bool:
    """Whether the tests pass on a copy of the tree with the mutant in it."""
    with tempfile.TemporaryDirectory() as folder:
        copied = [ROOT / "pera_kernels", ROOT / "tests"]
        for path in copied:
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, Path(folder) / path.name, ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", folder)
        if mutant is not None:
            (Path(folder) / mutant.file).write_text(broken(mutant), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        # Slow tests too.
        command += ["-m", "", *tests]
        # No bytecode: a mutant of the same size and second would be taken for what it replaced.
        own = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def main(words: list[str]) -> int:
    chosen = [own for own in MUTANTS if all(word in own.breaks for word in words)]
    if not chosen:
        names = "\n".join(own.breaks for own in MUTANTS)
        print(f"no mutant's name has {' and '.join(words)}; they are:\n{names}", file=sys.stderr)
        return 2
    tests = tuple(dict.fromkeys(test for own in chosen for test in own.tests))
    if not passes(tests, None):
        print("the tests do not pass without a mutant", file=sys.stderr)
        return 2
    survivors = 0
    for mutant in chosen:
        survived = passes(mutant.tests, mutant)
        survivors += survived
        print(
            f"{'SURVIVED' if survived else 'killed':<9}{mutant.file}: {mutant.breaks}", flush=True
        )
    print(f"{len(chosen)} mutants, {survivors} survived")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
