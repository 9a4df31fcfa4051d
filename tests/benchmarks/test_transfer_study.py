"""The study of transfer: its jobs, its figures from stored outcomes, and one run of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.papers import transfer, transfer_runs
from benchmarks.papers.study import SEEDS, pack_bits, unpack_bits

IMAGES = 200
RIGHT = {"supcon": 120, "sincere": 160, "ce": 120, "untrained": 60, "pixels": 140}
"""Of IMAGES test images; those of each seed are others."""


def planted(seeds: tuple[int, ...] = SEEDS) -> dict[str, Any]:
    """Records in which the rows have RIGHT images right, on every pair of data sets."""
    records: dict[str, Any] = {}
    for key, count in RIGHT.items():
        for source in transfer.DOMAINS:
            for seed in seeds:
                bits = (torch.arange(IMAGES) - 7 * seed) % IMAGES < count
                packed = {figure: pack_bits(bits) for figure in transfer.FIGURES}
                targets = {target: {"samples": IMAGES, **packed} for target in transfer.DOMAINS}
                name = "pixels" if key == "pixels" else f"{source}_{key}_seed{seed}"
                records.setdefault(name, {"targets": targets})
    return records


def test_jobs_need_jobs_of_the_study_and_quick_ones_are_some_of_all() -> None:
    names = {job.name for job in transfer.jobs(False)}
    assert len(names) == 3 * 4 * len(SEEDS) + 1
    assert sum(job.minutes for job in transfer.jobs(False)) < 25
    for quick in (False, True):
        found = transfer.jobs(quick)
        assert {job.name for job in found} <= names
        assert all(need in {job.name for job in found} for job in found for need in job.needs)
    sources = {job.name.partition("_")[0] for job in transfer.jobs(True)} - {"pixels"}
    assert sources == {"mnist5k"}


def test_claims_follow_the_outcomes() -> None:
    found = {claim.claim.partition(" after")[0]: claim for claim in transfer.claims(planted())}
    assert found["SINCERE above SupCon"].measured.startswith("+20.0 [")
    assert {title: claim.verdict for title, claim in found.items()} == {
        "SINCERE above SupCon": "shown",
        "SupCon above cross-entropy": "not shown",
        "SupCon above the pixels": "contradicted",
        "SupCon above an untrained network": "shown",
    }
    assert all(claim.measured.endswith("8 seeds") for claim in found.values())
    assert transfer.claims(planted((0,))) == []


def test_tables_of_all_and_of_some_records(tmp_path: Path) -> None:
    text = transfer.tables(planted())
    assert text.count("| SINCERE | 80.0 ± 0.0 | ") == len(transfer.FIGURES)
    assert "| control: the pixels themselves | 70.0 | " in text
    assert text.count("**+20.0 [") == len(transfer.PAIRS) * len(transfer.FIGURES)
    some = {name: record for name, record in planted().items() if name.startswith("digits_supcon_seed")}
    text = transfer.tables(some)
    assert "| SupCon | 60.0 ± 0.0 | 60.0 ± 0.0 |" in text
    assert "MNIST to digits" not in text
    assert transfer.tables({}) == ""
    assert transfer.draw({}, tmp_path) == []
    assert transfer.draw(planted(), tmp_path) == ["paper_transfer.png"]
    assert (tmp_path / "paper_transfer.png").stat().st_size > 1000


@pytest.mark.slow
def test_an_encoder_is_transferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short training on digits, its control and the pixels, evaluated on MNIST."""
    domains = {name: replace(transfer.DOMAINS[name], epochs=4) for name in ("digits", "mnist5k")}
    for module in (transfer, transfer_runs):
        monkeypatch.setattr(module, "DOMAINS", domains)
    records = {}
    for job in transfer.jobs(False):
        if job.name in ("digits_supcon_seed0", "digits_untrained_seed0"):
            records[job.name] = json.loads(json.dumps(transfer.run(job, tmp_path)))
    monkeypatch.setattr(transfer, "DOMAINS", {"digits": domains["digits"]})
    (pixels,) = [job for job in transfer.jobs(False) if job.name == "pixels"]
    records["pixels"] = json.loads(json.dumps(transfer.run(pixels, tmp_path)))
    accuracy = {}
    for name, target in (
        ("digits_supcon_seed0", "mnist5k"),
        ("digits_untrained_seed0", "mnist5k"),
        ("pixels", "digits"),
    ):
        found = records[name]["targets"][target]
        for figure in transfer.FIGURES:
            bits = unpack_bits(found[figure], found["samples"])
            accuracy[name, figure] = bits.double().mean().item()
    assert accuracy["pixels", "knn"] > 0.95
    assert all(0.3 < accuracy[f"digits_{key}_seed0", "knn"] < 0.98 for key in ("supcon", "untrained"))
    assert accuracy["digits_supcon_seed0", "logistic"] != accuracy["digits_untrained_seed0", "logistic"]
    assert records["digits_supcon_seed0"]["train_minutes"] > 0
    assert not (tmp_path / "digits_supcon_seed0" / "checkpoints").exists()
