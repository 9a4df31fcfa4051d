"""GroupDRO in the trainer: the loss over several processes, resumed weights, checkpoints chosen by the worst
group."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.group_training import (  # noqa: F401
    GROUP_DRO,
    TINY,
    coarse_labels,
    tiny_config,
    train_erm,
    train_group_dro,
    write_groups_file,
)
from helpers.training_server import TrainingServer, start_training_server  # noqa: F401
from safetensors.torch import load_file
from torch import Tensor

from pysupcon.data.datamodule import DataModule
from pysupcon.data.group_files import (
    Groups,
    read_groups,
    write_groups,
)
from pysupcon.errors import ConfigError, Interrupted, RunError
from pysupcon.evaluation.evaluate import evaluate_run
from pysupcon.evaluators import EvaluationConfig, GroupDRO, ProjectionConfig, WorstGroupConfig
from pysupcon.trainer.checkpoint import best_checkpoint, checkpoints, read_checkpoint, read_manifest
from pysupcon.trainer.loop import train
from pysupcon.trainer.run import load_run, read_log

# The loss


@pytest.mark.parametrize("shares", [(7, 9), (16, 0), (1, 4, 11)])
def test_the_mean_over_the_processes_is_the_loss_of_the_whole_batch(shares: tuple[int, ...]) -> None:
    """Values, gradients and weights; a process may have no sample of a group, or no sample at all."""
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(16, generator=generator, dtype=torch.float64)
    groups = torch.randint(3, (16,), generator=generator)
    counts = torch.tensor([50, 9, 4])
    whole = GroupDRO(counts, eta=0.5, adjustment=1.0)
    joint = losses.clone().requires_grad_()
    value = whole(joint, groups)
    value.backward()
    pieces = list(zip(losses.split(shares), groups.split(shares), strict=True))

    def told(part: Tensor, own: Tensor) -> Tensor:
        members = F.one_hot(own, 3).double()
        return torch.cat([part @ members, members.sum(0), torch.ones(1)])

    total = sum(told(*piece) for piece in pieces)
    asked: list[Tensor] = []

    def all_reduce_sum(tensor: Tensor) -> Tensor:
        asked.append(tensor)
        return total

    values, gradients = [], []
    for part, own in pieces:
        mine = part.clone().requires_grad_()
        objective = GroupDRO(counts, eta=0.5, adjustment=1.0, all_reduce_sum=all_reduce_sum)
        found = objective(mine, own)
        found.backward()
        values.append(found.detach())
        gradients.append(mine.grad)
        torch.testing.assert_close(asked.pop(), told(part, own))
        torch.testing.assert_close(objective.weights, whole.weights)
        torch.testing.assert_close(objective.losses, whole.losses)
    torch.testing.assert_close(torch.stack(values).mean(), value.detach())
    torch.testing.assert_close(torch.cat(gradients) / len(shares), joint.grad)


def test_weights_stand_still_in_eval_mode_and_losses_of_absent_groups_stay() -> None:
    objective = GroupDRO(torch.tensor([4, 4]), eta=1.0)
    objective(torch.tensor([1.0, 3.0]), torch.tensor([0, 1]))
    weights = objective.weights.clone()
    assert objective.losses.tolist() == [1.0, 3.0]
    value = objective.eval()(torch.tensor([2.0, 5.0]), torch.tensor([0, 1]))
    assert value.item() == pytest.approx(float(weights @ torch.tensor([2.0, 5.0]).double()))
    assert torch.equal(objective.weights, weights)
    objective.train()(torch.tensor([7.0]), torch.tensor([0]))
    assert objective.losses.tolist() == [7.0, 3.0]
    figures = objective.metrics()
    assert {name: value.item() for name, value in figures.items()} == {
        "group=0/loss": 7.0, "group=0/weight": objective.weights[0].item(),
        "group=1/loss": 3.0, "group=1/weight": objective.weights[1].item(),
    }  # fmt: skip


def test_the_state_holds_the_weights_and_refuses_other_groups() -> None:
    objective = GroupDRO(torch.tensor([4, 6]), eta=1.0)
    objective(torch.tensor([1.0, 3.0]), torch.tensor([0, 1]))
    other = GroupDRO(torch.tensor([4, 6]), eta=1.0)
    other.load_state_dict(objective.state_dict())
    assert torch.equal(other.weights, objective.weights)
    wrong = GroupDRO(torch.tensor([5, 5]), eta=1.0)
    with pytest.raises(ValueError, match="of 4, 6 training samples, got groups of 5, 5"):
        wrong.load_state_dict(objective.state_dict())


# Training


def test_weights_and_loss_follow_the_formula_at_every_step(group_dro_run: Path) -> None:
    log, data = load_run(group_dro_run).log(), load_run(group_dro_run).data
    assert data.groups is not None
    offset = [2 / math.sqrt(count) for count in data.groups.counts.tolist()]
    q = [0.25] * 4
    for line in log:
        losses = [line[f"group={g}/loss"] for g in range(4)]
        q = [w * math.exp(0.1 * (loss + c)) for w, loss, c in zip(q, losses, offset, strict=True)]
        q = [w / sum(q) for w in q]
        assert [line[f"group={g}/weight"] for g in range(4)] == pytest.approx(q, rel=1e-6)
        assert line["group_dro"] == line["loss"]
        assert line["loss"] == pytest.approx(
            sum(w * loss for w, loss in zip(q, losses, strict=True)), rel=1e-5
        )
        assert line["cross_entropy"] == pytest.approx(sum(losses) / 4, rel=1e-5)  # groups equally often
    assert max(q) > 0.27, "the weights were to move"
    assert "val_group_dro" not in log[-1]
    assert log[-1]["val_loss"] == log[-1]["val_cross_entropy"]


def test_one_group_is_erm(erm_run: Path, groups_file: tuple[Path, DataModule], tmp_path: Path) -> None:
    """With a single group the robust loss is the mean: the same steps from the same initial weights."""
    data = groups_file[1]
    labels = coarse_labels(data)
    alone = Groups(torch.zeros_like(labels["train"]), torch.zeros_like(labels["val"]), torch.tensor([0]), {})
    file = tmp_path / "one.safetensors"
    write_groups(file, alone, data.splits, labels)
    run = train(tiny_config(tmp_path / "run", f"--data.groups {file} --loss.group_dro {{}}"))
    for first, second in zip(load_run(run).log(), load_run(erm_run).log(), strict=True):
        assert first["cross_entropy"] == pytest.approx(second["cross_entropy"], rel=1e-4)
    weights = [load_file(folder / "model.safetensors") for folder in (run, erm_run)]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_a_resumed_training_equals_an_uninterrupted_one(group_dro_run: Path, tmp_path: Path) -> None:
    more = (GROUP_DRO, "--data.sampler groups")
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(tiny_config(folder, *more, "--trainer.time_budget 1e-9"))
    saved = read_checkpoint(checkpoints(folder)[-1])
    assert saved.step < 20
    weights = saved.training["objective"]["group_dro.weights"]
    assert weights.sum().item() == pytest.approx(1)
    assert weights.max() > weights.min()
    train(tiny_config(folder, *more, "--resume_from_checkpoint latest"))
    first, second = (load_file(run / "model.safetensors") for run in (folder, group_dro_run))
    assert all(torch.equal(first[name], second[name]) for name in first)
    times = ("images_per_second", "peak_memory_mib")
    logs = [
        [{k: v for k, v in line.items() if k not in times} for line in load_run(r).log()]
        for r in (folder, group_dro_run)
    ]
    assert logs[0] == logs[1]


def test_a_changed_groups_file_is_not_resumed(groups_file: tuple[Path, DataModule], tmp_path: Path) -> None:
    path, data = groups_file
    labels = coarse_labels(data)
    groups = read_groups(path, data.splits, labels)
    file, folder = tmp_path / "groups.safetensors", tmp_path / "run"
    write_groups(file, groups, data.splits, labels)
    more = ("--loss.group_dro {}", f"--data.groups {file}")
    with pytest.raises(Interrupted):
        train(tiny_config(folder, *more, "--trainer.time_budget 1e-9"))
    moved = groups.train.clone()
    moved[(moved == 0).nonzero()[0]] = 1
    write_groups(file, replace(groups, train=moved), data.splits, labels)
    with pytest.raises(RunError, match="does not fit: the groups must be those that the weights belong to"):
        train(tiny_config(folder, *more, "--resume_from_checkpoint latest"))


VIT = "{img_size: 8, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}"


def shared(folder: Path, *more: str) -> list[str]:
    """Nothing random in the model and no batch norm, so that processes can agree. Batches are shuffled: a
    process may lack the small groups."""
    fixed = TINY.replace("--model.width 4", "--model.backbone vit_tiny_patch16_224")
    fixed += f" {GROUP_DRO} --optimizer.name sgd --optimizer.learning_rate 0.05 --trainer.best_by worst_group"
    fixed += " --data.sampler shuffled --data.spurious_rate 0.97 --trainer.epochs 1"
    return [*fixed.split(), "--model.timm_args", VIT, "--output_dir", str(folder), *more]


@pytest.mark.parametrize("more", [(), ("--trainer.chunk_size", "24")], ids=["two", "two, chunks"])
def test_two_processes_train_what_one_trains(
    server: TrainingServer, tmp_path: Path, more: tuple[str, ...]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert server.run(shared(one)) == 0, server.output()
    assert server.run(shared(two, *more), processes=2) == 0, server.output()
    logs = [read_log(run / "log.jsonl") for run in (one, two)]
    names = ["loss", "group_dro", "cross_entropy", "gradient_norm"]
    names += [f"group={g}/{what}" for g in range(4) for what in ("loss", "weight")]
    for first, second in zip(*logs, strict=True):
        assert [second[name] for name in names] == pytest.approx([first[name] for name in names], rel=2e-4)
    for name in ("val_accuracy", "val_worst_group", "val_worst_known_group"):
        assert logs[1][-1][name] == pytest.approx(logs[0][-1][name], abs=1e-12)
    weights = [load_file(run / "model.safetensors") for run in (one, two)]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=2e-4)
    states = [read_checkpoint(checkpoints(run)[-1]).training["objective"] for run in (one, two)]
    torch.testing.assert_close(
        states[1]["group_dro.weights"], states[0]["group_dro.weights"], rtol=1e-5, atol=0
    )


# Selection by the worst group, and the trained head


def accuracies(run_dir: Path, split: str) -> tuple[float, dict[int, float]]:
    run = load_run(run_dir)
    dataset = run.splits()[split]
    images = torch.stack([dataset[i][0] for i in range(len(dataset))])
    with torch.no_grad():
        logits = run.model(images).logits
    assert logits is not None
    right = (logits.argmax(1) == dataset.coarse).double()
    return right.mean().item(), {g: right[dataset.fine == g].mean().item() for g in range(4)}


def test_the_kept_weights_are_those_of_the_best_worst_group(tmp_path: Path) -> None:
    arguments = "--trainer.best_by worst_group --trainer.final_weights best --trainer.keep_checkpoints 1"
    groups = "--data.groups annotated --data.sampler groups"
    run = train(tiny_config(tmp_path / "run", arguments, groups, "--trainer.epochs 4"))
    checked = [line for line in load_run(run).log() if "val_worst_group" in line]
    assert len(checked) == 4
    best = max(checked, key=lambda line: line["val_worst_group"])
    assert len({line["val_worst_group"] for line in checked}) > 1
    mean, by_group = accuracies(run, "val")
    assert min(by_group.values()) == pytest.approx(best["val_worst_group"])
    assert mean == pytest.approx(best["val_accuracy"])
    chosen = best_checkpoint(run, "worst_group", 10**6)
    assert chosen is not None
    manifest = read_manifest(chosen)
    assert (manifest["step"], manifest["metrics"]["worst_group"]) == (best["step"], best["val_worst_group"])
    assert all(line["val_worst_known_group"] == line["val_worst_group"] for line in checked)


def test_the_kept_weights_are_those_of_the_best_accuracy(tmp_path: Path) -> None:
    """Of data with groups that nobody asked for: the mean over all samples chooses."""
    arguments = "--trainer.best_by accuracy --trainer.final_weights best --trainer.keep_checkpoints 1"
    run = train(tiny_config(tmp_path / "run", arguments, "--trainer.epochs 8"))
    checked = [line for line in load_run(run).log() if "val_accuracy" in line]
    assert len(checked) == 8
    assert len({line["val_accuracy"] for line in checked}) > 1
    best = max(checked, key=lambda line: line["val_accuracy"])
    assert accuracies(run, "val")[0] == pytest.approx(best["val_accuracy"])
    chosen = best_checkpoint(run, "accuracy", 10**6)
    assert chosen is not None
    assert read_manifest(chosen)["metrics"]["accuracy"] == best["val_accuracy"]
    row = (run / "summary.csv").read_text().splitlines()
    assert f"{checked[0]['val_accuracy']}" in row[1].split(",")


def test_known_groups_are_those_of_the_file(groups_file: tuple[Path, DataModule], tmp_path: Path) -> None:
    more = f"--data.groups {groups_file[0]} --trainer.best_by worst_known_group --trainer.epochs 1"
    run = train(tiny_config(tmp_path / "run", more))
    line = load_run(run).log()[-1]
    _, by_group = accuracies(run, "val")
    data = load_run(run).data
    fine, coarse = data.splits["val"].fine, data.splits["val"].coarse
    sizes = torch.bincount(fine).tolist()
    by_class = [
        sum(by_group[g] * sizes[g] for g in range(4) if g // 2 == c) / int((coarse == c).sum())
        for c in (0, 1)
    ]  # all validation samples of a class are in its first group
    assert line["val_worst_known_group"] == pytest.approx(min(by_class))
    assert line["val_worst_group"] == pytest.approx(min(by_group.values()))


def test_the_evaluator_judges_the_head_that_was_trained(group_dro_run: Path) -> None:
    config = EvaluationConfig(evaluators=["worst_group"], device="cpu", progress=False)
    config.worst_group, config.projection = (
        WorstGroupConfig(methods=["trained"]),
        ProjectionConfig(method="pca"),
    )
    metrics = evaluate_run(group_dro_run, config).metrics
    mean, by_group = accuracies(group_dro_run, "test")
    prefix = "worst_group/trained"
    assert metrics[f"{prefix}/accuracy"].value == pytest.approx(mean)
    for g, value in by_group.items():
        assert metrics[f"{prefix}/group={g}/accuracy"].value == pytest.approx(value)
    worst = metrics[f"{prefix}/worst_group_accuracy"]
    assert worst.value == pytest.approx(min(by_group.values()))
    assert worst.low is not None
    assert worst.high is not None
    assert worst.low <= worst.value <= worst.high


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--loss.group_dro {}", "loss.group_dro needs data.groups, got None"),
        ("--data.sampler groups", "data.groups must be given for data.sampler=groups, got None"),
        ("--data.groups annotated", "data.groups=annotated has no effect without loss.group_dro"),
        (
            f"{GROUP_DRO} --loss.group_dro.eta 0",
            "loss.group_dro.eta must be greater than 0, got 0.0",
        ),
        (
            f"{GROUP_DRO} --loss.group_dro.adjustment -1",
            "loss.group_dro.adjustment must be at least 0, got -1.0",
        ),
        (
            f"{GROUP_DRO} --loss.cross_entropy_weight 0",
            "loss.cross_entropy_weight must be greater than 0 for loss.group_dro, got 0.0",
        ),
        (
            f"{GROUP_DRO} --model.encoders two --model.decoder plain --loss.reconstruction_weight 1 "
            "--loss.name supcon",
            "loss.group_dro is for one head, but model.encoders is two",
        ),
        (
            "--trainer.best_by worst_group --model.classifier false --loss.name supcon "
            "--loss.cross_entropy_weight 0",
            "trainer.best_by=worst_group needs model.classifier, which is false",
        ),
        (
            "--trainer.best_by worst_known_group",
            "trainer.best_by=worst_known_group needs data.groups, got None",
        ),
    ],
)
def test_what_cannot_run_is_refused(arguments: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(tmp_path, arguments)
