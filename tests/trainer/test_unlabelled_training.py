"""Trainings with samples whose class is not known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pysupcon.config import Config, parse_args
from pysupcon.data.datamodule import load_data
from pysupcon.data.unlabelled import UNKNOWN
from pysupcon.evaluation.features import run_features
from pysupcon.evaluators import KNN
from pysupcon.models.model import ModelOutput
from pysupcon.trainer import environment
from pysupcon.trainer.config import LossConfig
from pysupcon.trainer.loop import Trainer, train
from pysupcon.trainer.objective import Objective
from pysupcon.trainer.run import load_run


def _config(output_dir: Path, *args: str) -> Config:
    fixed = (
        "--data.dataset digits --data.augmentation weak --data.batch_size 128 --model.width 8 "
        "--trainer.epochs 1 --trainer.threads 1 --trainer.cpu true --data.ignore_index 3 --data.labels fine "
        "--data.sampler shuffled --evaluate false"
    )
    return parse_args([*fixed.split(), "--output_dir", str(output_dir), *args])[0]


def test_cross_entropy_leaves_them_out() -> None:
    """Value and gradient are those of the known rows alone; a batch without known rows has loss 0."""
    config = LossConfig(name="none", cross_entropy_weight=1.0)
    labels = torch.tensor([1, UNKNOWN, 0, UNKNOWN, 2])
    logits = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    objective = Objective(config, 2, unlabelled=True)

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return objective(ModelOutput(logits, logits, logits, None, None), labels)["cross_entropy"]

    value = loss(logits, labels)
    known = (labels != UNKNOWN).repeat_interleave(2)
    torch.testing.assert_close(value, F.cross_entropy(logits[known], labels.repeat_interleave(2)[known]))
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient[~known].count_nonzero() == 0
    assert gradient[known].count_nonzero() > 0
    assert loss(logits, torch.full_like(labels, UNKNOWN)) == 0


def test_a_classifier_trains_and_is_evaluated(tmp_path: Path) -> None:
    options = "--loss.name none --model.classifier true --loss.cross_entropy_weight 1"
    train(_config(tmp_path, *options.split()))
    run = load_run(tmp_path)
    assert run.config.data.ignore_index == 3
    assert run.model.classifier is not None
    assert run.model.classifier.out_features == 9
    assert run.log()[-1]["val_cross_entropy"] > 0
    splits = run_features(run, run.config.evaluation, torch.device("cpu"))
    for name, split in splits.items():
        assert torch.equal(split.fine, run.data.splits[name].fine)
        assert set(split.fine.tolist()) == set(range(9))
    values = {name: value for name, value in KNN()(splits) if isinstance(value, float)}
    assert 0 < values["knn/k=1/fine/accuracy"] <= 1


@pytest.mark.parametrize(
    ("args", "anchors"),
    [
        ("--loss.name supcon", "known"),
        ("--loss.name supcon --loss.unlabeled instance --trainer.chunk_size 50", "all"),
        ("--loss.name sincere --loss.pairing cross", "known"),
        ("--loss.name supcon --loss.pairing cross --loss.unlabeled instance", "all"),
        ("--loss.name infonce", "all"),
        ("--loss.name spread --loss.infonce_weight 0.5", "known"),
    ],
)
def test_anchors_chance_and_metrics(tmp_path: Path, args: str, anchors: str) -> None:
    """The figures of a step against the loss of the same rows, and of equal rows."""
    config = _config(tmp_path, *args.split(), "--trainer.metrics_steps", "1", "--loss.temperature", "0.5")
    environment.apply_environment(config)
    data = load_data(config.data)
    trainer = Trainer(config, data, tmp_path)
    views, labels = next(iter(trainer.loader))
    unknown = int((labels == UNKNOWN).sum())
    assert 0 < unknown < 64
    values, _ = trainer.step([(views, labels)], 1, False)
    rows = (128 if anchors == "all" else 128 - unknown) * (1 if config.loss.pairing == "cross" else 2)
    assert values["valid_anchors"] == rows
    equal = torch.nn.functional.normalize(torch.ones(256, 4), dim=1)
    flat = trainer.objective(ModelOutput(equal, equal, None), labels)
    assert values["chance"] == pytest.approx(flat["contrastive"].item(), rel=1e-5)
    assert 0 <= values["contrastive_accuracy"] <= 1
    metrics = trainer.objective.metrics(ModelOutput(equal, equal, None), labels)
    assert metrics["contrastive_accuracy"] == 0  # ties
