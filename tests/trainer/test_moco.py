"""A queue of earlier rows and a momentum encoder: the objective, the training, and its checkpoints."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from pysupcon.config import Config, load_config, parse_args, to_yaml
from pysupcon.losses import LOSSES_BY_NAME
from pysupcon.memory import MemoryQueue
from pysupcon.models.config import ModelConfig
from pysupcon.models.model import ContrastiveModel, ModelOutput
from pysupcon.models.momentum import MomentumEncoder
from pysupcon.trainer import LossConfig
from pysupcon.trainer.checkpoint import checkpoints, read_checkpoint
from pysupcon.trainer.loop import train
from pysupcon.trainer.objective import Objective, batch_statistics
from pysupcon.trainer.run import load_run

LABELS = torch.tensor([0, 0, 1, 2])
QUEUED = torch.tensor([0, 2, 2, 3])
MOMENTUM = 0.9
MOCO = f"--model.momentum {MOMENTUM} --loss.queue 300"
QUEUE = "--loss.queue 300 --loss.learnable_temperature true"
TIMES = ("images_per_second", "peak_memory_mib")


def _config(folder: Path, arguments: str, *more: str) -> Config:
    """Ten steps; the queue is full after the second or third."""
    fixed = (
        "--data.dataset digits --data.augmentation weak --data.batch_size 128 --model.width 4 "
        "--model.projection linear --model.projection_dim 8 --trainer.epochs 1 --trainer.threads 1 "
        "--evaluate false --trainer.cpu true --trainer.checkpoint_steps 4 --trainer.keep_checkpoints 9"
    )
    return parse_args([*fixed.split(), *arguments.split(), "--output_dir", str(folder), *more])[0]


def _model(**fields: Any) -> ContrastiveModel:
    config = ModelConfig(width=4, **fields)
    config.resolve()
    return ContrastiveModel(config, channels=1, image_size=8, classes=2)


def _rows(count: int) -> Tensor:
    return normalize(torch.randn(count, 6, dtype=torch.float64), dim=1)


def _queue() -> MemoryQueue:
    """Two slots are empty."""
    queue = MemoryQueue(6, 6, dtype=torch.float64)
    queue.enqueue(_rows(4), QUEUED)
    return queue


def _moco_loss(
    queries: Tensor, keys: Tensor, queue: MemoryQueue, labels: Tensor | None, temperature: float, batch: bool
) -> Tensor:
    """SupCon of queries against the keys of the batch and the queue, by the definition; float64."""
    losses = []
    for i, query in enumerate(queries):
        same = torch.arange(4) == i if labels is None else labels == labels[i]
        queued = torch.zeros(4, dtype=torch.bool) if labels is None else labels[i] == QUEUED
        s = torch.cat([keys, queue.rows[:4]]) @ query / temperature
        positives = torch.cat([same, queued])
        included = torch.cat([same | batch, torch.ones(4, dtype=torch.bool)])
        losses.append(s[included].logsumexp(0) - s[positives].mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("batch_negatives", [True, False])
@pytest.mark.parametrize("name", ["supcon", "infonce"])
def test_the_loss_of_queries_keys_and_queue(name: Any, batch_negatives: bool) -> None:
    config = LossConfig(name=name, temperature=0.3, queue=6, batch_negatives=batch_negatives)
    queue, queries, keys = _queue(), _rows(4), _rows(4)
    objective = Objective(config, 2, None, queue, momentum=True)
    labels = LABELS if name == "supcon" else None
    expected = _moco_loss(queries, keys, queue, labels, 0.3, batch_negatives)
    got = objective(ModelOutput(queries, queries, None), LABELS, None, keys)["contrastive"]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    both = torch.stack([queries, keys], dim=1).flatten(0, 1)  # in validation: the model encodes both views
    got = objective(ModelOutput(both, both, None), LABELS)["contrastive"]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_terms_beside_the_contrastive_loss() -> None:
    """Labels, groups and InfoNCE are those of the first view."""
    config = LossConfig(temperature=0.3, queue=6, infonce_weight=0.5, cross_entropy_weight=0.25)
    queue, queries, keys, logits = _queue(), _rows(4), _rows(4), torch.randn(4, 3)
    objective = Objective(config, 2, None, queue, momentum=True)
    parts = objective(ModelOutput(queries, queries, logits), LABELS, None, keys)
    torch.testing.assert_close(parts["infonce"], _moco_loss(queries, keys, queue, None, 0.3, True))
    torch.testing.assert_close(parts["cross_entropy"], torch.nn.functional.cross_entropy(logits, LABELS))


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("batch_negatives", [True, False])
@pytest.mark.parametrize("name", LOSSES_BY_NAME)
def test_chance_is_the_loss_of_a_collapsed_representation(
    name: Any, batch_negatives: bool, momentum: bool
) -> None:
    config = LossConfig(name=name, queue=6, batch_negatives=batch_negatives)
    config.resolve()
    point = normalize(torch.ones(8, 6, dtype=torch.float64), dim=1)
    queue = MemoryQueue(6, 6, dtype=torch.float64)
    queue.enqueue(point[:4], QUEUED)
    objective = Objective(config, 2, None, queue, momentum)
    outputs = ModelOutput(point[:4], point[:4], None) if momentum else ModelOutput(point, point, None)
    loss = objective(outputs, LABELS, None, point[:4] if momentum else None)["contrastive"]
    counts, memory = LABELS.bincount(minlength=4), objective.memory_counts(4)
    valid, chance = batch_statistics(
        config, LABELS, counts, 2, memory_counts=memory, momentum=momentum
    ).tolist()
    assert chance == pytest.approx(float(loss), rel=1e-6)
    assert valid == (4 if momentum else 8)


def test_the_key_encoder_follows_the_model() -> None:
    model = _model(projection="linear", projection_dim=5, spectral_norm=True).eval()
    keys = MomentumEncoder(model, MOMENTUM)
    before = copy.deepcopy(dict(keys.model.named_parameters()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    keys.update(model)
    for name, parameter in model.named_parameters():
        expected = MOMENTUM * before[name] + (1 - MOMENTUM) * parameter
        torch.testing.assert_close(dict(keys.model.named_parameters())[name], expected)
    assert not any(parameter.requires_grad for parameter in keys.parameters())


def test_keys_are_projections_in_training_mode() -> None:
    model = _model(projection="mlp", projection_dim=5)
    images = torch.randn(7, 1, 8, 8)
    keys = MomentumEncoder(model, MOMENTUM)(images)
    torch.testing.assert_close(keys, model(images).projection)  # the batch statistics of BatchNorm
    assert not keys.requires_grad
    assert keys.shape == (7, model.projection_dim)
    assert _model().projection_dim == 16  # the embedding


@pytest.fixture(scope="module", params=[MOCO, QUEUE], ids=["moco", "queue"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, train(_config(tmp_path_factory.mktemp("finished") / "run", request.param))


def test_what_a_checkpoint_holds(finished: tuple[str, Path]) -> None:
    arguments, folder = finished
    content = read_checkpoint(checkpoints(folder)[0])
    state, training = content.training["objective"], content.training
    views = 1 if arguments == MOCO else 2
    assert state["queue.rows"].shape == (300, 8)
    assert state["queue.filled"] == 300
    assert state["queue.position"] == 4 * 128 * views % 300
    torch.testing.assert_close(state["queue.rows"].norm(dim=1), torch.ones(300))
    assert set(state["queue.labels"].tolist()) == {0, 1}
    assert ("key_encoder" in training) == (arguments == MOCO)
    if arguments == MOCO:
        for name, value in content.weights.items():
            if name.endswith("weight") and value.dim() > 1:
                assert not torch.equal(training["key_encoder"][f"model.{name}"], value)
    final = load_file(folder / "model.safetensors")  # of the trained encoder
    assert final.keys() == content.weights.keys()
    log = load_run(folder).log()
    assert [line["valid_anchors"] for line in log] == [128 * views] * 10
    assert log[0]["chance"] < log[1]["chance"] < log[-1]["chance"]


def test_a_resumed_run_equals_an_uninterrupted_one(finished: tuple[str, Path], tmp_path: Path) -> None:
    arguments, folder = finished
    other = tmp_path / "run"
    shutil.copytree(folder, other)
    for path in checkpoints(other)[1:]:
        shutil.rmtree(path)
    train(_config(other, arguments, "--resume_from_checkpoint", "latest"))
    first, second = (read_checkpoint(checkpoints(run)[-1]) for run in (folder, other))
    assert first.step == second.step == 10
    for one, two in (
        (first.weights, second.weights),
        (first.training["objective"], second.training["objective"]),
        (first.training.get("key_encoder", {}), second.training.get("key_encoder", {})),
    ):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    logs = [
        [{name: value for name, value in line.items() if name not in TIMES} for line in load_run(run).log()]
        for run in (folder, other)
    ]
    assert logs[0] == logs[1]


def test_a_config_from_before_has_no_queue(tmp_path: Path) -> None:
    text = to_yaml(_config(tmp_path / "run", ""))
    lines = [
        line for line in text.splitlines() if line.strip().split(":")[0] not in ("queue", "batch_negatives")
    ]
    assert len(lines) == len(text.splitlines()) - 2
    (tmp_path / "config.yaml").write_text("\n".join(lines), encoding="utf-8")
    config = load_config(tmp_path / "config.yaml")
    assert (config.loss.queue, config.loss.batch_negatives, config.model.momentum) == (0, True, 0.0)


@pytest.mark.parametrize(
    "arguments",
    [
        f"{MOCO} --loss.name infonce --loss.batch_negatives false --trainer.chunk_size 50",
        f"{MOCO} --loss.name spread --loss.infonce_weight 1 --trainer.accumulation_steps 2 "
        "--model.spectral_norm true --model.classifier true --loss.cross_entropy_weight 1",
        "--loss.queue 100 --loss.contrast_mode one --data.views 3 --trainer.chunk_size 50",
    ],
)
def test_with_other_options(arguments: str, tmp_path: Path) -> None:
    log = load_run(train(_config(tmp_path / "run", arguments))).log()
    assert all(torch.tensor(line["loss"]).isfinite() for line in log)
    assert "val_contrastive" in log[-1]
