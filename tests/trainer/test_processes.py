"""Several processes give the same training as one process, resume runs of another number of processes, and
stop together."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import pytest
from helpers.parallel_training import assert_same_training, training_arguments
from helpers.training_server import TrainingServer, after_log_lines, start_training_server  # noqa: F401

from pysupcon.train import EX_TEMPFAIL
from pysupcon.trainer.checkpoint import checkpoints, read_checkpoint, read_manifest
from pysupcon.trainer.run import read_log

FEW = ("--trainer.epochs", "1")


@pytest.fixture(scope="module")
def one(server: TrainingServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    assert server.run(training_arguments(folder)) == 0, server.output()
    return folder


@pytest.mark.parametrize(
    ("processes", "chunks"), [(1, "24"), (2, None), (2, "24")], ids=["chunks", "two", "two, chunks"]
)
def test_what_one_process_trains(
    server: TrainingServer,
    one: Path,
    tmp_path: Path,
    processes: int,
    chunks: str | None,
) -> None:
    """Also with GradCache, with a chunk that does not divide the batch; gradient, temperature, clipping."""
    folder = tmp_path / "run"
    more = () if chunks is None else ("--trainer.chunk_size", chunks)
    assert server.run(training_arguments(folder, *more), processes=processes) == 0, server.output()
    assert_same_training(folder, one)
    assert server.output().count("epoch 1/2: loss") == 1, "only the main process shows progress"
    assert server.output().count("training on the coarse labels") == 1, "only the main process says it"
    saved = read_checkpoint(checkpoints(folder)[-1])
    assert len(saved.random) == read_manifest(checkpoints(folder)[-1])["processes"] == processes
    states = {bytes(state["torch"].numpy()) for state in saved.random}
    assert len(states) == processes


@pytest.mark.slow
@pytest.mark.parametrize("pairs", ["--loss.pairing cross", "--loss.contrast_mode one --loss.gather ring"])
def test_anchors_of_one_view(server: TrainingServer, tmp_path: Path, pairs: str) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for processes, folder in enumerate(folders, start=1):
        arguments = training_arguments(folder, *FEW, *pairs.split())
        assert server.run(arguments, processes=processes) == 0, server.output()
    assert_same_training(*folders)


def test_processes_that_do_not_gather(server: TrainingServer, tmp_path: Path) -> None:
    """Each process contrasts its own rows; all stop when one of them receives the signal."""
    folder = tmp_path / "run"
    thread = after_log_lines(folder, 3, lambda: os.kill(server.pid(1), signal.SIGTERM))
    assert server.run(training_arguments(folder, "--loss.gather", "false"), processes=2) == EX_TEMPFAIL, (
        server.output()
    )
    thread.join()
    log = read_log(folder / "log.jsonl")
    assert log[-1]["valid_anchors"] == 256
    per_process = 64
    share, rows = per_process // 2, per_process * 2
    sincere, cnce = math.log1p(rows - 2 * share), math.log(2 * share - 1)
    assert log[-1]["chance"] == pytest.approx((sincere + cnce) / 2)
    assert server.output().count("stopped by a signal to another process after step") == 1
    assert read_checkpoint(checkpoints(folder)[-1]).step == len(log) < 20


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_processes(
    server: TrainingServer,
    one: Path,
    tmp_path: Path,
    before: int,
    after: int,
) -> None:
    folder = tmp_path / "run"
    first = training_arguments(folder, "--trainer.time_budget", "1e-6")
    assert server.run(first, processes=before) == EX_TEMPFAIL, server.output()
    assert server.run(training_arguments(folder), processes=after) == 0, server.output()
    said = server.output()
    assert said.count("resuming from ") == 1
    assert (
        f"changed: processes: {before} -> {after}: each takes {128 // after} samples of a global batch of "
        f"128 instead of {128 // before}; batches, learning rate and epochs are unchanged"
    ) in said
    assert ("changed: processes 1 to 1 start from new random states" in said) == (after > before)
    assert_same_training(folder, one)


def test_changes_are_printed_and_invalid_ones_are_refused(
    server: TrainingServer,
    one: Path,
    tmp_path: Path,
) -> None:
    more = ("--trainer.epochs", "3", "--trainer.ema_decay", "0.9", "--loss.gather", "false")
    assert server.run(training_arguments(one, *more, "--data.batch_size", "64"), processes=2) == 2
    refusal = f"data.batch_size must be as in the checkpoint {checkpoints(one)[-1]} to resume from it"
    assert server.output().count(f"train.py: error: {refusal}") == 1
    copy = tmp_path / "run"
    assert server.run(training_arguments(copy, *FEW)) == 0
    assert server.run(training_arguments(copy, *more), processes=2) == 0, server.output()
    for change in (
        "trainer.epochs: 1 -> 3",
        "trainer.ema_decay: None -> 0.9",
        "loss.gather: True -> False",
        "processes: 1 -> 2: each takes 64 samples",
        "loss.gather is false: each process contrasts its own rows only, so the loss changes",
    ):
        assert f"  changed: {change}" in server.output()
    assert "checkpoint_epochs" not in server.output()
