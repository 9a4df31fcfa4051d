"""MemoryQueue.enqueue(gather=...): the rows of all processes in the same order in every process.

The processes of one world size are started once and run all cases (tests/helpers/queue_worker.py).
"""

from __future__ import annotations

import pytest
import torch
from helpers import processes
from helpers import queue_worker as worker

from pysupcon import MemoryQueue

SECONDS = 300  # only reached by a hang
REFUSED = {
    "size": "size of the queue must be the same in all processes: 11 on {first}, 12 on {last}",
    "labels": "whether labels are given must be the same in all processes: True on {first}, False on {last}",
    "instances": "whether instances are given must be the same in all processes: False on {first}, True on "
    "{last}",
    "width": "whether the arguments of enqueue are valid must be the same in all processes: True on {first}, "
    "False on {last}",
}
REFUSED["type"] = REFUSED["labels dtype"] = REFUSED["width"]
OWN = {
    "width": "ValueError: rows must have the width D=3 of the queue",
    "type": "TypeError: rows must be a float tensor",
    "labels dtype": "ValueError: labels must be integers",
}
"""Errors of the last process, where they are others than those of the other processes"""
FORMS = [
    *[(sizes, views, "True", torch.float32) for sizes in worker.SIZES for views in (0, 2)],
    *[("ragged", 2, mode, torch.bfloat16) for mode in worker.MODES],
]
CASES: list[processes.Case] = [
    *[("gathered", *form) for form in FORMS],
    *[("refused", what) for what in REFUSED],
    ("by_default",),
    ("without_broadcast",),
]


@pytest.fixture(params=(2, 3), scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> processes.Results:
    """Results of the processes, by rank."""
    return processes.results_of("queue", worker.CASES, request.param, CASES, tmp_path_factory, SECONDS)


@pytest.mark.parametrize(("sizes", "views", "mode", "dtype"), FORMS)
def test_every_process_holds_the_rows_of_all(
    sizes: str, views: int, mode: str, dtype: torch.dtype, results: processes.Results
) -> None:
    expected = MemoryQueue(worker.SIZE, worker.DIM, dtype=dtype)
    for step in range(worker.STEPS):
        for rank in range(len(results)):
            expected.enqueue(*worker.batch(rank, step, worker.SIZES[sizes][rank], views))
    for result in results:
        state = result["gathered", sizes, views, mode, dtype]
        for name, buffer in expected.state_dict().items():
            assert torch.equal(state[name], buffer), name


@pytest.mark.parametrize("what", REFUSED)
def test_a_difference_is_refused_by_all(what: str, results: processes.Results) -> None:
    first = "rank 0" if len(results) == 2 else f"ranks 0-{len(results) - 2}"
    message = REFUSED[what].format(first=first, last=f"rank {len(results) - 1}")
    for rank, result in enumerate(results):
        error, after, filled = result["refused", what]
        own = OWN.get(what) if rank == len(results) - 1 else None
        assert error.startswith(own) if own else error == f"ValueError: {message}"
        if what == "size":  # it differs in the second call, too
            assert (after, filled) == (error, "0")
        else:
            assert (after, filled) == ("", str(2 * len(results)))


def test_a_queue_in_a_wrapped_module(results: processes.Results) -> None:
    """As the docstring of MemoryQueue says."""
    for rank, result in enumerate(results):
        assert result["by_default",].tolist() == [0, 0]
        assert result["without_broadcast",].tolist() == [rank, rank]
