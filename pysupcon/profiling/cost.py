"""What a loss or a step will cost, from two small measurements.

Time grows with the pairs of rows a loss looks at, memory with the rows: two straight lines, each through two
measured points. The unit of work is u = N^2 D floating-point operations; both passes over pairs, with their
symmetry used, take 4 u: 1 for the similarities and 3 for the gradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple


def loss_flops(loss: str, n: int, dim: int, classes: int) -> float:
    """4 D times the pairs: all of them; of the same class only for cnce; those again for sincere."""
    same = 1 / min(classes, n)
    share = {"cnce": same, "sincere": 1 + same}.get(loss, 1.0)
    return 4.0 * n * n * dim * share


class Line(NamedTuple):
    """y = fixed + slope * x, neither of them negative."""

    fixed: float
    slope: float

    @classmethod
    def through(cls, first: tuple[float, float], second: tuple[float, float]) -> Line:
        """Through two points (x, y), x ascending; through the origin and the second where that would need a
        negative number."""
        slope = (second[1] - first[1]) / (second[0] - first[0])
        fixed = second[1] - slope * second[0]
        return cls(fixed, slope) if slope > 0 and fixed >= 0 else cls(0.0, second[1] / second[0])

    def at(self, x: float) -> float:
        return self.fixed + self.slope * x


def largest_rows(available: float, memory: Line, input_bytes: float) -> int:
    """Rows that fit: each takes its share of the peak, and of the inputs."""
    rows = (available - memory.fixed) / (memory.slope + input_bytes)
    return max(int(rows), 0)


def largest_dense_rows(available: float, bytes_a_pair: float) -> int:
    """Rows whose N x N matrices fit."""
    return int(math.sqrt(available / bytes_a_pair))
