"""The figures of a table: measured on features, stored per test image, compared over seeds and images."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.papers.study import Record, pack_bits, unpack_bits

if TYPE_CHECKING:
    from pysupcon.evaluators import BoundMetric, FeatureSplits

PENALTIES = [10.0**-power for power in range(1, 8)]
"""L2 penalties of the logistic regression; validation accuracy chooses. Collapsed features need small
ones."""
RESAMPLES = 4000
"""Draws of seeds and test images. With 1,000, the ends of an interval change visibly with the bootstrap's
seed."""
PROBE_STEPS = 35_200
"""Steps of Thanos's linear probe on CIFAR-10: 100 epochs of 45,000 images in batches of 128."""


@dataclass(frozen=True)
class Figure:
    """A column of a table.

    Attributes:
        heading: heading of the column.
        metric: the figure in the results of its evaluator.
        factor: 100 for an accuracy in per cent.
        digits: decimal places that are shown.
    """

    heading: str
    metric: str
    factor: float = 100.0
    digits: int = 1


FIGURES = {
    "coarse": Figure("coarse labels, logistic regression", "linear_probe/coarse/accuracy"),
    "logistic": Figure("fine labels, logistic regression", "linear_probe/fine/accuracy"),
    "knn": Figure("fine labels, 1-NN", "knn/k=1/fine/accuracy"),
    "probe": Figure("fine labels, Thanos's probe", "linear_probe/fine/accuracy"),
    "lipschitz": Figure("local Lipschitz constant", "lipschitz/local/median", 1.0, 2),
    "spread": Figure("spread", "geometry/spread/coarse", 1.0, 3),
    "margin": Figure("margin, embedding", "separation/fine/margin", 1.0, 3),
    "bound": Figure("KL bound, embedding", "pairs/fine/kl_bound", 1.0, 2),
    "head_margin": Figure("margin, projection", "separation/fine/margin", 1.0, 3),
    "head_bound": Figure("KL bound, projection", "pairs/fine/kl_bound", 1.0, 2),
}
"""Columns; those with ``head_`` are measured on the output of the projection head."""


def measure(splits: FeatureSplits, figures: Iterable[str]) -> dict[str, Any]:
    """Measure figures of features.

    Returns:
        The record of each figure: its ``value``, and the outcome of each test image if there is one:
        ``bits`` of :func:`benchmarks.papers.study.pack_bits`, or ``floats``, float32 as base64. Figures of
        probes also have ``val``, the validation accuracy that chose the probe, and ``converged``.
    """
    from pysupcon.evaluators import bind_metric

    found: dict[str, Any] = {}
    for name in figures:
        results = dict(_evaluator(name)(splits))
        metric = FIGURES[name].metric
        prefix = metric.rpartition("/")[0]
        record: dict[str, Any] = {"value": results[metric]}
        bound = bind_metric(metric, {key: x for key, x in results.items() if isinstance(x, Tensor)})
        if bound is not None and bound.outcomes[0].dtype == torch.bool:
            record["bits"] = pack_bits(bound.outcomes[0])
        elif bound is not None:
            record["floats"] = [_pack_floats(outcome) for outcome in bound.outcomes]
        for kind in ("val_accuracy", "converged", "chosen"):
            if f"{prefix}/{kind}" in results:
                record[kind] = results[f"{prefix}/{kind}"]
        found[name] = record
    return found


def local_lipschitz(folder: Path) -> dict[str, Any]:
    """The record of the figure "lipschitz" of a run, the median over 64 validation images, as ``pysupcon
    evaluate RUN --lipschitz true`` measures it."""
    from pysupcon.evaluation.lipschitz import Lipschitz
    from pysupcon.evaluators import EvaluationConfig
    from pysupcon.trainer.run import load_run

    found = Lipschitz(load_run(folder), torch.device("cpu"), EvaluationConfig()).measure()
    return {"value": dict(found)[FIGURES["lipschitz"].metric]}


