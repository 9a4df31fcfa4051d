"""Trainings with several labels per sample: data.dataset=image_table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.data_files import write_grey_image, write_text

import pysupcon
from pysupcon import functional
from pysupcon.config import Config, parse_args
from pysupcon.data.datamodule import load_data
from pysupcon.errors import ConfigError
from pysupcon.evaluation.evaluate import evaluate_run
from pysupcon.models.model import ModelOutput
from pysupcon.trainer import environment
from pysupcon.trainer.checkpoint import checkpoints
from pysupcon.trainer.loop import Trainer, train
from pysupcon.trainer.run import load_run

COUNT = 40


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The labels of an image are the three lowest bits of its number; some images have none."""
    root = tmp_path_factory.mktemp("table")
    rows = []
    for i in range(COUNT):
        write_grey_image(root / f"{i}.png", 5 * i, (8, 8))
        rows.append(f"{i}.png,{i & 1},{i >> 1 & 1},{i >> 2 & 1}")
    write_text(root / "labels.csv", "\n".join(["file,a,b,c", *rows]) + "\n")
    return root


def _config(root: Path, output_dir: Path, *args: str) -> Config:
    fixed = (
        "--data.dataset image_table --data.image_size 8 --data.sampler shuffled --data.batch_size 12 "
        "--data.augmentation weak --model.width 8 --trainer.epochs 2 --trainer.threads 1 --trainer.cpu true "
        "--evaluate false --trainer.metrics_steps 1"
    )
    where = ["--data.root", str(root), "--output_dir", str(output_dir)]
    return parse_args([*fixed.split(), *where, *args])[0]


@pytest.mark.parametrize(
    ("args", "loss"),
    [
        ("--loss.name supcon", pysupcon.SupConLoss(0.07)),
        (
            "--loss.name supcon --loss.multi_label jaccard --loss.overlap_threshold 0.3",
            pysupcon.SupConLoss(0.07, multi_label="jaccard", overlap_threshold=0.3),
        ),
        ("--loss.name sincere --trainer.chunk_size 5", pysupcon.SINCERELoss(0.07, multi_label="any")),
        ("--loss.name infonce", None),
    ],
)
def test_the_loss_gets_all_labels(
    root: Path, tmp_path: Path, args: str, loss: pysupcon.SupConLoss | None
) -> None:
    config = _config(root, tmp_path, *args.split())
    environment.apply_environment(config)
    trainer = Trainer(config, load_data(config.data), tmp_path)
    views, labels = next(iter(trainer.loader))
    assert labels.shape == (12, 3)
    rows = torch.nn.functional.normalize(
        torch.randn(24, 6, generator=torch.Generator().manual_seed(0)), dim=1
    )
    found = trainer.objective(ModelOutput(rows, rows, None), labels)["contrastive"]
    features = rows.unflatten(0, (12, 2))
    if loss is None:
        expected = functional.info_nce(features, temperature=0.07)
        metrics = functional.contrastive_metrics(features)
    else:
        expected = loss(features, labels)
        shared = (labels @ labels.T) > 0
        metrics = functional.contrastive_metrics(features, mask=shared)
    torch.testing.assert_close(found, expected)
    measured = trainer.objective.metrics(ModelOutput(rows, rows, None), labels)
    torch.testing.assert_close(torch.stack(list(measured.values())), torch.stack(metrics))
    values, _ = trainer.step([(views, labels)], 1, False)
    assert values["contrastive"] > 0
    assert 0 <= values["contrastive_accuracy"] <= 1
    assert "chance" not in values


def test_a_training_from_the_table_to_the_log(root: Path, tmp_path: Path) -> None:
    train(_config(root, tmp_path))
    run = load_run(tmp_path)
    assert (run.config.loss.multi_label, run.config.loss.overlap_threshold) == ("per_label", 0.0)
    log = run.log()
    assert len(log) == 4
    assert log[-1]["val_loss"] > 0
    assert checkpoints(tmp_path)
    train(_config(root, tmp_path, "--resume_from_checkpoint", "latest", "--trainer.epochs", "3"))
    assert len(load_run(tmp_path).log()) == 6
    with pytest.raises(ConfigError, match=r"the evaluators need one label per sample"):
        evaluate_run(tmp_path)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--evaluate true", "evaluate must be false for data.dataset=image_table: it needs one label per"),
        ("--model.classifier true --loss.cross_entropy_weight 1", "model.classifier must be false for data"),
        ("--loss.queue 100", "loss.queue must be 0 for data.dataset=image_table"),
        ("--loss.gather true", "loss.gather must be false for data.dataset=image_table"),
        (
            "--loss.name sincere --loss.multi_label jaccard",
            "loss.multi_label must be any for loss.name=sincere, got 'jaccard'",
        ),
        (
            "--loss.overlap_threshold 0.5",
            "loss.overlap_threshold has no effect with loss.multi_label=per_label",
        ),
        (
            "--loss.multi_label any --loss.overlap_threshold 1",
            r"loss.overlap_threshold must lie in \[0, 1\), got 1",
        ),
        (
            "--loss.name infonce --loss.multi_label any",
            "loss.multi_label has no effect with loss.name=infonce",
        ),
    ],
)
def test_errors(root: Path, tmp_path: Path, args: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(root, tmp_path, *args.split())


def test_one_label_per_sample_has_no_multi_label() -> None:
    with pytest.raises(
        ConfigError, match=r"loss.multi_label has no effect with data.dataset=mnist5k, which has"
    ):
        parse_args(["--loss.multi_label", "any"])
