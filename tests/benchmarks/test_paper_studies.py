"""benchmarks/papers: jobs and their order, records, differences over seeds and images, and the pages."""

from __future__ import annotations

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.papers import encoders, page, results  # noqa: E402
from benchmarks.papers.cells import show_interval  # noqa: E402
from benchmarks.papers.figures import FIGURES, RESAMPLES, bound_metric, outcomes  # noqa: E402
from benchmarks.papers.methods import Method, Table  # noqa: E402
from benchmarks.papers.studies import STUDIES  # noqa: E402
from benchmarks.papers.study import QUICK_SEEDS, Claim, Job, Study, Verdict, pack_bits, unpack_bits, verdict  # noqa: E402
from benchmarks.papers.table_study import Order, TableStudy  # noqa: E402
from pysupcon.config import parse_args  # noqa: E402
from pysupcon.evaluators import BootstrapConfig  # noqa: E402
from pysupcon.evaluators.bootstrap import percentile_interval, seed_and_sample_values  # noqa: E402

RECIPE = """
data: {dataset: digits, augmentation: none, batch_size: 128}
model: {width: 4}
trainer: {epochs: 2, checkpoint_epochs: 2, best_by: null}
optimizer: {learning_rate: 5.0e-3}
"""
CROSS_ENTROPY = (
    "config: recipe.yaml\nmodel: {classifier: true}\nloss: {name: none, cross_entropy_weight: 1}\n"
)
METHODS = (
    Method("supcon", "SupCon"),
    Method("ce", "cross-entropy"),
    Method("head", "SupCon, MLP head", "supcon", ("--model.projection", "mlp"), shown=False),
    Method("both", "two frozen backbones", kind="concatenated", parts=("supcon", "ce")),
    Method("pixels", "the pixels", kind="pixels"),
    Method("untrained", "untrained network", kind="untrained"),
)
ORDERS = (
    Order("trained above untrained", "supcon", "untrained", "logistic", headline=True),
    Order("SupCon above the pixels", "supcon", "pixels", "knn"),
)
STUDY = TableStudy(Table("digits", "digits", "digits", METHODS), ORDERS)


