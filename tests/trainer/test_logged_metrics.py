"""Metrics of the contrastive features in the log: values, steps, and no effect on the training."""

from __future__ import annotations

import copy
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pysupcon import functional
from pysupcon.config import Config, parse_args
from pysupcon.data.datamodule import load_data
from pysupcon.trainer import environment
from pysupcon.trainer.checkpoint import checkpoints, read_manifest
from pysupcon.trainer.loop import Trainer, train
from pysupcon.trainer.objective import METRICS
from pysupcon.trainer.run import load_run

FIXED = (
    "--data.dataset digits --data.augmentation weak --data.batch_size 128 --trainer.epochs 1 "
    "--trainer.threads 1 --evaluate false --trainer.cpu true"
)


def _config(output_dir: Path, *args: str) -> Config:
    small = [] if "--model.backbone" in args else ["--model.width", "8"]
    return parse_args([*FIXED.split(), *small, "--output_dir", str(output_dir), *args])[0]


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ("--loss.name supcon", {}),
        ("--loss.name infonce --data.views 3", {}),
        ("--loss.name supcon --loss.contrast_mode one --trainer.chunk_size 50", {"contrast_mode": "one"}),
        ("--loss.name spread --loss.pairing cross", {}),
    ],
)
def test_values(tmp_path: Path, args: str, options: dict[str, Any]) -> None:
    """The means over the two batches of a step, of the features before the update."""
    batch_norm = "--model.backbone vit_tiny_patch16_224"  # none: chunks would change the features
    arguments = "{img_size: 8, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}"
    given = [
        *args.split(),
        *batch_norm.split(),
        "--model.timm_args",
        arguments,
        "--trainer.metrics_steps",
        "1",
    ]
    config = _config(tmp_path, *given, "--trainer.accumulation_steps", "2")
    environment.apply_environment(config)
    data = load_data(config.data)
    trainer = Trainer(config, data, tmp_path)
    trainer.model.train()
    network = copy.deepcopy(trainer.network)
    batches = list(islice(iter(trainer.loader), 2))
    found = []
    for views, labels in batches:
        images = data.normalize(views).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        rows = network(images, labels.repeat_interleave(views.shape[1])).projection
        features = rows.unflatten(0, (-1, views.shape[1]))
        known = None if config.loss.name == "infonce" else labels
        if config.loss.pairing == "cross":
            options = {"candidates": features[:, 0], "candidate_labels": labels}
            features = features[:, 1]
        found.append(torch.stack(functional.contrastive_metrics(features, known, **options)))
    values, _ = trainer.step(iter(batches), 1, False)
    # Chunks change the rounding of float32 features.
    assert [values[name] for name in METRICS] == pytest.approx(torch.stack(found).mean(0).tolist(), abs=1e-6)
    assert 0 < values["contrastive_accuracy"] <= 1


def test_steps_and_no_effect_on_the_training(tmp_path: Path) -> None:
    with_metrics, without = tmp_path / "with", tmp_path / "without"
    train(_config(with_metrics, "--trainer.metrics_steps", "4"))
    train(_config(without, "--trainer.metrics_steps", "null"))
    first, second = load_run(with_metrics).log(), load_run(without).log()
    assert [line["step"] for line in first if METRICS[0] in line] == [4, 8]
    assert [line["step"] for line in first if f"val_{METRICS[2]}" in line] == [10]
    assert read_manifest(checkpoints(with_metrics)[-1])["metrics"].keys() >= set(METRICS)
    assert not any(name.removeprefix("val_") in METRICS for line in second for name in line)
    assert [line["loss"] for line in first] == [line["loss"] for line in second]
    weights, others = (load_file(run / "model.safetensors") for run in (with_metrics, without))
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


def test_a_mean_over_nothing_is_left_out(tmp_path: Path) -> None:
    """Views of one sample are its only positives: with one view there is none. A log without NaN is JSON."""
    config = _config(
        tmp_path, "--data.labels", "fine", "--trainer.metrics_steps", "1", "--data.batch_size", "8"
    )
    config.data.views = 1
    data = load_data(config.data)
    environment.apply_environment(config)
    trainer = Trainer(config, data, tmp_path)
    views, labels = next(iter(trainer.loader))
    first = torch.stack([(labels == label).nonzero()[0, 0] for label in labels.unique()])
    with pytest.warns(UserWarning, match="no anchor of this batch has a positive"):
        values, _ = trainer.step([(views[first], labels[first])], 1, False)
    assert values["loss"] == 0
    assert not values.keys() & set(METRICS)
