"""The losses and their gradients with 60 digits, pair by pair, for tests in which float64 is not enough."""

from __future__ import annotations

from typing import Any, NamedTuple

import mpmath
import torch
from torch import Tensor

__all__ = ["Exact", "exact"]

_DIGITS = 60


class Exact(NamedTuple):
    """Exact results, rounded to float64."""

    loss: Tensor
    """[N]; 0 for anchors without positives"""
    grad: Tensor
    """gradient of the sum of the losses, [N, D]"""
    slope: float
    """derivative of that sum with respect to the temperature"""


def _log_sum(values: list[Any]) -> Any:
    top = max(values)
    return top + mpmath.log(mpmath.fsum(mpmath.exp(value - top) for value in values))


def _anchor(
    name: str, s: dict[int, Any], positives: list[int], negatives: list[int], own: list[int], epsilon: Any
) -> tuple[Any, dict[int, Any]]:
    """The loss of one anchor and its derivatives with respect to the similarities ``s``."""
    slope = dict.fromkeys(s, mpmath.mpf(0))
    if not positives:
        return mpmath.mpf(0), slope
    if name == "supcon":
        total = _log_sum(list(s.values()))
        loss = total - mpmath.fsum(s[j] for j in positives) / len(positives)
        for j, value in s.items():
            slope[j] = mpmath.exp(value - total) - (mpmath.mpf(1) / len(positives) if j in positives else 0)
        return loss, slope
    if name == "sincere":
        loss = mpmath.mpf(0)
        for p in positives:
            total = _log_sum([s[p] - epsilon, *(s[j] for j in negatives)])
            loss += (total - s[p]) / len(positives)
            slope[p] += (mpmath.exp(s[p] - epsilon - total) - 1) / len(positives)
            for j in negatives:
                slope[j] += mpmath.exp(s[j] - total) / len(positives)
        return loss, slope
    if not own:
        return mpmath.mpf(0), slope
    total = _log_sum([s[j] for j in positives])
    for j in positives:
        slope[j] = mpmath.exp(s[j] - total) - (mpmath.mpf(1) / len(own) if j in own else 0)
    return total - mpmath.fsum(s[j] for j in own) / len(own), slope


def exact(
    parts: dict[str, float], x: Tensor, labels: Tensor, instances: Tensor, temperature: float, epsilon: float
) -> Exact:
    """A weighted sum of losses of rows [N, D].

    Args:
        parts: weights of "supcon", "sincere" and "cnce".
        x: rows, [N, D].
        labels: [N].
        instances: [N].
        temperature: of all losses.
        epsilon: of "sincere".
    """
    with mpmath.workdps(_DIGITS):
        rows = [[mpmath.mpf(value) for value in row] for row in x.double().tolist()]
        count, tau = len(rows), mpmath.mpf(temperature)
        losses, grad = [], [[mpmath.mpf(0)] * x.shape[1] for _ in rows]
        for i in range(count):
            others = [j for j in range(count) if j != i]
            s = {j: mpmath.fdot(rows[i], rows[j]) / tau for j in others}
            positives = [j for j in others if labels[j] == labels[i]]
            negatives = [j for j in others if labels[j] != labels[i]]
            own = [j for j in others if instances[j] == instances[i]]
            loss = mpmath.mpf(0)
            for name, weight in parts.items():
                value, slope = _anchor(name, s, positives, negatives, own, mpmath.mpf(epsilon))
                loss += weight * value
                for j in others:
                    pull = weight * slope[j] / tau
                    for k in range(x.shape[1]):
                        grad[i][k] += pull * rows[j][k]
                        grad[j][k] += pull * rows[i][k]
            losses.append(float(loss))
        # Similarities are homogeneous of degree 2 in the rows and of degree -1 in the temperature.
        slope = -mpmath.fsum(mpmath.fdot(row, pull) for row, pull in zip(rows, grad, strict=True)) / (2 * tau)
        return Exact(
            torch.tensor(losses, dtype=torch.float64),
            torch.tensor([[float(value) for value in row] for row in grad], dtype=torch.float64),
            float(slope),
        )
