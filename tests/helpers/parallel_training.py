"""A training that several processes can repeat, and the comparison of two such trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pysupcon.trainer.run import read_log

VIT_ARGUMENTS = "{img_size: 8, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}"


def training_arguments(folder: Path, *more: str) -> list[str]:
    """Arguments of a training of ten steps per epoch. It has no dropout and no batch norm, so that the result
    does not depend on the number of processes."""
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
    return [*fixed.split(), "--model.timm_args", VIT_ARGUMENTS, "--output_dir", str(folder), *more]


def assert_same_training(folder: Path, other: Path) -> None:
    """Check that two runs have equal logs and weights, up to the order of float32 sums."""
    first, second = (read_log(run / "log.jsonl") for run in (folder, other))
    for name in ("step", "epoch", "learning_rate", "valid_anchors"):
        assert [line[name] for line in first] == [line[name] for line in second], name
    parts = ("contrastive", "infonce", "cross_entropy", "second_cross_entropy", "reconstruction")
    for name in ("loss", *parts, "chance", "gradient_norm"):
        assert _column(first, name) == pytest.approx(_column(second, name), rel=2e-4), name
    # The temperature changes by little, and may return to its first value: its changes are compared.
    temperatures = _column(first, "temperature")
    span = max(temperatures) - min(temperatures)
    assert span > 1e-4, "the temperature did not change"
    tolerance = min(span / 50, 2e-4 * min(temperatures))
    assert temperatures == pytest.approx(_column(second, "temperature"), rel=0, abs=tolerance), "temperature"
    weights = [load_file(run / "model.safetensors") for run in (folder, other)]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=2e-4)


def _column(log: list[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in log]
