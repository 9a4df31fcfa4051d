"""Trains the encoders of the tables and computes the features of each row."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.papers.methods import CONFIGS, Method, Table

if TYPE_CHECKING:
    from pysupcon.evaluators import FeatureSplits
    from pysupcon.models.model import ContrastiveModel
    from pysupcon.trainer.run import Run

COST_FILE = "train_cost.json"
"""Written when a training has ended."""
BATCH = 512
"""Images that are encoded at once."""


def arguments(table: Table, method: Method, seed: int, folder: Path) -> list[str]:
    """Arguments of pysupcon/train.py for a trained method."""
    config = CONFIGS / f"{table.data}_{method.config or method.key}.yaml"
    root = ("--data.root", table.root) if table.root else ()
    given = [*table.arguments, *method.overrides, *root, "--seed", str(seed), "--output_dir", str(folder)]
    return ["--config", str(config), *given, "--trainer.threads", "1"]


def train_encoder(table: Table, method: Method, seed: int, folder: Path) -> float:
    """Train an encoder; see :func:`train_once`."""
    return train_once(arguments(table, method, seed, folder), folder)


def train_once(given: Sequence[str], folder: Path) -> float:
    """Train with arguments of pysupcon/train.py, or continue a training that was stopped.

    Returns:
        Processor minutes of the training, also if it has ended before.
    """
    from pysupcon.config import parse_args
    from pysupcon.trainer.loop import train

    cost = folder / COST_FILE
    if not cost.is_file():
        start = time.process_time()
        train(parse_args([*given, "--resume_from_checkpoint", "auto"])[0])
        minutes = (time.process_time() - start) / 60
        cost.write_text(json.dumps({"train_processor_minutes": minutes}), encoding="utf-8")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    found: float = json.loads(cost.read_text(encoding="utf-8"))["train_processor_minutes"]
    return found


def concatenate(first: Path, second: Path, folder: Path) -> None:
    """Concatenate two frozen encoders, as ``pysupcon concatenate`` does."""
    from pysupcon.commands.concatenate import concatenate_runs

    if not (folder / "config.yaml").is_file():
        concatenate_runs(first, second, folder)


def embeddings(folder: Path, projection: bool = False) -> FeatureSplits:
    """Features of a run's images: the embedding, or the output of its projection head."""
    from pysupcon.evaluation.features import run_features
    from pysupcon.evaluators import EvaluationConfig
    from pysupcon.trainer.run import load_run

    config = EvaluationConfig(features="projection") if projection else EvaluationConfig()
    config.progress = False
    return run_features(load_run(folder), config, torch.device("cpu"))


def pixels(folder: Path) -> FeatureSplits:
    """The images of a run's data themselves, as vectors."""
    from pysupcon.trainer.run import load_run

    return _features(load_run(folder), lambda images: images.flatten(1))


def untrained(folder: Path, seed: int) -> FeatureSplits:
    """Features of a network like that of a run, with random weights."""
    from pysupcon.trainer.run import load_run

    run = load_run(folder)
    return _features(run, random_model(run, seed).backbone)


def random_model(run: Run, seed: int) -> ContrastiveModel:
    """A model like that of a run, with random weights, in eval mode.

    Its BatchNorm layers have the statistics of the training images: with the initial ones (mean 0,
    variance 1) the network would be worse for a reason that has nothing to do with its weights.
    """
    from pysupcon.trainer.run import build_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(run.config, run.data)
    for layer in model.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            layer.momentum = None  # the mean of all batches
    with torch.no_grad():
        for batch in torch.utils.data.DataLoader(run.splits()["train"], batch_size=BATCH):
            model.backbone(batch[0])
    return model.eval()


def _features(run: Run, encode: object) -> FeatureSplits:
    from pysupcon.evaluation.features import SPLITS, extract_split
    from pysupcon.evaluators import FeatureSplits

    assert callable(encode)
    datasets = run.splits()
    found = {
        name: extract_split(
            encode, datasets[name], name, run.dir, batch_size=BATCH, device=torch.device("cpu")
        )
        for name in SPLITS
    }
    return FeatureSplits(**found)
