"""Processes whose arguments differ: all refuse with the same message, and none hangs.

The processes of one world size are started once and run all cases (tests/helpers/agreement_worker.py).
"""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from helpers import agreement_worker as worker
from helpers import processes

from pysupcon.pairs.agreement import Code, describe_difference, largest_norm

SECONDS = 300  # only reached by a hang
WORLDS = (2, 3)
UNCHECKED = ("temperature", "epsilon", "alpha", "reduction none")
BAD_ROWS = {
    "not finite": "features must be finite, got NaN or infinity on rank {}",
    "too large": "features must be small enough for their similarities; the largest |features| |features| / "
    "temperature is beyond 7e14 (on rank {})",
    "candidates not finite": "candidates must be finite, got NaN or infinity on rank {}",
    "candidates too large": "features must be small enough for their similarities; the largest |features| "
    "|candidates| / temperature is beyond 7e14 (features on rank 0 and candidates on rank {})",
}
CASES: list[processes.Case] = [
    *[("differing", what, mode) for what in worker.DIFFERENCES for mode in worker.MODES],
    *[("invalid", what, mode) for what in worker.INVALID for mode in worker.MODES],
    *[("unmatched", mode) for mode in worker.MODES],
    ("unsupported", "mask"),
    ("gather_mode",),
    ("last_bits",),
    *[("bad_rows", what, mode) for what in BAD_ROWS for mode in worker.MODES],
    *[("unchecked", name) for name in UNCHECKED],
    ("learnable", "ddp"),
    ("learnable", "alone"),  # it warns once only
]


