"""How far a result may be from the float64 truth: the only place with such numbers, for tests and benchmarks.

A similarity s = x . c / temperature computed in float32 errs by about eps * S, where S = max|x| max|c| /
temperature is the largest it can be; e^s errs by that factor *relatively*. The gradient of a row is a
difference of two weighted means of candidates (attraction and repulsion) that cancel as the loss converges;
each of the two is at most 2 max|c| / temperature times the upstream gradient. :func:`parts` is their norm.

Two uses:

- ``tests/helpers/tolerances.py``: any rows, on a CPU. Worst cases added up, from the unit of the arithmetic.
- :func:`loss_bar` and :func:`gradient_bar`: unit rows drawn at random, on any device, where the errors of
  many pairs average out. The bars are tighter, and hold for what the benchmarks and the GPU tests compute.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    eps: float
    """unit of the arithmetic inside"""
    loss: float
    """relative bar of the loss"""
    gradient: float
    """relative bar of the gradient, norm-wise, before it is rounded to its own dtype"""
    output: float
    """half a unit of the gradient's own dtype"""


TABLE = {
    # 2.2e-16 times the few thousand additions behind a number, were they all rounded in one direction.
    torch.float64: Tolerance(2.2e-16, 1e-12, 1e-12, 0.0),
    # The bars of the design. Measured: 4e-7 and 7e-7 at the most.
    torch.float32: Tolerance(1.2e-7, 2e-6, 5e-6, 0.0),
    # Inputs are exact, arithmetic is float32; only the gradient is rounded to the input's dtype, and on a GPU
    # the weights that its rows are multiplied by.
    torch.bfloat16: Tolerance(1.2e-7, 2e-6, 5e-6, 2.0**-8),
    torch.float16: Tolerance(1.2e-7, 2e-6, 5e-6, 2.0**-11),
}

ROUNDINGS = 2
"""of a 16-bit gradient: the weights (on a GPU) and the result, each by at most ``output`` of what is rounded.
The weights' errors are independent, so of a gradient that is not much smaller than its parts they take less
than the bound of one rounding. N = 2,048, 100 classes, temperature 0.07: 2.6e-3 at D = 128 and 4.2e-3 at
D = 768 of the 7.8e-3 that two roundings to bfloat16 allow."""
SMALL = 1 / 16
"""A gradient smaller than this share of its parts is measured against this share of them: what is left of two
sums of rounded terms that cancel, exactly so where the true gradient is 0, has an absolute error."""
WARM = 16.0
"""S up to which the table's bars hold; beyond it the error of s, eps * S, dominates, and they grow with S."""

GRADCHECK = {"eps": 1e-6, "atol": 1e-5, "rtol": 1e-4}
"""Central differences in float64 at step 1e-6 err by about 1e-10 / 1e-6 of values up to 10."""

PRECISION = {"highest": 5e-6, "high": 2e-4, "medium": 3e-2}
"""relative bar of a float32 gradient at S = 10, by torch.set_float32_matmul_precision. "high" keeps 16 bits
of a row, so that s errs by up to 2^-16 S = 1.5e-4; "medium" keeps 8: 2^-8 S = 4e-2. Pairs average it out."""
BIAS_OF_N = 3e-6
"""mean error of n over the rows of a batch on a GPU, at S = 14 and D = 4,096. Rounding s and n (about 20) to
float32 errs by up to 1e-6 in either direction, which averages out over rows; a product that is truncated
instead of rounded errs in one direction, and all rows alike: by 8e-6 S = 1e-4."""
BIAS = 1e-4
"""relative error of a float32 gradient that sums a million rows which share a direction. Rounding the weights
to 16 bits gives 7e-6; sums kept in a tensor core's accumulator, which truncates, give 2e-3."""

#: Of implementations that are not ours: loss, gradient. A 16-bit matrix product rounds s itself, by 2^-8 S
#: for bfloat16. Wrong by more than this would be another function.
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
    """
    return 4 * pull * math.sqrt(rows)


def loss_bar(truth: float, dtype: torch.dtype, similarity: float) -> float:
    """Largest error of a mean loss of unit rows; ``similarity`` is S, 1 / temperature."""
    return TABLE[dtype].loss * max(abs(truth), similarity / WARM, 1.0)


def gradient_bar(norm: float, dtype: torch.dtype, similarity: float, both: float) -> float:
    """Largest norm of a gradient's error.

    Args:
        norm: of the true gradient.
        dtype: of the rows and of the gradient.
        similarity: S, 1 / temperature for unit rows.
        both: :func:`parts`.
    """
    tolerance = TABLE[dtype]
    relative = tolerance.gradient * max(similarity / WARM, 1.0) + ROUNDINGS * tolerance.output
    return relative * max(norm, SMALL * both)
