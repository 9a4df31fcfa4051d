"""The exported backbone: timm loads it, it gives the run's embedding, and its card lists the metrics."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from pysupcon.__main__ import main
from pysupcon.commands.export import export_run
from pysupcon.config import parse_args, to_yaml
from pysupcon.errors import RunError
from pysupcon.trainer.checkpoint import save_weights
from pysupcon.trainer.run import build_model, load_run

VIT = "{img_size: 8, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}"
TWO = "--model.width 4 --model.encoders two --model.decoder plain --loss.reconstruction_weight 1"
METRICS: dict[str, Any] = {
    "knn/fine/accuracy": {"value": 0.987654, "low": 0.97, "high": 0.99, "unit": "fraction"},
    "knn/fine/class=3/accuracy": {"value": 0.5, "unit": "fraction"},
    "geometry/spread": {"value": 0.123456, "unit": "", "low": None, "high": None},
}


def run_of(folder: Path, *model: str) -> Path:
    """An untrained run, with metrics."""
    config = parse_args(["--data.dataset", "digits", "--data.labels", "fine", *model])[0]
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    torch.manual_seed(3)
    network = build_model(config, load_run(folder).data)
    for name, buffer in network.named_buffers():  # as training would move them
        if name.endswith("running_mean"):
            buffer.normal_()
    save_weights(network.state_dict(), folder / "model.safetensors")
    (folder / "evaluation").mkdir()
    (folder / "evaluation/metrics.json").write_text(json.dumps({"metrics": METRICS}))
    return folder


def images_and_embedding(folder: Path) -> tuple[Tensor, Tensor]:
    run = load_run(folder)
    images = torch.stack([run.splits()["test"][i][0] for i in range(5)])
    with torch.no_grad():
        return images, run.model.backbone(images)


@pytest.mark.parametrize(
    "model", [("vit_tiny_patch16_224", "--model.timm_args", VIT), ("resnet10t",)], ids=lambda model: model[0]
)
def test_timm_loads_it(tmp_path: Path, model: tuple[str, ...]) -> None:
    folder = run_of(tmp_path / "run", "--model.backbone", *model)
    assert main(["export", str(folder), "--output", str(tmp_path / "hub/digits")]) == 0
    output = tmp_path / "hub/digits"
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = timm.create_model(f"local-dir:{output}", pretrained=True).eval()
    images, embedding = images_and_embedding(folder)
    with torch.no_grad():
        assert torch.equal(loaded(images), embedding)
    settings = timm.data.resolve_model_data_config(loaded)
    assert settings["input_size"] == (1, 8, 8)
    assert (settings["mean"], settings["std"]) == (pytest.approx((0.3053,)), pytest.approx((0.3761,)))
    with_head = timm.create_model(f"local-dir:{output}", pretrained=True, num_classes=7)
    assert with_head(images).shape == (5, 7)


@pytest.mark.parametrize(
    "model",
    [
        ("small_cnn", "--model.width", "4"),
        ("resnet10t",),
        ("resnet18", "--model.small_stem", "true", "--model.timm_args", "{block_args: {}}"),
        ("small_cnn", "--model.width", "4", "--model.spectral_norm", "true"),
        ("small_cnn", *TWO.split()),
    ],
    ids=["small_cnn", "resnet10t", "resnet18", "bounded", "two"],
)
def test_the_card_runs_as_written(
    tmp_path: Path, model: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_of(tmp_path / "run", "--model.backbone", *model)
    output = export_run(folder, tmp_path / "out")
    card = (output / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(code) == 1
    images, embedding = images_and_embedding(folder)
    monkeypatch.chdir(output)
    names = {"images": images}
    with torch.no_grad():
        exec(code[0].replace("FOLDER", str(output), 1), names)
    assert torch.equal(names["embedding"], embedding)
    own = model[0] != "resnet10t"
    assert ("timm.create_model cannot build this backbone" in card) == own
    assert ("library_name: timm" in card) != own
    assert ("architecture" in json.loads((output / "config.json").read_text())) != own


def test_the_card_tells_the_metrics(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run")
    card = (export_run(folder, tmp_path / "out") / "README.md").read_text()
    assert card.startswith("---\ntags:\n")
    assert "| knn/fine/accuracy | 98.77 [97.00, 99.00] | % |" in card
    assert "| geometry/spread | 0.1235 |  |" in card
    assert "of this one training: they say nothing about other seeds." in card
    assert "class=3" not in card
    assert "| loss | supcon, temperature 0.07 |" in card
    assert "| data | digits, fine labels (0, 1, 2, 3, 4, 5, 6, 7, 8, 9) |" in card
    shutil.rmtree(folder / "evaluation")
    assert "The run was not evaluated" in (export_run(folder, tmp_path / "bare") / "README.md").read_text()


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_of(tmp_path / "run")
    with pytest.raises(RunError, match=r"--output .*run must be a new or an empty folder; it is not empty"):
        export_run(folder, folder)
    (folder / "evaluation/metrics.json").write_text('{"metrics": {"a": 3}}')
    with pytest.raises(RunError, match=r"metrics.json is damaged"):
        export_run(folder, tmp_path / "out")
    (folder / "model.safetensors").unlink()
    assert main(["export", str(folder), "--output", str(tmp_path / "out")]) == 1
    assert "model.safetensors is missing: the run has not finished" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
