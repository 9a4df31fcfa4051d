"""The command ``concatenate``: the embedding of two frozen runs, its readers, its errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

from pysupcon.__main__ import main
from pysupcon.commands.concatenate import concatenate_runs
from pysupcon.config import load_config, parse_args
from pysupcon.errors import ConfigError, RunError
from pysupcon.reports.evaluated_runs import config_key
from pysupcon.trainer import loop
from pysupcon.trainer.run import load_run

FIXED = (
    "--data.dataset digits --data.augmentation weak --data.batch_size 256 --model.width 4 --trainer.epochs 1 "
    "--trainer.threads 1 --trainer.cpu true --trainer.best_by null --evaluate false"
)
QUICK = (
    "--evaluators", "[knn,linear_probe]", "--bootstrap.resamples", "20", "--projection.method", "pca",
    "--progress", "false",
)  # fmt: skip


def trained(folder: Path, *args: str) -> Path:
    return loop.train(parse_args([*FIXED.split(), "--output_dir", str(folder), *args])[0])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs: L_spread with bounded layers of another width, and an autoencoder."""
    folder = tmp_path_factory.mktemp("runs")
    ends = "--loss.name none --model.classifier true --loss.cross_entropy_weight 1 --model.decoder plain "
    ends += "--loss.reconstruction_weight 1 --model.width 6"
    return (
        trained(folder / "spread", "--loss.name", "spread", "--model.spectral_norm", "true"),
        trained(folder / "auto", *ends.split()),
    )


@pytest.fixture(scope="module")
def both(runs: tuple[Path, Path]) -> Path:
    output = runs[0].parent / "both"
    assert main(["concatenate", *map(str, runs), "--output", str(output)]) == 0
    return output


def test_the_embedding_is_that_of_both(runs: tuple[Path, Path], both: Path) -> None:
    test = load_run(both).splits()["test"]
    images = torch.stack([test[i][0] for i in range(9)])
    with torch.no_grad():
        expected = [normalize(load_run(run).model.backbone(images), dim=1) for run in runs]
        embedding = load_run(both).model.backbone(images)
    torch.testing.assert_close(embedding, torch.cat(expected, dim=1), rtol=1e-5, atol=1e-6)
    assert embedding.shape == (9, 16 + 24)
    assert sorted(path.name for path in both.iterdir() if path.is_file()) == [
        "config.yaml", "data.json", "first.yaml", "model.safetensors", "second.yaml",
    ]  # fmt: skip
    assert load_config(both / "second.yaml") == load_config(runs[1] / "config.yaml")


def test_what_opens_it(
    runs: tuple[Path, Path], both: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / "both", tmp_path / "spread"]
    for source, folder in zip((both, runs[0]), folders, strict=True):
        shutil.copytree(source, folder)
        assert main(["evaluate", str(folder), *QUICK]) == 0
    metrics = json.loads((folders[0] / "evaluation/metrics.json").read_text())["metrics"]
    assert "warning" not in capsys.readouterr().out
    assert 0.55 < metrics["linear_probe/coarse/accuracy"]["value"] <= 1
    output = tmp_path / "comparison"
    compared = ["compare", *map(str, folders), "--resamples", "20", "--output", str(output)]
    assert main(compared) == 0
    assert json.loads((output / "compare.json").read_text())["configurations"].keys() == {"both", "spread"}
    probe = ("--probe.epochs", "1", "--bootstrap.resamples", "20", "--progress", "false")
    data = ("--data.dataset", "digits", "--data.split_seed", "3")
    assert main(["transfer", str(folders[0]), *data, *probe]) == 0
    assert (folders[0] / "transfer/digits/metrics.json").is_file()


def test_its_config(runs: tuple[Path, Path], both: Path, tmp_path: Path) -> None:
    """The config states how both were trained, so that compare distinguishes pairs; nothing is trained."""
    config = load_config(both / "config.yaml")
    assert [part["loss"]["name"] for part in config.model.concatenated] == ["spread", "none"]
    assert [part["model"]["width"] for part in config.model.concatenated] == [4, 6]
    assert config.data == load_config(runs[0] / "config.yaml").data
    twice = concatenate_runs(runs[0], runs[0], tmp_path / "twice")
    keys = [config_key(vars(load_config(folder / "config.yaml"))) for folder in (both, twice)]
    assert keys[0] != keys[1]
    nested = load_run(concatenate_runs(both, runs[0], tmp_path / "nested"))
    assert nested.model.embedding_dim == 40 + 16
    with pytest.raises(ConfigError, match=r"model.concatenated describes backbones that are frozen"):
        parse_args(["--config", str(both / "config.yaml")])


def test_runs_of_other_data_are_refused(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for field, now in (("split_seed", 5), ("labels", "fine")):
        other = tmp_path / field
        shutil.copytree(runs[1], other)
        text = (other / "config.yaml").read_text()
        before = f"  {field}: {'coarse' if field == 'labels' else 0}\n"
        assert before in text
        (other / "config.yaml").write_text(text.replace(before, f"  {field}: {now}\n"))
        with pytest.raises(RunError, match=rf"must share their data and their split, but data.{field} is"):
            concatenate_runs(runs[0], other, tmp_path / "out")
    shutil.copytree(runs[1], tmp_path / "augmented")
    text = (runs[1] / "config.yaml").read_text().replace("augmentation: weak", "augmentation: strong")
    (tmp_path / "augmented/config.yaml").write_text(text)
    concatenate_runs(runs[0], tmp_path / "augmented", tmp_path / "out")
    assert main(["concatenate", *map(str, runs), "--output", str(tmp_path / "out")]) == 1
    assert "must be a new or an empty folder; it is not empty" in capsys.readouterr().err
    (tmp_path / "augmented/model.safetensors").unlink()
    assert main(["concatenate", *map(str, runs[:1]), str(tmp_path / "augmented"), "--output", "x"]) == 1
    assert "model.safetensors is missing: the run has not finished" in capsys.readouterr().err


def test_exported_weights_are_plain(runs: tuple[Path, Path], both: Path, tmp_path: Path) -> None:
    main(["export", str(runs[0]), "--output", str(tmp_path / "bounded")])
    assert not any("parametrizations" in name for name in load_file(tmp_path / "bounded/model.safetensors"))
    main(["export", str(both), "--output", str(tmp_path / "both")])
    card = (tmp_path / "both/README.md").read_text()
    assert "Concatenation of a small_cnn and a small_cnn, trained by pysupcon." in card
    loss = "spread, temperature 0.5 (part 1); cross-entropy weight 1, reconstruction weight 1 (part 2)"
    assert f"| loss | {loss} |" in card
