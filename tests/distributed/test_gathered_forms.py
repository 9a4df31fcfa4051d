"""Memory, own hard negatives, weights, ignored labels and class balance among processes: losses and gradients
equal those of one process with the whole batch.

The processes of one world size are started once and run all its cases (tests/helpers/forms_worker.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import forms_worker as worker
from helpers import processes

SECONDS = 300  # only reached by a hang
WITH_MEMORY = ("memory with instances", "memory, one", "memory and hard negatives", "keys", "unlabelled, one")
FORMS: list[processes.Case] = [
    ("forms", name, mode, form, "mean", "auto")
    for first, name in enumerate(worker.LOSSES)
    for second, form in enumerate(worker.FORMS)
    for third, mode in enumerate(worker.MODES)
    if worker.takes(name, form) and (first + second + third) % 2  # each form with both modes
]
FORMS += [
    ("forms", name, mode, form, reduction, backend)
    for mode in worker.MODES
    for form in ("everything", "weights of candidates", "keys")
    for name, reduction, backend in (("spread_sincere", "sum", "tiled"), ("dcl", "none", "auto"))
]
OWN_MEMORY: list[processes.Case] = [
    ("own_memory", name, mode, form)
    for first, name in enumerate(worker.LOSSES)
    for second, form in enumerate(WITH_MEMORY)
    for third, mode in enumerate(worker.MODES)
    if worker.takes(name, form) and (first + second + third) % 2
]
STATISTICS: list[processes.Case] = [
    ("statistics", mode, form)
    for mode in worker.MODES
    for form in ("memory and hard negatives", "ignored candidates", "keys", "unlabelled, one")
]
REFUSED = {
    "class balance and memory": "ValueError: class_balance needs the same candidates in every process",
    "not finite": "ValueError: memory must be finite, got NaN or infinity",
    "too large": "ValueError: memory must be small enough for its similarities",
}
CASES = [*FORMS, *OWN_MEMORY, *STATISTICS]
CASES += [("refused", what, mode) for what in REFUSED for mode in worker.MODES]


@pytest.fixture(params=tuple(worker.SIZES), scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> processes.Results:
    """Results of the processes, by rank."""
    return processes.results_of("forms", worker.CASES, request.param, CASES, tmp_path_factory, SECONDS)


def _check(case: Any, results: processes.Results, reduction: str) -> None:
    """Float64: 1e-10, some 1e6 roundings of numbers of size 1 to 10."""
    truth = results[0][case]["truth"]
    loss, temperature, *gradients = zip(*(result[case]["got"] for result in results), strict=True)
    got = [torch.stack(temperature).sum(), *map(torch.cat, gradients)]
    got = [torch.cat(loss) if reduction == "none" else torch.stack(loss).sum(), *got]
    if reduction == "mean":  # results are averaged over the processes
        got = [value / len(results) for value in got]
    for one, other in zip(got, truth, strict=True):
        assert other.norm() > 1e-3, "nothing to compare"
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", FORMS, ids=lambda case: "-".join(case[1:]))
def test_forms(case: tuple[Any, ...], results: processes.Results) -> None:
    _check(case, results, case[4])


@pytest.mark.parametrize("case", OWN_MEMORY, ids=lambda case: "-".join(case[1:]))
def test_a_memory_of_each_process(case: tuple[Any, ...], results: processes.Results) -> None:
    _check(case, results, "sum")


@pytest.mark.parametrize("case", STATISTICS, ids=lambda case: "-".join(case[1:]))
def test_pair_statistics(case: tuple[Any, ...], results: processes.Results) -> None:
    _check(case, results, "none")


@pytest.mark.parametrize("mode", worker.MODES)
@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, mode: str, results: processes.Results) -> None:
    others = f"ValueError: the arguments of the loss were refused on rank {len(results) - 1}"
    for rank, result in enumerate(results):
        error, after = result["refused", what, mode]
        own = what == "class balance and memory" or rank == len(results) - 1
        assert error.startswith(REFUSED[what] if own else others)
        assert after == ""
