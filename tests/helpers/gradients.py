"""Calls backward operators and returns the gradients that they add."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pysupcon.pairs import ops


def added(operator: Any, *arguments: Any, candidates: bool = False) -> tuple[Tensor, Any, Any]:
    """Call a backward operator with gradient buffers of zeros.

    Args:
        operator: a backward operator.
        arguments: all arguments except grad_x and grad_candidates.
        candidates: whether to compute the gradient of the candidates.

    Returns:
        dL/dx, dL/dcandidates or None, and the operator's result.
    """
    grad_x = ops.zero_gradients(arguments[0])
    grad_candidates = ops.zero_gradients(arguments[4]) if candidates else None
    result = operator(*arguments, grad_x, grad_candidates)
    return grad_x, grad_candidates, result
