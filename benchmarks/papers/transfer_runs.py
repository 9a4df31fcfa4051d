"""Trains and applies the encoders of :mod:`benchmarks.papers.transfer`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.papers.encoders import BATCH, random_model, train_once
from benchmarks.papers.figures import PENALTIES
from benchmarks.papers.methods import CONFIGS, FASHION_ROOT
from benchmarks.papers.study import pack_bits

if TYPE_CHECKING:
    from pysupcon.data import DataConfig
    from pysupcon.evaluators import FeatureSplits
    from pysupcon.trainer.run import Run

SIDE = 14


@dataclass(frozen=True)
class Domain:
    """A data set that encoders are trained on and evaluated on.

    Attributes:
        title: its name in the tables.
        data: fields of the data section.
        epochs: of a training, so that those of all data sets have about 200 steps or more.
        minutes: processor minutes of a training.
        evaluation: processor minutes of an evaluation on it.
    """

    title: str
    data: dict[str, Any]
    epochs: int
    minutes: float
    evaluation: float


DOMAINS = {
    "mnist5k": Domain("MNIST", {"dataset": "mnist5k"}, 8, 0.2, 0.025),
    "fashion_mnist": Domain(
        "Fashion-MNIST",
        {"dataset": "fashion_mnist", "root": FASHION_ROOT, "train_size": 5000, "val_fraction": 0.02},
        8,
        0.22,
        0.035,
    ),
    "digits": Domain("digits", {"dataset": "digits"}, 24, 0.2, 0.015),
}
_HEAD = ("--model.projection", "mlp", "--loss.temperature", "0.1")
METHODS = {
    "supcon": ("SupCon", "mnist5k_fine_supcon", _HEAD),
    "sincere": ("SINCERE", "mnist5k_fine_sincere", _HEAD),
    "ce": ("cross-entropy", "mnist5k_coarse_ce", ()),
}
"""Method -> title, config, arguments"""


def train_encoder(source: str, key: str, seed: int, folder: Path) -> float:
    """Train an encoder on a source; see :func:`benchmarks.papers.encoders.train_once`."""
    domain, (_, config, extra) = DOMAINS[source], METHODS[key]
    data = [word for name, value in domain.data.items() for word in (f"--data.{name}", str(value))]
    arguments = [
        "--config", str(CONFIGS / f"{config}.yaml"), *data, "--data.labels", "fine", *extra,
        "--data.augmentation", "strong", "--data.views", "2", "--trainer.epochs", str(domain.epochs),
        "--trainer.checkpoint_epochs", str(domain.epochs), "--trainer.threads", "1",
        "--seed", str(seed), "--output_dir", str(folder),
    ]  # fmt: skip
    return train_once(arguments, folder)


def _target(name: str) -> DataConfig:
    from pysupcon.data import DataConfig

    return DataConfig(**DOMAINS[name].data, labels="fine", image_size=SIDE, views=1, augmentation="none")


def transferred(encoder: Run, target: str) -> FeatureSplits:
    """Features of the target's images, as ``pysupcon transfer`` computes them."""
    from pysupcon.commands.transfer import TransferArguments, transfer_features

    arguments = TransferArguments(_target(target), batch_size=BATCH, device="cpu", progress=False)
    return transfer_features(encoder, arguments)[0]


def pixels(target: str) -> FeatureSplits:
    from pysupcon.data.datamodule import load_data
    from pysupcon.evaluation.features import SPLITS, extract_features
    from pysupcon.evaluators import FeatureSplits

    config = _target(target)
    config.check()
    config.resolve()
    data, device = load_data(config), torch.device("cpu")
    return FeatureSplits(
        *(
            extract_features(
                lambda images: images.flatten(1),
                data.evaluation_dataset(name),
                batch_size=BATCH,
                device=device,
            )
            for name in SPLITS
        )
    )


def write_untrained(trained: Path, seed: int, folder: Path) -> Path:
    """Write a run like ``trained`` whose network has random weights; returns ``folder``."""
    from pysupcon.trainer.checkpoint import pack_weights
    from pysupcon.trainer.run import WEIGHTS_FILE, load_run

    model = random_model(load_run(trained), seed)
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    (folder / WEIGHTS_FILE).write_bytes(pack_weights(model.state_dict()))
    return folder


def measure(splits: FeatureSplits) -> dict[str, Any]:
    """Whether each test image is classified correctly, and how the logistic regression was chosen."""
    from pysupcon.evaluators import KNN, FeatureSplits, KNNConfig, Transfer, TransferConfig
    from pysupcon.evaluators.transfer import concatenate

    linear = dict(Transfer(TransferConfig(penalties=PENALTIES))(splits))
    both = concatenate(splits.train, splits.val)
    nearest = dict(KNN(KNNConfig(k=[1]))(FeatureSplits(both, splits.val, splits.test)))
    correct = {"logistic": linear["transfer/correct"], "knn": nearest["knn/k=1/fine/correct"]}
    packed = {figure: pack_bits(bits) for figure, bits in correct.items() if isinstance(bits, Tensor)}
    chosen = {kind: linear[f"transfer/{kind}"] for kind in ("val_accuracy", "chosen", "converged")}
    return {"samples": len(splits.test), **packed, **chosen}
