"""csrc/cuda_glue.cpp without a GPU: registered for CPU tensors, with emulated kernels."""

from __future__ import annotations

import platform
import random
import shutil
from typing import Any, NamedTuple

import pytest
import torch
from cuda_emulation import build
from helpers import raw_operators, weighted_pairs
from helpers.gradients import added
from torch import Tensor

from pysupcon import functional
from pysupcon.pairs import ops, statistics

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.system() != "Linux", reason="the emulation needs g++ on Linux"
)


@pytest.fixture(scope="module")
def emulated() -> Any:
    torch.ops.load_library(str(build.build_operators()))
    return torch.ops.pysupcon_emulated


def rows(
    count: int, width: int, dtype: torch.dtype, classes: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64)).to(
        dtype
    )
    labels = torch.randint(classes, (count,), generator=generator)
    return x, labels, torch.argsort(labels, stable=True)


SCALE = torch.tensor(5.0, dtype=torch.float64)
NONE = (None, None, None, None)
ALONE = (*NONE, *NONE)
"""no candidates, no instances, no weights"""
NO_COLUMNS = (None,) * 6
"""no statistics of candidates"""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


class Pairs(NamedTuple):
    """The terms of the sums as a matrix [M, N] in float64."""

    s: Tensor
    negative: Tensor
    positive: Tensor
    same_instance: Tensor
    log_weights: Tensor
    """of the candidates, [N]"""

    def statistics(self, negatives: bool, positives: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        negative, positive = self.negative & negatives, self.positive & positives
        weighted = self.s + self.log_weights
        n = weighted.masked_fill(~negative, -torch.inf).logsumexp(dim=1)
        p = weighted.masked_fill(~positive, -torch.inf).logsumexp(dim=1)
        total = torch.where(positive, self.s, 0.0).sum(dim=1)
        return n, p, total, torch.where(positive & self.same_instance, self.s, 0.0).sum(dim=1)


class Problem(NamedTuple):
    """The first twelve arguments of pair_stats."""

    x: Tensor
    labels: Tensor
    order: Tensor
    scale: Tensor
    candidates: Tensor | None
    candidate_labels: Tensor | None
    candidate_order: Tensor | None
    self_index: Tensor | None
    instances: Tensor | None
    candidate_instances: Tensor | None
    log_weights: Tensor | None = None
    candidate_log_weights: Tensor | None = None

    def pairs(self, x: Tensor, candidates: Tensor | None) -> Pairs:
        """Computed from float64 copies of the rows, which may require a gradient."""
        one_set = candidates is None
        c = x if candidates is None else candidates
        other_labels = self.labels if one_set else self.candidate_labels
        assert other_labels is not None
        same = self.labels[:, None] == other_labels
        own = torch.arange(len(x)) if one_set else self.self_index
        counts = torch.ones_like(same)
        if own is not None:
            counts[own >= 0, own[own >= 0]] = False
        instance = torch.zeros_like(same)
        if self.instances is not None:
            others = self.instances if one_set else self.candidate_instances
            instance = self.instances[:, None] == others
        log_weights = self.log_weights if one_set else self.candidate_log_weights
        if log_weights is None:
            log_weights = torch.zeros(len(c), dtype=torch.float64)
        return Pairs(self.scale * x @ c.T, counts & ~same, counts & same, instance, log_weights)


def by_label_and_instance(labels: Tensor, instances: Tensor | None) -> Tensor:
    if instances is None:
        return torch.argsort(labels, stable=True)
    by_instance = torch.argsort(instances, stable=True)
    return by_instance[torch.argsort(labels[by_instance], stable=True)]


def make_problem(dtype: torch.dtype, separate: bool, with_instances: bool, weighted: bool = False) -> Problem:
    generator = torch.Generator().manual_seed(2)
    log_weights = torch.randn(30 if separate else 21, generator=generator, dtype=torch.float64)
    log_weights[5] = -torch.inf
    given = log_weights if weighted else None
    weights = (None, given) if separate else (given, None)
    x, labels, _ = rows(21, 12, dtype, 3, 0)
    x = torch.cat([x, x], 1)[:, :12]  # strided rows
    instances = torch.arange(21) % 4 if with_instances else None
    order = by_label_and_instance(labels, instances)
    if not separate:
        return Problem(x, labels, order, SCALE, *NONE, instances, None, *weights)
    c, c_labels, _ = rows(30, 12, dtype, 3, 1)
    c[:4], c_labels[:4] = x[:4], labels[:4]
    self_index = torch.full((21,), -1)
    self_index[:4] = torch.arange(4)
    c_instances = torch.arange(30) % 4 if with_instances else None
    c_order = by_label_and_instance(c_labels, c_instances)
    return Problem(
        x, labels, order, SCALE, c, c_labels, c_order, self_index, instances, c_instances, *weights
    )


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("separate", [False, True], ids=["one set", "candidates"])
@pytest.mark.parametrize("with_instances", [False, True], ids=["labels", "instances"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
def test_operators_agree_with_written_down_pairs(
    emulated: Any, dtype: torch.dtype, separate: bool, with_instances: bool, weighted: bool
) -> None:
    problem = make_problem(dtype, separate, with_instances, weighted)
    tolerance = TOLERANCE[dtype]
    x = problem.x.double().clone().requires_grad_()
    c = None if problem.candidates is None else problem.candidates.double().clone().requires_grad_()
    pairs = problem.pairs(x, c)
    want = pairs.statistics(True, True)
    got = emulated.pair_stats(*problem, True, True)
    for statistic, right in zip(got, want, strict=True):
        assert statistic.dtype == torch.float64
        close(statistic, right.detach(), 1e-12 if dtype == torch.float64 else 1e-5)
    assert bool((got[3] == 0).all()) != with_instances

    def same_gradients(got: Any, scalar: Tensor, slack: float) -> None:
        leaves = [x] if c is None else [x, c]
        right = torch.autograd.grad(scalar, leaves, retain_graph=True)
        for g, w in zip(got[:2], [*right, None], strict=False):
            assert (g is None) == (w is None)
            if g is not None:
                close(g, w, tolerance * slack)

    n, p = got[:2]
    upstream = [torch.randn(21, dtype=torch.float64) for _ in range(4)]
    u, v, w, a = upstream
    operator = emulated.pair_stats_backward
    sums = (
        added(operator, *problem, n, p, u, v, w, a, *NO_COLUMNS, True, True, candidates=separate),
        added(operator, *problem, n, p, u, v, None, None, *NO_COLUMNS, True, True, candidates=separate),
    )
    same_gradients(sums[0], sum((g * s).sum() for g, s in zip(upstream, want, strict=True)), 5)
    same_gradients(sums[1], (u * want[0]).sum() + (v * want[1]).sum(), 5)
    for negatives, positives in ((True, False), (False, True), (False, False)):
        got = emulated.pair_stats(*problem, negatives, positives)
        right = pairs.statistics(negatives, positives)
        for statistic, value in zip(got, right, strict=True):
            close(statistic, value.detach(), 1e-12 if dtype == torch.float64 else 1e-5)
        part = added(
            operator, *problem, *got[:2], *upstream, *NO_COLUMNS, negatives, positives, candidates=separate
        )
        scalar = 0 * x.sum() + (0 if c is None else 0 * c.sum())
        if negatives:
            scalar = scalar + (u * right[0]).sum()
        if positives:
            scalar = scalar + sum((g * s).sum() for g, s in zip(upstream[1:], right[1:], strict=True))
        same_gradients(part, scalar, 5)

    here = (*problem[:8], *problem[10:])
    total = emulated.positive_softplus(*here, n, 0.25)
    softplus = torch.logaddexp(n[:, None] - pairs.s + 0.25, pairs.log_weights)
    right = torch.where(pairs.positive, softplus, 0.0).sum(dim=1)
    assert total.dtype == torch.float64
    close(total, right.detach(), 1e-12 if dtype == torch.float64 else 3e-5)
    softplus_gradient = added(
        emulated.positive_softplus_backward, *here, n, 0.25, u, None, None, candidates=separate
    )
    assert softplus_gradient[2].dtype == torch.float64
    same_gradients(softplus_gradient, (u * right).sum(), 20)


@pytest.mark.parametrize("form", weighted_pairs.FORMS)
@pytest.mark.parametrize("weights", ["near", "far"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_operators_with_weights_equal_the_definition(
    emulated: Any, form: str, weights: str, dtype: torch.dtype
) -> None:
    weighted_pairs.check(weighted_pairs.draw(form, dtype, 0.07, weights, seed=3, total=120), emulated)


def test_matmul_precision_chooses_the_split(emulated: Any) -> None:
    x, labels, order = rows(40, 64, torch.float32, 4, 3)
    problem = Problem(x, labels, order, torch.tensor(20.0), *ALONE)
    want = problem.pairs(x.double(), None).statistics(True, True)[0]
    errors = {}
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            n = emulated.pair_stats(*problem, True, True)[0]
            errors[precision] = float((n.double() - want).abs().max())
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors["highest"] < 3e-6
    assert errors["highest"] < errors["high"] < 1e-4
    assert errors["high"] < errors["medium"] < 0.1


def test_newer_precision_setting_is_understood(emulated: Any) -> None:
    """torch.get_float32_matmul_precision() raises once the new setting is used; the operators must not."""
    problem = Problem(*rows(40, 64, torch.float32, 4, 3), torch.tensor(20.0), *ALONE)
    exact = emulated.pair_stats(*problem, True, True)[0]
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        split = emulated.pair_stats(*problem, True, True)[0]
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        again = emulated.pair_stats(*problem, True, True)[0]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert not torch.equal(split, exact)
    torch.testing.assert_close(split, exact, rtol=1e-4, atol=1e-4)
    assert torch.equal(again, exact)


def test_empty_batches(emulated: Any) -> None:
    x, labels, order = rows(0, 8, torch.float32, 3, 0)
    one = torch.tensor(1.0)
    for statistic in emulated.pair_stats(x, labels, order, one, *ALONE, True, True):
        assert statistic.shape == (0,)
    y, y_labels, y_order = rows(6, 8, torch.float32, 3, 1)
    no_candidates = Problem(y, y_labels, y_order, one, x, labels, order, None, None, None)
    n, p, *sums = emulated.pair_stats(*no_candidates, True, True)
    assert bool((n == -torch.inf).all())
    assert bool((p == -torch.inf).all())
    assert all(bool((total == 0).all()) for total in sums)
    empty, ones = [torch.empty(0)] * 6, [torch.ones(6)] * 4
    no_anchors = (x, labels, order, one, y, y_labels, y_order, *NONE, None)
    operator = emulated.pair_stats_backward
    gx, g, _ = added(operator, *no_anchors, *empty, *NO_COLUMNS, True, True, candidates=True)
    assert gx.shape == (0, 8)
    assert bool((g == 0).all())
    gx, _, _ = added(operator, *no_candidates, n, p, *ones, *NO_COLUMNS, True, True)
    assert bool((gx == 0).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(5).long()}, r"must be int64 of shape \[6\] on cpu, got Long of shape \[5"),
        ({"labels": torch.zeros(6)}, r"labels must be int64 of shape \[6\] on cpu, got Float"),
        ({"x": torch.zeros(6)}, r"x must be \[rows, D\] with D at least 1, got Float of shape \[6\] on cpu"),
        ({"x": torch.zeros(6, 4, dtype=torch.int32)}, "x must be float32, float64, .* got Int"),
        ({"scale": torch.ones(1)}, r"scale must be .* of no dimensions on cpu, got Float of shape \[1\]"),
    ],
)  # fmt: skip
def test_errors_name_argument_contract_and_value(
    emulated: Any, change: dict[str, Tensor], message: str
) -> None:
    x, labels, order = rows(6, 4, torch.float32, 2, 0)
    arguments = {"x": x, "labels": labels, "order": order, "scale": torch.tensor(1.0), **change}
    with pytest.raises(ValueError, match=message):
        emulated.pair_stats(*arguments.values(), *ALONE, True, True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"candidate_instances": torch.zeros(6).long()}, "candidate_instances go with candidates and inst"),
        ({"instances": torch.zeros(5).long()}, r"instances must be int64 of shape \[6\] on cpu, got Long of"),
        ({"instances": torch.zeros(6)}, r"instances must be int64 of shape \[6\] on cpu, got Float"),
    ],
)
def test_instances_are_checked(emulated: Any, given: dict[str, Tensor], message: str) -> None:
    problem = Problem(*rows(6, 4, torch.float32, 2, 0), torch.tensor(1.0), *ALONE)._replace(**given)
    with pytest.raises(ValueError, match=message):
        emulated.pair_stats(*problem, True, True)


