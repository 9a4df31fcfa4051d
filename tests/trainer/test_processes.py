"""Several processes train what one process trains, go on where another number of them stopped, and stop
together."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training_server import TrainingServer, after_log_lines, start_training_server  # noqa: F401
from safetensors.torch import load_file

from pysupcon.train import TRY_AGAIN
from pysupcon.trainer.checkpoint import checkpoints, read_checkpoint, read_manifest
from pysupcon.trainer.run import read_log

VIT = "{img_size: 8, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}"
FEW = ("--trainer.epochs", "1")


def arguments(folder: Path, *more: str) -> list[str]:
    """Ten steps an epoch; nothing random in the model and no batch norm, so that processes can agree."""
    fixed = (
        "--data.dataset digits --data.augmentation weak --data.batch_size 128 --trainer.epochs 2 "
        "--trainer.threads 1 --evaluate false --trainer.cpu true --model.backbone vit_tiny_patch16_224 "
        "--loss.name spread --loss.base sincere --loss.gather true --loss.learnable_temperature true "
        "--model.classifier true --loss.cross_entropy_weight 0.5 --loss.infonce_weight 0.25 "
        "--model.encoders two --model.decoder labelled --loss.reconstruction_weight 0.5 "
        "--model.spectral_norm true --optimizer.name sgd "
        "--optimizer.learning_rate 0.05 --optimizer.warmup_epochs 0.5 --trainer.clip_norm 1 "
        "--resume_from_checkpoint auto"
    )
    return [*fixed.split(), "--model.timm_args", VIT, "--output_dir", str(folder), *more]


@pytest.fixture(scope="module")
def one(server: TrainingServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    assert server.run(arguments(folder)) == 0, server.output()
    return folder


def agree(folder: Path, other: Path) -> None:
    """The same training up to the order of float32 sums."""
    first, second = (read_log(run / "log.jsonl") for run in (folder, other))
    for name in ("step", "epoch", "learning_rate", "valid_anchors"):
        assert [line[name] for line in first] == [line[name] for line in second], name
    parts = ("contrastive", "infonce", "cross_entropy", "second_cross_entropy", "reconstruction")
    for name in ("loss", *parts, "chance", "temperature", "gradient_norm"):
        assert column(first, name) == pytest.approx(column(second, name), rel=2e-4), name
    temperatures = column(first, "temperature")
    assert abs(temperatures[-1] - temperatures[0]) > 1e-4, "the temperature was to learn"
    weights = [load_file(run / "model.safetensors") for run in (folder, other)]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=2e-4)


def column(log: list[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in log]


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
    """GradCache too, with a chunk that does not divide the batch: gradient, temperature, norm, clipping."""
    folder = tmp_path / "run"
    more = () if chunks is None else ("--trainer.chunk_size", chunks)
    assert server.run(arguments(folder, *more), processes=processes) == 0, server.output()
    agree(folder, one)
    if processes == 2:
        assert server.output().count("0/20 [00:00<?") == 1, "only the main process shows progress"
    saved = read_checkpoint(checkpoints(folder)[-1])
    assert len(saved.random) == read_manifest(checkpoints(folder)[-1])["processes"] == processes
    states = {bytes(state["torch"].numpy()) for state in saved.random}
    assert len(states) == processes


def test_processes_that_do_not_gather(server: TrainingServer, tmp_path: Path) -> None:
    """Each contrasts its own rows; all stop when one of them is told to."""
    folder = tmp_path / "run"
    thread = after_log_lines(folder, 3, lambda: os.kill(server.pid(1), signal.SIGTERM))
    assert server.run(arguments(folder, "--loss.gather", "false"), processes=2) == TRY_AGAIN, server.output()
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
    first = arguments(folder, "--trainer.time_budget", "1e-6")
    assert server.run(first, processes=before) == TRY_AGAIN, server.output()
    assert server.run(arguments(folder), processes=after) == 0, server.output()
    said = server.output()
    assert said.count("going on from ") == 1
    assert (
        f"changed: processes: {before} -> {after}: each takes {128 // after} samples of a global batch of "
        f"128 instead of {128 // before}; batches, learning rate and epochs stay as they were"
    ) in said
    assert ("changed: processes 1 to 1 start from new random states" in said) == (after > before)
    agree(folder, one)


def test_what_changed_is_said_and_what_cannot_is_refused(
    server: TrainingServer,
    one: Path,
    tmp_path: Path,
) -> None:
    more = ("--trainer.epochs", "3", "--trainer.ema_decay", "0.9", "--loss.gather", "false")
    assert server.run(arguments(one, *more, "--data.batch_size", "64"), processes=2) == 2
    refusal = f"data.batch_size must be as in the checkpoint {checkpoints(one)[-1]} to resume from it"
    assert server.output().count(f"train.py: error: {refusal}") == 1
    copy = tmp_path / "run"
    assert server.run(arguments(copy, *FEW)) == 0
    assert server.run(arguments(copy, *more), processes=2) == 0, server.output()
    for change in (
        "trainer.epochs: 1 -> 3",
        "trainer.ema_decay: None -> 0.9",
        "loss.gather: True -> False",
        "processes: 1 -> 2: each takes 64 samples",
        "loss.gather is false: each process contrasts with its own rows only, so the loss changes",
    ):
        assert f"  changed: {change}" in server.output()
    assert "checkpoint_epochs" not in server.output()
