"""Problems with weights of candidates, and the operators' results by definition: dense float64 matrices."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from helpers.gradients import added
from pysupcon.pairs import ops, tiled

OPERATORS: dict[str, Any] = {"cpu": ops, "tiled": tiled}
EPSILON = {torch.float64: 2.2e-16, torch.float32: 1.2e-7, torch.bfloat16: 1.2e-7, torch.float16: 1.2e-7}
TINY = 1e-35
"""float32 has no smaller numbers of full precision"""
FORMS = ["self", "candidates", "self index", "own rows"]
NONE = (None,) * 6
"""no statistics of candidates"""


class Case(NamedTuple):
    """The arguments of the operators per row, and which rows of ``everything`` the anchors are."""

    x: Tensor
    labels: Tensor
    candidates: Tensor | None
    candidate_labels: Tensor | None
    self_index: Tensor | None
    instances: Tensor
    candidate_instances: Tensor | None
    log_weights: Tensor | None
    candidate_log_weights: Tensor | None
    scale: Tensor

    @property
    def rows(self) -> tuple[Any, ...]:
        orders = [
            None if labels is None or instances is None else _order(labels, instances)
            for labels, instances in (
                (self.labels, self.instances),
                (self.candidate_labels, self.candidate_instances),
            )
        ]
        side = self.candidates, self.candidate_labels, orders[1], self.self_index
        return self.x, self.labels, orders[0], self.scale, *side

    @property
    def weights(self) -> tuple[Tensor | None, Tensor | None]:
        return self.log_weights, self.candidate_log_weights

    @property
    def pairs(self) -> tuple[Any, ...]:
        return *self.rows, self.instances, self.candidate_instances, *self.weights


def _order(labels: Tensor, instances: Tensor) -> Tensor:
    order = torch.argsort(instances, stable=True)
    return order[torch.argsort(labels[order], stable=True)]


def draw(
    form: str,
    dtype: torch.dtype,
    temperature: float,
    weights: str,
    seed: int,
    total: int = 300,
    width: int = 24,
) -> Case:
    """A problem in which the rows of label -1 have weight 0."""
    generator = torch.Generator().manual_seed(seed)
    everything = torch.randn(total, width, generator=generator, dtype=torch.float64)
    everything = torch.nn.functional.normalize(everything, dim=1).to(dtype)
    labels = torch.randint(-1, 6, (total,), generator=generator)
    instances = torch.randint(0, 40, (total,), generator=generator)
    log_weights = {
        "equal": torch.full((total,), 3.0, dtype=torch.float64),
        "near": torch.randn(total, generator=generator, dtype=torch.float64),
        "far": math.log(1e30) * (2 * torch.rand(total, generator=generator, dtype=torch.float64) - 1),
    }[weights]
    log_weights[labels == -1] = -torch.inf
    scale = torch.tensor(1 / temperature, dtype=torch.float64)
    if form == "self":
        return Case(everything, labels, None, None, None, instances, None, log_weights, None, scale)
    if form == "candidates":
        count = total // 3
        x, own, own_instances, index = everything[:count], labels[:count], instances[:count], None
        everything, labels, instances = everything[count:], labels[count:], instances[count:]
        log_weights = log_weights[count:]
    else:
        index = torch.randperm(total, generator=generator)[: total // 2]
        x, own, own_instances = everything[index], labels[index], instances[index]
    own_weights = log_weights[index] if form == "own rows" else None
    if form == "self index":
        index = torch.where(torch.arange(len(x)) % 3 == 0, -1, index)
    return Case(
        x, own, everything, labels, index, own_instances, instances, own_weights, log_weights, scale
    )  # fmt: skip


class Dense(NamedTuple):
    """Matrices [M, N] of the definition, from float64 rows."""

    s: Tensor
    negative: Tensor
    positive: Tensor
    instance: Tensor
    log_weights: Tensor
    """[N]"""

    @classmethod
    def of(cls, case: Case) -> Dense:
        one_set = case.candidates is None
        labels = case.labels if one_set else case.candidate_labels
        instances = case.instances if one_set else case.candidate_instances
        log_weights = case.log_weights if one_set else case.candidate_log_weights
        assert labels is not None
        assert instances is not None
        assert log_weights is not None
        same = case.labels[:, None] == labels
        others = torch.ones_like(same)
        own = torch.arange(len(same)) if one_set else case.self_index
        if own is not None:
            others[own >= 0, own[own >= 0]] = False
        alike = case.instances[:, None] == instances
        x = case.x.double()
        s = case.scale * x @ (x if case.candidates is None else case.candidates.double()).T
        return cls(s, others & ~same, others & same, others & same & alike, log_weights)

    def statistics(self) -> tuple[Tensor, ...]:
        def logsumexp(where: Tensor) -> Tensor:
            return torch.where(where, self.s + self.log_weights, -torch.inf).logsumexp(1)

        sums = (torch.where(where, self.s, 0.0).sum(1) for where in (self.positive, self.instance))
        return logsumexp(self.negative), logsumexp(self.positive), *sums

    def softplus(self, n: Tensor, epsilon: float) -> Tensor:
        terms = torch.logaddexp(self.log_weights.expand_as(self.s), n[:, None] - self.s + epsilon)
        return torch.where(self.positive, terms, 0.0).sum(1)

    def sigmoid(self, n: Tensor, epsilon: float) -> Tensor:
        return torch.where(
            self.positive, torch.sigmoid(n[:, None] - self.s - self.log_weights + epsilon), 0.0
        )

    def gradient(self, n: Tensor, p: Tensor, u: Tensor, v: Tensor, w: Tensor, a: Tensor) -> Tensor:
        """G_ij = dL/ds_ij."""

        def part(where: Tensor, statistic: Tensor, upstream: Tensor) -> Tensor:
            share = (self.s + self.log_weights - statistic[:, None]).exp()
            return torch.where(where & (statistic > -torch.inf)[:, None], upstream[:, None] * share, 0.0)

        constants = self.positive * w[:, None] + self.instance * a[:, None]
        return part(self.negative, n, u) + part(self.positive, p, v) + constants


def compare(got: Tensor, want: Tensor, allowed: Tensor | float) -> None:
    """Equal where infinite, and otherwise within ``allowed``."""
    finite = want.isfinite()
    assert torch.equal(got.double()[~finite], want[~finite])
    error = torch.where(finite, got.double() - want, 0.0).abs()
    assert (error <= allowed + TINY).all(), (error / (allowed + TINY)).max()


def check(case: Case, operators: Any, epsilon: float = 0.25) -> None:
    """Compares all operators with the definition.

    An exponent s + log w has an error of some roundings of its terms, which is the relative error of an
    exponential. The error of a sum over pairs is relative to the sum of the magnitudes.
    """
    rows, dense = case.rows, Dense.of(case)
    weights = dense.log_weights[dense.log_weights > -torch.inf]
    reach = 1 + float(case.scale) + float(weights.max() - weights.min()) + float(weights.abs().max())
    slack = 16 * EPSILON[case.x.dtype] * reach
    own_rows = case.candidates is not None and case.log_weights is not None
    forward_weights = None if own_rows else case.log_weights, case.candidate_log_weights
    instances = case.instances, case.candidate_instances
    want = dense.statistics()
    got = operators.pair_stats(*rows, *instances, *forward_weights, True, True)
    terms = 1 + dense.positive.sum(1)
    for value, right, count in zip(got, want, (1, 1, terms, terms), strict=True):
        compare(value, right, slack * count)
    n, p = got[:2]
    total = operators.positive_softplus(*rows, *forward_weights, n, epsilon)
    assert total.isfinite().all()
    counted = case.labels != -1  # the positives of other rows have weight 0
    compare(total[counted], dense.softplus(n, epsilon)[counted], (slack * terms)[counted])

    whole, index = case, torch.arange(len(case.x))
    columns: tuple[Any, ...] = (None,) * 6
    if own_rows:
        assert case.candidates is not None
        assert case.candidate_labels is not None
        assert case.candidate_instances is not None
        assert case.self_index is not None
        index = case.self_index
        whole = Case(
            case.candidates, case.candidate_labels, None, None, None, case.candidate_instances, None,
            case.candidate_log_weights, None, case.scale,
        )  # fmt: skip
        dense = Dense.of(whole)
        n, p = dense.statistics()[:2]
    generator = torch.Generator().manual_seed(0)
    *upstream, g = torch.randn(5, len(whole.x), generator=generator, dtype=torch.float64)
    if own_rows:
        columns = n, p, *upstream

    def same_gradients(found: Any, weights: Tensor) -> None:
        x = whole.x.double()
        c = x if whole.candidates is None else whole.candidates.double()

        def products(weights: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            if whole.candidates is None:
                return case.scale * (weights + weights.T) @ x, torch.zeros(())
            return case.scale * weights @ c, case.scale * weights.T @ x

        magnitudes = products(weights.abs(), x.abs(), c.abs())
        right = products(weights, x, c)
        compare(found[0], right[0][index], slack * magnitudes[0][index])
        if found[1] is not None:
            compare(found[1], right[1], slack * magnitudes[1])

    own = [column[index] for column in (n, p, *upstream)]
    both = whole.candidates is not None
    found = added(
        operators.pair_stats_backward, *rows, *instances, *case.weights, *own, *columns, True, True,
        candidates=both,
    )  # fmt: skip
    same_gradients(found, dense.gradient(n, p, *upstream))
    only_n = added(
        operators.pair_stats_backward, *rows, *instances, *case.weights, *own, *columns, True, False,
        candidates=both,
    )  # fmt: skip
    zeros = torch.zeros_like(g)
    same_gradients(only_n, dense.gradient(n, p, upstream[0], zeros, zeros, zeros))
    found = added(
        operators.positive_softplus_backward, *rows, *case.weights, n[index], epsilon, g[index],
        *((n, g) if own_rows else (None, None)), candidates=both,
    )  # fmt: skip
    sigmoid = dense.sigmoid(n, epsilon)
    same_gradients(found, -g[:, None] * sigmoid)
    compare(found[2], (g * sigmoid.sum(1))[index], slack * (1 + (g.abs() * sigmoid.sum(1))[index]))