def test_candidates_need_instances_where_the_anchors_have_them(emulated: Any) -> None:
    problem = make_problem(torch.float32, True, True)._replace(candidate_instances=None)
    with pytest.raises(ValueError, match="candidate_instances go with candidates and instances"):
        emulated.pair_stats(*problem, True, True)


@pytest.mark.parametrize(
    "fault", [fault for fault in raw_operators.FAULTS if not fault.on_device], ids=lambda fault: fault.name
)
def test_faults_that_the_host_can_see_are_refused(emulated: Any, fault: raw_operators.Fault) -> None:
    tried = 0
    for form in raw_operators.FORMS:
        rng = random.Random(form)
        for dtype in raw_operators.DTYPES:
            values = raw_operators.draw(rng, form, dtype)
            for name, taken in raw_operators.operators("pysupcon_emulated").items():
                wrong = raw_operators.applied(fault, taken, values)
                if wrong is not None:
                    tried += 1
                    with pytest.raises(ValueError, match=fault.message):
                        raw_operators.call("pysupcon_emulated", name, wrong)
    assert tried


def test_candidate_statistics_need_candidates(emulated: Any) -> None:
    problem = Problem(*rows(6, 4, torch.float32, 2, 0), torch.tensor(1.0), *ALONE)
    ones, into = [torch.ones(6)] * 6, (problem.x.clone(), None)
    with pytest.raises(ValueError, match="go with candidates"):
        emulated.pair_stats_backward(*problem, *ones, *ones, True, True, *into)
    with pytest.raises(ValueError, match="candidate_grad_instance_sum need candidate_n"):
        emulated.pair_stats_backward(*problem, *ones, *NONE, *ones[:2], True, True, *into)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda g: g[:5],
            r"grad_x must be a contiguous tensor of Float and shape \[6, 4\] on cpu, got Float of",
        ),
        (lambda g: g.double(), r"grad_x must be .* of Float and shape \[6, 4\] on cpu, got Double"),
        (lambda g: g.new_zeros(4, 6).T, r"got Float of shape \[6, 4\] and strides \[1, 6\]"),
    ],
)
def test_gradient_buffers_are_checked(emulated: Any, change: Any, message: str) -> None:
    x, labels, order = rows(6, 4, torch.float32, 2, 0)
    with pytest.raises(ValueError, match=message):
        emulated.pair_stats_backward(
            *(x, labels, order, torch.tensor(1.0), *ALONE, *[torch.ones(6)] * 4, None, None),
            *(*NO_COLUMNS, True, True, change(x.clone()), None),
        )


