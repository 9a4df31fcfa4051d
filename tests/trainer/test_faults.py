"""A run that is killed, asked to stop, or out of disk space resumes to identical weights."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training_server import TrainingServer, after_log_lines, start_training_server  # noqa: F401

from pysupcon.config import Config, parse_args
from pysupcon.errors import Interrupted, RunError
from pysupcon.train import EX_TEMPFAIL
from pysupcon.trainer import files
from pysupcon.trainer.checkpoint import checkpoints, read_checkpoint, read_manifest
from pysupcon.trainer.loop import train
from pysupcon.trainer.run import read_log

VIT = "{img_size: 8, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2, proj_drop_rate: 0.2}"
TIMES = ("images_per_second", "peak_memory_mib")


def arguments(folder: Path, *more: str) -> list[str]:
    """Twenty steps, a checkpoint every third; dropout, an average of weights, a learnable temperature."""
    fixed = (
        "--data.dataset digits --data.augmentation weak --data.batch_size 128 --trainer.epochs 2 "
        "--trainer.threads 1 --evaluate false --trainer.cpu true --model.backbone vit_tiny_patch16_224 "
        "--trainer.checkpoint_steps 3 --trainer.ema_decay 0.9 --loss.learnable_temperature true "
        "--optimizer.learning_rate 0.01 --resume_from_checkpoint auto"
    )
    return [*fixed.split(), "--model.timm_args", VIT, "--output_dir", str(folder), *more]


def config(folder: Path, *more: str) -> Config:
    return parse_args(arguments(folder, *more))[0]


@pytest.fixture(scope="module")
def undisturbed(server: TrainingServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run, and its seconds."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    start = time.monotonic()
    assert server.run(arguments(folder)) == 0, server.output()
    return folder, time.monotonic() - start


def same(one: Path, other: Path) -> None:
    """Weights, their average, the last state and the log are bitwise equal."""
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    first, second = (read_checkpoint(checkpoints(folder)[-1]) for folder in (one, other))
    assert first.step == second.step == 20
    assert_equal(vars(first), vars(second))
    assert without_times(read_log(one / "log.jsonl")) == without_times(read_log(other / "log.jsonl"))


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_equal(first, second)
    else:
        assert one == other


def without_times(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in log]


@pytest.mark.parametrize("kills", [4, pytest.param(24, marks=pytest.mark.slow)])
def test_killed_at_any_moment(
    server: TrainingServer, undisturbed: tuple[Path, float], tmp_path: Path, kills: int
) -> None:
    whole, seconds = undisturbed
    draw = random.Random(kills)
    folder = tmp_path / "run"
    died: list[str] = []
    finished = 0
    while len(died) < kills:
        within_a_save = len(died) % 2 == 0
        if within_a_save:
            status = server.run(arguments(folder), kill_at_disk_operation=draw.randrange(1, 60))
        else:
            status = server.run(arguments(folder), kill_after=draw.uniform(0.2, 1.0) * seconds)
        if status == 0:
            same(folder, whole)
            shutil.rmtree(folder)
            finished += 1
        else:
            assert status == -signal.SIGKILL, server.output()
            died.append("in a save" if within_a_save else "at a random moment")
    assert server.run(arguments(folder)) == 0, server.output()
    same(folder, whole)
    assert died.count("in a save") == kills // 2
    print(f"{len(died)} kills, {finished + 1} runs finished, all equal to the undisturbed one")


# --- asked to stop


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)],
    ids=["SIGTERM", "SIGUSR1"],
)
def test_a_signal_stops_and_saves(
    tmp_path: Path, undisturbed: tuple[Path, float], number: signal.Signals
) -> None:
    handlers = [signal.getsignal(known) for known in (signal.SIGTERM, signal.SIGUSR1)]
    folder = tmp_path / "run"
    sender = after_log_lines(folder, 4, lambda: os.kill(os.getpid(), number))
    with pytest.raises(
        Interrupted, match=rf"stopped by {number.name} after step \d+ of 20; checkpoint"
    ) as told:
        train(config(folder))
    sender.join()
    assert [signal.getsignal(known) for known in (signal.SIGTERM, signal.SIGUSR1)] == handlers
    last = checkpoints(folder)[-1]
    assert f"checkpoint {last} is complete; resume with --resume_from_checkpoint latest" in str(told.value)
    assert len(read_log(folder / "log.jsonl")) == read_checkpoint(last).step >= 4
    assert not (folder / "model.safetensors").exists()
    train(config(folder))
    same_but_validation(folder, undisturbed[0])


def test_a_time_budget(tmp_path: Path, server: TrainingServer, undisturbed: tuple[Path, float]) -> None:
    """Exit status of the command: 75, or 0 if torchrun would restart it otherwise."""
    folder = tmp_path / "run"
    budget = ("--trainer.time_budget", "1e-6")
    assert server.run(arguments(folder, *budget)) == EX_TEMPFAIL
    ended = "stopped by the end of its 1e-06 minutes (trainer.time_budget) after step 1 of 20; checkpoint"
    assert ended in server.output()
    for step in (2, 3):
        assert server.run(arguments(folder, *budget)) == EX_TEMPFAIL
        assert read_manifest(checkpoints(folder)[-1])["step"] == step
    assert server.run(arguments(folder), environment={"TORCHELASTIC_MAX_RESTARTS": "3"}) == 0
    same_but_validation(folder, undisturbed[0])
    other = arguments(tmp_path / "other", *budget)
    assert server.run(other, environment={"TORCHELASTIC_MAX_RESTARTS": "3"}) == 0
    assert ended in server.output()


def same_but_validation(one: Path, other: Path) -> None:
    """Training does not validate after the step at which it stops."""
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    first, second = (without_times(read_log(folder / "log.jsonl")) for folder in (one, other))
    assert [{k: v for k, v in line.items() if k[:3] != "val"} for line in first] == [
        {k: v for k, v in line.items() if k[:3] != "val"} for line in second
    ]


# --- no space left


@pytest.fixture
def small_disk(tmp_path: Path, undisturbed: tuple[Path, float]) -> Iterator[Path]:
    """A separate file system with space for one checkpoint, not two."""
    sizes = [path.stat().st_size for path in checkpoints(undisturbed[0])[-1].iterdir()]
    blocks = sum(-(-size // 4096) for size in sizes)
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("a small file system needs root and mount")
    made = subprocess.run(
        # one and a half
        [mount, "-t", "tmpfs", "-o", f"size={6 * blocks}k", "tmpfs", str(place)],
        capture_output=True,
        text=True,
    )
    if made.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(small_disk: Path, undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    folder = small_disk / "run"
    with pytest.raises(
        RunError,
        match=r"checkpoint .*step_00000006 could not be written: No space left on device; the previous one, "
        r".*step_00000003, is complete",
    ):
        train(config(folder, "--trainer.keep_checkpoints", "1"))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000003"]
    assert read_checkpoint(checkpoints(folder)[-1]).step == 3
    elsewhere = tmp_path / "run"
    shutil.copytree(folder, elsewhere)
    train(config(elsewhere))
    same(elsewhere, undisturbed[0])


@pytest.mark.parametrize("file", range(1, 7), ids=lambda n: f"file{n}")
def test_a_full_disk_at_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: int) -> None:
    """The disk is full at each file of a checkpoint in turn, and at its manifest."""
    from pysupcon.trainer import checkpoint

    saved = checkpoint.Checkpoint(
        1, {"a": torch.ones(3)}, {"optimizer": {}}, [{}], ema={"a": torch.ones(3)}, metrics={"loss": 1.0}
    )
    arguments_ = config(tmp_path)
    checkpoint.save_checkpoint(tmp_path, saved, arguments_, keep=1)
    written = 0

    def write(path: Path, content: bytes) -> str:
        nonlocal written
        written += 1
        if written == file:
            path.write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return files.write_file(path, content)

    monkeypatch.setattr(checkpoint, "write_file", write)
    saved.step = 2
    with pytest.raises(
        RunError, match=r"step_00000002 could not be written: No space.*step_00000001, is complete"
    ):
        checkpoint.save_checkpoint(tmp_path, saved, arguments_, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert_equal(read_checkpoint(checkpoints(tmp_path)[-1]).weights, saved.weights)
    checkpoint.save_checkpoint(tmp_path, saved, arguments_, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
