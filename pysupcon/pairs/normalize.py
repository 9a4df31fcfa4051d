"""L2 normalisation of rows, with defined results for rows of norm zero and of infinite norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["smallest_norm", "unit_rows"]


def smallest_norm(dtype: torch.dtype) -> float:
    """Returns the norm below which a row of ``dtype`` counts as zero.

    It is 1e-12, the epsilon of ``torch.nn.functional.normalize``; for float16 it is 2^-14, the smallest
    normal number. Smaller float16 numbers have fewer than 11 bits, so the direction of such a row is mostly
    rounding, and its gradient, which grows as 1 / norm, overflows float16.
    """
    return 2.0**-14 if dtype == torch.float16 else 1e-12


def unit_rows(rows: Tensor) -> Tensor:
    """Divides rows by their L2 norm.

    The norm is at least float32: under autocast a 16-bit norm would leave rows up to 1e-3 away from unit
    length.

    Args:
        rows: [..., D], any float dtype.

    Returns:
        [..., D], at least float32. A row whose norm is below :func:`smallest_norm` of the dtype of ``rows``
        becomes zero, with a gradient of zero. A row whose squared norm overflows becomes NaN: it has a
        direction, but dividing by infinity would make it zero.
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    divisor = torch.where(norm < math.inf, norm, math.nan)
    # Dividing by infinity gives 0 in the forward and in the backward.
    return wide / torch.where(norm < smallest_norm(rows.dtype), math.inf, divisor)