@pytest.mark.skipif(not ops.compiled_for("cuda"), reason="this build has no CUDA kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_fakes_answer_for_cuda_tensors_without_a_gpu(dtype: torch.dtype) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(8, 4, dtype=dtype, device="cuda")
        labels = torch.empty(8, dtype=torch.int64, device="cuda")
        stats = ops.stats_dtype(x)
        assert stats == torch.float64
        scale = torch.empty((), dtype=stats, device="cuda")
        found = torch.ops.pysupcon.pair_stats(x, labels, labels, scale, *ALONE, True, True)
        for statistic in found:
            assert statistic.dtype == stats
            assert statistic.device.type == "cuda"
            assert statistic.shape == (8,)
        n, p = found[:2]
        grad_x, _, _ = added(
            torch.ops.pysupcon.pair_stats_backward,
            *(x, labels, labels, scale, *ALONE, n, p, n, p, None, None, *NO_COLUMNS, True, True),
        )
        assert grad_x.dtype == torch.promote_types(dtype, torch.float32)
        assert grad_x.device.type == "cuda"
        grad_n = torch.ops.pysupcon.positive_softplus_backward(
            x, labels, labels, scale, *NONE, None, None, n, 0.0, n, None, None, grad_x, None
        )
        assert grad_n.dtype == stats
        assert grad_n.device.type == "cuda"


LOSSES = ["supcon", "sincere", "class_conditional_info_nce", "spread", "info_nce"]


def evaluate(loss: str, x: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The loss of two views a sample, [B, 2, D], and the gradient."""
    leaf = x.to(dtype).requires_grad_()
    ids = {} if loss == "info_nce" else {"labels": labels}
    value = getattr(functional, loss)(leaf, **ids, backend="cpu")
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_broken_row_makes_every_loss_nan(
    emulated: Any, monkeypatch: pytest.MonkeyPatch, loss: str, dtype: torch.dtype
) -> None:
    """Even if the row is alone in its class. Without the broken row, the results agree with float64."""
    generator = torch.Generator().manual_seed(1)
    x = torch.nn.functional.normalize(torch.randn(35, 2, 20, generator=generator, dtype=torch.float64), dim=2)
    labels = torch.arange(35) % 3
    labels[[0, 17, 34]] = torch.tensor([-8, 40, 50])
    right = evaluate(loss, x.to(dtype), labels, torch.float64)
    monkeypatch.setitem(statistics.OPERATORS, "cpu", emulated)
    for found, want in zip(evaluate(loss, x, labels, dtype), right, strict=True):
        close(found, want, TOLERANCE[dtype])
    for row, view, d in ((0, 0, 0), (17, 1, 19), (34, 1, 7), (5, 0, 3)):
        for value in (torch.nan, torch.inf, -torch.inf, 1e30 if dtype == torch.float64 else 1e15):
            broken = x.clone()
            broken[row, view, d] = value
            found, gradient = evaluate(loss, broken, labels, dtype)
            assert found.isnan(), (row, value)
            assert gradient.isnan().all(), (row, value)
