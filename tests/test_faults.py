"""A run survives: killed at any moment, asked to stop, out of disk, it goes on to the very same weights."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pysupcon.config import Config, parse_args
from pysupcon.errors import Interrupted, RunError
from pysupcon.train import TRY_AGAIN
from pysupcon.trainer import files
from pysupcon.trainer.checkpoint import checkpoints, read_checkpoint, read_manifest
from pysupcon.trainer.loop import train
from pysupcon.trainer.run import load_run, read_log

VIT = "{img_size: 8, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2, proj_drop_rate: 0.2}"
REPOSITORY = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
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


class Nursery:
    """See tests/nursery.py."""

    def __init__(self, folder: Path) -> None:
        self.stderr = folder / "stderr.txt"
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("nursery.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=ENVIRONMENT,
        )  # fmt: skip
        assert self._read() == 0

    def run(self, args: list[str], *, die_at: int | None = None, kill_after: float | None = None) -> int:
        assert self.process.stdin is not None
        line = {"args": args, "stderr": str(self.stderr), "die_at": die_at, "kill_after": kill_after}
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def undisturbed(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run, and its seconds."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    start = time.monotonic()
    assert nursery.run(arguments(folder)) == 0, nursery.stderr.read_text()
    return folder, time.monotonic() - start


def same(one: Path, other: Path) -> None:
    """Weights, their average, the whole last state and the log are equal to the bit."""
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
    nursery: Nursery, undisturbed: tuple[Path, float], tmp_path: Path, kills: int
) -> None:
    whole, seconds = undisturbed
    draw = random.Random(kills)
    folder = tmp_path / "run"
    died: list[str] = []
    finished = 0
    while len(died) < kills:
        within_a_save = len(died) % 2 == 0
        if within_a_save:
            status = nursery.run(arguments(folder), die_at=draw.randrange(1, 60))
        else:
            status = nursery.run(arguments(folder), kill_after=draw.uniform(0.2, 1.0) * seconds)
        if status == 0:
            same(folder, whole)
            shutil.rmtree(folder)
            finished += 1
        else:
            assert status == -signal.SIGKILL, nursery.stderr.read_text()
            died.append("in a save" if within_a_save else "at a random moment")
    assert nursery.run(arguments(folder)) == 0, nursery.stderr.read_text()
    same(folder, whole)
    assert died.count("in a save") == kills // 2
    print(f"{len(died)} kills, {finished + 1} runs finished, all equal to the undisturbed one")
