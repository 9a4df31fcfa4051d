"""Transfer of a frozen encoder to other data, and the points on a circle."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers.feature_cases import numbers, splits
from safetensors.torch import load_file, save_file
from test_groups import waterbirds
from test_published import dtd

from pysupcon.__main__ import main
from pysupcon.commands import circle
from pysupcon.commands.circle import CircleConfig, minimise, on_circle
from pysupcon.commands.transfer import TransferArguments, transfer_features
from pysupcon.config import Config, to_yaml
from pysupcon.data.config import DataConfig
from pysupcon.evaluators import FeatureSet, FeatureSplits, Transfer, TransferConfig
from pysupcon.evaluators.linear_probe import fit_probe
from pysupcon.evaluators.transfer import concatenated, fit_transfer
from pysupcon.trainer.run import build_model, load_data, load_run

# The evaluator


def test_the_head_is_chosen_on_validation_and_trained_on_both():
    data = splits(distance=0.7)
    config = TransferConfig(penalties=[10.0, 0.03, 1e-6])
    chosen = fit_probe(data.train, data.val, "fine", config)
    found = fit_transfer(data, config)
    assert found.chosen == chosen.chosen
    assert found.val_accuracy == chosen.val_accuracy
    both = concatenated(data.train, data.val)
    expected = fit_probe(both, data.val, "fine", TransferConfig(penalties=[chosen.chosen]))
    assert torch.equal(found.weight, expected.weight)
    assert not torch.allclose(found.weight, chosen.weight)
    alone = fit_transfer(data, TransferConfig(penalties=[10.0, 0.03, 1e-6], refit=False))
    assert torch.equal(alone.weight, chosen.weight)


def test_validation_samples_of_a_class_that_training_lacks_are_learnt():
    data = splits(distance=4.0)
    keep = data.train.fine != 5
    train = FeatureSet(data.train.features[keep], data.train.coarse[keep], data.train.fine[keep])
    lacking = FeatureSplits(train, data.val, data.test)
    with_both, without = (dict(Transfer(TransferConfig(refit=refit))(lacking)) for refit in (True, False))
    assert with_both["transfer/accuracy"] > 0.95
    assert without["transfer/accuracy"] < 0.85


def test_the_last_training_ends_with_its_last_epoch():
    data = splits(distance=0.3)
    config = TransferConfig(
        solver="sgd", epochs=6, learning_rates=[3.0], standardize=False, batch_size=16, seed=2
    )
    found = fit_transfer(data, config)
    both = concatenated(data.train, data.val)
    generator = torch.Generator().manual_seed(2)
    head = torch.nn.Linear(both.features.shape[1], 6)
    torch.nn.init.normal_(head.weight, std=0.01, generator=generator)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), 3.0, momentum=0.9)
    accuracies = []
    for epoch in range(6):
        for group in optimizer.param_groups:  # x 0.2 at 60, 75 and 90 % of six epochs
            group["lr"] = 3.0 * 0.2 ** sum(epoch >= start for start in (4, 5, 6))
        for rows in torch.randperm(len(both), generator=generator).split(16):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(both.features[rows].float()), both.fine[rows]).backward()
            optimizer.step()
        predicted = head(data.val.features.float()).argmax(1)
        accuracies.append((predicted == data.val.fine).double().mean().item())
    torch.testing.assert_close(found.weight, head.weight.detach().double(), rtol=1e-4, atol=1e-4)
    assert max(accuracies) > accuracies[-1]  # another epoch is better on what was validated


def test_transfer_names_its_figures_and_sweeps_learning_rates():
    data = splits(distance=1.5)
    found = numbers(Transfer(TransferConfig(solver="sgd", epochs=5, learning_rates=[1e-6, 0.1]))(data))
    assert found["transfer/chosen"] == 0.1
    assert found["transfer/chance"] == pytest.approx(1 / 6)
    assert set(found) == {
        f"transfer/{k}" for k in ("accuracy", "chance", "val_accuracy", "chosen", "converged")
    }


# The command


def write_run(folder: Path, dataset: str) -> Path:
    folder.mkdir()
    config = Config()
    config.data.dataset = dataset
    config.model.width = 4
    config.resolve()
    (folder / "config.yaml").write_text(to_yaml(config))
    torch.manual_seed(0)
    model = build_model(config, load_data(config.data))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def test_the_command_on_a_grey_encoder_and_grey_digits(tmp_path, capsys):
    run = write_run(tmp_path / "run", "digits")
    arguments = ["--data.dataset", "digits", "--data.split_seed", "7", "--probe.penalties", "[0.01]"]
    assert main(["transfer", str(run), *arguments, "--progress", "false"]) == 0
    folder = run / "transfer" / "digits"
    assert {p.name for p in folder.iterdir()} == {
        "metrics.json",
        "report.md",
        "outcomes.safetensors",
        "confusion.png",
    }
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    accuracy = metrics["transfer/accuracy"]
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    assert accuracy["value"] > 0.5  # random convolutions tell digits, too
    outcomes = load_file(folder / "outcomes.safetensors")
    assert outcomes["transfer/correct"].double().mean().item() == accuracy["value"]
    assert torch.equal(
        outcomes["transfer/predicted"] == outcomes["labels/fine"], outcomes["transfer/correct"]
    )
    assert "accuracy" in capsys.readouterr().out


def test_grey_images_for_an_encoder_of_colours_and_its_own_normalisation(tmp_path):
    run = load_run(write_run(tmp_path / "run", "coloured_digits"))
    arguments = TransferArguments(DataConfig("digits", split_seed=3), progress=False)
    found, data = transfer_features(run, arguments)
    image = data.splits["test"].images[:1].expand(-1, 3, -1, -1)
    expected = run.model.backbone(run.data.normalize(image))[0].detach()
    torch.testing.assert_close(found.test.features[0], expected)


def test_the_command_on_a_published_set(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run", "coloured_digits")
    dtd(tmp_path / "files", monkeypatch)
    arguments = ["--data.dataset", "dtd", "--data.root", str(tmp_path / "files"), "--probe.solver", "sgd"]
    rates = ["--probe.learning_rates", "[0.1, 0.01]", "--probe.epochs", "20"]
    assert main(["transfer", str(run), *arguments, *rates, "--progress", "false"]) == 0
    content = json.loads((run / "transfer" / "dtd" / "metrics.json").read_text())
    assert content["metrics"]["transfer/accuracy"]["value"] == 1.0  # three greys
    assert content["metadata"]["samples"] == {"train": 9, "val": 3, "test": 6}
    assert content["metadata"]["arguments"]["data"]["image_size"] == 8
    capsys.readouterr()
    missing = [*arguments[:3], str(tmp_path / "run"), *arguments[4:]]
    assert main(["transfer", str(run), *missing, "--progress", "false"]) == 1
    assert "does not hold dtd: looked for dtd/dtd with images and labels in" in capsys.readouterr().err


def test_data_that_cannot_be_transferred_to_are_refused(tmp_path, capsys):
    run = write_run(tmp_path / "run", "digits")
    birds = tmp_path / "birds"
    waterbirds(birds)
    for arguments, message in (
        (["--data.dataset", "waterbirds", "--data.root", str(birds)], "has 3 channels, but the encoder of"),
        (
            ["--data.dataset", "digits", "--data.image_size", "16"],
            "data.image_size must be that of the run, 8",
        ),
        (["--data.dataset", "mnist"], "data.root must be the folder that holds mnist"),
        (["--probe.penalties", "[-1]"], "penalties must be one or more positive numbers"),
    ):
        assert main(["transfer", str(run), *arguments, "--progress", "false"]) == 1
        assert message in capsys.readouterr().err
    assert not (run / "transfer").exists()
    assert main(["transfer", str(tmp_path / "nowhere")]) == 1
    assert "there is no such folder" in capsys.readouterr().err


# The circle


def test_alpha_and_temperature_decide_on_collapse_or_spread():
    config = CircleConfig(classes=2, samples=4, steps=150)
    collapsed, spread = (minimise(config, alpha, 0.5) for alpha in (0.0, 0.95))
    assert collapsed.spread < 0.02
    assert collapsed.separation == pytest.approx(180, abs=2)
    # SINCERE's floor: all positives together, all negatives opposite. Both views of a sample count.
    assert collapsed.loss == pytest.approx(math.log1p(8 * math.exp(-2 / 0.5)), rel=1e-2)
    assert spread.spread == pytest.approx(1.0, abs=0.02)  # the class mean is the centre
    # cNCE alone spreads a class of four evenly: neighbours a quarter of a turn apart.
    alone = minimise(config, 1.0, 0.5)
    points = torch.tensor(alone.points[:4], dtype=torch.float64)
    turned = points[torch.atan2(points[:, 1], points[:, 0]).argsort()]
    steps = (turned * turned.roll(1, dims=0)).sum(dim=1)
    assert steps.abs().max() < 0.05
    assert minimise(config, 0.0, 0.5) == collapsed


def test_the_better_of_both_starts_is_kept(monkeypatch):
    config = CircleConfig(classes=2, samples=2, steps=1, learning_rate=1e-9)
    good, bad = torch.tensor([0, 0, torch.pi, torch.pi]), torch.tensor([0, torch.pi, 0, torch.pi])
    for starts in ([good, bad], [bad, good]):
        monkeypatch.setattr(circle, "_starts", lambda _, s=starts: [a.double().clone() for a in s])
        kept = minimise(config, 0.0, 0.5)
        torch.testing.assert_close(
            torch.tensor(kept.points), on_circle(good.double()).float(), atol=1e-5, rtol=0
        )


def test_the_command_writes_numbers_and_picture(tmp_path, capsys):
    arguments = ["--alphas", "[0.0, 0.9]", "--temperatures", "[0.5]", "--steps", "20", "--samples", "3"]
    assert main(["circle", *arguments, "--output", str(tmp_path / "out"), "--progress", "false"]) == 0
    content = json.loads((tmp_path / "out" / "circle.json").read_text())
    assert [entry["alpha"] for entry in content["circles"]] == [0.0, 0.9]
    assert content["config"]["steps"] == 20
    assert all(math.hypot(*point) == pytest.approx(1) for point in content["circles"][0]["points"])
    assert (tmp_path / "out" / "circle.png").read_bytes()[:4] == b"\x89PNG"
    assert "separation" in capsys.readouterr().out
    assert main(["circle", "--alphas", "[2.0]", "--output", str(tmp_path / "no")]) == 1
    assert "alphas must be one or more numbers in [0, 1], got [2.0]" in capsys.readouterr().err
