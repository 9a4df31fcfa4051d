"""The command ``transfer``: a frozen encoder on another data set."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from helpers.group_data_files import write_waterbirds
from helpers.transfer_data_files import write_dtd
from safetensors.torch import load_file, save_file

from pysupcon.__main__ import main
from pysupcon.commands.transfer import TransferArguments, transfer_features
from pysupcon.config import Config, to_yaml
from pysupcon.data.config import DataConfig
from pysupcon.trainer.run import build_model, load_data, load_run


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
        "report.html",
        "outcomes.safetensors",
        "confusion.png",
    }
    report = json.loads((folder / "metrics.json").read_text())
    metrics = report["metrics"]
    assert report["warnings"] == [
        "data.split_seed is 7, but 0 in the training of the encoder on the same data: test images may be its "
        "training images"
    ]
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
    write_dtd(tmp_path / "files", monkeypatch)
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
    write_waterbirds(birds)
    for arguments, message in (
        (["--data.dataset", "waterbirds", "--data.root", str(birds)], "has 3 channels, but the encoder of"),
        (
            ["--data.dataset", "digits", "--data.image_size", "16"],
            "data.image_size must be that of the run, 8",
        ),
        (["--data.dataset", "mnist"], "data.root must be the folder that holds mnist"),
        (
            ["--data.dataset", "digits", "--probe.penalties", "[-1]"],
            "penalties must be one or more positive numbers",
        ),
        (["--data.dataset", "digits", "--data.train_on_val", "true"], "validation images choose the probe"),
        (
            ["--data.dataset", "digits", "--data.views", "2", "--data.view_partners", "class"],
            "data.view_partners must be left out for transfer: it has no effect here",
        ),
    ):
        assert main(["transfer", str(run), *arguments, "--progress", "false"]) == 1
        assert message in capsys.readouterr().err
    assert not (run / "transfer").exists()
    assert main(["transfer", str(run)]) == 1
    assert "data.dataset must be given" in capsys.readouterr().err
    assert main(["transfer", str(tmp_path / "nowhere"), "--data.dataset", "digits"]) == 1
    assert "there is no such folder" in capsys.readouterr().err
