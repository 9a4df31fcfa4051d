"""Evaluation of the projection head's outputs, beside that of the embeddings."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pysupcon.__main__ import main
from pysupcon.config import load_config, parse_args
from pysupcon.errors import ConfigError
from pysupcon.evaluation.evaluate import evaluate_run
from pysupcon.evaluation.features import run_features
from pysupcon.evaluators import (
    BootstrapConfig,
    EvaluationConfig,
    KNNConfig,
    ProjectionConfig,
    WorstGroupConfig,
)
from pysupcon.reports.report import Report
from pysupcon.trainer.loop import train
from pysupcon.trainer.run import load_run

TINY = (
    "--data.dataset digits --data.augmentation none --data.batch_size 128 --trainer.threads 1 "
    "--trainer.cpu true --model.width 4 --trainer.epochs 1 --trainer.best_by null "
)
HEAD = "--model.projection mlp --model.projection_dim 6 "
EMBEDDING = EvaluationConfig(
    evaluators=["knn", "separation"],
    knn=KNNConfig(k=[1]),
    projection=ProjectionConfig(method="pca"),
    bootstrap=BootstrapConfig(resamples=50),
    progress=False,
    pictures=False,
)
HEADS = replace(EMBEDDING, features="projection")


def trained(folder: Path, arguments: str) -> Path:
    words = (TINY + "--evaluate false " + arguments).split()
    return train(parse_args([*words, "--output_dir", str(folder)])[0])


@pytest.fixture(scope="module")
def with_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("head") / "run", HEAD)


@pytest.fixture
def run_dir(with_head: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(with_head, tmp_path / "run"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_features_are_the_outputs_of_the_head_before_normalisation(run_dir: Path) -> None:
    run = load_run(run_dir)
    device = torch.device("cpu")
    found = run_features(run, HEADS, device).test.features
    embeddings = run_features(run, EMBEDDING, device).test.features
    assert (found.shape[1], embeddings.shape[1]) == (6, 16)
    with torch.no_grad():
        torch.testing.assert_close(found, run.model.projection(embeddings))
    assert (found.norm(dim=1) < 0.9).all(), "of unit length"


def test_neither_evaluation_changes_the_other(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = evaluate_run(run_dir, EMBEDDING)
    before = files(run_dir / "evaluation")
    arguments = "--features projection --evaluators separation --pictures false --progress false"
    assert main(["evaluate", str(run_dir), *arguments.split()]) == 0
    assert "evaluation-projection/report.html" in capsys.readouterr().out
    assert files(run_dir / "evaluation") == before
    other = Report.from_json((run_dir / "evaluation-projection/metrics.json").read_text())
    assert all(name.startswith("separation/") for name in other.metrics), "nothing of the embedding is kept"
    assert other.metadata["features"] == "output of the projection head, not normalised"
    assert other.metadata["feature_width"] == 6
    assert "projection head" in (run_dir / "evaluation-projection/report.md").read_text().splitlines()[0]
    margin = "separation/fine/margin"
    assert other.metrics[margin].value != one.metrics[margin].value
    # Another evaluation of the same features is merged, in each folder.
    after = evaluate_run(run_dir, replace(HEADS, evaluators=["knn"]))
    assert after.metrics[margin].value == other.metrics[margin].value
    assert files(run_dir / "evaluation") == before
    assert not (run_dir / "evaluation-projection-1").exists()


def test_results_of_other_features_are_put_aside(run_dir: Path) -> None:
    """Also if they stand in the folder of these, for instance because a user renamed it."""
    evaluate_run(run_dir, HEADS)
    (run_dir / "evaluation-projection").rename(run_dir / "evaluation")
    report = evaluate_run(run_dir, replace(EMBEDDING, evaluators=["knn"]))
    assert all(name.startswith("knn/") for name in report.metrics)
    assert "kept" not in report.metadata
    assert (run_dir / "evaluation-1/metrics.json").exists()


def test_embedding_and_projection_are_compared(run_dir: Path, tmp_path: Path) -> None:
    evaluate_run(run_dir, EMBEDDING)
    evaluate_run(run_dir, HEADS)
    output = tmp_path / "comparison"
    arguments = [str(run_dir), str(run_dir / "evaluation-projection"), "--output", str(output)]
    assert main(["compare", *arguments]) == 0
    table = (output / "compare.md").read_text()
    assert "run (baseline)" in table
    assert "run (projection) - run" in table
    # Both of one kind: --of
    second = Path(shutil.copytree(run_dir, tmp_path / "second"))
    config = (second / "config.yaml").read_text()
    (second / "config.yaml").write_text(config.replace("width: 4", "width: 5"))
    part = ["--of", "evaluation-projection", "--output", str(output)]
    assert main(["compare", str(run_dir), str(second), *part]) == 0
    assert "second (projection) - run (projection)" in (output / "compare.md").read_text()


def test_a_missing_evaluation_names_the_command(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_run(run_dir, EMBEDDING)
    assert main(["compare", str(run_dir), "--of", "evaluation-projection"]) == 1
    assert f"pysupcon evaluate {run_dir} --features projection" in capsys.readouterr().err


def test_without_a_head_there_is_no_projection(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = trained(tmp_path / "plain", "")
    with pytest.raises(ConfigError, match="features=projection needs a model with a projection head"):
        evaluate_run(plain, HEADS)
    assert not list(plain.glob("evaluation*"))
    assert main(["evaluate", str(plain), "--features", "projection"]) == 1
    assert "projection head" in capsys.readouterr().err
    # A concatenation has none either, and its own evaluation is that of the embedding.
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(text.replace("features: embedding", "features: projection"))
    assert load_config(run_dir / "config.yaml").evaluation.features == "projection"
    both = tmp_path / "both"
    assert main(["concatenate", str(run_dir), str(plain), "--output", str(both)]) == 0
    assert load_config(both / "config.yaml").evaluation.features == "embedding"
    with pytest.raises(ConfigError, match="projection head"):
        evaluate_run(both, HEADS)


def test_two_encoders_have_the_head_of_the_first(tmp_path: Path) -> None:
    arguments = "--model.encoders two --model.decoder plain --loss.reconstruction_weight 1 " + HEAD
    run = load_run(trained(tmp_path / "run", arguments))
    found = run_features(run, HEADS, torch.device("cpu")).test.features
    images = torch.stack([run.splits()["test"][i][0] for i in range(4)])
    with torch.no_grad():
        expected = run.model.projection(run.model.backbone.parts[0](images))  # type: ignore[operator,union-attr,index]
    torch.testing.assert_close(found[:4], expected)


def test_the_trained_classifier_is_for_embeddings_only(tmp_path: Path) -> None:
    """Even if both have the same width."""
    arguments = "--model.classifier true --loss.cross_entropy_weight 1 --model.projection linear "
    run = load_run(trained(tmp_path / "run", arguments + "--model.projection_dim 16"))
    config = replace(EMBEDDING, evaluators=["worst_group"], worst_group=WorstGroupConfig(methods=["trained"]))
    assert run_features(run, config, torch.device("cpu")).head is not None
    assert run_features(run, replace(config, features="projection"), torch.device("cpu")).head is None


def test_a_dry_run_shows_what_is_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = TINY + HEAD + "--trainer.dry_run true --evaluation.features projection"
    train(parse_args([*arguments.split(), "--output_dir", str(tmp_path / "run")])[0])
    assert "projections float32 [64, 6]" in capsys.readouterr().out


def test_pictures_say_what_they_show(run_dir: Path) -> None:
    report = evaluate_run(run_dir, replace(HEADS, evaluators=["knn"], pictures=True))
    assert "outputs of the projection head" in report.pictures[0].caption


def test_what_chooses_on_validation_images_is_refused_if_they_are_trained_on(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "--data.train_on_val true")
    assert load_run(run).data.splits["train"].fine.numel() > 1200
    with pytest.raises(ConfigError, match="coarse_to_fine chooses on validation images"):
        evaluate_run(run, replace(EMBEDDING, evaluators=["knn", "coarse_to_fine"]))
    assert evaluate_run(run, EMBEDDING).metrics
