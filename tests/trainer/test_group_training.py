"""GroupDRO in the trainer: its loss among processes, its weights through a stop, groups from files, the
choice by the worst group, and the command that infers groups."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.training_server import TrainingServer, start_training_server  # noqa: F401
from safetensors.torch import load_file, save_file
from torch import Tensor

from pysupcon.__main__ import main as command
from pysupcon.commands.evaluate import evaluate_run
from pysupcon.commands.infer_groups import InferenceArguments, infer_from_runs
from pysupcon.config import Config, parse_args
from pysupcon.data.bundle import Data, load_data
from pysupcon.data.config import DataConfig
from pysupcon.data.group_files import (
    Groups,
    fingerprint,
    group_numbers,
    read_groups,
    true_groups,
    write_groups,
)
from pysupcon.errors import ConfigError, Interrupted, RunError
from pysupcon.evaluators import EvaluationConfig, GroupDRO, ProjectionConfig, SubgroupConfig, WorstGroupConfig
from pysupcon.trainer.checkpoint import best_checkpoint, checkpoints, read_checkpoint, read_manifest
from pysupcon.trainer.loop import train
from pysupcon.trainer.run import load_run, read_log

TINY = (
    "--data.dataset coloured_digits --data.augmentation none --data.views 1 --data.batch_size 128 "
    "--model.width 4 --model.classifier true --loss.name none --loss.cross_entropy_weight 1 "
    "--optimizer.learning_rate 0.005 --trainer.epochs 2 --trainer.threads 1 --trainer.cpu true "
    "--evaluate false"
)
DRO = "--data.groups annotated --loss.group_dro.eta 0.1 --loss.group_dro.adjustment 2"
QUIET = InferenceArguments(SubgroupConfig(k_max=3), device="cpu", progress=False)


def tiny(folder: Path, *more: str) -> Config:
    return parse_args([*TINY.split(), "--output_dir", str(folder), *" ".join(more).split()])[0]


def digits(**fields: Any) -> Data:
    return load_data(DataConfig(dataset="coloured_digits", **fields))


def labels_of(data: Data) -> dict[str, Tensor]:
    return {name: samples.coarse for name, samples in data.splits.items()}


@pytest.fixture(scope="module")
def robust(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training with GroupDRO over the true groups, equally often in a batch."""
    return train(tiny(tmp_path_factory.mktemp("robust") / "run", DRO, "--data.sampler groups"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by ERM."""
    return train(tiny(tmp_path_factory.mktemp("plain") / "run", "--trainer.best_by worst_group"))


# The loss


@pytest.mark.parametrize("shares", [(7, 9), (16, 0), (1, 4, 11)])
def test_the_mean_over_the_processes_is_the_loss_of_the_whole_batch(shares: tuple[int, ...]) -> None:
    """Values, gradients and weights; a process may hold no sample of a group, or none at all."""
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

    def add_up(tensor: Tensor) -> Tensor:
        asked.append(tensor)
        return total

    values, gradients = [], []
    for part, own in pieces:
        mine = part.clone().requires_grad_()
        objective = GroupDRO(counts, eta=0.5, adjustment=1.0, add_up=add_up)
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
    figures = objective.figures()
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


# Groups of the data


def test_true_groups_are_pairs_numbered_over_all_splits() -> None:
    labels = {"train": torch.tensor([1, 0, 1]), "val": torch.tensor([0, 0]), "test": torch.tensor([1])}
    fine = {"train": torch.tensor([7, 2, 9]), "val": torch.tensor([2, 4]), "test": torch.tensor([7])}
    numbers = group_numbers(labels, fine)
    assert {name: found.tolist() for name, found in numbers.items()} == {
        "train": [2, 0, 3], "val": [0, 1], "test": [2]
    }  # fmt: skip
    groups = true_groups(labels, numbers)
    assert (groups.train.tolist(), groups.val.tolist(), groups.parent.tolist()) == (
        [1, 0, 2],
        [0, -1],
        [0, 1, 1],
    )
    assert groups.counts.tolist() == [1, 1, 1]


def test_batches_hold_the_groups_equally_often_and_tell_them() -> None:
    data = digits(sampler="groups", groups="annotated", batch_size=40, views=1, augmentation="none")
    groups = data.groups
    assert groups is not None
    assert torch.equal(groups.train, data.splits["train"].fine)
    assert groups.counts.max() > 15 * groups.counts.min(), "the groups were to differ in size"
    batches = data.batches(seed=0, steps=6)
    for drawn, (views, labels, found) in zip(
        batches, data.loader(data.batches(seed=0, steps=6)), strict=True
    ):
        samples = torch.tensor([sample for sample, _ in drawn])
        assert torch.equal(found, groups.train[samples])
        assert torch.equal(labels, data.splits["train"].coarse[samples])
        assert len(views) == 40
        assert torch.bincount(found).tolist() == [10] * 4
    dataset = data.loader(batches).dataset
    assert int(dataset[5, 3][2]) == groups.train[5]
    assert len(dataset) == len(groups.train)
    assert len(next(iter(data.loader(data.validation_batches(seed=0), split="val")))) == 2


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Data]:
    """A groups file for coloured digits: quarters of a class."""
    data = digits()
    labels = labels_of(data)
    train_groups = 2 * labels["train"] + torch.arange(len(labels["train"])) % 2
    val_groups = 2 * labels["val"]
    groups = Groups(
        train_groups, val_groups, torch.tensor([0, 0, 1, 1]), {"data": {"dataset": "coloured_digits"}}
    )
    path = tmp_path_factory.mktemp("groups") / "new" / "groups.safetensors"
    write_groups(path, groups, data.splits, labels)
    return path, data


def test_a_groups_file_gives_back_what_was_written(stored: tuple[Path, Data]) -> None:
    path, data = stored
    found = digits(groups=str(path)).groups
    assert found is not None
    assert torch.bincount(found.train).sum() == len(data.splits["train"])
    assert torch.equal(found.train // 2, data.splits["train"].coarse)
    assert torch.equal(found.val, 2 * data.splits["val"].coarse)
    assert found.parent.tolist() == [0, 0, 1, 1]
    assert found.made_from == {"data": {"dataset": "coloured_digits"}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"split_seed": 1},
            "belongs to other train samples than this config's: it was made from data.dataset=",
        ),
        ({"spurious_rate": 0.9}, "belongs to other train samples than this config's"),
        (
            {"val_fraction": 0.2},
            r"holds groups of \d+ train samples, the train split has \d+: it was made from",
        ),
        ({"labels": "fine"}, "belongs to other train samples"),
    ],
)
def test_a_groups_file_of_other_samples_is_refused(
    stored: tuple[Path, Data], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _ = digits(groups=str(stored[0]), **fields).groups


def test_a_broken_groups_file_is_refused(stored: tuple[Path, Data], tmp_path: Path) -> None:
    path, data = stored
    labels = labels_of(data)

    def reading(other: Path) -> Any:
        return lambda: read_groups(other, data.splits, labels)

    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-9])
    foreign = tmp_path / "foreign.safetensors"
    save_file({"train": torch.zeros(3)}, foreign)
    old = tmp_path / "old.safetensors"
    save_file(load_file(path), old, {"format": "0"})
    gap = tmp_path / "gap.safetensors"
    groups = read_groups(path, data.splits, labels)
    write_groups(gap, replace(groups, train=groups.train.clamp(min=1)), data.splits, labels)
    for read, message in (
        (
            reading(tmp_path / "none"),
            "must be annotated or a file that `python -m pysupcon infer-groups` wrote",
        ),
        (reading(cut), "cut.safetensors is damaged or no groups file"),
        (reading(foreign), "has the format None, this version reads 1"),
        (reading(old), "has the format 0, this version reads 1"),
        (reading(gap), r"must number the 4 groups of the training samples without gaps, got \[1, 2, 3\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            read()


def test_the_fingerprint_is_of_images_and_classes_or_of_the_ends_of_paths() -> None:
    from pysupcon.data.samples import FileImages, Samples

    data = digits()
    samples, labels = data.splits["val"], data.splits["val"].coarse
    assert fingerprint(samples, labels) == fingerprint(digits().splits["val"], labels)
    assert fingerprint(samples, 1 - labels) != fingerprint(samples, labels)
    other = replace(samples, images=samples.images.flip(0))  # type: ignore[union-attr]
    assert fingerprint(other, labels) != fingerprint(samples, labels)

    def files(root: str, *names: str) -> Samples:
        return Samples(FileImages([Path(root) / name for name in names]), labels[:2], labels[:2])

    here = fingerprint(files("/a", "x/1.png", "x/2.png"), labels[:2])
    assert fingerprint(files("/b/c", "x/1.png", "x/2.png"), labels[:2]) == here
    assert fingerprint(files("/a", "x/1.png", "x/3.png"), labels[:2]) != here


# Training


def test_weights_and_loss_follow_the_formula_at_every_step(robust: Path) -> None:
    log, data = load_run(robust).log(), load_run(robust).data
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


def test_one_group_is_erm(plain: Path, stored: tuple[Path, Data], tmp_path: Path) -> None:
    """The robust loss of a single group is the mean: the same steps from the same first weights."""
    data = stored[1]
    labels = labels_of(data)
    alone = Groups(torch.zeros_like(labels["train"]), torch.zeros_like(labels["val"]), torch.tensor([0]), {})
    file = tmp_path / "one.safetensors"
    write_groups(file, alone, data.splits, labels)
    run = train(tiny(tmp_path / "run", f"--data.groups {file} --loss.group_dro {{}}"))
    for first, second in zip(load_run(run).log(), load_run(plain).log(), strict=True):
        assert first["cross_entropy"] == pytest.approx(second["cross_entropy"], rel=1e-4)
    weights = [load_file(folder / "model.safetensors") for folder in (run, plain)]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_a_resumed_training_equals_an_uninterrupted_one(robust: Path, tmp_path: Path) -> None:
    more = (DRO, "--data.sampler groups")
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(tiny(folder, *more, "--trainer.time_budget 1e-9"))
    saved = read_checkpoint(checkpoints(folder)[-1])
    assert saved.step < 20
    weights = saved.training["objective"]["group_dro.weights"]
    assert weights.sum().item() == pytest.approx(1)
    assert weights.max() > weights.min()
    train(tiny(folder, *more, "--resume_from_checkpoint latest"))
    first, second = (load_file(run / "model.safetensors") for run in (folder, robust))
    assert all(torch.equal(first[name], second[name]) for name in first)
    times = ("images_per_second", "peak_memory_mib")
    logs = [
        [{k: v for k, v in line.items() if k not in times} for line in load_run(r).log()]
        for r in (folder, robust)
    ]
    assert logs[0] == logs[1]


def test_other_groups_under_the_same_name_are_not_resumed(stored: tuple[Path, Data], tmp_path: Path) -> None:
    path, data = stored
    labels = labels_of(data)
    groups = read_groups(path, data.splits, labels)
    file, folder = tmp_path / "groups.safetensors", tmp_path / "run"
    write_groups(file, groups, data.splits, labels)
    more = ("--loss.group_dro {}", f"--data.groups {file}")
    with pytest.raises(Interrupted):
        train(tiny(folder, *more, "--trainer.time_budget 1e-9"))
    moved = groups.train.clone()
    moved[(moved == 0).nonzero()[0]] = 1
    write_groups(file, replace(groups, train=moved), data.splits, labels)
    with pytest.raises(RunError, match="does not fit: the groups must be those that the weights belong to"):
        train(tiny(folder, *more, "--resume_from_checkpoint latest"))


VIT = "{img_size: 8, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}"


def shared(folder: Path, *more: str) -> list[str]:
    """Nothing random in the model and no batch norm, so that processes can agree. Batches are shuffled: a
    process may lack the small groups."""
    fixed = TINY.replace("--model.width 4", "--model.backbone vit_tiny_patch16_224")
    fixed += f" {DRO} --optimizer.name sgd --optimizer.learning_rate 0.05 --trainer.best_by worst_group"
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


# Choice by the worst group, and the trained head


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
    run = train(tiny(tmp_path / "run", arguments, groups, "--trainer.epochs 4"))
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


def test_known_groups_are_those_of_the_file(stored: tuple[Path, Data], tmp_path: Path) -> None:
    more = f"--data.groups {stored[0]} --trainer.best_by worst_known_group --trainer.epochs 1"
    run = train(tiny(tmp_path / "run", more))
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


def test_the_evaluator_judges_the_head_that_was_trained(robust: Path) -> None:
    config = EvaluationConfig(evaluators=["worst_group"], device="cpu", progress=False)
    config.worst_group, config.projection = (
        WorstGroupConfig(methods=["trained"]),
        ProjectionConfig(method="pca"),
    )
    metrics = evaluate_run(robust, config).metrics
    mean, by_group = accuracies(robust, "test")
    prefix = "worst_group/trained"
    assert metrics[f"{prefix}/accuracy"].value == pytest.approx(mean)
    for g, value in by_group.items():
        assert metrics[f"{prefix}/group={g}/accuracy"].value == pytest.approx(value)
    worst = metrics[f"{prefix}/worst_group_accuracy"]
    assert worst.value == pytest.approx(min(by_group.values()))
    assert worst.low is not None
    assert worst.high is not None
    assert worst.low <= worst.value <= worst.high


# infer-groups


def test_infer_groups_writes_what_training_takes(
    plain: Path, robust: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "groups.safetensors"
    arguments = [str(plain), str(robust), "--output", str(file), "--device", "cpu", "--progress", "false"]
    assert command(["infer-groups", *arguments, "--subgroups.k_max", "4", "--subgroups.seed", "3"]) == 0
    said = capsys.readouterr().out
    assert "class; most frequent true group" in said
    assert "below five; below five, red" in said
    assert "recovery of the 4 true groups: F1 " in said
    assert f"train with --data.groups {file}" in said
    groups = digits(groups=str(file)).groups
    assert groups is not None
    train_labels = digits().splits["train"].coarse
    assert torch.equal(groups.parent[groups.train], train_labels)
    assert torch.equal(groups.parent[groups.val], digits().splits["val"].coarse)
    made_from = groups.made_from
    assert [run["name"] for run in made_from["runs"]] == ["run", "run"]
    assert made_from["runs"][0]["weights"] != made_from["runs"][1]["weights"]
    assert (made_from["subgroups"]["k_max"], made_from["subgroups"]["seed"]) == (4, 3)
    assert made_from["data"]["dataset"] == "coloured_digits"
    assert f"{100 * made_from['recovery']['f1']:.1f} %" in said
    assert str(tmp_path) not in json.dumps(made_from), "the file must not tell where it was made"
    run = train(tiny(tmp_path / "run", f"--data.groups {file} --loss.group_dro {{}} --data.sampler groups"))
    assert f"group={len(groups.parent) - 1}/weight" in load_run(run).log()[-1]


def test_embeddings_stand_side_by_side_at_equal_length(plain: Path, robust: Path, tmp_path: Path) -> None:
    """What two runs give is what one gives whose embedding is both."""
    from pysupcon.evaluators import infer_groups

    both = infer_from_runs([plain, robust], tmp_path / "both", QUIET)
    rows = []
    for folder in (plain, robust):
        run = load_run(folder)
        dataset = run.splits()["train"]
        images = torch.stack([dataset[i][0] for i in range(len(dataset))])
        with torch.no_grad():
            rows.append(F.normalize(run.model.backbone(images).double(), dim=1))
    expected = infer_groups(
        torch.cat(rows, dim=1), load_run(plain).data.splits["train"].coarse, QUIET.subgroups
    )
    assert torch.equal(both.groups.train, expected.groups)
    one = infer_from_runs([plain], tmp_path / "one", QUIET)
    assert not torch.equal(one.groups.train, both.groups.train)
    assert 0 < both.f1 <= 1
    assert 0 < both.purity <= 1


def test_infer_groups_refuses_what_does_not_fit(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = train(tiny(tmp_path / "other", "--data.split_seed 5 --trainer.epochs 1 --trainer.best_by null"))
    with pytest.raises(RunError, match="the runs must have the same train samples and classes"):
        infer_from_runs([plain, other], tmp_path / "file", QUIET)
    assert not (tmp_path / "file").exists()
    with pytest.raises(RunError, match=r"--output .* could not be written"):
        infer_from_runs([plain], tmp_path, QUIET)
    assert command(["infer-groups", str(tmp_path / "nothing"), "--output", str(tmp_path / "file")]) == 1
    assert "must be the folder of a run" in capsys.readouterr().err
    assert command(["infer-groups", str(plain), "--output", "x", "--subgroups.k_min", "1"]) == 1
    assert "must be 2 <= k_min <= k_max" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--loss.group_dro {}", "loss.group_dro needs data.groups, got None"),
        ("--data.sampler groups", "data.groups must be given for data.sampler=groups, got None"),
        ("--data.groups annotated", "data.groups=annotated has no effect without loss.group_dro"),
        (f"{DRO} --loss.group_dro.eta 0", "loss.group_dro.eta must be greater than 0, got 0.0"),
        (f"{DRO} --loss.group_dro.adjustment -1", "loss.group_dro.adjustment must be at least 0, got -1.0"),
        (
            f"{DRO} --loss.cross_entropy_weight 0",
            "loss.cross_entropy_weight must be greater than 0 for loss.group_dro, got 0.0",
        ),
        (
            f"{DRO} --model.encoders two --model.decoder plain --loss.reconstruction_weight 1 "
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
        tiny(tmp_path, arguments)


# The stored comparison


def test_the_stored_comparison_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/results/worst_group.json: summaries are those of the seeds, and the table prints them."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks.papers import worst_group

    results = json.loads(worst_group.RESULTS.read_text())
    classifiers = results["classifiers"]
    assert set(classifiers) == set(worst_group.CLASSIFIERS)
    means = {}
    for name, entry in classifiers.items():
        assert list(entry["seeds"]) == ["0", "1", "2"]
        for figures in entry["seeds"].values():
            by_group = [figures[f"group={g}/accuracy"] for g in range(4)]
            assert figures["worst_group_accuracy"] == min(by_group)
            assert figures["accuracy"] == pytest.approx(sum(by_group) / 4)  # groups of one size
        summary = entry["worst_group_accuracy"]
        means[name] = sum(f["worst_group_accuracy"] for f in entry["seeds"].values()) / 3
        assert summary["mean"] == pytest.approx(means[name])
        assert summary["low"] <= summary["mean"] <= summary["high"]
    shown = worst_group.table(results)
    for name, entry in classifiers.items():
        change = entry["worst_group_accuracy"]["above_erm"]
        assert change["value"] == pytest.approx(means[name] - means["erm"])
        assert f"| {entry['title']} | {100 * entry['accuracy']['mean']:.1f} ± " in shown
        assert (f"| {100 * change['value']:+.1f} [" in shown) == (name != "erm")
