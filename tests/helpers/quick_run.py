"""A run that is trained in about a second."""

from __future__ import annotations

from pathlib import Path

from pysupcon.config import parse_args
from pysupcon.trainer.loop import train

ARGUMENTS = (
    "--data.dataset digits --data.augmentation none --data.batch_size 128 --trainer.threads 1 "
    "--evaluate false --trainer.cpu true --model.width 4 --trainer.epochs 1 --trainer.best_by null"
)


def train_quickly(folder: Path, *more: str) -> Path:
    """Train on 8 x 8 digits into ``folder``, which must not exist, and return it; ``more`` are arguments."""
    return train(parse_args([*ARGUMENTS.split(), *more, "--output_dir", str(folder)])[0])