@pytest.fixture(params=WORLDS, scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> processes.Results:
    """Results of the processes, by rank."""
    return processes.results_of("agree", worker.CASES, request.param, CASES, tmp_path_factory, SECONDS)


def _others(results: processes.Results) -> str:
    return "rank 1" if len(results) == 2 else f"ranks 1-{len(results) - 1}"


@pytest.mark.parametrize("mode", worker.MODES)
@pytest.mark.parametrize("what", worker.DIFFERENCES)
def test_a_difference_is_refused_by_all(what: str, mode: str, results: processes.Results) -> None:
    name, (_, first), (_, other) = worker.DIFFERENCES[what]
    message = f"{name} must be the same in all processes: {first} on rank 0, {other} on {_others(results)}"
    for result in results:
        assert result["differing", what, mode] == [f"ValueError: {message}", ""]


def test_all_gather_and_ring(results: processes.Results) -> None:
    message = f"gather must be the same in all processes: True on rank 0, 'ring' on {_others(results)}"
    for result in results:
        assert result["gather_mode",] == [f"ValueError: {message}", ""]


@pytest.mark.parametrize("mode", worker.MODES)
@pytest.mark.parametrize("what", worker.INVALID)
def test_invalid_arguments_of_one_process(what: str, mode: str, results: processes.Results) -> None:
    first, *others = [result["invalid", what, mode] for result in results]
    assert first[0].startswith(worker.INVALID[what][1])
    message = "the arguments of the loss were refused on rank 0; the error there says why"
    assert [first[1], *others] == ["", *[[f"ValueError: {message}", ""]] * len(others)]


@pytest.mark.parametrize("mode", worker.MODES)
def test_candidates_that_match_no_sample(mode: str, results: processes.Results) -> None:
    first, *others = [result["unmatched", mode] for result in results]
    assert first[0].startswith("ValueError: without instances candidate k is matched with sample k")
    message = "the arguments of the loss were refused on rank 0; the error there says why"
    assert [first[1], *others] == ["", *[[f"ValueError: {message}", ""]] * len(others)]


def test_a_mask_of_all_processes(results: processes.Results) -> None:
    for result in results:
        for error in result["unsupported", "mask"]:
            assert error.startswith("ValueError: gather works with labels and instances, not with a mask")


def test_the_last_bits_of_a_schedule_may_differ(results: processes.Results) -> None:
    for result in results:
        assert result["last_bits",] == ""


@pytest.mark.parametrize("mode", worker.MODES)
@pytest.mark.parametrize("what", BAD_ROWS)
def test_rows_of_one_process_that_no_loss_accepts(what: str, mode: str, results: processes.Results) -> None:
    """Also processes that would not compare these rows with others of their size refuse them."""
    message = BAD_ROWS[what].format(len(results) - 1)
    for result in results:
        assert result["bad_rows", what, mode] == [f"ValueError: {message}", ""]


@pytest.mark.parametrize(
    ("rows", "norm"),
    [
        (torch.empty(0, 3), 0.0),
        (torch.tensor([[3.0, 4.0], [0.0, 1.0]]), 5.0),
        (torch.tensor([[[3e4, 4e4]]], dtype=torch.float16), 5e4),  # its square is infinite in float16
        (torch.tensor([[3e30, 4e30]]), sys.float_info.max),
        (torch.tensor([[1.0, -math.inf], [0.0, 1.0]]), math.inf),
        (torch.tensor([[1.0, 0.0], [math.nan, 1.0]]), math.inf),
        (torch.empty(2, 3, device="meta"), -1.0),  # on another device nothing is read
    ],
)
def test_largest_norm(rows: torch.Tensor, norm: float) -> None:
    assert largest_norm(rows) == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("name", UNCHECKED)
def test_the_message_does_not_change_results(name: str, results: processes.Results) -> None:
    for result in results:
        for checked, unchecked in zip(*result["unchecked", name], strict=True):
            assert torch.equal(checked, unchecked)


def test_a_learnable_temperature_that_drifts_apart(results: processes.Results) -> None:
    temperatures = [result["learnable", "alone"]["temperature"] for result in results]
    assert max(temperatures) - min(temperatures) > 0.005, "nothing drifts"
    for result in results:
        ((warning, file),) = result["learnable", "alone"]["warnings"]
        assert warning.startswith("temperature must be the same in all processes: 0.")
        assert "average the gradient over the processes, with DistributedDataParallel" in warning
        assert file == worker.__file__


def test_a_learnable_temperature_under_ddp(results: processes.Results) -> None:
    assert len({result["learnable", "ddp"]["temperature"] for result in results}) == 1
    for result in results:
        assert not result["learnable", "ddp"]["warnings"]


@pytest.mark.parametrize(
    ("value", "others", "same"),
    [
        (0.07, [0.07, 0.1], False),
        (0.1, [0.1 * (1 + 5e-7)], True),
        (0.1, [0.1 * (1 + 5e-6)], False),
        (0.0, [1e-9], False),
        (0.0, [0.0, -0.0], True),
        (None, [None], True),
        (None, [0.1], False),
        (1, [1.0], True),
        ("mean", ["sum"], False),
        ("a_long_name", ["a_long_story"], False),
        ("a_long_name", ["a_long_name"], True),
        # A tensor on another device (here without storage) is not read.
        (0.1, [torch.empty((), device="meta"), 0.1], True),
        (0.1, [torch.empty((), device="meta"), 0.2], False),
        (torch.empty((), device="meta"), [torch.empty((), device="meta")], True),
        (torch.tensor(0.25), [0.25], True),
    ],
)
def test_what_counts_as_the_same(value: Any, others: list[Any], same: bool) -> None:
    own = Code.of(value)
    codes = [int(own), *(int(Code.of(other)) for other in others)]
    assert own.same(codes) is same
    assert all(-(2**63) <= code < 2**63 for code in codes)


def test_a_message_with_many_ranks() -> None:
    own = Code.of(0.5)
    codes = [int(own)] * 3 + [int(Code.of(math.pi))] + [int(own)] * 2 + [int(Code.of(math.inf))]
    assert describe_difference("alpha", own, codes, [0, 1, 2, 4, 8, 9, 16]) == (
        "alpha must be the same in all processes: 0.5 on ranks 0-2 and 8-9, 3.1415927 on rank 4, "
        "unknown (on a GPU) on rank 16"
    )
