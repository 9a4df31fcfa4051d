"""Backward operators as functions that return what they add."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pysupcon.pairs import ops


def added(operator: Any, *arguments: Any, candidates: bool = False) -> tuple[Tensor, Any, Any]:
    """Call a backward operator on zeros.

    Args:
        operator: one of the three.
        arguments: all but the two last, which say where the gradients go.
        candidates: whether the gradient of the candidates is wanted.

    Returns:
        dL/dx, dL/dcandidates or None, and what the operator returns.
    """
    grad_x = ops.zero_gradients(arguments[0])
    grad_candidates = ops.zero_gradients(arguments[4]) if candidates else None
    result = operator(*arguments, grad_x, grad_candidates)
    return grad_x, grad_candidates, result
