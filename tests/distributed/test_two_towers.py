"""Anchors of each process against candidates of all processes: losses and gradients of both sides equal those
of one process.

The processes of one world size are started once and run all its cases (tests/helpers/tower_worker.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import processes
from helpers import tower_worker as worker
from helpers.distributed_worker import MESSAGE, WIDTH

CLIP: list[processes.Case] = [("clip", mode, local) for mode in worker.MODES for local in (True, False)]
TRAFFIC: list[processes.Case] = [
    ("tower_traffic", name, mode, form)
    for name in ("supcon", "sincere")
    for mode in worker.MODES
    for form in ("candidates", "fixed candidates", "one view")
]
STATISTICS: list[processes.Case] = [("statistics", mode) for mode in worker.MODES]
SECONDS = 300  # only reached by a hang
WORLDS = (2, 3)
TOWERS: list[processes.Case] = [
    ("towers", name, mode, form, batches, "float64", "mean", "auto")
    for name in worker.LOSSES
    for mode in worker.MODES
    for form in worker.FORMS
    for batches in worker.SIZES
    if not (name in ("infonce", "clip") and form.startswith("labels"))  # they take no labels
    if not (name == "clip" and form == "one view")
    if not (form == "labels" and worker.LOSSES[name][0].needs_instances)
]
for mode in worker.MODES:
    TOWERS += [
        ("towers", name, mode, "labels, one view", "ragged", "float64", reduction, "auto")
        for name, reduction in (("supcon", "mean"), ("sincere", "none"))
    ]
    for form in ("instances", "one view", "position"):
        TOWERS += [
            ("towers", "spread_sincere", mode, form, "ragged", "float64", "sum", "tiled"),
            ("towers", "supcon", mode, form, "ragged", "float64", "none", "auto"),
            ("towers", "sincere", mode, form, "ragged", "float32", "mean", "auto"),
            ("towers", "supcon", mode, form, "ragged", "bfloat16", "mean", "auto"),
        ]


@pytest.fixture(params=WORLDS, scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> processes.Results:
    """Results of the processes, by rank."""
    return processes.results_of(
        "towers",
        worker.CASES,
        request.param,
        [*TOWERS, *CLIP, *TRAFFIC, *STATISTICS],
        tmp_path_factory,
        SECONDS,
    )


@pytest.mark.parametrize("case", TOWERS, ids=lambda case: "-".join(case[1:]))
def test_two_towers(case: tuple[Any, ...], results: processes.Results) -> None:
    *_, dtype, reduction, _ = case
    truth = results[0][case]["truth"]
    loss, temperature, *gradients = zip(*(result[case]["got"] for result in results), strict=True)
    got = [torch.stack(temperature).sum(), *map(torch.cat, gradients)]
    got = [torch.cat(loss) if reduction == "none" else torch.stack(loss).sum(), *got]
    if reduction == "mean":  # results are averaged over the processes
        got = [value / len(results) for value in got]
    for value in truth:
        assert value.norm() > 1e-3, "nothing to compare"
    exact = dtype == "float64"
    tolerance = {"rtol": 1e-10, "atol": 1e-11} if exact else {"rtol": 1e-3, "atol": 1e-5}
    if dtype == "bfloat16":  # the rows have 8 bits
        tolerance = {"rtol": 0.02, "atol": 0.01}
    assert [value.dtype for value in got[2:]] == [getattr(torch, dtype)] * (len(got) - 2)
    for one, other in zip(got, truth, strict=True):
        torch.testing.assert_close(one.double(), other.double(), **tolerance)


@pytest.mark.parametrize("case", CLIP, ids=str)
def test_clip_is_that_of_open_clip(case: tuple[Any, ...], results: processes.Results) -> None:
    """Every process has the loss and the gradients of ClipLoss with local_loss, and on average those of
    ClipLoss without."""
    for result in results:
        for got, truth in zip(result[case]["got"], result[case]["truth"], strict=True):
            assert truth.norm() > 1e-3, "nothing to compare"
            torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", STATISTICS, ids=str)
def test_pair_statistics(case: tuple[Any, ...], results: processes.Results) -> None:
    parts = zip(*(result[case]["got"] for result in results), strict=True)
    for got, truth in zip(map(torch.cat, parts), results[0][case]["truth"], strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("case", TRAFFIC, ids=lambda case: "-".join(case[1:]))
def test_bytes(case: tuple[Any, ...], results: processes.Results) -> None:
    """Rows of the candidates in the forward; scalars and anchors in the backward, if they are needed."""
    _, name, mode, form = case
    others = len(results) - 1
    anchors, candidates, samples = (4, 8, 4) if form == "one view" else (8, 12, 8)
    row, passes = WIDTH * 4, 2 if name == "sincere" and mode == "ring" else 1
    needed = form != "fixed candidates"
    scalars = 8 * 3 * anchors * needed
    forward = MESSAGE + 8 * samples + passes * candidates * row
    backward = scalars + anchors * row * needed + (passes * candidates * row if mode == "ring" else 0)
    for result in results:
        received = {step: sum(call[2] for call in calls) for step, calls in result[case].items()}
        assert received == {"forward": others * forward, "backward": others * backward}
