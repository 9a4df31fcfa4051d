"""The study of worst groups: its jobs, what a job records, and what the records show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.papers import worst_group
from benchmarks.papers.study import ROOT, Job, pack_bits, unpack_bits

COLOURED, RARE = worst_group.DATA
SEEDS = range(4)
GROUP = torch.arange(4).repeat_interleave(100)


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worst_group, "RESAMPLES", 60)


def classifier(accuracies: list[float], true: list[float]) -> dict[str, Any]:
    """The record of a classifier with these accuracies in the four groups, for both selections."""

    def bits(wanted: list[float]) -> str:
        return pack_bits(torch.cat([torch.arange(100) < round(100 * accuracy) for accuracy in wanted]))

    return {
        "groups": "".join(map(str, GROUP.tolist())),
        "known": {"epoch": 3, "validation": 0.9, "correct": bits(accuracies)},
        "true": {"epoch": 2, "validation": 0.8, "correct": bits(true)},
    }


def records(data: str = COLOURED) -> dict[str, Any]:
    """ERM 50, groups of SupCon 80, of Thanos 60 in the worst group; a little more with other seeds."""
    found: dict[str, Any] = {}
    for seed in SEEDS:
        more = seed / 100
        for name, worst in (("erm", 0.5), ("group_dro_supcon", 0.8), ("group_dro_thanos", 0.6)):
            one = classifier([0.9, worst + more, 0.9, 0.9], [0.9, 0.7 + more, 0.9, 0.9])
            found[f"{data}_{name}_seed{seed}"] = one
        for name, f1 in (("supcon", 0.99), ("thanos", 0.88)):
            found[f"{data}_groups_{name}_seed{seed}"] = {
                "f1": f1 + more / 10, "purity": 0.9, "silhouette": 0.5, "counts": [3] * (4 + seed)
            }  # fmt: skip
    return found


@pytest.mark.parametrize("quick", [False, True])
def test_jobs_need_jobs_of_the_study_and_have_configs(quick: bool) -> None:
    jobs = worst_group.jobs(quick)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    for job in jobs:
        assert set(job.needs) <= set(names)
        data, what, seed = worst_group.parts_of(job.name)
        if what.startswith("groups_"):
            runs = worst_group.SOURCES[what.removeprefix("groups_")][1]
            assert job.needs == tuple(f"{data}_{run}_seed{seed}" for run in runs)
        else:
            assert (ROOT / f"configs/worst_group/{data}_{what}.yaml").is_file()
    dro = next(job for job in jobs if job.name == f"{RARE}_group_dro_thanos_seed1")
    assert dro.needs == (f"{RARE}_groups_thanos_seed1",)
    if quick:
        assert set(names) < {job.name for job in worst_group.jobs(False)}
    else:
        assert {worst_group.parts_of(name)[2] for name in names} == set(range(8))
        assert sum(job.minutes for job in jobs) < 30


def test_tables_and_claims_are_those_of_the_records(tmp_path: Path) -> None:
    shown = worst_group.tables(records())
    assert "| ERM | 80.4 ± 0.3 | 51.5 ± 1.3 |  | 71.5 ± 1.3 |  |" in shown
    assert "| GroupDRO, groups of SupCon | 87.9 ± 0.3 | 81.5 ± 1.3 | **+30.0 [" in shown
    assert "± 0.1 | 90.0 ± 0.0 | 0.50 | 4 to 7 | 4 |" in shown
    assert "That Thanos recovers hidden groups better is contradicted here." in shown
    claims = {claim.claim: claim for claim in worst_group.claims(records())}
    by_text = {text.partition(" (")[0]: claim for text, claim in claims.items()}
    raised = by_text["GroupDRO on groups of SupCon raises the worst group above ERM"]
    assert raised.measured.startswith("+30.0 [")
    assert raised.verdict == "shown"
    better = by_text["GroupDRO is better on groups of Thanos than of SupCon"]
    assert (better.measured[:7], better.verdict) == ("-20.0 [", "contradicted")
    recovered = by_text["Groups of Thanos match the true groups better than those of SupCon"]
    assert (recovered.measured[:15], recovered.verdict) == ("-11.0 [-11.0, -", "contradicted")
    assert worst_group.draw(records(), tmp_path) == [worst_group.PICTURE]
    assert (tmp_path / worst_group.PICTURE).stat().st_size > 1000


def test_records_of_some_jobs_are_shown() -> None:
    every = records() | records(RARE)
    for count in (0, 1, 3, 9, 22):
        some = dict(list(every.items())[:count])
        worst_group.tables(some)
        worst_group.claims(some)
    # Seeds that not all classifiers have are left out.
    del every[f"{COLOURED}_erm_seed3"]
    assert "(3 seeds)" in worst_group.tables(every)
    assert "(4 seeds)" in worst_group.tables(every)


@pytest.mark.slow
def test_jobs_record_both_selections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ERM, groups of it, and GroupDRO on them, one or two epochs each."""
    from pysupcon import config as module

    original = module.parse_args
    monkeypatch.setattr(
        module, "parse_args", lambda given: original([*given, "--trainer.epochs", "2", "--model.width", "4"])
    )
    threads = torch.get_num_threads()
    found = {}
    try:
        for what in ("erm", "groups_erm", "group_dro_erm"):
            job = Job(f"{COLOURED}_{what}_seed0", 0.1)
            found[job.name] = worst_group.run(job, tmp_path)
    finally:
        torch.set_num_threads(threads)
    json.dumps(found)
    erm, groups, dro = found.values()
    assert (erm["known"]["metric"], dro["known"]["metric"]) == ("accuracy", "worst_known_group")
    assert erm["true"]["metric"] == dro["true"]["metric"] == "worst_group"
    for record in (erm, dro):
        assert sorted(set(record["groups"])) == ["0", "1", "2", "3"]
        correct = unpack_bits(record["known"]["correct"], len(record["groups"]))
        assert 0.4 < correct.float().mean() <= 1
        assert record["true"]["epoch"] in (1, 2)
    assert sum(groups["counts"]) == 3600
    assert 0 < groups["f1"] <= 1
    assert not (tmp_path / f"{COLOURED}_erm_seed0" / "checkpoints").exists()
    assert worst_group.tables(found)
