"""Steps of several batches use the mean gradient; logs and checkpoints count optimizer steps."""

from __future__ import annotations

import copy
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.parallel_training import assert_same_training, training_arguments
from helpers.training_server import TrainingServer, start_training_server  # noqa: F401
from safetensors.torch import load_file

from pysupcon.config import Config, parse_args
from pysupcon.data.datamodule import load_data
from pysupcon.data.samplers import BalancedBatchSampler, ShuffledBatchSampler
from pysupcon.errors import ConfigError, Interrupted
from pysupcon.trainer import environment
from pysupcon.trainer.checkpoint import checkpoints, read_manifest
from pysupcon.trainer.loop import Trainer, train
from pysupcon.trainer.optim import learning_rate_factor
from pysupcon.trainer.run import read_log

PER_EPOCH = 10
"""batches of 128 in the training split of 1,295 digits"""


def config(output_dir: Path, *args: str) -> Config:
    fixed = "--data.dataset digits --data.augmentation weak --data.batch_size 128 --model.width 8"
    fixed += " --trainer.epochs 2 --trainer.threads 1 --evaluate false --trainer.cpu true"
    return parse_args([*fixed.split(), "--output_dir", str(output_dir), *args])[0]


@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize("chunk_size", [None, 128])
def test_the_step_is_that_of_the_mean_gradient(
    tmp_path: Path, clip_norm: float | None, chunk_size: int | None
) -> None:
    """Equals three batches accumulated by hand, with batch normalisation and a learnable temperature."""
    sgd = (
        "--optimizer.name sgd --optimizer.momentum 0 --optimizer.weight_decay 0 --optimizer.learning_rate 0.5"
    )
    options = [*sgd.split(), "--loss.learnable_temperature", "true", "--trainer.accumulation_steps", "3"]
    whole = config(tmp_path, *options)
    whole.trainer.clip_norm, whole.trainer.chunk_size = clip_norm, chunk_size
    whole.resolve()
    environment.apply_environment(whole)
    data = load_data(whole.data)
    trainer = Trainer(whole, data, tmp_path)
    trainer.model.train()
    network, objective = copy.deepcopy(trainer.network), copy.deepcopy(trainer.objective)
    batches = [tuple(batch) for batch in islice(iter(trainer.loader), 3)]
    losses, anchors = [], 0
    for views, labels in batches:
        images = data.normalize(views).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        loss = objective(network(images, labels.repeat_interleave(2)), labels)["loss"]
        loss.backward()  # gradients add up
        losses.append(loss.item())
        anchors += 2 * len(labels)
    parameters = [*network.parameters(), *objective.parameters()]
    gradients = [parameter.grad / 3 for parameter in parameters if parameter.grad is not None]
    assert len(gradients) == len(parameters)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    factor = 1.0 if clip_norm is None else min(1.0, clip_norm / norm)
    assert clip_norm is None or factor < 0.5, "the gradient was to be clipped"

    values, stop = trainer.step(iter(batches), 1, False)
    assert not stop
    assert values["loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert values["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    assert values["valid_anchors"] == anchors
    after = [*trainer.network.parameters(), *trainer.objective.parameters()]
    for parameter, gradient, updated in zip(parameters, gradients, after, strict=True):
        # Sums of three float32 gradients, divided before or after the sum, differ by rounding.
        torch.testing.assert_close(updated, parameter - 0.5 * factor * gradient, rtol=1e-5, atol=1e-6)
    for buffer, moved in zip(network.buffers(), trainer.network.buffers(), strict=True):
        torch.testing.assert_close(moved, buffer)  # running statistics of every batch
    assert all(parameter.grad is None for parameter in after)


def test_everything_is_counted_in_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An epoch of ten batches has three steps of three batches; the tenth batch is skipped."""
    whole = config(tmp_path, "--trainer.accumulation_steps", "3", "--optimizer.warmup_epochs", "1")
    train(whole)
    log = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in log] == [pytest.approx(step / 3) for step in range(1, 7)]
    rates = [learning_rate_factor(k, config=whole.optimizer, steps=6, steps_per_epoch=3) for k in range(6)]
    assert [line["learning_rate"] for line in log] == pytest.approx([1e-3 * rate for rate in rates])
    assert ["val_loss" in line for line in log] == [False, False, True] * 2
    assert log[0]["valid_anchors"] == 3 * 256
    sampler = read_manifest(checkpoints(tmp_path)[-1])["sampler"]
    assert (sampler["epoch"], sampler["batch"]) == (2, 0)
    said = capsys.readouterr().err
    assert said.count("trainer.accumulation_steps 3: a step takes the mean gradient of 3 batches of 128") == 1
    assert said.count("For a larger contrastive batch raise data.batch_size") == 1


def test_no_word_where_nothing_is_contrasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = "--loss.name none --model.classifier true --loss.cross_entropy_weight 1 --trainer.epochs 1"
    train(config(tmp_path, *only.split(), "--trainer.accumulation_steps", "5"))
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2]
    assert "contrastive batch" not in capsys.readouterr().err


def test_a_training_resumed_between_steps(tmp_path: Path) -> None:
    """Resumed within an epoch, the run ends with the weights of an uninterrupted run, bitwise."""
    options = ("--trainer.accumulation_steps", "4", "--trainer.ema_decay", "0.5", "--trainer.best_by", "null")
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "run"
    train(config(undisturbed, *options))
    with pytest.raises(Interrupted, match="after step 1 of 4"):
        train(config(folder, *options, "--trainer.time_budget", "1e-9"))
    assert read_manifest(checkpoints(folder)[-1])["sampler"]["batch"] == 4
    with pytest.raises(ConfigError, match=r"^trainer.accumulation_steps must be as in the checkpoint"):
        train(config(folder, "--resume_from_checkpoint", "latest", "--trainer.accumulation_steps", "2"))
    train(config(folder, *options, "--resume_from_checkpoint", "latest"))
    first, second = (load_file(run / "model.safetensors") for run in (undisturbed, folder))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    losses = [[line["loss"] for line in read_log(run / "log.jsonl")] for run in (undisturbed, folder)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


@pytest.mark.parametrize("chunks", [(), ("--trainer.chunk_size", "24")], ids=["whole", "chunks"])
def test_two_processes_take_the_steps_of_one(
    server: TrainingServer, tmp_path: Path, chunks: tuple[str, ...]
) -> None:
    """The processes exchange gradients once per step, for all its batches."""
    one, two = tmp_path / "one", tmp_path / "two"
    options = ("--trainer.accumulation_steps", "2", "--optimizer.warmup_epochs", "0")
    assert server.run(training_arguments(one, *options)) == 0, server.output()
    assert server.run(training_arguments(two, *options, *chunks), processes=2) == 0, server.output()
    assert server.output().count("trainer.accumulation_steps 2: a step takes the mean gradient") == 1
    assert_same_training(two, one)


@pytest.mark.parametrize("kind", [ShuffledBatchSampler, BalancedBatchSampler])
def test_an_epoch_has_whole_steps(kind: Any) -> None:
    labels = torch.arange(1295) % 10
    plain = kind(labels, 128, seed=3, steps=2 * PER_EPOCH)
    threes = kind(labels, 128, seed=3, steps=18, accumulation_steps=3)
    assert (plain.steps_per_epoch, threes.steps_per_epoch) == (10, 9)
    samples = [[[sample for sample, _ in batch] for batch in batches] for batches in (plain, threes)]
    assert samples[1][:9] == samples[0][:9]
    assert kind is BalancedBatchSampler or samples[1][9:] == samples[0][10:19]
    draws = [draw for batch in threes for _, draw in batch]
    assert draws == list(range(18 * 128))
    assert list(kind(labels, 128, seed=3, steps=18, start=12, accumulation_steps=3)) == list(threes)[12:]


def test_a_step_of_more_batches_than_an_epoch_has(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="accumulation_steps must be at most the 10 batches of an epoch, got 11"
    ):
        train(config(tmp_path / "run", "--trainer.accumulation_steps", "11"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"trainer.accumulation_steps must be at least 1"):
        config(tmp_path, "--trainer.accumulation_steps", "0").resolve()
