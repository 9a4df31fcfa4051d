"""Losses, gradients and training of two to four processes equal those of one; bytes of communication.

The processes of one world size are started once and run all its cases (tests/helpers/distributed_worker.py).
Each test here checks one case.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import distributed_worker as worker
from helpers import gradcache_wrappers, processes, tolerances
from helpers.cases import CASES
from torch import Tensor

import pysupcon

SECONDS = 600  # only reached by a hang
EVERYDAY, SLOW = (2, 3), (4,)


def _embedding_cases(world: int) -> list[tuple[Any, ...]]:
    """(loss, mode, batches, layout, dtype, reduction, backend)"""
    cases = [
        ("embeddings", name, mode, batches, "views", "float64", "mean", "auto")
        for name in worker.LOSSES
        for mode in worker.MODES
        for batches in ("equal", "ragged", "empty")
    ]
    for name in worker.LOSSES:
        for mode in worker.MODES:
            # Instances on two processes; samples without positives; sums and single losses; tiled PyTorch.
            cases += [
                ("embeddings", name, mode, "single", "rows", "float64", "none", "auto"),
                ("embeddings", name, mode, "ragged", "three views", "float64", "sum", "tiled"),
                ("embeddings", name, mode, "ragged", "views", "float32", "mean", "auto"),
            ]
    for name in ("supcon", "spread_sincere"):
        cases += [
            ("embeddings", name, mode, "large", "views", "float32", "mean", "auto") for mode in worker.MODES
        ]
    for dtype in ("bfloat16", "float16"):
        for mode in worker.MODES:
            cases += [
                ("embeddings", "supcon", mode, "ragged", "rows", dtype, "mean", "auto"),
                ("embeddings", "spread_sincere", mode, "empty", "views", dtype, "mean", "tiled"),
            ]
    return cases


def _training_cases(world: int) -> list[tuple[Any, ...]]:
    """(loss, mode, batches, dtype, chunk size of GradCache)"""
    cases: list[tuple[Any, ...]] = [
        ("training", name, "all", batches, "float64", None)
        for name in worker.LOSSES
        for batches in ("equal", "ragged", "empty")
    ]
    cases += [("training", name, "ring", "ragged", "float64", None) for name in ("supcon", "spread_sincere")]
    cases += [("training", "supcon", mode, "ragged", "float32", None) for mode in worker.MODES]
    cases += [
        ("training", "sincere", "all", batches, "float64", 3) for batches in ("equal", "ragged", "empty")
    ]
    cases += [("training", "spread", "ring", "ragged", "float64", 3)]
    return cases


TRAFFIC = [("traffic", name, mode, "float32", "views") for name in worker.LOSSES for mode in worker.MODES] + [
    ("traffic", "supcon", "all", "float64", "views"),
    ("traffic", "supcon", "all", "bfloat16", "views"),
    ("traffic", "spread", "all", "float32", "rows"),
]
WRAPPED_BATCHES = ("equal", "ragged", "empty")
BEHAVIOUR: list[tuple[Any, ...]] = [
    *[("not_finite", mode) for mode in worker.MODES],
    *[("one_sample", mode, classes) for mode in worker.MODES for classes in (1, 4)],
    ("no_positive",),
    ("stochastic",),
    *[("wrapped", kind, batches) for kind in gradcache_wrappers.KINDS for batches in WRAPPED_BATCHES],
    ("static_graph_twice",),
    *[("subgroup", mode) for mode in worker.MODES],
    *[("pair_statistics", mode) for mode in worker.MODES],
]


def _cases(world: int) -> list[tuple[Any, ...]]:
    cases = [("without_gather",), *_embedding_cases(world), *_training_cases(world)]  # it warns once only
    if world in EVERYDAY:
        cases += BEHAVIOUR
    if world == 2:
        cases += [*TRAFFIC, ("compiled",)]
    return cases


@pytest.fixture
def results(world: int, tmp_path_factory: pytest.TempPathFactory) -> processes.Results:
    """Results of the processes, by rank."""
    return processes.results_of("world", worker.CASES, world, _cases(world), tmp_path_factory, SECONDS)


def _worlds(cases: Any, worlds: tuple[int, ...] = (*EVERYDAY, *SLOW)) -> list[Any]:
    return [
        pytest.param(
            world,
            case,
            id=f"{world}-" + "-".join(str(part) for part in case[1:]),
            marks=[pytest.mark.slow] if world in SLOW else [],
        )
        for world in worlds
        for case in cases(world)
    ]


def _largest(batches: str, layout: str, world: int) -> int:
    return sum(worker.sizes_of(batches, world)) * {"views": 2, "three views": 3, "rows": 1}[layout]


@pytest.mark.parametrize(("world", "case"), _worlds(_embedding_cases))
def test_embeddings(world: int, case: tuple[Any, ...], results: list[dict[Any, Any]]) -> None:
    _, name, _, batches, layout, dtype_name, reduction, _ = case
    dtype = getattr(torch, dtype_name)
    parts = [result[case] for result in results]
    truth_loss, truth_gradient, truth_temperature = parts[0]["truth"]
    losses = [part["got"][0] for part in parts]
    gradient = torch.cat([part["got"][1] for part in parts])
    temperature = torch.stack([part["got"][2].double() for part in parts]).sum()
    loss = torch.cat(losses) if reduction == "none" else torch.stack(losses).sum()
    if reduction == "mean":  # results are averaged over the processes
        loss, gradient, temperature = loss / world, gradient / world, temperature / world
    assert gradient.dtype == dtype
    assert truth_gradient.norm() > 1e-3, "nothing to compare"
    if dtype == torch.float64:
        torch.testing.assert_close(loss, truth_loss, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient, truth_gradient, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(temperature, truth_temperature, rtol=1e-10, atol=1e-11)
        return
    inverse = 1 / worker.LOSSES[name][1]["temperature"]
    similarity = 1.02 * inverse  # rows are of unit length but for their rounding
    tolerances.assert_loss_close(loss, truth_loss, dtype, similarity)
    anchors = _largest(batches, layout, world) if reduction == "mean" else 1
    tolerances.assert_gradient_close(gradient, truth_gradient, dtype, similarity, inverse * 2 / anchors)
    torch.testing.assert_close(temperature, truth_temperature, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("world", "case"), _worlds(_training_cases))
def test_training(world: int, case: tuple[Any, ...], results: list[dict[Any, Any]]) -> None:
    """Under DistributedDataParallel gradients and, after five steps, parameters are those of one process."""
    exact = case[4] == "float64"
    tolerance = {"rtol": 1e-10, "atol": 1e-11} if exact else {"rtol": 1e-3, "atol": 2e-5}
    truth = results[0][case]["truth"]
    assert torch.stack(truth["losses"]).diff().abs().min() > 1e-5, "nothing is learnt"
    for result in results:
        got = result[case]["got"]
        for what in ("gradients", "parameters"):
            for one, other in zip(got[what], truth[what], strict=True):
                torch.testing.assert_close(one.double(), other, **tolerance)
    means = torch.stack([torch.stack(result[case]["got"]["losses"]).double() for result in results]).mean(0)
    torch.testing.assert_close(means, torch.stack(truth["losses"]), **tolerance)


@pytest.mark.parametrize(
    ("world", "case"), _worlds(lambda world: [case for case in _training_cases(world) if case[-1]], EVERYDAY)
)
def test_grad_cache_synchronises_once(
    world: int, case: tuple[Any, ...], results: list[dict[Any, Any]]
) -> None:
    """Five steps reduce the weights five times, for any number of chunks."""
    for result in results:
        assert sum(result[case]["reductions"]) == 5 * result[case]["weights"]


@pytest.mark.parametrize("world", EVERYDAY)
def test_grad_cache_with_dropout_and_batch_norm(world: int, results: list[dict[Any, Any]]) -> None:
    for result in results:
        for got, truth in zip(*(result["stochastic",][side] for side in ("got", "truth")), strict=True):
            torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batches", WRAPPED_BATCHES)
@pytest.mark.parametrize("kind", gradcache_wrappers.KINDS)
@pytest.mark.parametrize("world", EVERYDAY)
def test_grad_cache_in_wrappers(world: int, kind: str, batches: str, results: list[dict[Any, Any]]) -> None:
    """Static graphs, broadcast buffers and several models give the gradients of the whole batch."""
    for result in results:
        got = result["wrapped", kind, batches]
        for tensors, truths in zip(got["got"], got["truth"], strict=True):
            for one, other in zip(tensors, truths, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
        for gradients in got["truth"][:-1]:
            assert min(gradient.abs().max() for gradient in gradients) > 1e-6, "nothing to compare"
        # One synchronisation per step, and one more in the first step of a static graph.
        synchronisations = gradcache_wrappers.STEPS + kind.startswith("static graph")
        assert got["reduced"] == synchronisations * got["weights"]


@pytest.mark.parametrize("world", EVERYDAY)
def test_grad_cache_refuses_a_static_graph_twice(world: int, results: list[dict[Any, Any]]) -> None:
    for result in results:
        assert "static_graph=True has one graph per step" in result["static_graph_twice",]


@pytest.mark.parametrize("case", TRAFFIC, ids=lambda case: "-".join(case[1:]))
@pytest.mark.parametrize("world", [2])
def test_bytes(world: int, case: tuple[Any, ...], results: list[dict[Any, Any]]) -> None:
    """The exact bytes of one step: rows once, and at most 32 bytes per row in the backward."""
    _, name, mode, dtype, layout = case
    samples, views = 4, 2 if layout == "views" else 1
    rows, element = samples * views, {"float64": 8, "float32": 4, "bfloat16": 2}[dtype]
    embeddings, ids = rows * worker.WIDTH * element, 8 * samples
    loss, own = CASES.get(name, (pysupcon.InfoNCELoss, {}))
    scalars = 8 * (1 + len(loss.statistics(**own))) * rows  # dL/dloss; n, p and dL/dn as far as asked for
    own_pass = "sincere" in name or name == "eps_supinfonce"
    labels = 0 if name == "infonce" else 1
    instances = 1 if layout == "rows" and name in ("cnce", "spread", "spread_sincere") else 0
    for result in results:
        forward, backward = result[case]["forward"], result[case]["backward"]
        sent = {step: sum(call[1] for call in calls) for step, calls in result[case].items()}
        assert {call[0] for call in forward + backward} <= {"all_gather_single", "batch_isend_irecv"}
        if mode == "all":
            assert sent["forward"] == worker.MESSAGE + (labels + instances) * ids + embeddings
            assert sent["backward"] == scalars
            assert len(forward) == 2 + labels + instances
        else:
            passes = 2 if own_pass else 1
            assert sent["forward"] == worker.MESSAGE + labels * ids + passes * embeddings
            assert sent["backward"] == scalars + passes * embeddings
            assert len(forward) == 1 + labels + passes
        for _, out, back in forward + backward:
            assert out == back, "between two equal processes as much comes as goes"


@pytest.mark.parametrize("mode", worker.MODES)
@pytest.mark.parametrize("world", EVERYDAY)
def test_features_that_are_not_finite(world: int, mode: str, results: list[dict[Any, Any]]) -> None:
    for result in results:
        assert "features must be finite" in result["not_finite", mode]


def _one_sample(results: list[dict[Any, Any]], mode: str, classes: int) -> dict[str, Tensor]:
    """[batches, samples, views, D]"""
    parts = [result["one_sample", mode, classes] for result in results]
    return {name: torch.cat([torch.stack(part[name]) for part in parts], dim=1) for name in parts[0]}


@pytest.mark.parametrize("mode", worker.MODES)
@pytest.mark.parametrize("world", EVERYDAY)
def test_cnce_of_one_sample_per_process(world: int, mode: str, results: list[dict[Any, Any]]) -> None:
    """Attraction and repulsion almost cancel if the other view is by far the most similar row. The error is
    the rounding of these terms, and not larger than that of a dense float32 loss."""
    found = _one_sample(results, mode, 1)
    norms = {name: gradient.flatten(1).norm(dim=1) for name, gradient in found.items()}
    assert (norms["truth"] / norms["terms"]).min() < 5e-3, "nothing cancels"
    errors, dense_errors = (
        ((found[name] - found["truth"]).flatten(1).norm(dim=1) / norms["terms"]).max()
        for name in ("got", "dense")
    )
    # Rounding of a similarity of up to 1 / 0.07 moves a weight by eps / 0.07.
    assert errors < torch.finfo(torch.float32).eps / 0.07
    assert errors < 3 * dense_errors


@pytest.mark.parametrize("mode", worker.MODES)
@pytest.mark.parametrize("world", EVERYDAY)
def test_cnce_of_one_sample_per_process_and_class(
    world: int, mode: str, results: list[dict[Any, Any]]
) -> None:
    """The only positive of an anchor is its other view: the gradient is 0, without rounding."""
    found = _one_sample(results, mode, 4)
    assert not found["got"].any()
    assert not found["truth"].any()


@pytest.mark.parametrize("world", EVERYDAY)
def test_no_positive_anywhere(world: int, results: list[dict[Any, Any]]) -> None:
    for result in results:
        got = result["no_positive",]
        assert got["loss"] == 0
        assert torch.equal(got["gradient"], torch.zeros(3, worker.WIDTH))
        assert len(got["warnings"]) == 1
        assert "no anchor of this batch has a positive" in got["warnings"][0]


@pytest.mark.parametrize("world", EVERYDAY)
def test_without_gather_it_warns_once(world: int, results: list[dict[Any, Any]]) -> None:
    for result in results:
        (message,) = result["without_gather",]
        assert message.startswith(
            f"SupConLoss runs in {world} processes, and each contrasts its own rows only"
        )
        assert "SupConLoss(..., gather=True)" in message


@pytest.mark.parametrize("mode", worker.MODES)
@pytest.mark.parametrize("world", EVERYDAY)
def test_a_process_group(world: int, mode: str, results: list[dict[Any, Any]]) -> None:
    for result in results:
        got = result["subgroup", mode]
        torch.testing.assert_close(got["got"], got["truth"], rtol=1e-5, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("mode", worker.MODES)
@pytest.mark.parametrize("world", EVERYDAY)
def test_pair_statistics(world: int, mode: str, results: list[dict[Any, Any]]) -> None:
    parts = [result["pair_statistics", mode] for result in results]
    total = torch.stack([part["got"][0] for part in parts]).sum()
    torch.testing.assert_close(total, parts[0]["truth"][0], rtol=1e-10, atol=0)
    for part in parts:
        torch.testing.assert_close(part["got"][1], part["truth"][1], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("world", [2])
def test_inside_a_compiled_function(world: int, results: list[dict[Any, Any]]) -> None:
    for result in results:
        for got, truth in zip(*(result["compiled",][side] for side in ("got", "truth")), strict=True):
            torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gather", [True, "ring"])
def test_one_process_equals_no_gather(gather: Any, recwarn: pytest.WarningsRecorder) -> None:
    assert not torch.distributed.is_initialized()

    def step(**options: Any) -> tuple[Tensor, Tensor]:
        x = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
        loss = pysupcon.SpreadLoss(base="sincere", **options)(x, torch.arange(6) % 2)
        loss.backward()
        assert x.grad is not None
        return loss.detach(), x.grad

    for got, truth in zip(step(gather=gather), step(), strict=True):
        assert torch.equal(got, truth)
    assert not recwarn.list


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_under_a_launcher(launcher: str, tmp_path: Path) -> None:
    if launcher == "accelerate":
        pytest.importorskip("accelerate")
    script = Path(worker.__file__)
    tests = script.parents[1]
    searched = [str(tests.parent), str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(searched)}
    with subprocess.Popen(
        [sys.executable, "-m", *LAUNCHERS[launcher], str(script), launcher],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as started:  # fmt: skip
        try:
            output, errors = started.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)  # the launcher would leave its processes behind
            raise
    assert started.returncode == 0, errors
    assert "equal among 2 processes" in output
