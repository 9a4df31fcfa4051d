"""compare with several seeds: intervals over seeds and test samples, pairing by seed, and what is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from scipy import stats

from pysupcon.__main__ import main
from pysupcon.commands.compare import to_markdown
from pysupcon.errors import RunError
from pysupcon.evaluation.comparison import compare
from pysupcon.evaluators import BootstrapConfig
from pysupcon.reports.charts import draw_differences
from pysupcon.reports.evaluated_runs import EvaluatedRun, read_run
from tests.commands.test_compare import FIGURES, N, write_run

ACCURACY = FIGURES[0]
BOOTSTRAP = BootstrapConfig(resamples=4000)
WRONG = (10, 60, 30, 90, 20, 70, 50, 40)
"""Errors of the baseline by seed."""
FEWER = (4, 6, 5, 9, 3, 8, 6, 7)
"""Errors that the other configuration has less, by seed."""


def read(folder: Path, loss: str, errors: dict[int, int]) -> list[EvaluatedRun]:
    return [
        read_run(write_run(folder / f"{loss}-{seed}", errors=wrong, seed=seed, loss=loss))
        for seed, wrong in errors.items()
    ]


def baseline(folder: Path) -> list[EvaluatedRun]:
    return read(folder, "a", dict(enumerate(WRONG)))


def test_differences_are_paired_by_seed_in_any_order(tmp_path: Path) -> None:
    less = {seed: wrong - fewer for seed, (wrong, fewer) in enumerate(zip(WRONG, FEWER, strict=True))}
    runs = [*baseline(tmp_path), *reversed(read(tmp_path, "b", less))]
    found = compare(runs, bootstrap=BOOTSTRAP)
    difference = found.differences[ACCURACY]["b"]
    assert difference.value == pytest.approx(0.015)
    assert difference.significant
    # Wider than over the seeds alone, and far narrower than without pairing.
    seeds = stats.t.interval(0.95, 7, 0.015, stats.sem([fewer / N for fewer in FEWER]))
    assert seeds[1] - seeds[0] < difference.high - difference.low < 0.03
    assert found.paired_by_seed == {"b": True}
    assert found.resampled == dict.fromkeys("ab", "seeds and test samples")
    text = to_markdown(found)
    assert "Resampled: seeds and test samples. Paired by test sample and by seed.\n" in text
    assert "one seed" not in text
    # The values vary with the seeds: by far more than the test samples, and like a t interval.
    value = found.values[ACCURACY]["a"]
    wanted = stats.t.interval(0.95, 7, value.mean, stats.sem(value.seeds))
    assert wanted[0] - 0.04 < value.low < wanted[0] + 0.01
    assert wanted[1] - 0.01 < value.high < wanted[1] + 0.04


def test_what_holds_for_these_seeds_is_not_bold_if_other_seeds_may_differ(tmp_path: Path) -> None:
    """A difference that is clear over the test samples of every run, but of the other sign for one seed."""
    runs = [
        *read(tmp_path, "a", {0: 100, 1: 100, 2: 100, 3: 100}),
        *read(tmp_path, "b", {0: 40, 1: 40, 2: 50, 3: 140}),
    ]
    found = compare(runs, bootstrap=BOOTSTRAP).differences[ACCURACY]["b"]
    assert found.value == pytest.approx(32.5 / N)
    assert not found.significant
    for seed in range(4):
        assert compare([runs[seed], runs[4 + seed]]).differences[ACCURACY][f"b-{seed}"].significant


def test_other_seeds_are_not_paired(tmp_path: Path) -> None:
    """Differences of runs that are equal but for the numbers of their seeds: the seeds are independent."""
    runs = [*baseline(tmp_path), *read(tmp_path, "b", {8 + seed: wrong for seed, wrong in enumerate(WRONG)})]
    found = compare(runs, bootstrap=BOOTSTRAP)
    difference, value = found.differences[ACCURACY]["b"], found.values[ACCURACY]["a"]
    assert difference.value == 0
    assert difference.high - difference.low > 1.2 * (value.high - value.low)
    assert found.paired_by_seed == {"b": False}
    text = to_markdown(found)
    assert "Paired by test sample. Not paired by seed, because the seeds are not those of a: b." in text
    same = [*baseline(tmp_path / "same"), *read(tmp_path / "same", "b", dict(enumerate(WRONG)))]
    equal = compare(same, bootstrap=BOOTSTRAP).differences[ACCURACY]["b"]
    assert (equal.low, equal.high) == pytest.approx((0, 0))
    fewer = compare([*same[:8], *same[8:12]], bootstrap=BOOTSTRAP)
    assert fewer.paired_by_seed == {"b": False}
    assert "Not paired by seed" in to_markdown(fewer)


def test_one_seed_each(tmp_path: Path) -> None:
    found = compare([*read(tmp_path, "a", {0: 20}), *read(tmp_path, "b", {0: 40})])
    text = to_markdown(found)
    assert "Resampled: test samples. Paired by test sample.\n" in text
    assert "\nWarning, one seed: the interval says nothing about other seeds: a-0, b-0\n" in text
    assert (found.paired_by_seed, set(found.resampled.values())) == ({"b-0": False}, {"test samples"})


def test_runs_of_one_config_and_one_seed_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path / name, errors=9) for name in ("x", "copy")]
    runs.append(write_run(tmp_path / "other", errors=9, loss="other"))
    assert main(["compare", *map(str, runs), "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert f"different seeds, but {runs[0]} and {runs[1]} both have seed 0" in error


@pytest.mark.parametrize("seed", [None, "1", True, [1]])
def test_a_config_without_a_seed_is_refused(tmp_path: Path, seed: object) -> None:
    runs = [write_run(tmp_path / loss, errors=9, loss=loss) for loss in "ab"]
    config = yaml.safe_load((runs[1] / "config.yaml").read_text()) | {"seed": seed}
    (runs[1] / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(RunError, match=r"config.yaml: seed must be an integer, got"):
        compare([read_run(run) for run in runs])


def test_a_metric_of_other_test_samples_is_refused(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / loss, errors=9, loss=loss) for loss in "ab"]
    path = runs[1] / "evaluation" / "outcomes.safetensors"
    outcomes = load_file(path)
    outcomes["separation/fine/target"][:10] = float("nan")
    save_file(outcomes, path)
    read_back = [read_run(run) for run in runs]
    message = (
        rf"{FIGURES[1]} must be known for the same test samples in all runs, but .*a has 400 of them and .*b "
        "has 390: choose other metrics with --figures"
    )
    with pytest.raises(RunError, match=message):
        compare(read_back)
    assert list(compare(read_back, figures=["knn"]).values) == [ACCURACY]


def test_the_picture_and_json_say_what_was_resampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pysupcon.reports import charts

    notes = []
    monkeypatch.setattr(charts, "draw_differences", lambda *_, note, **__: notes.append(note))
    several = [str(run.dir) for run in baseline(tmp_path)]
    other = [str(run.dir) for run in read(tmp_path, "b", dict.fromkeys(range(8), 30))]
    output = ["--output", str(tmp_path / "out"), "--figures", "knn", "--resamples", "50"]
    assert main(["compare", *several, *other, *output]) == 0
    content = json.loads((tmp_path / "out/compare.json").read_text())
    assert content["resampled"] == dict.fromkeys("ab", "seeds and test samples")
    assert content["paired_by_seed"] == {"b": True}
    assert main(["compare", *several, other[0], *output, "--confidence", "0.9"]) == 0
    assert main(["compare", several[0], other[0], *output]) == 0
    alone = "one seed: the interval says nothing about other seeds"
    assert notes == [
        "95 % intervals over seeds and test samples",
        f"90 % intervals over test samples, and over seeds except b-0 ({alone})",
        f"95 % intervals over test samples; {alone}",
    ]


def test_the_picture_shows_the_note(tmp_path: Path) -> None:
    rows = [("figure", "b", 1.0, -0.5, 2.0)]
    for name in ("over seeds", "over test samples", ""):
        draw_differences(tmp_path / f"{name}.png", rows, title="t", unit="points", note=name)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 3


def test_other_settings_of_the_evaluators_are_told(tmp_path: Path) -> None:
    """A difference of runs that were evaluated in two ways may come from the evaluation."""

    def evaluated(name: str, loss: str, seed: int, metadata: dict[str, object]) -> EvaluatedRun:
        folder = write_run(tmp_path / name, errors=10, seed=seed, loss=loss)
        file = folder / "evaluation" / "metrics.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"metadata": metadata}))
        return read_run(folder)

    voting = {votes: {"votes": votes, "chunk_bytes": len(votes)} for votes in ("exp", "cosine")}
    arguments = {"arguments": {"knn": voting["exp"], "geometry": {"level": "fine"}, "batch_size": 256}}
    runs = [
        evaluated("a", "supcon", 0, arguments),
        evaluated("b", "sincere", 0, {"arguments": {"knn": voting["exp"], "geometry": {"level": "coarse"}}}),
    ]
    assert compare(runs).other_settings == []  # no figure of geometry is compared
    kept = {
        "arguments": {"knn": voting["exp"]},
        "kept": {"knn": {"arguments": {"knn": 1} | voting["cosine"]}},
    }
    found = compare([*runs, evaluated("c", "sincere", 1, kept)])
    told = f"knn.votes is exp in {tmp_path / 'a'} and cosine in {tmp_path / 'c'}"
    assert found.other_settings == [told]
    assert "Warning, the runs were not evaluated with the same settings: knn.votes is exp" in to_markdown(
        found
    )
    assert compare([runs[0], *read(tmp_path, "older", {0: 5})]).other_settings == []
