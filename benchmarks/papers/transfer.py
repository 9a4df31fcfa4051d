"""Frozen encoders of SupCon, SINCERE and cross-entropy on other data sets than those they are trained on.

MNIST, Fashion-MNIST and scikit-learn's digits, each to the two others, at 14 pixels, trained on all classes.
SupCon and SINCERE have the temperature 0.1 and an MLP head, which is left out for the transfer, as in
SINCERE's paper. A classifier of the target is fitted to its training images; its validation images choose the
L2 penalty.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.papers.cells import bold_interval, show_interval, with_deviation
from benchmarks.papers.figures import Stored, resampled
from benchmarks.papers.methods import FASHION_ROOT, FASHION_SOURCE
from benchmarks.papers.study import (
    QUICK_SEEDS,
    SEEDS,
    Claim,
    Job,
    Records,
    Source,
    seeds_of,
    unpack_bits,
    verdict,
)
from benchmarks.papers.transfer_runs import (
    DOMAINS,
    METHODS,
    measure,
    pixels,
    train_encoder,
    transferred,
    write_untrained,
)
from benchmarks.table import markdown

NAME = "transfer"
TITLE = "Transfer of frozen encoders among MNIST, Fashion-MNIST and digits"
CONTROLS = {"untrained": "control: untrained network", "pixels": "control: the pixels themselves"}
FIGURES = {"logistic": "logistic regression", "knn": "1-NN"}
COMPARED = (
    ("sincere", "supcon", "SINCERE above SupCon"),
    ("supcon", "ce", "SupCon above cross-entropy"),
    ("supcon", "pixels", "SupCon above the pixels"),
    ("supcon", "untrained", "SupCon above an untrained network"),
)
PAIRS = tuple((source, target) for source in DOMAINS for target in DOMAINS if source != target)


def missing() -> str:
    """Why this study cannot run here; empty if it can."""
    found = Path(FASHION_ROOT).is_dir()
    return "" if found else f"{FASHION_ROOT} does not exist: {FASHION_SOURCE}"


def jobs(quick: bool) -> list[Job]:
    """See :class:`benchmarks.papers.study.Study`."""
    found = []
    for seed in QUICK_SEEDS if quick else SEEDS:
        for source in list(DOMAINS)[: 1 if quick else None]:
            evaluation = sum(DOMAINS[target].evaluation for target in DOMAINS if target != source)
            name = f"{source}_{{}}_seed{seed}"
            found += [Job(name.format(key), DOMAINS[source].minutes + evaluation) for key in METHODS]
            found.append(Job(name.format("untrained"), evaluation, (name.format("supcon"),)))
    evaluation = 10 * sum(domain.evaluation for domain in DOMAINS.values())  # 196 features, not 32
    return [*found, Job("pixels", evaluation)]


def run(job: Job, folder: Path) -> dict[str, Any]:
    """See :class:`benchmarks.papers.study.Study`."""
    from pysupcon.trainer.run import load_run

    if job.name == "pixels":
        return {"targets": {target: measure(pixels(target)) for target in DOMAINS}}
    source, key, seed = _parts(job.name)
    record: dict[str, Any] = {}
    place = folder / job.name
    if key == "untrained":
        write_untrained(folder / job.needs[0], seed, place)
    else:
        record["train_minutes"] = train_encoder(source, key, seed, place)
    start = time.process_time()
    encoder = load_run(place)
    others = [target for target in DOMAINS if target != source]
    record["targets"] = {target: measure(transferred(encoder, target)) for target in others}
    record["evaluate_minutes"] = (time.process_time() - start) / 60
    return record


def _parts(name: str) -> tuple[str, str, int]:
    """Source, method and seed in the name of a job."""
    start, _, seed = name.rpartition("_seed")
    source, _, key = start.rpartition("_")
    return source, key, int(seed)


class Outcomes:
    """The outcomes of the records: accuracies, and differences over seeds and test images.

    Args:
        records: the records of some jobs.
    """

    def __init__(self, records: Records) -> None:
        self.records = records

    def seeds(self, source: str, key: str) -> list[int]:
        """Seeds of a row; those of the pixels are all, because they are the same for each."""
        if key == "pixels":
            return list(SEEDS) if "pixels" in self.records else []
        return seeds_of([name for name in self.records if name.startswith(f"{source}_{key}_seed")])

    def stored(self, source: str, key: str, target: str, figure: str, seed: int) -> tuple[str, int]:
        """Whether each test image of the target is classified correctly: arguments of ``unpack_bits``."""
        name = key if key == "pixels" else f"{source}_{key}_seed{seed}"
        found = self.records[name]["targets"][target]
        return found[figure], found["samples"]

    def accuracies(self, source: str, key: str, target: str, figure: str) -> list[float]:
        """Per cent, one per seed."""
        seeds = self.seeds(source, key)[: 1 if key == "pixels" else None]
        found = [self.stored(source, key, target, figure, seed) for seed in seeds]
        return [100 * unpack_bits(*each).double().mean().item() for each in found]

    def difference(
        self, row: str, less: str, figure: str, pairs: Sequence[tuple[str, str]]
    ) -> tuple[float, float, float, int] | None:
        """Mean difference over pairs of source and target: value, interval, and number of seeds.

        None if no pair has two seeds of both rows. Only the seeds that all pairs have are used.
        """
        from pysupcon.evaluators.bootstrap import percentile_interval

        usable = [(s, t) for s, t in pairs if self.seeds(s, row) and self.seeds(s, less)]
        common = [set(self.seeds(s, key)) for s, _ in usable for key in (row, less)]
        seeds = sorted(set.intersection(*common)) if common else []
        if len(seeds) < 2:
            return None
        values, draws = [], []
        for source, target in usable:
            drawn: list[Tensor] = []
            means: list[float] = []
            for key in (row, less):
                found = [self.stored(source, key, target, figure, seed) for seed in seeds]
                runs = tuple(Stored(samples, bits) for bits, samples in found)
                drawn.append(resampled(figure, runs, tuple(seeds)))
                means.append(fmean(unpack_bits(*each).double().mean().item() for each in found))
            draws.append(drawn[0] - drawn[1])
            values.append(means[0] - means[1])
        low, high = percentile_interval(torch.stack(draws).mean(dim=0), 0.95)
        return fmean(values), low, high, len(seeds)


def tables(records: Records) -> str:
    """See :class:`benchmarks.papers.study.Study`."""
    outcomes = Outcomes(records)
    shown = [pair for pair in PAIRS if any(outcomes.seeds(pair[0], key) for key in METHODS)]
    if not shown:
        return ""
    count = max(len(outcomes.seeds(source, key)) for source, _ in shown for key in METHODS)
    parts = [f"**{TITLE}** ({count} seeds): accuracy on the target's test images, per cent."]
    titles = {**{key: method[0] for key, method in METHODS.items()}, **CONTROLS}
    for figure, heading in FIGURES.items():
        lines = [[heading, *(f"{DOMAINS[s].title} to {DOMAINS[t].title}" for s, t in shown)]]
        for key, title in titles.items():
            cells = [
                with_deviation(outcomes.accuracies(source, key, target, figure)) for source, target in shown
            ]
            lines.append([title, *cells])
        for row, less, _ in COMPARED[:2]:
            cells = [_difference(outcomes, row, less, figure, pair) for pair in shown]
            lines.append([f"{titles[row]} less {titles[less]}", *cells])
        parts.append(markdown(lines))
    return "\n\n".join(parts)


def _difference(outcomes: Outcomes, row: str, less: str, figure: str, pair: tuple[str, str]) -> str:
    found = outcomes.difference(row, less, figure, [pair])
    return "" if found is None else bold_interval(*found[:3], 100, 1)


def draw(records: Records, folder: Path) -> list[str]:
    """Draw the differences of every pair of data sets."""
    from pysupcon.reports.charts import draw_differences

    outcomes, bars = Outcomes(records), []
    for row, less, title in COMPARED[:2]:
        for figure, heading in FIGURES.items():
            for source, target in PAIRS:
                found = outcomes.difference(row, less, figure, [(source, target)])
                if found is not None:
                    ends = [100 * end for end in found[:3]]
                    pair = f"{DOMAINS[source].title} to {DOMAINS[target].title}"
                    bars.append((f"{title.replace('above', 'less')}, {heading}", pair, *ends))
    if not bars:
        return []
    file = f"paper_{NAME}.png"
    draw_differences(folder / file, bars, title=TITLE, unit="percentage points")
    return [file]


def claims(records: Records) -> list[Claim]:
    """See :class:`benchmarks.papers.study.Study`; each is the mean over the pairs of data sets."""
    outcomes, found = Outcomes(records), []
    for row, less, title in COMPARED:
        for figure, heading in FIGURES.items():
            difference = outcomes.difference(row, less, figure, PAIRS)
            if difference is not None:
                value, low, high, seeds = difference
                measured = f"{show_interval(value, low, high, 100, 1)} points, {seeds} seeds"
                claim = f"{title} after transfer (mean over the pairs of data sets; {heading})"
                headline = (row, less, figure) == ("sincere", "supcon", "logistic")
                source: Source = "SINCERE" if (row, less) == ("sincere", "supcon") else "control"
                found.append(Claim(claim, source, measured, verdict(low, high), headline))
    return found
