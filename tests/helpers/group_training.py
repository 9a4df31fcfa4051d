"""Small trainings on coloured digits with and without GroupDRO, and a groups file for them.

A test module that uses a fixture imports the function that makes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pysupcon.config import Config, parse_args
from pysupcon.data.config import DataConfig
from pysupcon.data.datamodule import DataModule, load_data
from pysupcon.data.group_files import Groups, write_groups
from pysupcon.trainer.loop import train

TINY = (
    "--data.dataset coloured_digits --data.augmentation none --data.views 1 --data.batch_size 128 "
    "--model.width 4 --model.classifier true --loss.name none --loss.cross_entropy_weight 1 "
    "--optimizer.learning_rate 0.005 --trainer.epochs 2 --trainer.threads 1 --trainer.cpu true "
    "--evaluate false"
)
GROUP_DRO = "--data.groups annotated --loss.group_dro.eta 0.1 --loss.group_dro.adjustment 2"


def tiny_config(folder: Path, *more: str) -> Config:
    return parse_args([*TINY.split(), "--output_dir", str(folder), *" ".join(more).split()])[0]


def coloured_digits(**fields: Any) -> DataModule:
    return load_data(DataConfig(dataset="coloured_digits", **fields))


def coarse_labels(data: DataModule) -> dict[str, Tensor]:
    return {name: samples.coarse for name, samples in data.splits.items()}


@pytest.fixture(scope="module", name="group_dro_run")
def train_group_dro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained with GroupDRO over the true groups, each drawn equally often."""
    return train(
        tiny_config(tmp_path_factory.mktemp("group_dro") / "run", GROUP_DRO, "--data.sampler groups")
    )


@pytest.fixture(scope="module", name="erm_run")
def train_erm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained with the mean loss (ERM)."""
    return train(tiny_config(tmp_path_factory.mktemp("erm") / "run", "--trainer.best_by worst_group"))


@pytest.fixture(scope="module", name="groups_file")
def write_groups_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DataModule]:
    """A groups file of coloured digits, with two groups per class, and its data."""
    data = coloured_digits()
    labels = coarse_labels(data)
    train_groups = 2 * labels["train"] + torch.arange(len(labels["train"])) % 2
    val_groups = 2 * labels["val"]
    groups = Groups(
        train_groups, val_groups, torch.tensor([0, 0, 1, 1]), {"data": {"dataset": "coloured_digits"}}
    )
    path = tmp_path_factory.mktemp("groups") / "new" / "groups.safetensors"
    write_groups(path, groups, data.splits, labels)
    return path, data
