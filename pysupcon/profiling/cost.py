"""Predict the cost of a loss or a training step from small measurements.

Time is linear in the number of pairs of rows and in the number of images; memory is linear in the number of
rows. Each line goes through two measured points. The unit of work is u = N^2 D floating-point operations.
Both passes over the pairs take 4 u if symmetry is used: 1 for the similarities and 3 for the gradient.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pysupcon.profiling.workspace import needed_statistics

MOST_ROWS = 2**40
LEAST_ERROR = 0.15
"""Relative error of a predicted time even if repeated measurements agree: caches, clocks, other work."""


def loss_flops(loss: str, n: int, dim: int, classes: int) -> float:
    """Return 4 D times the number of pairs of a loss.

    A loss without negatives (cnce) uses only pairs of the same class; one with a softplus sum (sincere) uses
    all pairs, and those of the same class again.
    """
    needed = needed_statistics(loss)
    same = 1 / min(classes, n)
    share = (1.0 if needed.get("negatives") else same) + (same if "epsilon" in needed else 0.0)
    return 4.0 * n * n * dim * share


class Line(NamedTuple):
    """The line y = fixed + slope * x with non-negative coefficients."""

    fixed: float
    slope: float

    @classmethod
    def through(cls, first: tuple[float, float], second: tuple[float, float]) -> Line:
        """Return the line through two points (x, y) with ascending x.

        If a coefficient would be negative, the line goes through the origin and the second point.
        """
        slope = (second[1] - first[1]) / (second[0] - first[0])
        fixed = second[1] - slope * second[0]
        return cls(fixed, slope) if slope > 0 and fixed >= 0 else cls(0.0, second[1] / second[0])

    def at(self, x: float) -> float:
        """Return y at ``x``."""
        return self.fixed + self.slope * x

    def times(self, factor: float) -> Line:
        """Return the line whose values are multiplied by ``factor``."""
        return Line(factor * self.fixed, factor * self.slope)


class Estimate(NamedTuple):
    """A predicted time in seconds, and the range that the calibration allows."""

    seconds: float
    low: float
    high: float

    def plus(self, other: Estimate) -> Estimate:
        """Return the time of both, one after the other."""
        return Estimate(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: float) -> Estimate:
        """Return the time of ``factor`` repetitions."""
        return Estimate(*(factor * value for value in self))


class Timing(NamedTuple):
    """Repeated measurements of one size."""

    work: float
    seconds: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        ordered = sorted(self.seconds)
        quarter = (len(ordered) - 1) // 4
        return ordered[quarter], ordered[-1 - quarter]


class TimeModel(NamedTuple):
    """The time of any amount of work, from two sizes that were measured."""

    small: Timing
    large: Timing

    def at(self, work: float, slower: float = LEAST_ERROR) -> Estimate:
        """Return the time of ``work``.

        Args:
            work: in the unit of the measured sizes.
            slower: the range reaches this share above the time, at least.

        The range holds every line through a quartile of the small and one of the large size, and the time
        that is proportional to the large size: what the calibration cannot tell apart.
        """
        x, y = self.small.work, self.large.work
        seconds = Line.through((x, self.small.median), (y, self.large.median)).at(work)
        ends = itertools.product(self.small.quartiles, self.large.quartiles)
        others = [Line.through((x, first), (y, last)).at(work) for first, last in ends]
        others.append(self.large.median * work / y if work > y else seconds)
        return Estimate(
            seconds,
            min(seconds * (1 - LEAST_ERROR), *others),
            max(seconds * (1 + slower), *others),
        )


def largest_rows(limit: float, cost: Callable[[int], float], multiple: int = 1) -> int:
    """Return the largest number of rows whose cost is at most ``limit``, 0 if there is none.

    Args:
        limit: of the cost.
        cost: function of the number of rows that does not decrease.
        multiple: the result is a multiple of it and at most MOST_ROWS.
    """
    most = MOST_ROWS // multiple
    low, high = 0, 1
    while high <= most and cost(high * multiple) <= limit:
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle * multiple) <= limit else (low, middle)
    return low * multiple


def largest_dense_rows(available: float, bytes_a_pair: float) -> int:
    """Return the number of rows N whose N x N matrices fit into ``available`` bytes."""
    return int(math.sqrt(available / bytes_a_pair))
