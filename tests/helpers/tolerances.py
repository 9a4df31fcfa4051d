"""Assertions that a result is close to the float64 truth; benchmarks/kernels/tolerances.py has the numbers.

At S <= 1 the relative tolerances in float32 are 2e-6 for the loss and 5e-6 for the norm of the gradient. The
error of a gradient is relative to its parts, attraction and repulsion, and not to their difference.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.kernels.tolerances import GRADCHECK, TABLE, Tolerance, parts

__all__ = [
    "GRADCHECK",
    "TABLE",
    "Tolerance",
    "assert_gradient_close",
    "assert_loss_close",
    "largest_similarity",
]


def largest_similarity(x: Tensor, candidates: Tensor | None, temperature: float) -> float:
    """S, the largest possible similarity of rows [..., D]."""
    if not x.numel() or (candidates is not None and not candidates.numel()):
        return 0.0
    top = x.detach().double().norm(dim=-1).max().item()
    other = top if candidates is None else candidates.detach().double().norm(dim=-1).max().item()
    return top * other / temperature


def assert_loss_close(got: Tensor, truth: Tensor, dtype: torch.dtype, similarity: float) -> None:
    """Check a loss. ``similarity`` is S; ``truth`` is float64."""
    tolerance = TABLE[dtype]
    assert torch.isfinite(got).all(), f"not finite: {got}"
    allowed = tolerance.loss * truth.abs() + 4 * tolerance.eps * (1 + similarity)
    worst = ((got.double() - truth).abs() / allowed).max().item() if truth.numel() else 0.0
    assert worst <= 1, f"the error of the loss is {worst:.2f} times the tolerance: {got} instead of {truth}"


def assert_gradient_close(
    got: Tensor, truth: Tensor, dtype: torch.dtype, similarity: float, pull: float
) -> None:
    """Check a gradient. ``pull``: max|c| / temperature times the largest upstream gradient of an anchor."""
    tolerance = TABLE[dtype]
    assert got.dtype == dtype
    assert torch.isfinite(got).all(), "gradient is not finite"
    rows = max(truth.numel() // max(truth.shape[-1], 1), 1)
    allowed = (tolerance.gradient + tolerance.output) * truth.norm().item()
    allowed += 4 * tolerance.eps * (1 + similarity) * parts(pull, rows)
    # Values below the smallest normal number of the type are lost.
    allowed += torch.finfo(dtype).tiny * math.sqrt(max(truth.numel(), 1))
    error = (got.double() - truth).norm().item()
    assert error <= allowed, (
        f"the error of the gradient is {error:.3e}, allowed {allowed:.3e} (norm {truth.norm():.3e})"
    )
