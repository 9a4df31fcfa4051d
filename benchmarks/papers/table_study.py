"""A study that compares the methods of one table: trainings, features, figures, differences, claims."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.papers.cells import bold_interval, show_interval, with_deviation
from benchmarks.papers.encoders import concatenate, embeddings, pixels, train_encoder, untrained
from benchmarks.papers.figures import FIGURES, Comparer, Difference, local_lipschitz, measure, values
from benchmarks.papers.methods import Method, Table
from benchmarks.papers.study import QUICK_SEEDS, SEEDS, Claim, Job, Record, Records, Source, verdict
from benchmarks.table import markdown

_PARTS_ONLY = 0.6
"""Share of the minutes of a training without an evaluation."""


@dataclass(frozen=True)
class Order:
    """A claim that a row is above another in a figure.

    Attributes:
        claim: in words; the table's title and the figure are added.
        row, less: keys of the methods.
        figure: key of the figure.
        source: who makes the claim.
        headline: it stands in the summary of the project's README.
    """

    claim: str
    row: str
    less: str
    figure: str
    source: Source = "control"
    headline: bool = False


class TableStudy:
    """The study of one table; see :class:`benchmarks.papers.study.Study`.

    Args:
        table: the table.
        orders: the claims that it decides.
        in_quick: whether the quick form trains this table.
        headlines: row, less and figure of the claims that stand in README.
    """

    def __init__(
        self,
        table: Table,
        orders: Sequence[Order] = (),
        in_quick: bool = False,
        headlines: Sequence[tuple[str, str, str]] = (),
    ) -> None:
        self.table, self.in_quick = table, in_quick
        self.orders = tuple(
            replace(order, headline=order.headline or (order.row, order.less, order.figure) in headlines)
            for order in orders
        )
        self.NAME, self.TITLE = table.name, table.title
        self.methods = {method.key: method for method in table.methods}

    def missing(self) -> str:
        """Why this study cannot run here; empty if it can."""
        there = not self.table.root or Path(self.table.root).exists()
        return "" if there else f"{self.table.root} does not exist: {self.table.source}"

    def jobs(self, quick: bool) -> list[Job]:
        """See :class:`benchmarks.papers.study.Study`."""
        if quick and not self.in_quick:
            return []
        return [
            self._job(method, seed)
            for seed in (QUICK_SEEDS if quick else SEEDS)
            for method in self.table.methods
            if (method.quick or not quick) and not (method.kind == "pixels" and seed != SEEDS[0])
        ]

    def _job(self, method: Method, seed: int) -> Job:
        minutes = self.table.minutes
        if method.kind != "trained":
            of = method.parts or (self.table.baseline,)
            needs = tuple(f"{key}_seed{seed}" for key in of)
            return Job(f"{method.key}_seed{seed}", (1 - _PARTS_ONLY) * minutes, needs)
        return Job(f"{method.key}_seed{seed}", minutes if method.shown else _PARTS_ONLY * minutes)

    def run(self, job: Job, folder: Path) -> dict[str, Any]:
        """See :class:`benchmarks.papers.study.Study`."""
        key, _, number = job.name.rpartition("_seed")
        method, seed = self.methods[key], int(number)
        record: dict[str, Any] = {}
        place = folder / job.name
        start = time.process_time()
        if method.kind == "trained":
            of_run = seed + len(SEEDS) * method.new_seeds
            record["train_minutes"] = train_encoder(self.table, method, of_run, place)
            start = time.process_time()
            if not method.shown:
                return record
            splits = embeddings(place)
        elif method.kind == "concatenated":
            concatenate(*(folder / name for name in job.needs), place)
            splits = embeddings(place)
        else:
            of_baseline = folder / job.needs[0]
            splits = pixels(of_baseline) if method.kind == "pixels" else untrained(of_baseline, seed)
        figures = [*self.table.figures, *method.also]
        heads = [name for name in figures if name.startswith("head_")]
        plain = [name for name in figures if name not in (*heads, "lipschitz")]
        record["figures"] = measure(splits, plain)
        if "lipschitz" in figures:
            record["figures"]["lipschitz"] = local_lipschitz(place)
        if heads:
            record["figures"] |= measure(embeddings(place, projection=True), heads)
        record["samples"] = len(splits.test)
        record["evaluate_minutes"] = (time.process_time() - start) / 60
        return record

    def rows(self, records: Records) -> dict[str, dict[int, Record]]:
        """The records of each row by seed, for :class:`benchmarks.papers.figures.Comparer`. The record of the
        pixels stands for all seeds."""
        found: dict[str, dict[int, Record]] = {}
        for method in self.table.methods:
            if not method.shown:
                continue
            mine = {
                int(name.rpartition("_seed")[2]): record
                for name, record in records.items()
                if name.rpartition("_seed")[0] == method.key
            }
            if method.kind == "pixels" and mine:
                mine = dict.fromkeys(SEEDS, mine[SEEDS[0]])
            if mine:
                found[method.key] = mine
        return found

    def tables(self, records: Records) -> str:
        """See :class:`benchmarks.papers.study.Study`."""
        rows = self.rows(records)
        if not rows:
            return ""
        comparer = Comparer(rows)
        measured = {
            name for of_row in rows.values() for record in of_row.values() for name in record["figures"]
        }
        also = dict.fromkeys(
            name for method in self.table.methods for name in method.also if name in measured
        )
        shown = [*self.table.figures, *also]
        base = self.methods[self.table.baseline].title
        header = ["method", *(FIGURES[name].heading for name in shown)]
        header += [f"{FIGURES[name].heading}, less {base}" for name in self.table.compared]
        lines = [[*header, "minutes"]]
        for key, of_row in rows.items():
            found = list(of_row.values())
            if self.methods[key].kind == "pixels":
                found = found[:1]
            cells = [self._cell(found, name) for name in shown]
            cells += [_difference(comparer, key, self.table.baseline, name) for name in self.table.compared]
            lines.append([self.methods[key].title, *cells, _minutes(found)])
        seeds = sorted({len(of_row) for key, of_row in rows.items() if self.methods[key].kind != "pixels"})
        count = " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
        images = next(record["samples"] for of_row in rows.values() for record in of_row.values())
        return f"**{self.TITLE}** ({count} seeds, {images:,} test samples).\n\n{markdown(lines)}"

    def _cell(self, records: Sequence[Record], name: str) -> str:
        if any(name not in record["figures"] for record in records):
            return ""
        figure, found = FIGURES[name], values(records, name)
        return with_deviation(found, figure.factor, figure.digits)

    def draw(self, records: Records, folder: Path) -> list[str]:
        """Draw the differences to the baseline: a panel for each figure, a line for each row."""
        from matplotlib.figure import Figure

        comparer, base = Comparer(self.rows(records)), self.table.baseline
        found = {
            name: {
                method.title: difference
                for key, method in self.methods.items()
                if key != base and (difference := comparer.difference(key, base, name))
            }
            for name in self.table.compared
        }
        titles = list(dict.fromkeys(title for of_figure in found.values() for title in of_figure))
        if not titles:
            return []
        height = 1.2 + 0.24 * len(titles)
        figure = Figure(figsize=(4.5 + 2.8 * len(found), height), dpi=120, layout="constrained")
        for axis, (name, differences) in zip(
            figure.subplots(1, len(found), sharey=True, squeeze=False)[0], found.items(), strict=True
        ):
            factor = FIGURES[name].factor
            for title, difference in differences.items():
                low, high = factor * difference.low, factor * difference.high
                colour = "0.6" if low <= 0 <= high else "#3f90da" if low > 0 else "#bd1f01"
                place = titles.index(title)
                axis.hlines(place, low, high, color=colour, linewidth=2)
                axis.plot(factor * difference.value, place, "o", color=colour, markersize=5)
            axis.axvline(0, color="black", linewidth=0.8)
            axis.grid(axis="x", alpha=0.25)
            axis.set_title(FIGURES[name].heading, fontsize=9)
            axis.set_xlabel("points" if factor == 100 else "")
            axis.set_yticks(range(len(titles)), titles, fontsize=8)
        axis.invert_yaxis()
        figure.suptitle(f"{self.TITLE}: less {self.methods[base].title}", fontsize=10)
        file = f"paper_{self.NAME}.png"
        figure.savefig(folder / file)
        return [file]

    def claims(self, records: Records) -> list[Claim]:
        """See :class:`benchmarks.papers.study.Study`."""
        return list(self._claims(Comparer(self.rows(records))))

    def _claims(self, comparer: Comparer) -> Iterator[Claim]:
        for order in self.orders:
            found = comparer.difference(order.row, order.less, order.figure)
            if found is not None:
                figure = FIGURES[order.figure]
                claim = f"{order.claim} ({self.TITLE}; {figure.heading})"
                measured, outcome = _shown(found, order.figure), verdict(found.low, found.high)
                repeated = f"{order.claim}; {figure.heading}"
                yield Claim(claim, order.source, measured, outcome, order.headline, repeated)


def _shown(found: Difference, name: str) -> str:
    figure = FIGURES[name]
    unit = " points" if figure.factor == 100 else ""
    text = show_interval(found.value, found.low, found.high, figure.factor, figure.digits)
    return f"{text}{unit}, {found.seeds} seeds"


def _difference(comparer: Comparer, row: str, less: str, name: str) -> str:
    found = None if row == less else comparer.difference(row, less, name)
    if found is None:
        return ""
    figure = FIGURES[name]
    return bold_interval(found.value, found.low, found.high, figure.factor, figure.digits)


def _minutes(records: Sequence[Mapping[str, Any]]) -> str:
    """Processor minutes of training and evaluation, mean over the seeds."""
    total = sum(record.get("train_minutes", 0) + record.get("evaluate_minutes", 0) for record in records)
    return f"{total / len(records):.1f}"
