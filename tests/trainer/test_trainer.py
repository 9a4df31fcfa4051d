"""The training loop: learning, logging and stopping, with one or several processes."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from pysupcon.config import Config, parse_args
from pysupcon.errors import ConfigError, RunError
from pysupcon.losses import LOSSES_BY_NAME
from pysupcon.models.model import ContrastiveModel, ModelOutput
from pysupcon.trainer import LossConfig, OptimizerConfig, loop, progress
from pysupcon.trainer.checkpoint import checkpoints, read_checkpoint
from pysupcon.trainer.config import LossName
from pysupcon.trainer.folders import lock_run_dir
from pysupcon.trainer.objective import Objective, batch_statistics
from pysupcon.trainer.optim import build_optimizer, build_scheduler
from pysupcon.trainer.run import load_run


def tiny(output_dir: Path | None, *args: str) -> Config:
    fixed = "--data.dataset digits --data.augmentation weak --data.batch_size 128 --model.width 8"
    fixed += " --trainer.epochs 1 --trainer.threads 1 --evaluate false --trainer.cpu true"
    where = [] if output_dir is None else ["--output_dir", str(output_dir)]
    return parse_args([*fixed.split(), *where, *args])[0]


def features_and_labels(run_dir: Path, split: str) -> tuple[Tensor, Tensor, Tensor]:
    run = load_run(run_dir)
    dataset = run.splits()[split]
    images = torch.stack([dataset[i][0] for i in range(len(dataset))])
    with torch.no_grad():
        return run.model.backbone(images), dataset.coarse, dataset.fine


def test_a_short_run_learns(tmp_path: Path) -> None:
    args = "--trainer.epochs 5 --model.classifier true --loss.cross_entropy_weight 1 --loss.name spread"
    config = tiny(
        tmp_path, *args.split(), "--optimizer.learning_rate", "0.005", "--optimizer.warmup_epochs", "1"
    )
    assert loop.train(config) == tmp_path
    log = load_run(tmp_path).log()
    assert [line["step"] for line in log] == list(range(1, 51))
    first, last = log[0], log[-1]
    assert last["loss"] < first["loss"] - 0.5
    assert last["contrastive"] < last["chance"] - 0.2
    assert abs(last["loss"] - last["contrastive"] - last["cross_entropy"]) < 1e-5
    assert last["valid_anchors"] == 256
    assert last["epoch"] == 5
    assert last["images_per_second"] > 0
    assert 50 < last["peak_memory_mib"] < 20000
    rates = [line["learning_rate"] for line in log]
    assert rates[0] == 0
    assert rates[10] == max(rates) == 0.005
    assert rates[-1] < 1e-4

    train, test = features_and_labels(tmp_path, "train"), features_and_labels(tmp_path, "test")
    for level, chance in ((1, 0.5), (2, 0.1)):
        probe = LogisticRegression(max_iter=500).fit(train[0], train[level])
        accuracy = probe.score(test[0], test[level])
        assert accuracy > (chance + 1) / 2, f"accuracy {accuracy} at chance {chance}"


@pytest.mark.parametrize(
    "args",
    [
        "--loss.name supcon --optimizer.name sgd --optimizer.learning_rate 0.1",
        "--loss.name sincere --optimizer.name lars --optimizer.learning_rate 1 --trainer.clip_norm 1",
        "--loss.name eps_supinfonce --data.labels fine --data.sampler shuffled --model.projection mlp",
        "--loss.name cnce --trainer.mixed_precision bf16 --trainer.chunk_size 30",
        "--loss.name infonce --loss.contrast_mode one --data.sampler per_class --data.samples_per_class 64",
        "--loss.name supcon --data.views 1 --trainer.chunk_size 50 --loss.learnable_temperature true",
        "--loss.name none --model.classifier true --loss.cross_entropy_weight 1 --model.decoder labelled "
        "--loss.reconstruction_weight 1 --trainer.chunk_size 100",
        "--loss.name none --model.decoder plain --loss.reconstruction_weight 1",
        "--loss.name spread --loss.pairing cross --loss.infonce_weight 0.5 --model.spectral_norm true "
        "--trainer.ema_decay 0.5 --trainer.chunk_size 60 --trainer.mixed_precision bf16",
        "--loss.name spread --model.encoders two --model.decoder plain --loss.reconstruction_weight 1 "
        "--model.classifier true --loss.cross_entropy_weight 1 --trainer.best_by reconstruction",
    ],
)
def test_every_loss_and_option_trains(tmp_path: Path, args: str) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # precision is fixed for a process otherwise
    config = tiny(tmp_path, *args.split())
    loop.train(config)
    log = load_run(tmp_path).log()
    assert len(log) == 10
    rows = 128 * config.data.views
    one = config.loss.contrast_mode == "one" or config.loss.pairing == "cross"
    expected = None if config.loss.name == "none" else 128 if one else rows
    assert log[0].get("valid_anchors") == expected
    parts = {"contrastive": config.loss.name != "none", "chance": config.loss.name != "none"}
    parts |= {"infonce": config.loss.infonce_weight > 0, "cross_entropy": config.model.classifier}
    parts |= {"reconstruction": config.model.decoder != "none"}
    parts |= {"second_cross_entropy": config.model.encoders == "two"}
    assert {name: name in log[0] for name in parts} == parts
    assert {name: f"val_{name}" in log[-1] for name in parts if name != "chance"}.items() <= parts.items()
    start = ContrastiveModel(config.model, channels=1, image_size=8, classes=2).state_dict()
    trained = load_run(tmp_path).model.state_dict()
    assert start.keys() == trained.keys()
    losses = [line["loss"] for line in log]
    assert sum(losses[-3:]) < sum(losses[:3])
    AcceleratorState._reset_state(reset_partial_state=True)


def test_non_finite_features_stop_the_run(tmp_path: Path) -> None:
    config = tiny(tmp_path, "--optimizer.name", "sgd", "--optimizer.learning_rate", "1e38")
    with pytest.raises(RunError, match=r"step \d+: .*not finite|step \d+: .* = (nan|inf)"):
        loop.train(config)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log
    assert all(math.isfinite(line["loss"]) for line in log)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("broken", ["gradient", "loss"])
def test_what_was_not_finite_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    build = loop.build_model

    def build_broken(*args: Any) -> ContrastiveModel:
        model = build(*args)
        assert model.classifier is not None
        if broken == "gradient":
            model.classifier.weight.register_hook(lambda grad: grad * math.inf)
        else:
            nn.init.constant_(model.classifier.bias, math.nan)
        return model

    monkeypatch.setattr(loop, "build_model", build_broken)
    config = tiny(tmp_path, "--model.classifier", "true", "--loss.cross_entropy_weight", "1")
    expected = {
        "gradient": r"^step 1: gradient_norm = (nan|inf); gradients that are not finite: classifier.weight$",
        "loss": r"^step 1: loss = nan, cross_entropy = nan, gradient_norm = nan; gradients .*: backbone",
    }
    with pytest.raises(RunError, match=expected[broken]):
        loop.train(config)


def test_a_folder_that_holds_a_run_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"output_dir .* already holds a run; continue it with --resume"):
        loop.train(tiny(tmp_path))
    assert (tmp_path / "log.jsonl").read_text() == "{}\n"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/name/checkpoints").mkdir(parents=True)
    config = tiny(None)

    def chosen() -> Path:
        with lock_run_dir(config, "name") as lock:
            return lock.folder

    assert chosen() == Path("runs/name-2")
    config.resume_from_checkpoint = "latest"
    assert chosen() == Path("runs/name")
    config.resume_from_checkpoint = "runs/name/checkpoints/step_00000001"
    assert chosen() == tmp_path / "runs/name"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["name"]


def test_the_average_of_the_weights(tmp_path: Path) -> None:
    """The average equals the definition over the weights after each step; the run validates and saves it."""
    args = "--trainer.ema_decay 0.6 --trainer.final_weights ema --trainer.checkpoint_steps 1"
    config = tiny(tmp_path, *args.split(), "--trainer.keep_checkpoints", "100")
    loop.train(config)
    steps = [read_checkpoint(path) for path in checkpoints(tmp_path)]
    assert len(steps) == 10
    name = next(name for name in steps[0].weights if name.endswith("weight"))
    average = steps[0].weights[name]
    for saved in steps[1:]:
        average = 0.6 * average + 0.4 * saved.weights[name]
    final = load_run(tmp_path).model.state_dict()[name]
    assert torch.allclose(final, average, atol=1e-6)
    assert not torch.allclose(final, steps[-1].weights[name], atol=1e-4)
    raw = tiny(tmp_path / "raw", *args.split()[:2])
    loop.train(raw)
    last = [load_run(folder).log()[-1] for folder in (tmp_path, tmp_path / "raw")]
    assert last[0]["loss"] == last[1]["loss"]
    assert last[0]["val_loss"] != last[1]["val_loss"]


def test_the_validation_loss_is_that_of_the_validation_split(tmp_path: Path) -> None:
    config = tiny(tmp_path, "--model.classifier", "true", "--loss.cross_entropy_weight", "1")
    loop.train(config)
    last, run = load_run(tmp_path).log()[-1], load_run(tmp_path)
    batches = list(run.data.loader(run.data.validation_batch_sampler(seed=0), split="val"))
    assert [len(labels) for _, labels in batches] == [71, 71]  # of 143, in batches of 128 at most
    losses = []
    with torch.no_grad():
        for views, labels in batches:
            outputs = run.model(run.data.normalize(views).flatten(0, 1))
            losses.append(Objective(config.loss, 2)(outputs, labels))
    for part in ("loss", "contrastive", "cross_entropy"):
        assert last[f"val_{part}"] == pytest.approx(sum(float(each[part]) for each in losses) / 2, rel=1e-5)


def test_batch_norm_is_not_synchronised_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer.sync_batch_norm needs CUDA devices.* runs on cpu"):
        loop.train(tiny(tmp_path, "--trainer.sync_batch_norm", "true"))


@pytest.mark.parametrize(("chunk_size", "warned"), [("127", True), ("128", False)])
def test_batch_norm_in_chunks_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], chunk_size: str, warned: bool
) -> None:
    loop.train(tiny(tmp_path, "--trainer.chunk_size", chunk_size, "--trainer.best_by", "null"))
    warning = "trainer.chunk_size 127: BatchNorm normalises each chunk separately"
    assert (warning in capsys.readouterr().err) == warned


def test_trackers_get_the_log(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loop.train(tiny(tmp_path, "--trainer.trackers", "[tensorboard]"))
    (file,) = [path for path in tmp_path.rglob("events.out.tfevents*") if path.parent.name == "pysupcon"]
    events = EventAccumulator(str(file))
    events.Reload()
    log = load_run(tmp_path).log()
    tracked = {event.step: event.value for event in events.Scalars("loss")}
    assert tracked == {line["step"]: pytest.approx(line["loss"], rel=1e-6) for line in log}
    assert [event.value for event in events.Scalars("val_loss")] == [pytest.approx(log[-1]["val_loss"])]


def test_slow_operations_are_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.02)
    for shown in (True, False):
        with progress.report_if_slow("counting sheep", enabled=shown):
            time.sleep(0.2)
    monkeypatch.setattr(progress, "DELAY", 60.0)
    with progress.report_if_slow("blinking"):
        pass
    assert capsys.readouterr().err == "counting sheep ...\n"


def test_unknown_tracker(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer.trackers"):
        loop.train(tiny(tmp_path, "--trainer.trackers", "[abacus]"))


# --- objective and optimizer


LOSSES: list[dict[str, Any]] = [
    *({"name": name} for name in LOSSES_BY_NAME),
    {"name": "spread", "alpha": 0.3},
    {"name": "spread", "alpha": 0.3, "base": "sincere"},
]


def test_the_names_of_losses() -> None:
    assert get_args(LossName) == (*LOSSES_BY_NAME, "none")


@pytest.mark.parametrize("arguments", LOSSES, ids=lambda a: "-".join(map(str, a.values())))
@pytest.mark.parametrize("mode", ["all", "one", "cross"])
def test_chance_is_the_loss_of_a_collapsed_representation(arguments: dict[str, Any], mode: Any) -> None:
    pairs = {"pairing": mode} if mode == "cross" else {"contrast_mode": mode}
    config = LossConfig(**arguments, **pairs)
    config.resolve()
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    point = nn.functional.normalize(torch.ones(12, 4), dim=1)
    loss = Objective(config, 2)(ModelOutput(point, point, None), labels)["contrastive"]
    valid, chance = batch_statistics(config, labels, labels.bincount(), 2).tolist()
    assert chance == pytest.approx(float(loss), rel=1e-5)
    assert valid == (12 if mode == "all" else 6)


def test_anchors_without_a_positive_are_not_counted() -> None:
    config = LossConfig()
    config.resolve()
    labels = torch.tensor([0, 0, 0, 1, 2])
    valid, chance = batch_statistics(config, labels, labels.bincount(), 1).tolist()
    assert (valid, chance) == (3, pytest.approx(math.log(4)))


def test_cross_entropy_has_its_own_weight() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2, 0])
    projection, logits = nn.functional.normalize(torch.randn(8, 5), dim=1), torch.randn(8, 3)
    config = LossConfig(weight=0.5, cross_entropy_weight=0.25)
    config.resolve()
    parts = Objective(config, 2)(ModelOutput(projection, projection, logits), labels)
    expected = nn.functional.cross_entropy(logits, torch.tensor([0, 0, 1, 1, 2, 2, 0, 0]))
    assert torch.allclose(parts["cross_entropy"], expected)
    assert torch.allclose(parts["loss"], 0.5 * parts["contrastive"] + 0.25 * expected)


def test_learning_rate() -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_epochs=2, warmup_start=0.1, final=0.01)
    optimizer = build_optimizer(config, nn.Linear(2, 2))
    scheduler = build_scheduler(config, optimizer, steps=100, steps_per_epoch=10)
    rates = []
    for _ in range(101):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(0.2)
    assert rates[10] == pytest.approx(2 * (0.1 + 0.9 / 2))
    assert rates[20] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(2 * (0.01 + 0.99 / 2))
    assert rates[100] == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW), ("lars", torch.optim.Optimizer)],
)
def test_optimizers(name: Any, kind: type[torch.optim.Optimizer]) -> None:
    config = OptimizerConfig(name=name, weight_decay=0.1)
    config.resolve()
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = build_optimizer(config, model)
    assert isinstance(optimizer, kind)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[id(model[0].weight)] == 0.1
    assert decay[id(model[0].bias)] == decay[id(model[1].weight)] == 0
    if name != "adamw":
        assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)
        assert not any(group.get("nesterov") for group in optimizer.param_groups)
