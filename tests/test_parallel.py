"""Adapted models on several ranks: real processes over gloo."""

from pathlib import Path

import pytest

from tests import parallel_cases as cases
from tests import sharded_cases
from tests import tensor_parallel_cases as tensor_cases

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(
    "how, way, steps",
    [
        ("ddp", None, 2),
        ("ddp", "reentrant", 1),
        ("ddp", "not reentrant", 1),
        ("fsdp", None, 2),
        ("fsdp", "reentrant", 1),
        ("fsdp", "not reentrant", 2),
        ("fsdp of layers", None, 1),
        ("fsdp of adapters", None, 1),
    ],
)
def test_gradients_are_those_of_one_process(two_ranks, averages, how, way, steps):
    two_ranks.run(cases.data_parallel, how, way, steps, False)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_compiled(two_ranks, averages, how):
    two_ranks.run(cases.data_parallel, how, None, 1, True)


def test_a_start_on_the_meta_device(two_ranks):
    two_ranks.run(cases.meta_start)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("way", [None, "reentrant", "not reentrant"])
def test_tensor_parallel(two_ranks, dropout, way):
    two_ranks.run(tensor_cases.tp_gradients, dropout, way)


def test_tensor_parallel_before_adapters(two_ranks):
    two_ranks.run(tensor_cases.tp_gradients, before=True)


def test_sequence_parallel(two_ranks):
    two_ranks.run(tensor_cases.tp_gradients, sequence=True)


@pytest.mark.parametrize("how", ["fsdp", "fsdp of adapters", "fsdp offloaded", "tp"])
@pytest.mark.parametrize("terms", ["full", "linear"])
def test_the_same_calls(two_ranks, how, terms, tmp_path):
    two_ranks.run(sharded_cases.calls, how, str(tmp_path), terms)


@pytest.mark.parametrize("how", ["fsdp", "tp"])
def test_a_call_on_one_rank_alone_ends(two_ranks, how, tmp_path):
    two_ranks.run(sharded_cases.one_rank_alone, how, str(tmp_path))


def test_different_calls_end(two_ranks):
    two_ranks.run(sharded_cases.different_calls)


def test_what_fails_on_one_rank_fails_on_all(two_ranks, tmp_path):
    two_ranks.run(sharded_cases.files_that_fail, str(tmp_path))


def test_ranks_that_differ_are_told(two_ranks):
    two_ranks.run(sharded_cases.ranks_that_differ)


def test_adapters_after_wrapping_are_refused(two_ranks):
    two_ranks.run(sharded_cases.adapters_after_wrapping)


def test_tied_weights_are_refused(two_ranks):
    two_ranks.run(sharded_cases.tied_weights)


def test_the_page(two_ranks, tmp_path):
    two_ranks.run(cases.page, str(DOCS / "parallel.md"), str(tmp_path))


def test_fsdp1(two_ranks):
    two_ranks.run(cases.fsdp1)


def test_a_part_of_what_is_wrapped_is_written(two_ranks):
    two_ranks.run(sharded_cases.a_part_of_what_is_wrapped)


def test_a_merged_model_is_wrapped(two_ranks):
    two_ranks.run(sharded_cases.merged_before_it_is_wrapped)


def test_different_files_are_refused(two_ranks, tmp_path):
    two_ranks.run(sharded_cases.files_that_differ, str(tmp_path))


def test_all_ranks_get_one_answer_about_one_that_is_late(two_ranks):
    two_ranks.run(sharded_cases.one_comes_late)


@pytest.mark.slow
def test_all_of_four_ranks_get_one_answer(four_ranks):
    four_ranks.run(sharded_cases.one_comes_late)


def test_what_cannot_be_distributed_is_refused(two_ranks):
    two_ranks.run(tensor_cases.sizes_that_do_not_divide)


def test_mixed_precision(two_ranks, averages):
    two_ranks.run(cases.mixed_precision)


@pytest.mark.slow
def test_tensor_parallel_compiled(two_ranks):
    two_ranks.run(tensor_cases.compiled_parts)


def test_tensor_parallel_with_the_kernels(two_ranks, triton_backend):
    two_ranks.run(tensor_cases.tp_gradients, dropout=0.3, backend=triton_backend)


def test_every_gradient_is_reduced_once(two_ranks):
    two_ranks.run(tensor_cases.reduced_once)


def test_layers_on_one_x_share_the_sum_of_its_gradient(two_ranks):
    two_ranks.run(tensor_cases.one_sum_of_dx)


@pytest.mark.parametrize("others", ["one_rank", pytest.param("four_ranks", marks=pytest.mark.slow)])
def test_a_checkpoint_of_two_ranks_goes_on(two_ranks, others, averages, tmp_path, request):
    (losses, _) = two_ranks.run(cases.resumed, str(tmp_path), True)
    for ranks in (two_ranks, request.getfixturevalue(others)):
        for found in ranks.run(cases.resumed, str(tmp_path), False):
            assert found == pytest.approx(losses[3:], rel=1e-5)


@pytest.mark.slow
def test_two_dimensions(four_ranks, averages):
    four_ranks.run(sharded_cases.two_dimensions)


def test_adapters_in_what_transformers_sharded(two_ranks, tmp_path):
    pytest.importorskip("transformers", "5.24", reason="its tensor parallelism by DTensors")
    two_ranks.run(tensor_cases.of_transformers, str(tmp_path))


def test_peft_under_fsdp(two_ranks, averages, tmp_path):
    pytest.importorskip("peft")
    two_ranks.run(sharded_cases.under_peft, str(tmp_path))
