"""Tolerances of results against the float64 truth, for all tests and benchmarks.

A similarity s = x . c / temperature computed in float32 has an error of about eps * S, the *relative* error
of e^s. S = max|x| max|c| / temperature is the largest possible similarity. The gradient of a row is a
difference of two weighted means of candidates (attraction and repulsion) that cancel as the loss converges.
Each of the two is at most 2 max|c| / temperature times the upstream gradient. :func:`parts` is their norm.

The tolerances have two uses:

- ``tests/helpers/tolerances.py``: any rows, on a CPU. Bounds for the worst case, from the unit roundoff.
- :func:`loss_bar` and :func:`gradient_bar`: random unit rows on any device, where the errors of many pairs
  average out. These tolerances are tighter; the benchmarks and the GPU tests use them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    eps: float
    """unit roundoff of the arithmetic"""
    loss: float
    """relative tolerance of the loss"""
    gradient: float
    """relative tolerance of the gradient's norm, before the gradient is rounded to its own dtype"""
    output: float
    """half a unit of the gradient's own dtype"""


TABLE = {
    # 2.2e-16 times a few thousand additions, if all of them are rounded in the same direction.
    torch.float64: Tolerance(2.2e-16, 1e-12, 1e-12, 0.0),
    # Largest measured errors: 4e-7 and 7e-7.
    torch.float32: Tolerance(1.2e-7, 2e-6, 5e-6, 0.0),
    # Inputs are exact and arithmetic is float32. Only the gradient is rounded to the dtype of the input, and
    # on a GPU also the weights of the rows.
    torch.bfloat16: Tolerance(1.2e-7, 2e-6, 5e-6, 2.0**-8),
    torch.float16: Tolerance(1.2e-7, 2e-6, 5e-6, 2.0**-11),
}

ROUNDINGS = 2
"""Roundings of a 16-bit gradient: the weights (on a GPU) and the result, each with a relative error of at
most ``output``. The errors of the weights are independent. For a gradient that is not much smaller than its
parts they stay below the bound of one rounding. Measured with N = 2,048, 100 classes, temperature 0.07:
2.6e-3 at D = 128 and 4.2e-3 at D = 768; two roundings to bfloat16 allow 7.8e-3."""
SMALL = 1 / 16
"""If a gradient is smaller than this share of its parts, its error is relative to this share of the parts,
because the difference of two rounded sums that cancel has an absolute error."""
WARM = 16.0
"""Largest S for which TABLE holds. Beyond it the error of s, eps * S, dominates: tolerances grow with S."""

GRADCHECK = {"eps": 1e-6, "atol": 1e-5, "rtol": 1e-4}
"""Central differences in float64 with step 1e-6 have an error of about 1e-10 / 1e-6 for values up to 10."""

PRECISION = {"highest": 5e-6, "high": 2e-4, "medium": 3e-2}
"""Relative tolerance of a float32 gradient at S = 10, by torch.set_float32_matmul_precision. "high" keeps 16
bits of a row: s has an error of up to 2^-16 S = 1.5e-4. "medium" keeps 8 bits: 2^-8 S = 4e-2. The errors of
pairs average out."""
BIAS_OF_N = 3e-6
"""Tolerance of the mean error of n over a batch on a GPU, at S = 14 and D = 4,096. Rounding s and n (about
20) to float32 has errors of up to 1e-6 in both directions, which average out over rows. Truncated products
have errors in one direction, in all rows: 8e-6 S = 1e-4."""
BIAS = 1e-4
"""Relative tolerance of a float32 gradient that sums a million rows with a common direction. Weights rounded
to 16 bits give 7e-6; sums kept in a tensor core's accumulator, which truncates, give 2e-3."""

#: Tolerances of other implementations: loss, gradient. A 16-bit matrix product rounds s, for bfloat16 by up
#: to 2^-8 S. A larger error means that the implementation computes another function.
OTHERS = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-4, 1e-3),
    torch.bfloat16: (5e-2, 1e-1),
    torch.float16: (5e-2, 1e-1),
}


def parts(pull: float, rows: int) -> float:
    """Norm of the attraction and repulsion of ``rows`` rows.

    Args:
        pull: max|c| / temperature times the largest upstream gradient of one anchor's loss.
        rows: number of rows.
    """
    return 4 * pull * math.sqrt(rows)


def loss_bar(truth: float, dtype: torch.dtype, similarity: float) -> float:
    """Tolerance of the mean loss of unit rows; ``similarity`` is S = 1 / temperature."""
    return TABLE[dtype].loss * max(abs(truth), similarity / WARM, 1.0)


def gradient_bar(norm: float, dtype: torch.dtype, similarity: float, both: float) -> float:
    """Tolerance of the norm of a gradient's error.

    Args:
        norm: norm of the true gradient.
        dtype: dtype of the rows and of the gradient.
        similarity: S, which is 1 / temperature for unit rows.
        both: :func:`parts`.
    """
    tolerance = TABLE[dtype]
    relative = tolerance.gradient * max(similarity / WARM, 1.0) + ROUNDINGS * tolerance.output
    return relative * max(norm, SMALL * both)
