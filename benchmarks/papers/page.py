"""Writes what the studies found: the results of this folder's README, the summary in the project's README,
and the pictures."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from benchmarks.papers.study import ROOT, Claim, Records, Study, Verdict
from benchmarks.table import between_markers, markdown

BEGIN, END = "<!-- papers:begin -->", "<!-- papers:end -->"
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "benchmarks" / "papers" / "README.md"
README = ROOT / "README.md"
MOST_HEADLINES = 10
EXPLANATION = (
    "Accuracies are per cent. Mean over the seeds ± their standard deviation. In brackets the 95 % interval "
    "of the difference over seeds and test images (paired bootstrap of both; with the Student-t correction "
    "for few seeds). Bold, and *shown* or *contradicted*: the interval excludes 0. The intervals are not "
    "corrected for the number of claims: if no difference were real, about {chance:.0f} of these {count} "
    "claims would be *shown* or *contradicted*. Minutes: of one processor, training and evaluation."
)


def stored_file(study: Study, results: Path) -> Path:
    """The file of a study's records."""
    return results / f"paper_{study.NAME}.json"


def read_stored(study: Study, results: Path) -> dict[str, Any]:
    """The stored records of a study; empty if there are none."""
    path = stored_file(study, results)
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["records"]
    return found


def read_makers(study: Study, results: Path) -> list[dict[str, Any]]:
    """Each ``machine`` that made stored records of a study, with their names as ``records``."""
    path = stored_file(study, results)
    if not path.is_file():
        return []
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["made"]
    return found


def section(studies: Iterable[Study], results: Path) -> str:
    """The claims, and the tables and pictures of all studies that have records."""
    stored = [(study, records) for study in studies if (records := read_stored(study, results))]
    claims = [claim for study, records in stored for claim in study.claims(records)]
    explanation = EXPLANATION.format(chance=0.05 * len(claims), count=len(claims))
    parts = [_machines([study for study, _ in stored], results), explanation, _claims(claims)]
    for study, records in stored:
        parts += [study.tables(records), *_pictures(study, results)]
    return "\n\n".join(part for part in parts if part)


def _machines(studies: Sequence[Study], results: Path) -> str:
    made_by = [maker["machine"] for study in studies for maker in read_makers(study, results)]
    machines = sorted({machine["processor"] for machine in made_by})
    versions = sorted({machine["versions"]["torch"] for machine in made_by})
    records = [record for study in studies for record in read_stored(study, results).values()]
    # A training may have ended before its job was started again.
    minutes = sum(
        max(record["processor_minutes"], record.get("train_minutes", 0) + record.get("evaluate_minutes", 0))
        for record in records
    )
    return (
        f"{', '.join(machines)}, one thread per job; torch {', '.join(versions)}; {len(records)} jobs in "
        f"{minutes:.0f} processor minutes."
    )


def _claims(claims: Sequence[Claim], elsewhere: Sequence[Claim] = ()) -> str:
    """A table of claims; those that are repeated have the count of the verdicts ``elsewhere``, too."""
    if not claims:
        return ""
    rows = []
    for claim in claims:
        others = [other for other in elsewhere if claim.repeated and other.repeated == claim.repeated]
        verdicts = "; ".join([claim.verdict, *_count(others)])
        rows.append([claim.claim, claim.source, claim.measured, verdicts])
    return markdown([["claim", "claimed by", "measured, with 95 % interval", "verdict"], *rows])


def _count(claims: Sequence[Claim]) -> list[str]:
    verdicts = Counter(claim.verdict for claim in claims)
    counts = [f"{verdicts[name]} {name}" for name in get_args(Verdict) if verdicts[name]]
    return [f"elsewhere {', '.join(counts)}"] if counts else []


def _pictures(study: Study, results: Path) -> list[str]:
    files = sorted(file.name for file in results.glob("paper_*.png"))
    mine = [name for name in files if re.fullmatch(rf"paper_{study.NAME}(\.\w+)?\.png", name)]
    return [f"![{study.TITLE}](../results/{name})" for name in mine]


def summary(studies: Iterable[Study], results: Path) -> str:
    """The headline claims as a table, with the verdicts on the same claims on other data and at other
    temperatures."""
    stored = [(study, records) for study in studies if (records := read_stored(study, results))]
    every = [claim for study, records in stored for claim in study.claims(records)]
    claims = [claim for claim in every if claim.headline]
    assert len(claims) <= MOST_HEADLINES, f"at most {MOST_HEADLINES} headlines, got {len(claims)}"
    return _claims(claims, [claim for claim in every if not claim.headline])


def write(studies: Sequence[Study], results: Path, check: bool = False) -> int:
    """Write the pages and the pictures.

    Args:
        studies: all studies.
        results: folder of the stored records and of the pictures.
        check: change nothing; only compare.

    Returns:
        1 if ``check`` and a page differs from the stored records, else 0.
    """
    if not check:
        for study in studies:
            records: Records = read_stored(study, results)
            if records:
                study.draw(records, results)
    differs = False
    for path, text in ((PAGE, section(studies, results)), (README, summary(studies, results))):
        page = path.read_text(encoding="utf-8")
        new = between_markers(page, BEGIN, END, text)
        if check and new != page:
            print(f"{path} does not show the stored records: run benchmarks/papers/results.py --render",
                  file=sys.stderr)  # fmt: skip
            differs = True
        elif not check:
            path.write_text(new, encoding="utf-8")
    return int(differs)