@pytest.fixture(scope="module", name="runs")
def finished_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs and records of STUDY for two seeds, made in this process."""
    folder = tmp_path_factory.mktemp("paper")
    configs = {"recipe": RECIPE, "digits_supcon": "config: recipe.yaml\n", "digits_ce": CROSS_ENTROPY}
    for name, text in configs.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(encoders, "CONFIGS", folder)
        patch.setitem(results.BY_NAME, STUDY.NAME, STUDY)
        patch.setattr("benchmarks.papers.table_study.SEEDS", (0, 1))
        jobs = results.left([STUDY], folder, quick=False)
        assert len(jobs) == 11  # the pixels are the same for both seeds
        assert results.run_all(jobs, folder, 1, pool) == []
        assert results.left([STUDY], folder, quick=False) == []
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(name="records")
def collected(runs: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("benchmarks.papers.table_study.SEEDS", (0, 1))
    return results.collect(STUDY, runs, quick=False)


def test_a_record_is_what_was_measured(records: dict[str, Any]) -> None:
    assert len(records) == 11
    assert "figures" not in records["head_seed0"]
    for name in ("supcon_seed0", "both_seed1", "untrained_seed1", "pixels_seed0"):
        record = records[name]
        assert list(record["figures"]) == ["coarse", "logistic", "knn", "spread"]
        for figure in ("coarse", "logistic", "knn"):
            stored = outcomes(record, figure)
            assert stored is not None
            metric = bound_metric(stored, figure)
            assert metric.value() == pytest.approx(record["figures"][figure]["value"], abs=1e-12)
            assert len(metric.outcomes[0]) == record["samples"]
        assert record["figures"]["logistic"]["converged"] == 1
        assert outcomes(record, "spread") is None
    assert records["supcon_seed0"]["train_minutes"] > 0
    assert records["untrained_seed0"]["figures"] != records["untrained_seed1"]["figures"]
    assert records["pixels_seed0"]["figures"]["knn"]["value"] > 0.9  # 8x8 digits


def test_differences_are_over_seeds_and_images(records: dict[str, Any]) -> None:
    draws = [
        seed_and_sample_values(
            [
                bound_metric(stored, "logistic")
                for seed in (0, 1)
                if (stored := outcomes(records[f"{key}_seed{seed}"], "logistic"))
            ],
            BootstrapConfig(resamples=RESAMPLES),
        )
        for key in ("supcon", "untrained")
    ]
    low, high = percentile_interval(draws[0] - draws[1], 0.95)
    trained, random = (
        fmean(records[f"{key}_seed{seed}"]["figures"]["logistic"]["value"] for seed in (0, 1))
        for key in ("supcon", "untrained")
    )
    claim, other = STUDY.claims(records)
    assert claim.measured == (
        f"{100 * (trained - random):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] points, 2 seeds"
    )
    assert (claim.verdict, claim.headline) == (verdict(low, high), True)
    assert other.claim == "SupCon above the pixels (digits; fine labels, 1-NN)"


def test_the_table_shows_every_row(records: dict[str, Any]) -> None:
    text = STUDY.tables(records)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert [row.split(" | ")[0] for row in rows[1:]] == [
        "| SupCon", "| cross-entropy", "| two frozen backbones", "| the pixels", "| untrained network",
    ]  # fmt: skip
    assert text.startswith(f"**digits** (2 seeds, {records['ce_seed0']['samples']} test samples).")
    assert "±" not in rows[4].split(" | ")[1]  # the pixels have no seeds
    assert "±" in rows[1]


def test_pages_show_the_stored_records(
    records: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("PAGE", "README"):
        file = tmp_path / f"{name}.md"
        file.write_text(f"above\n{page.BEGIN}\nformer\n{page.END}\nbelow\n", encoding="utf-8")
        monkeypatch.setattr(page, name, file)
    results.store(STUDY, dict(list(records.items())[:3]), tmp_path)
    results.store(STUDY, records, tmp_path)
    assert page.read_stored(STUDY, tmp_path) == records
    assert page.write([STUDY], tmp_path, check=True) == 1
    assert "results.py --render" in capsys.readouterr().err
    assert page.write([STUDY], tmp_path) == 0
    assert page.write([STUDY], tmp_path, check=True) == 0
    text = (tmp_path / "PAGE.md").read_text(encoding="utf-8")
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    for picture in re.findall(r"\(\.\./results/(paper_\w+\.png)\)", text):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    summary = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "trained above untrained" in summary
    assert "the pixels" not in summary  # not a headline


class Listed:
    """A study whose jobs write down that they ran."""

    NAME, TITLE = "listed", "listed"

    def __init__(self) -> None:
        self.ran: list[str] = []

    def missing(self) -> str:
        return ""

    def jobs(self, quick: bool) -> list[Job]:
        jobs = [Job("last", 1, ("middle", "first")), Job("middle", 2, ("first",)), Job("first", 4)]
        return [*jobs, Job("broken", 8), Job("needs_broken", 16, ("broken",))] if not quick else jobs

    def run(self, job: Job, folder: Path) -> dict[str, Any]:
        if job.name == "broken":
            raise ValueError("broken")
        self.ran.append(job.name)
        return {"name": job.name}

    def tables(self, records: Any) -> str:
        return ""

    def draw(self, records: Any, folder: Path) -> list[str]:
        return []

    def claims(self, records: Any) -> list[Claim]:
        return []


@pytest.fixture(name="listed")
def listed_study(monkeypatch: pytest.MonkeyPatch) -> Listed:
    study = Listed()
    monkeypatch.setitem(results.BY_NAME, "listed", study)  # type: ignore[arg-type]
    return study


def test_jobs_run_after_those_that_they_need(
    listed: Listed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ThreadPoolExecutor(1) as pool:
        jobs = results.left([listed], tmp_path, quick=False)
        assert results.run_all(jobs, tmp_path, 1, pool) == ["listed/broken", "listed/needs_broken"]
        assert listed.ran == ["first", "middle", "last"]
        assert "ValueError: broken" in capsys.readouterr().err
        again = results.left([listed], tmp_path, quick=False)
        assert [job.name for _, job in again] == ["broken", "needs_broken"]
    assert results.collect(listed, tmp_path, quick=True)["last"]["name"] == "last"


def test_the_plan_says_the_minutes_and_runs_nothing(
    listed: Listed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--studies", "listed", "--runs", str(tmp_path), "--plan"]
    assert results.main(given) == 0
    assert "5 jobs, about 31 processor minutes" in capsys.readouterr().out
    assert results.main([*given, "--quick"]) == 0
    assert "3 jobs, about 7 processor minutes" in capsys.readouterr().out
    assert listed.ran == []


def test_only_what_is_not_stored(listed: Listed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that was added is trained, with the runs that it needs; the stored records of these stay."""
    folder = tmp_path / "results"
    stored = {"first": {"name": "stored"}, "broken": {}, "needs_broken": {}}
    results.store(cast(Study, listed), stored, folder)
    have = {"listed": page.read_stored(cast(Study, listed), folder)}
    assert [job.name for _, job in results.left([listed], tmp_path, False, have)] == [
        "last",
        "middle",
        "first",
    ]
    everything = {"listed": {job.name: {} for job in listed.jobs(False)}}
    assert results.left([listed], tmp_path, False, everything) == []

    monkeypatch.setattr(results, "run_all", _run_here)
    monkeypatch.setattr(page, "section", lambda *_: "")
    given = ["--studies", "listed", "--runs", str(tmp_path), "--results", str(folder), "--missing"]
    assert results.main(given) == 0
    assert listed.ran == ["first", "middle", "last"]
    found = page.read_stored(cast(Study, listed), folder)
    assert found["first"] == {"name": "stored"}
    assert found["last"]["name"] == "last"


