"""Study of worst groups: ERM, and GroupDRO over true groups and over groups inferred from embeddings.

Two data sets (configs/worst_group): coloured digits, whose colour is spurious, and digits of which two are
rare. For each seed, ERM, SupCon and Thanos's two encoders are trained, groups are inferred from each of them
and from Thanos's concatenated embeddings, and GroupDRO is trained over the true groups and over those of ERM,
SupCon and Thanos. A training is selected twice, on validation images: by what it knows (ERM by its accuracy,
GroupDRO by the worst of its own groups), and by the worst true group.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from benchmarks.papers.cells import bold_interval, show_interval, with_deviation
from benchmarks.papers.figures import RESAMPLES
from benchmarks.papers.study import (
    QUICK_SEEDS,
    SEEDS,
    Claim,
    Job,
    Record,
    Records,
    Source,
    seeds_of,
    unpack_bits,
    verdict,
)
from benchmarks.papers.worst_group_runs import (
    CLASSIFIERS,
    DATA,
    ENCODERS,
    OVERCLUSTER,
    SOURCES,
    infer,
    name_of,
    parts_of,
    train,
)
from benchmarks.table import markdown

NAME = "worst_group"
TITLE = "Worst groups, and groups inferred from embeddings"
QUICK_CLASSIFIERS = ("erm", "group_dro_supcon", "group_dro_thanos")
QUICK_SOURCES = ("supcon", "thanos")
MINUTES = {
    "coloured_mnist5k": {"encoder": 0.1, "classifier": 0.21, "groups": 0.07},
    "rare_mnist5k": {"encoder": 0.21, "classifier": 0.17, "groups": 0.07},
}
"""Processor minutes of a job."""
SELECTIONS = {"known": "own selection", "true": "selected by true validation groups"}
CONFIDENCE = 0.95
HEADLINE = ("coloured_mnist5k", "group_dro_supcon")
"""Data set and classifier of the claims in README."""
ORDERS: tuple[tuple[str, str, Source, str], ...] = (
    ("group_dro_erm", "erm", "control", "GroupDRO on groups of ERM raises the worst group above ERM"),
    ("group_dro_supcon", "erm", "Thanos", "GroupDRO on groups of SupCon raises the worst group above ERM"),
    ("group_dro_thanos", "erm", "Thanos", "GroupDRO on groups of Thanos raises the worst group above ERM"),
    ("group_dro_thanos", "group_dro_supcon", "Thanos",
     "GroupDRO is better on groups of Thanos than of SupCon"),
    ("group_dro_annotated", "group_dro_supcon", "control",
     "GroupDRO is better on the true groups than on those of SupCon"),
)  # fmt: skip
"""Claims on the worst group: classifier, the one below it, who claims it, in words."""
RECOVERY: tuple[tuple[str, Source, str], ...] = (
    ("supcon", "Thanos", "SupCon"),
    ("ce_autoencoder", "control", "cross-entropy + autoencoder"),
)
"""Encoders whose groups are compared with those of Thanos."""
PICTURE = "paper_worst_group.png"


def missing() -> str:
    """Nothing: the data come with Python packages."""
    return ""


def jobs(quick: bool) -> list[Job]:
    """Trainings and inferences of each data set and seed; ``quick``: two seeds, without controls."""
    classifiers = QUICK_CLASSIFIERS if quick else tuple(CLASSIFIERS)
    sources = QUICK_SOURCES if quick else tuple(SOURCES)
    found = []
    for seed in QUICK_SEEDS if quick else SEEDS:
        for data in DATA:
            minutes = MINUTES[data]
            for name in ENCODERS:
                found.append(Job(name_of(data, name, seed), minutes["encoder"]))
            for name in classifiers:
                needs = ()
                if name.removeprefix("group_dro_") in SOURCES and name != "erm":
                    needs = (name_of(data, f"groups_{name.removeprefix('group_dro_')}", seed),)
                found.append(Job(name_of(data, name, seed), minutes["classifier"], needs))
            for source in sources:
                needs = tuple(name_of(data, run, seed) for run in SOURCES[source][1])
                found.append(Job(name_of(data, f"groups_{source}", seed), minutes["groups"], needs))
    return found


def run(job: Job, folder: Path) -> dict[str, Any]:
    """Train a classifier or an encoder, or infer groups; see :class:`benchmarks.papers.study.Study`."""
    data, what, seed = parts_of(job.name)
    shutil.rmtree(folder / job.name, ignore_errors=True)  # of a job that was stopped
    if what.startswith("groups_"):
        return infer(data, what.removeprefix("groups_"), seed, folder)
    return train(data, what, seed, folder)


class _Results:
    """The finished classifiers and inferences of a data set, for the seeds that all of them have."""

    def __init__(self, data: str, records: Records) -> None:
        mine = {name: record for name, record in records.items() if name.startswith(f"{data}_")}
        self.data = data
        self._draws: dict[tuple[str, str], Tensor] = {}
        self.classifiers = self._by_seed(mine, CLASSIFIERS)
        self.sources = {name: found for name in SOURCES if (found := self._of(mine, f"groups_{name}"))}

    def _of(self, records: Records, what: str) -> dict[int, Record]:
        names = [name for name in records if parts_of(name)[1] == what]
        return {seed: records[name_of(self.data, what, seed)] for seed in seeds_of(names)}

    def _by_seed(self, records: Records, names: Sequence[str]) -> dict[str, dict[int, Record]]:
        found = {name: of_seed for name in names if (of_seed := self._of(records, name))}
        common = set.intersection(*(set(of_seed) for of_seed in found.values())) if found else set()
        return {name: {seed: of_seed[seed] for seed in sorted(common)} for name, of_seed in found.items()}

    @property
    def seeds(self) -> list[int]:
        """Seeds of the classifiers."""
        return list(next(iter(self.classifiers.values()), {}))

    def metric(self, name: str, selection: str, metric: str) -> list[Any]:
        """A metric on the test images for each seed."""
        from pysupcon.evaluators import BoundMetric
        from pysupcon.evaluators.metrics import METRICS

        bound = []
        for record in self.classifiers[name].values():
            group = torch.tensor([int(digit) for digit in record["groups"]])
            correct = unpack_bits(record[selection]["correct"], len(group))
            outcomes = [correct, group] if metric == "worst_group_accuracy" else [correct]
            bound.append(BoundMetric(METRICS[metric], outcomes))
        return bound

    def values(self, name: str, selection: str, metric: str = "worst_group_accuracy") -> list[float]:
        """The metric of each seed."""
        return [bound.value() for bound in self.metric(name, selection, metric)]

    def draws(self, name: str, selection: str) -> Tensor:
        """Worst-group accuracy, mean over the seeds, on resamples of seeds and test images."""
        from pysupcon.evaluators import BootstrapConfig
        from pysupcon.evaluators.bootstrap import seed_and_sample_values

        if (name, selection) not in self._draws:
            metric = self.metric(name, selection, "worst_group_accuracy")
            config = BootstrapConfig(RESAMPLES, CONFIDENCE)
            self._draws[name, selection] = seed_and_sample_values(metric, config, seeds=self.seeds)
        return self._draws[name, selection]

    def difference(self, name: str, other: str, selection: str) -> tuple[float, float, float]:
        """Worst-group accuracy of ``name`` less that of ``other``: value and interval."""
        from pysupcon.evaluators.bootstrap import difference_interval

        value = mean(self.values(name, selection)) - mean(self.values(other, selection))
        draws = self.draws(name, selection) - self.draws(other, selection)
        return value, *difference_interval(draws, value, CONFIDENCE, least=True)

    def recovery(self, name: str, other: str) -> tuple[float, float, float, int] | None:
        """F1 of the groups of ``name`` less ``other``: value, interval over the seeds, number of seeds."""
        from pysupcon.evaluators.bootstrap import mean_interval

        if name not in self.sources or other not in self.sources:
            return None
        seeds = sorted(set(self.sources[name]) & set(self.sources[other]))
        values = [self.sources[name][seed]["f1"] - self.sources[other][seed]["f1"] for seed in seeds]
        if len(values) < 2:
            return None
        return mean(values), *mean_interval(values, CONFIDENCE), len(values)


def _results(records: Records) -> Iterator[_Results]:
    for data in DATA:
        found = _Results(data, records)
        if found.classifiers or found.sources:
            yield found


def tables(records: Records) -> str:
    """The Markdown tables of the classifiers and of the agreement of inferred with true groups."""
    lines: list[str] = []
    for found in _results(records):
        if found.seeds and "erm" in found.classifiers:
            lines += [f"**Worst group, {DATA[found.data]}** ({len(found.seeds)} seeds).", ""]
            lines += [_classifier_table(found), ""]
        if found.sources:
            lines += [f"**Groups inferred from embeddings, {DATA[found.data]}**.", ""]
            lines += [_source_table(found), ""]
            difference = found.recovery("thanos", "supcon")
            if difference is not None:
                value, low, high, count = difference
                outcome = verdict(low, high)
                lines += [
                    f"Recovery of the true groups, F1 of Thanos less SupCon: "
                    f"{show_interval(value, low, high, 100, 1)} points ({count} seeds). That Thanos recovers "
                    f"hidden groups better is {outcome} here.",
                    "",
                ]
    lines.append(
        "Mean over the seeds ± their standard deviation, per cent. In brackets the 95 % interval of the "
        "paired difference, over seeds and test images (for F1 over seeds). Own selection: ERM by validation "
        "accuracy, GroupDRO by the worst of the groups that it is trained with. A resample lowers the least "
        "of several accuracies, most where the groups are alike: intervals of differences are pivotal. "
        f"Groups: pca, Gaussian mixtures, over-clustering by {OVERCLUSTER}."
    )
    return "\n".join(lines)


def _classifier_table(found: _Results) -> str:
    columns = ["training", "accuracy, own selection"]
    for title in SELECTIONS.values():
        columns += [f"worst group, {title}", "less ERM [interval]"]
    rows = [columns]
    for name in found.classifiers:
        row = [CLASSIFIERS[name], with_deviation(found.values(name, "known", "accuracy"), 100)]
        for selection in SELECTIONS:
            row.append(with_deviation(found.values(name, selection), 100))
            row.append("" if name == "erm" else _difference(found, name, selection))
        rows.append(row)
    return markdown(rows)


def _difference(found: _Results, name: str, selection: str) -> str:
    return bold_interval(*found.difference(name, "erm", selection), 100, 1)


def _source_table(found: _Results) -> str:
    rows = [["groups from", "F1", "purity", "silhouette", "groups", "seeds"]]
    for name, of_seed in found.sources.items():
        records = list(of_seed.values())
        counts = [len(record["counts"]) for record in records]
        rows.append(
            [
                SOURCES[name][0], with_deviation([record["f1"] for record in records], 100),
                with_deviation([record["purity"] for record in records], 100),
                f"{mean(record['silhouette'] for record in records):.2f}",
                f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(counts[0]),
                str(len(records)),
            ]
        )  # fmt: skip
    return markdown(rows)


def claims(records: Records) -> list[Claim]:
    """GroupDRO on inferred groups against ERM, and Thanos's groups against SupCon's."""
    found = []
    for results in _results(records):
        there, title, count = results.classifiers, DATA[results.data], len(results.seeds)
        known = "validation: own groups, ERM by accuracy"
        for name, other, source, text in ORDERS:
            if count > 1 and name in there and other in there:
                value, low, high = results.difference(name, other, "known")
                measured = f"{show_interval(value, low, high, 100, 1)} points, {count} seeds"
                headline = (results.data, name) == HEADLINE and other == "erm"
                claim = f"{text} ({title}; {known})"
                found.append(Claim(claim, source, measured, verdict(low, high), headline, text))
        for other, source, text in RECOVERY:
            difference = results.recovery("thanos", other)
            if difference is not None:
                value, low, high, count = difference
                measured = f"{show_interval(value, low, high, 100, 1)} points of F1, {count} seeds"
                claim = f"Groups of Thanos match the true groups better than those of {text} ({title})"
                headline = results.data == HEADLINE[0] and other == "supcon"
                found.append(Claim(claim, source, measured, verdict(low, high), headline, f"groups {text}"))
    return found


def draw(records: Records, folder: Path) -> list[str]:
    """Worst-group accuracy of the classifiers, with intervals."""
    from matplotlib.figure import Figure

    from pysupcon.evaluators.bootstrap import percentile_interval

    shown = [found for found in _results(records) if found.seeds]
    if not shown:
        return []
    figure = Figure(figsize=(5.2 * len(shown), 3), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)
    for axis, found in zip(axes[0], shown, strict=True):
        for offset, (selection, title) in zip((-0.12, 0.12), SELECTIONS.items(), strict=True):
            values = [100 * mean(found.values(name, selection)) for name in found.classifiers]
            bounds = [
                percentile_interval(100 * found.draws(name, selection), CONFIDENCE)
                for name in found.classifiers
            ]
            places = [place + offset for place in range(len(values))]
            axis.hlines(places, [low for low, _ in bounds], [high for _, high in bounds], color="0.6")
            axis.plot(values, places, "o" if selection == "known" else "s", label=title)
        axis.set_yticks(range(len(found.classifiers)), [CLASSIFIERS[name] for name in found.classifiers])
        axis.invert_yaxis()
        axis.set_title(DATA[found.data], fontsize=10)
        axis.set_xlabel("worst group, %")
    axes[0][0].legend(fontsize=7)
    figure.savefig(folder / PICTURE)
    return [PICTURE]
