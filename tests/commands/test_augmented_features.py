"""Features of augmented training images in the evaluation of a run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.quick_run import train_quickly
from torch import Tensor

from pysupcon.__main__ import main
from pysupcon.config import parse_args
from pysupcon.data.augmented import AugmentedDataset
from pysupcon.data.config import DataConfig
from pysupcon.data.datamodule import DataModule, load_data
from pysupcon.errors import ConfigError, RunError
from pysupcon.evaluation import features
from pysupcon.evaluation.evaluate import evaluate_run
from pysupcon.evaluation.features import extract_features, run_features
from pysupcon.evaluators import (
    BootstrapConfig,
    CoarseToFineConfig,
    EvaluationConfig,
    KNNConfig,
    LinearProbeConfig,
)
from pysupcon.reports.report import Report
from pysupcon.trainer.run import load_run

CPU = torch.device("cpu")
PLAIN = EvaluationConfig(
    evaluators=["coarse_to_fine", "knn"],
    coarse_to_fine=CoarseToFineConfig(penalties=[1e-2]),
    knn=KNNConfig(k=[1]),
    bootstrap=BootstrapConfig(resamples=50),
    pictures=False,
    progress=False,
)
AUGMENTED = replace(PLAIN, coarse_to_fine=CoarseToFineConfig(penalties=[1e-2], augmented_passes=2))
NOTE = "coarse_to_fine: fitted to features of 2 passes over augmented training images (data.augmentation="


def trained(folder: Path, *more: str) -> Path:
    return train_quickly(folder, "--data.augmentation", "strong", *more)


@pytest.fixture(scope="module")
def of_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("augmented") / "run")


@pytest.fixture
def run_dir(of_digits: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(of_digits, tmp_path / "run"))


def flat(images: Tensor) -> Tensor:
    return images.flatten(1)


@pytest.fixture(scope="module")
def digits() -> DataModule:
    return load_data(DataConfig("digits", augmentation="strong", batch_size=128))


def rows(data: DataModule, number: int = 0, seed: int = 0, **options: Any) -> Tensor:
    settings: dict[str, Any] = {"batch_size": 100, "device": CPU, **options}
    return extract_features(flat, AugmentedDataset(data, seed, number), **settings).features


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (7, 0), (5000, 0), (64, 2)])
def test_images_do_not_depend_on_batches_and_processes(
    digits: DataModule, batch_size: int, workers: int
) -> None:
    assert torch.equal(rows(digits, batch_size=batch_size, workers=workers), rows(digits))


def test_images_are_augmented_anew_in_each_pass_and_in_order(digits: DataModule) -> None:
    plain = digits.evaluation_dataset("train")
    originals = torch.stack([image for image, *_ in plain.__getitems__(list(range(len(plain))))]).flatten(1)
    first, second = rows(digits), rows(digits, number=1)
    for one, other in (
        (first, originals),
        (second, originals),
        (first, second),
        (first, rows(digits, seed=1)),
    ):
        assert (one != other).any(dim=1).double().mean() > 0.99
    # Its own image is the nearest far more often than by chance, 1 of 1,295: the order is kept.
    nearest = torch.cdist(first, originals).argmin(dim=1)
    assert (nearest == torch.arange(len(first))).double().mean() > 0.1
    found = AugmentedDataset(digits, 0, 1)
    assert [item[1:] for item in found.__getitems__([5, 3])] == [plain[5][1:], plain[3][1:]]
    assert torch.equal(found[3][0].flatten(), second[3])
    # The training's own random numbers are others, though the seed is the same.
    in_training = digits.loader(digits.batch_sampler(seed=0, steps=1)).dataset
    views, _ = in_training[(0, 0)]
    assert not any(torch.equal(view.flatten(), first[0]) for view in digits.normalize(views))


def test_partners_and_unknown_samples_do_not_enter(tmp_path: Path) -> None:
    """Features keep the label of their own image, and rows of unknown class have no place."""
    options: dict[str, Any] = {"augmentation": "weak", "batch_size": 64}
    alone = load_data(DataConfig("digits", **options))
    paired = load_data(DataConfig("digits", view_partners="class", **options))
    assert torch.equal(rows(paired), rows(alone))
    some = load_data(DataConfig("digits", labels="fine", ignore_index=3, sampler="shuffled", **options))
    assert len(some.training) > len(AugmentedDataset(some, 0, 0)) == len(some.splits["train"])


def test_the_features_are_those_of_augmented_training_images_and_of_plain_others(run_dir: Path) -> None:
    run = load_run(run_dir)
    plain, found = run_features(run, PLAIN, CPU), run_features(run, AUGMENTED, CPU)
    assert plain.augmented is None
    for (_, one), (_, other) in zip(plain.items(), found.items(), strict=True):
        assert torch.equal(one.features, other.features)
    assert found.augmented is not None
    assert found.augmented.shape == (2, 1295, 16)
    assert not found.augmented.is_inference()
    for number in range(2):
        images = rows(run.data, number, run.config.seed).view(-1, 1, 8, 8)
        with torch.no_grad():
            expected = run.model.double().backbone(images.double())
        run.model.float()
        torch.testing.assert_close(found.augmented[number].double(), expected, rtol=1e-4, atol=1e-5)
    # Another batch size and processes: the same up to rounding of the encoder.
    other = load_run(run_dir)
    other.config.data.workers = 2
    again = run_features(other, replace(AUGMENTED, batch_size=37), CPU)
    torch.testing.assert_close(again.augmented, found.augmented, rtol=1e-5, atol=1e-6)
    assert torch.equal(run_features(load_run(run_dir), AUGMENTED, CPU).augmented, found.augmented)  # type: ignore[arg-type]


def test_as_many_passes_as_the_probes_need(run_dir: Path) -> None:
    """None for evaluators that do not run, and the first of the most for all."""
    run, more = load_run(run_dir), LinearProbeConfig(augmented_passes=3)
    both = replace(AUGMENTED, evaluators=["coarse_to_fine", "linear_probe"], linear_probe=more)
    three, two = run_features(run, both, CPU).augmented, run_features(run, AUGMENTED, CPU).augmented
    assert three is not None
    assert two is not None
    assert (len(three), len(two)) == (3, 2)
    assert torch.equal(three[:2], two)
    assert run_features(run, replace(both, evaluators=["knn"]), CPU).augmented is None


def test_the_report_says_it_and_keeps_it_with_the_results(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = evaluate_run(run_dir, AUGMENTED)
    assert f"{NOTE}strong, seed 0), not of plain ones" in first.notes
    assert first.metadata["arguments"]["coarse_to_fine"]["augmented_passes"] == 2
    assert evaluate_run(run_dir, AUGMENTED).metrics == first.metrics
    plain = evaluate_run(Path(shutil.copytree(run_dir, run_dir.with_name("other"))), PLAIN)
    assert not any(NOTE in note for note in plain.notes)
    of_neighbours = {name for name in first.metrics if name.startswith("knn/")}
    assert {name: plain.metrics[name] for name in of_neighbours} == {
        name: first.metrics[name] for name in of_neighbours
    }
    name = "coarse_to_fine/fine/accuracy"
    assert plain.metrics[name].value != first.metrics[name].value
    # Another probe, of plain images, beside the earlier one: each with its own settings and note.
    arguments = (
        "--evaluators linear_probe --pictures false --progress false --coarse_to_fine.augmented_passes 0"
    )
    assert main(["evaluate", str(run_dir), *arguments.split()]) == 0
    capsys.readouterr()
    both = Report.from_json((run_dir / "evaluation/metrics.json").read_text())
    assert both.metrics[name].value == first.metrics[name].value
    assert both.metadata["kept"]["coarse_to_fine"]["arguments"]["augmented_passes"] == 2
    assert both.metadata["arguments"]["linear_probe"]["augmented_passes"] == 0
    assert [note for note in both.notes if "augmented" in note] == [
        f"{NOTE}strong, seed 0), not of plain ones"
    ]
    # The same probe with another value replaces all of its results, and the note.
    after = evaluate_run(run_dir, replace(PLAIN, evaluators=["coarse_to_fine"]))
    assert after.metrics[name].value == plain.metrics[name].value
    assert not any("augmented" in note for note in after.notes)
    assert "coarse_to_fine" not in after.metadata["kept"]


def test_no_augmentation_is_refused_before_a_training_and_before_an_evaluation(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = (
        r"evaluation.coarse_to_fine.augmented_passes=2 needs augmented training images, but "
        r"data.augmentation is none: set augmented_passes to 0"
    )
    passes = ["--evaluation.coarse_to_fine.augmented_passes", "2"]
    plain = ["--data.dataset", "digits", "--data.augmentation", "none", "--output_dir"]
    with pytest.raises(ConfigError, match=message):
        parse_args([*plain, str(tmp_path / "x"), *passes])[0].resolve()
    parse_args([*plain, str(tmp_path / "x"), *passes, "--evaluation.evaluators", "knn"])[0].resolve()
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(text.replace("augmentation: strong", "augmentation: none"))
    assert main(["evaluate", str(run_dir), "--coarse_to_fine.augmented_passes", "2"]) == 1
    assert "augmented_passes=2 needs augmented training images" in capsys.readouterr().err
    assert not (run_dir / "evaluation").exists()


def test_vectors_have_their_own_augmentation(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(120) % 3
    table = np.column_stack([generator.normal(size=(120, 4)) + 2 * labels[:, None], labels])
    file = tmp_path / "features.csv"
    lines = [",".join([*(f"{value:.5f}" for value in row[:4]), f"c{int(row[4])}"]) for row in table]
    file.write_text("\n".join(["a,b,c,d,label", *lines]) + "\n")
    options = {"augmentation": "noise", "batch_size": 32}
    data = load_data(DataConfig("arrays", str(file), **options))  # type: ignore[arg-type]
    plain = data.evaluation_dataset("train")
    originals = torch.stack([plain[i][0] for i in range(len(plain))])
    found = rows(data, batch_size=11)
    assert torch.equal(found, rows(data))
    noise = (found - originals).std()  # of standardised features
    assert float(noise) == pytest.approx(0.1, rel=0.15)


def test_features_that_are_not_finite_name_the_split(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(AugmentedDataset):
        def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int, int]]:
            return [(image * torch.nan, *labels) for image, *labels in super().__getitems__(indices)]  # type: ignore[misc]

    monkeypatch.setattr(features, "AugmentedDataset", Broken)
    with pytest.raises(RunError, match=r"the augmented train split of .*run: features must be finite"):
        evaluate_run(run_dir, AUGMENTED)