def _run_here(jobs: Any, runs: Path, processes: int, run_all: Any = results.run_all) -> list[str]:
    """In this process, whose studies have the tests' own."""
    with ThreadPoolExecutor(1) as pool:
        return list(run_all(jobs, runs, processes, pool))


def test_records_stay_with_their_machine(
    listed: Listed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = cast(Study, listed)
    for commit, records in (
        ("one", {"first": 1, "middle": 1}),
        ("two", {"middle": 2, "last": 2, "first": 1}),
    ):
        monkeypatch.setattr("benchmarks.machine.describe", lambda _, commit=commit: {"commit": commit})
        results.store(study, {name: {"value": value} for name, value in records.items()}, tmp_path)
    makers = [(maker["machine"]["commit"], maker["records"]) for maker in page.read_makers(study, tmp_path)]
    assert makers == [("two", ["middle", "last"]), ("one", ["first"])]
    before = page.stored_file(study, tmp_path).read_text(encoding="utf-8")
    results.store(study, {"first": {"value": 1}}, tmp_path)
    assert page.stored_file(study, tmp_path).read_text(encoding="utf-8") == before, "nothing is new"


def test_results_of_another_folder_are_printed(
    listed: Listed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pages of the project stay."""
    monkeypatch.setattr(results, "run_all", lambda *_: [])
    monkeypatch.setattr(results, "STUDIES", [STUDY])
    monkeypatch.setattr(page, "write", lambda *_, **__: pytest.fail("the pages were written"))
    (tmp_path / "results").mkdir()
    record = {"figures": {}, "samples": 1, "processor_minutes": 1.0}
    results.store(STUDY, {"ce_seed0": record}, tmp_path / "results")
    given = ["--studies", "listed", "--runs", str(tmp_path), "--results", str(tmp_path / "results")]
    for words in (given, [*given, "--render"]):
        assert results.main(words) == 0
        assert "1 jobs in 1 processor minutes" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        results.main([*given, "--check"])
    assert "leave out --results and --quick" in capsys.readouterr().err


def test_the_summary_counts_the_other_tables(tmp_path: Path) -> None:
    def of_table(outcomes: dict[str, Verdict]) -> list[Claim]:
        return [
            Claim(name, "control", "+1", outcome, name == "one", "A above B")
            for name, outcome in outcomes.items()
        ]

    class Fixed(Listed):
        NAME = "fixed"

        def claims(self, records: Any) -> list[Claim]:
            found = of_table({"one": "shown", "two": "contradicted", "three": "shown", "four": "shown"})
            return [
                *found,
                Claim("alone", "control", "+2", "not shown", True),
                Claim("none", "control", "0", "shown"),
            ]

    study = cast(Study, Fixed())
    results.store(study, {"first": {}}, tmp_path)
    assert page.summary([study], tmp_path).splitlines()[2:] == [
        "| one | control | +1 | shown; elsewhere 2 shown, 1 contradicted |",
        "| alone | control | +2 | not shown |",
    ]


def test_an_end_beside_zero_shows_its_side() -> None:
    assert show_interval(0.0123, 0.00002, 0.02, 100, 1) == "+1.230 [+0.002, +2.000]"
    assert show_interval(0.0123, 0.0004, 0.02, 100, 1) == "+1.23 [+0.04, +2.00]"
    assert show_interval(0.0123, 0.004, 0.02, 100, 1) == "+1.2 [+0.4, +2.0]"
    assert show_interval(0.0, 0.0, 0.0, 100, 1) == "+0.0 [+0.0, +0.0]"


def test_the_example_of_the_page_gives_its_interval(capsys: pytest.CaptureFixture[str]) -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code, {})
    found = dict(re.findall(r"(\w+)=([-\w.]+)", capsys.readouterr().out))
    ends = [100 * float(found[name]) for name in ("value", "low", "high")]
    row = f"| {ends[0]:+.1f} [{ends[1]:+.1f}, {ends[2]:+.1f}] points, 8 seeds | shown |"
    claim = "| SupCon + cNCE above SupCon, both at tau 0.5 (MNIST-coarse, 3,600 images, strong augmentation"
    (line,) = [line for line in text.splitlines() if line.startswith(claim) and "logistic" in line]
    assert line.endswith(row)


def test_bits_survive() -> None:
    bits = torch.rand(1001, generator=torch.Generator().manual_seed(0)) < 0.3
    assert torch.equal(unpack_bits(pack_bits(bits), 1001), bits)


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.NAME)
def test_every_study_is_complete(study: Study) -> None:
    """Names are unique, needs exist and come before, configs parse, and claims name rows of the table."""
    for quick in (False, True):
        jobs = study.jobs(quick)
        names = [job.name for job in jobs]
        assert len(set(names)) == len(names)
        for job in jobs:
            assert set(job.needs) <= set(names)
            assert job.minutes > 0
    if isinstance(study, TableStudy):
        for method in study.methods.values():
            if method.kind == "trained":
                parse_args(encoders.arguments(study.table, method, 0, Path("unused")))
        shown = {key for key, method in study.methods.items() if method.shown}
        assert {study.table.baseline, *(order.row for order in study.orders)} <= shown
        assert {order.less for order in study.orders} <= shown
        assert {*study.table.figures, *study.table.compared} <= set(FIGURES)


def test_the_cost_is_bounded() -> None:
    """Six core hours for all; the quick form 20 minutes on two cores, with two seeds."""
    assert sum(job.minutes for study in STUDIES for job in study.jobs(False)) <= 360
    quick = [job for study in STUDIES for job in study.jobs(True)]
    assert 0 < sum(job.minutes for job in quick) <= 40
    assert len(QUICK_SEEDS) >= 2


@pytest.mark.slow
def test_the_pages_of_the_project_show_its_records() -> None:
    assert results.main(["--check"]) == 0
    for study in STUDIES:
        stored = page.stored_file(study, results.RESULTS)
        if stored.is_file():
            assert set(json.loads(stored.read_text(encoding="utf-8"))["records"]) <= {
                job.name for quick in (False, True) for job in study.jobs(quick)
            }
