"""A dry run: one batch through everything, and nothing is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pysupcon.config import parse_args
from pysupcon.errors import ConfigError
from pysupcon.train import main

ARGUMENTS = [
    "--data.dataset", "digits", "--data.augmentation", "weak", "--data.batch_size", "64",
    "--model.width", "8", "--trainer.epochs", "2", "--trainer.threads", "1", "--trainer.cpu", "true",
    "--trainer.dry_run", "true",
]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "shown"),
    [
        ("", [r"batch +views uint8 \[64, 2, 1, 8, 8\], labels int64 \[64\] per process; 1 batch"]),
        (
            "--trainer.accumulation_steps 2 --trainer.chunk_size 20 --model.classifier true "
            "--loss.cross_entropy_weight 1 --trainer.ema_decay 0.5 --trainer.trackers [tensorboard] "
            "--optimizer.warmup_epochs 1",
            [r"logits float32 \[128, 2\]", r"cross_entropy \d", r"; 2 batch\(es\) per step"],
        ),
        (
            "--evaluate false --trainer.best_by null --model.momentum 0.9 --loss.queue 100",
            [r"valid_anchors 64"],
        ),
    ],
)
def test_a_dry_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: str,
    shown: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*ARGUMENTS, *more.split()]) == 0
    said = capsys.readouterr().out
    steps = 10 if "accumulation" in more else 20
    for pattern in (
        *shown, r"parameters +\d", r"contrastive \d", r"contrastive_accuracy \d", r"peak [\d,]+ MiB",
        rf"{2 * steps} steps, {steps} per epoch; nothing was written",
    ):  # fmt: skip
        assert re.search(pattern, said), (pattern, said)
    for part in ("validation   loss", "evaluators   coarse_to_fine, knn"):
        assert (part in said) == ("--evaluate false" not in more)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.log_with=")
def test_what_a_dry_run_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"trainer.dry_run starts from the beginning: leave out resume_from"
    ):
        parse_args([*ARGUMENTS, "--resume_from_checkpoint", "latest"])
    assert main([*ARGUMENTS, "--trainer.trackers", "[wandb]"]) == 2
    assert not list(tmp_path.iterdir())