def _evaluator(name: str) -> Any:
    from pysupcon import evaluators as e

    kind = name.removeprefix("head_")
    if kind in ("coarse", "logistic"):
        level: Any = "coarse" if kind == "coarse" else "fine"
        return e.LinearProbe(e.LinearProbeConfig(level=level, penalties=PENALTIES))
    if kind == "probe":
        return e.LinearProbe(
            e.LinearProbeConfig(level="fine", solver="adamw", standardize=False, steps=PROBE_STEPS)
        )
    return {
        "knn": lambda: e.KNN(e.KNNConfig(k=[1])),
        "spread": lambda: e.Geometry(),
        "margin": lambda: e.Separation(e.SeparationConfig(per_class=False)),
        "bound": lambda: e.Pairs(e.PairsConfig(per_class=False)),
    }[kind]()


def _pack_floats(values: Tensor) -> str:
    return base64.b64encode(values.numpy().astype(np.float32).tobytes()).decode("ascii")


def _unpack_floats(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.float32).astype(np.float64))


class Stored(NamedTuple):
    """The outcomes of the test samples as a record stores them: ``bits``, or ``floats``."""

    samples: int
    bits: str = ""
    floats: tuple[str, ...] = ()


def outcomes(record: Record, name: str) -> Stored | None:
    """The outcomes of a figure in a record; None for a figure that has none."""
    stored = record["figures"][name]
    if "bits" in stored:
        return Stored(record["samples"], bits=stored["bits"])
    return Stored(record["samples"], floats=tuple(stored["floats"])) if "floats" in stored else None


def bound_metric(stored: Stored, name: str) -> BoundMetric:
    """The metric of a figure with the outcomes that it is computed from."""
    from pysupcon.evaluators import BoundMetric
    from pysupcon.evaluators.metrics import METRICS

    definition = METRICS[FIGURES[name].metric.rpartition("/")[2]]
    if stored.bits:
        return BoundMetric(definition, [unpack_bits(stored.bits, stored.samples)])
    return BoundMetric(definition, [_unpack_floats(text) for text in stored.floats])


@lru_cache(maxsize=512)  # tables, pictures, claims and the summary need the same
def resampled(name: str, runs: tuple[Stored, ...], seeds: tuple[int, ...]) -> Tensor:
    """A figure on resamples of seeds and test samples."""
    from pysupcon.evaluators import BootstrapConfig
    from pysupcon.evaluators.bootstrap import seed_and_sample_values

    metrics = [bound_metric(stored, name) for stored in runs]
    return seed_and_sample_values(metrics, BootstrapConfig(RESAMPLES), seeds=seeds)


def values(records: Sequence[Record], name: str) -> list[float]:
    """A figure of each record."""
    return [record["figures"][name]["value"] for record in records]


@dataclass(frozen=True)
class Difference:
    """A mean over seeds less another, with its 95 % interval over seeds and test images."""

    value: float
    low: float
    high: float
    seeds: int


class Comparer:
    """Paired differences of rows, over seeds and test images.

    Args:
        records: the records of each row, one per seed.
    """

    def __init__(self, records: Mapping[str, Mapping[int, Record]]) -> None:
        self.records = records

    def difference(self, row: str, less: str, figure: str) -> Difference | None:
        """``figure`` of ``row`` less that of ``less``, over the seeds that both have; None without two."""
        seeds = tuple(sorted(set(self.records.get(row, ())) & set(self.records.get(less, ()))))
        if len(seeds) < 2 or any(
            figure not in self.records[name][seed]["figures"] for name in (row, less) for seed in seeds
        ):
            return None
        from pysupcon.evaluators.bootstrap import mean_interval, percentile_interval

        pairs = [
            (self.records[row][seed]["figures"][figure]["value"]
             - self.records[less][seed]["figures"][figure]["value"]) for seed in seeds
        ]  # fmt: skip
        value = float(np.mean(pairs))
        mine, other = (self._resampled(name, figure, seeds) for name in (row, less))
        if mine is None or other is None:
            low, high = mean_interval(pairs, 0.95)
        else:
            low, high = percentile_interval(mine - other, 0.95)
        return Difference(value, low, high, len(seeds))

    def _resampled(self, row: str, figure: str, seeds: tuple[int, ...]) -> Tensor | None:
        found = [outcomes(self.records[row][seed], figure) for seed in seeds]
        known = tuple(stored for stored in found if stored is not None)
        return resampled(figure, known, seeds) if len(known) == len(seeds) else None
