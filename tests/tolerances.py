"""How far a result may be from the float64 truth: the only place with such numbers.

A similarity s = x . c / temperature computed in float32 errs by about eps * S, where S = max|x| max|c| /
temperature is the largest it can be; e^s errs by that factor *relatively*. At S <= 1 the bars of the design
remain: loss 2e-6, gradient 5e-6 (norm-wise). The gradient of a row is a difference of two weighted means of
candidates (attraction and repulsion) that cancel as the loss converges, so its error is measured against
those parts, 2 max|c| / temperature per row times the upstream gradient, and not against what is left of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    eps: float
    """unit of the arithmetic inside"""
    loss: float
    """relative bar of the loss at S <= 1"""
    gradient: float
    """relative bar of the gradient, norm-wise, at S <= 1"""
    output: float
    """half a unit of the gradient's own dtype"""


TABLE = {
    torch.float64: Tolerance(2.2e-16, 1e-12, 1e-11, 0.0),
    torch.float32: Tolerance(1.2e-7, 2e-6, 5e-6, 0.0),
    # Inputs are exact, arithmetic is float32; only the gradient is rounded to the input's dtype.
    torch.bfloat16: Tolerance(1.2e-7, 2e-6, 5e-6, 2.0**-8),
    torch.float16: Tolerance(1.2e-7, 2e-6, 5e-6, 2.0**-11),
}

GRADCHECK = {"eps": 1e-6, "atol": 1e-5, "rtol": 1e-4}
"""Central differences in float64 at step 1e-6 err by about 1e-10 / 1e-6 of values up to 10."""


def largest_similarity(x: Tensor, candidates: Tensor | None, temperature: float) -> float:
    """S, from rows [..., D]."""
    if not x.numel() or (candidates is not None and not candidates.numel()):
        return 0.0
    top = x.detach().double().norm(dim=-1).max().item()
    other = top if candidates is None else candidates.detach().double().norm(dim=-1).max().item()
    return top * other / temperature


def assert_loss_close(got: Tensor, truth: Tensor, dtype: torch.dtype, similarity: float) -> None:
    """``similarity`` is S; ``truth`` is float64."""
    tolerance = TABLE[dtype]
    assert torch.isfinite(got).all(), f"not finite: {got}"
    allowed = tolerance.loss * truth.abs() + 4 * tolerance.eps * (1 + similarity)
    worst = ((got.double() - truth).abs() / allowed).max().item() if truth.numel() else 0.0
    assert worst <= 1, f"loss is off by {worst:.2f} times what is allowed: {got} instead of {truth}"


def assert_gradient_close(
    got: Tensor, truth: Tensor, dtype: torch.dtype, similarity: float, pull: float
) -> None:
    """``pull``: max|c| / temperature times the largest upstream gradient of one anchor's loss."""
    tolerance = TABLE[dtype]
    assert got.dtype == dtype
    assert torch.isfinite(got).all(), "gradient is not finite"
    rows = max(truth.numel() // max(truth.shape[-1], 1), 1)
    parts = 4 * pull * math.sqrt(rows)
    allowed = (tolerance.gradient + tolerance.output) * truth.norm().item()
    allowed += 4 * tolerance.eps * (1 + similarity) * parts
    # A subnormal or a value below the smallest of a 16-bit type is lost whatever one does.
    allowed += torch.finfo(dtype).tiny * math.sqrt(max(truth.numel(), 1))
    error = (got.double() - truth).norm().item()
    assert error <= allowed, (
        f"gradient is off by {error:.3e}, allowed {allowed:.3e} (norm {truth.norm():.3e})"
    )
