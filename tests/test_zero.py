"""Adapted models under DeepSpeed's ZeRO: real processes over gloo."""

import pytest

pytest.importorskip("deepspeed")

from tests import zero_cases as cases  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "stage, threshold, before",
    [
        (1, 0, False),
        (2, 0, False),
        (3, cases.ALL_PARTITIONED, False),
        (3, cases.ALL_GATHERED, False),
        (3, cases.ALL_PARTITIONED, True),
    ],
)
def test_training_is_that_of_one_process(two_ranks, stage, threshold, before):
    two_ranks.run(cases.training, stage, threshold, before)


@pytest.mark.parametrize("inner", [False, True], ids=["engine", "module"])
@pytest.mark.parametrize(
    "stage, threshold", [(2, 0), (3, cases.ALL_PARTITIONED), (3, cases.ALL_GATHERED)]
)
def test_the_same_calls(two_ranks, stage, threshold, inner, tmp_path):
    two_ranks.run(cases.calls, stage, threshold, inner, str(tmp_path))


def test_calls_without_an_engine(two_ranks, tmp_path):
    two_ranks.run(cases.without_engine, str(tmp_path))


@pytest.mark.parametrize("threshold", [cases.ALL_PARTITIONED, cases.ALL_GATHERED])
def test_a_call_on_one_rank_alone_ends(two_ranks, threshold, tmp_path):
    two_ranks.run(cases.one_rank_alone, threshold, str(tmp_path))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_cannot_be_right_is_refused(two_ranks, stage):
    two_ranks.run(cases.refusals, stage)


@pytest.mark.parametrize(
    "stage, threshold", [(1, 0), (2, 0), (3, cases.ALL_PARTITIONED), (3, cases.ALL_GATHERED)]
)
def test_an_adapter_is_reset(two_ranks, stage, threshold):
    two_ranks.run(cases.reset, stage, threshold)


@pytest.mark.parametrize("threshold", [cases.ALL_PARTITIONED, cases.ALL_GATHERED])
def test_an_unloaded_model_is_saved(two_ranks, threshold, tmp_path):
    two_ranks.run(cases.saved_whole, threshold, str(tmp_path))


def test_adapters_in_float32_over_half_precision(two_ranks, tmp_path):
    two_ranks.run(cases.half_precision, str(tmp_path))


@pytest.mark.parametrize("threshold", [cases.ALL_PARTITIONED, cases.ALL_GATHERED])
def test_under_peft(two_ranks, threshold, tmp_path):
    pytest.importorskip("peft")
    two_ranks.run(cases.under_peft, threshold, str(tmp_path))
