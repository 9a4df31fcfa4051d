"""Ground truth in float64, computed for a few anchors at a time, and the errors of results."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels.cases import MANY_LABELS, TWO_SETS, Problem, label_rows
from pysupcon.losses import LOSSES_BY_NAME
from pysupcon.pairs import reference
from pysupcon.profiling.workload import Inputs

SPREAD_ALPHA = 0.5  # the default of functional.spread


class Truth(NamedTuple):
    loss: float
    gradient: Tensor
    """[N, D] float64"""

    @property
    def norm(self) -> float:
        """Norm of the gradient."""
        return torch.linalg.vector_norm(self.gradient).item()


def truth(problem: Problem, inputs: Inputs, anchors: int = 256) -> Truth:
    """Loss and gradient in float64 of the rows that the implementations get (rounded to their dtype).

    Uses the dense reference on ``anchors`` rows of the matrix at a time: memory is O(anchors N).
    """
    x = inputs.features.detach().to(torch.float64).requires_grad_()
    total = 0.0
    if problem.loss in TWO_SETS:
        sets = [(0, 1)] if problem.loss == "infonce" else [(0, 1), (1, 0)]
        for queries, candidates in sets:
            for start in range(0, problem.anchors, anchors):
                own = torch.arange(start, min(start + anchors, problem.anchors), device=x.device)
                s = reference.similarity(x[queries::2][own], x[candidates::2], problem.temperature)
                part = torch.nn.functional.cross_entropy(s, own, reduction="sum")
                part = part / (problem.anchors * len(sets))
                part.backward()
                total += part.item()
        assert x.grad is not None
        return Truth(total, x.grad)
    for start in range(0, problem.n, anchors):
        rows = slice(start, min(start + anchors, problem.n))
        own = torch.arange(rows.start, rows.stop, device=x.device)
        s = reference.similarity(x[rows], x, problem.temperature)
        positives, negatives = reference.pair_sets(inputs.labels[rows], inputs.labels, own)
        if problem.loss in MANY_LABELS:
            loss = _many_labels(problem.loss, s, label_rows(inputs.labels).to(s), own)
        else:
            same, _ = reference.pair_sets(inputs.instances[rows], inputs.instances, own)
            own_parameters = {"alpha": SPREAD_ALPHA, "base": "supcon"} if problem.loss == "spread" else {}
            loss = LOSSES_BY_NAME[problem.loss].dense(s, positives, negatives, same, s, **own_parameters)
        part = loss.sum() / problem.n  # every row has its other view as a positive
        part.backward()
        total += part.item()
    assert x.grad is not None
    return Truth(total, x.grad)


def _many_labels(form: str, s: Tensor, labels: Tensor, own: Tensor) -> Tensor:
    """SupCon of the anchors ``own`` from their similarities [n, N] and the labels [N, C] of all rows."""
    left_out = own[:, None] == torch.arange(len(labels), device=s.device)
    denominator = s.masked_fill(left_out, -torch.inf).logsumexp(dim=1)
    mine = labels[own]
    if form == "per_label":
        count = (labels.sum(dim=0) - mine).clamp(min=1)  # other rows with the label
        means = (s.masked_fill(left_out, 0.0) @ labels) / count
        return denominator - (means * mine).sum(dim=1) / mine.sum(dim=1)
    shared = (mine @ labels.T).masked_fill(left_out, 0.0)
    weights = shared / (mine.sum(dim=1)[:, None] + labels.sum(dim=1) - shared)
    if form == "any":
        weights = (shared > 0).to(s)
    return denominator - (weights * s).sum(dim=1) / weights.sum(dim=1)


def tangent(gradient: Tensor, features: Tensor) -> Tensor:
    """The gradient of a loss that normalizes unit rows itself: without the component along each row."""
    rows = features.detach().to(gradient.dtype)
    return gradient - (gradient * rows).sum(dim=1, keepdim=True) * rows


class Errors(NamedTuple):
    """Relative errors; absolute where the truth is 0."""

    loss: float
    gradient: float
    """norm of the difference over the norm of the truth"""


def errors(loss: Tensor, gradient: Tensor, expected: Truth) -> Errors:
    """Errors of a result; NaN if the result is not finite, so that every comparison fails."""
    difference = gradient.to(torch.float64) - expected.gradient
    return Errors(
        abs(loss.item() - expected.loss) / (abs(expected.loss) or 1.0),
        torch.linalg.vector_norm(difference).item() / (expected.norm or 1.0),
    )
