"""Predict the cost of a loss or a training step from two small measurements.

Time is linear in the number of pairs of rows and memory is linear in the number of rows; each line goes
through two measured points. The unit of work is u = N^2 D floating-point operations. Both passes over the
pairs take 4 u if symmetry is used: 1 for the similarities and 3 for the gradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pysupcon.losses import LOSSES_BY_NAME


def loss_flops(loss: str, n: int, dim: int, classes: int) -> float:
    """Return 4 D times the number of pairs of a loss.

    A loss without negatives (cnce) uses only pairs of the same class; one with a softplus sum (sincere) uses
    all pairs, and those of the same class again.
    """
    description = LOSSES_BY_NAME[loss]
    defaults = description.trainer_defaults[loss]
    own = {name: defaults[name] for name in description.own_parameters if name in defaults}
    needed = description.statistics(**own)
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


def largest_rows(available: float, memory: Line, input_bytes: float) -> int:
    """Return the number of rows that fit into ``available`` bytes, counting peak memory and inputs."""
    rows = (available - memory.fixed) / (memory.slope + input_bytes)
    return max(int(rows), 0)


def largest_dense_rows(available: float, bytes_a_pair: float) -> int:
    """Return the number of rows N whose N x N matrices fit into ``available`` bytes."""
    return int(math.sqrt(available / bytes_a_pair))
