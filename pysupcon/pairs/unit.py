"""Rows of unit length, and what becomes of a row that has no direction."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["smallest_norm", "unit_rows"]


def smallest_norm(dtype: torch.dtype) -> float:
    """The norm below which a row of ``dtype`` counts as zero.

    1e-12, the epsilon of ``torch.nn.functional.normalize``; for float16 2^-14, its smallest normal number.
    Numbers below that have less than their 11 bits, so the direction of such a row is mostly rounding, and
    its gradient, which grows as 1 / norm, overflows float16.
    """
    return 2.0**-14 if dtype == torch.float16 else 1e-12


def unit_rows(rows: Tensor) -> Tensor:
    """x / |x| of rows [..., D], in float32 at least: under autocast a 16-bit norm would leave rows up to 1e-3
    away from unit length.

    A row whose norm is below :func:`smallest_norm` of the dtype of ``rows`` becomes zero, and its gradient is
    zero. A row whose squared norm overflows becomes NaN: it has a direction, but dividing by infinity would
    make it zero.
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    divisor = torch.where(norm < math.inf, norm, math.nan)
    # Dividing by infinity gives 0 in the forward and in the backward.
    return wide / torch.where(norm < smallest_norm(rows.dtype), math.inf, divisor)
