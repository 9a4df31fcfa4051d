"""Properties of the losses other than values: tracing, autocast, determinism, memory, graphs, backends."""

from __future__ import annotations

import copy
import resource
import subprocess
import sys
import warnings
from typing import Any, get_args

import pytest
import torch
from helpers.cases import LOSSES, NEEDS_INSTANCES
from helpers.gradients import added
from helpers.tolerances import assert_loss_close, largest_similarity

import pysupcon
from pysupcon import functional, losses
from pysupcon.contrastive import ContrastiveLoss
from pysupcon.pairs import ops, tiled

COMPILED = pysupcon.backends()["cpu"]
needs_extension = pytest.mark.skipif(not COMPILED["available"], reason=COMPILED["detail"])


def _operator_arguments(dtype: torch.dtype, kind: str) -> tuple[Any, ...]:
    """(x, labels, order, scale, candidates, candidate_labels, candidate_order, self_index)"""
    x, labels = torch.randn(7, 5, dtype=dtype), torch.tensor([2, 0, 2, 1, 0, 2, 5])
    scale = torch.tensor(2.0, dtype=ops.stats_dtype(x))
    rows = (x, labels, torch.argsort(labels, stable=True), scale)
    if kind == "self":
        return (*rows, None, None, None, None)
    candidates, others = torch.randn(9, 5, dtype=dtype), torch.tensor([5, 2, 2, 0, 2, 1, 0, 2, 8])
    self_index = None if kind == "candidates" else torch.tensor([2, 3, 4, 5, 6, 7, 0])
    return (*rows, candidates, others, torch.argsort(others, stable=True), self_index)


def _all_operators(dtype: torch.dtype, kind: str) -> dict[str, tuple[Any, ...]]:
    """Arguments of each of the four operators. "own rows" is the third form of the backward."""
    rows = _operator_arguments(dtype, kind)
    wide = {"dtype": ops.stats_dtype(rows[0])}
    # Sorted by label; rows of a label have ascending instances, in the order of the rows.
    instances = torch.tensor([0, 0, 0, 4, 0, 3, 4]), None if rows[4] is None else torch.arange(9) // 3
    log_weights, candidate_log_weights = torch.randn(7, **wide), torch.randn(9, **wide)
    forward_weights = (log_weights, None) if rows[4] is None else (None, candidate_log_weights)
    weights = (log_weights, candidate_log_weights) if kind == "own rows" else forward_weights
    pairs = *rows, *instances
    n, p, *_ = tiled.pair_stats(*pairs, *forward_weights, True, True)
    u, v, w, a = (torch.randn(7, **wide) for _ in range(4))
    other: tuple[Any, ...] = (None,) * 6
    if kind == "own rows":
        other = tuple(torch.randn(9, **wide) for _ in range(6))
        other = other[0] + 40, other[1] + 40, *other[2:]  # no similarity is larger than its logsumexp
    into = [torch.full_like(ops.zero_gradients(x), 2.0) for x in (rows[0], rows[4]) if x is not None]
    mean = None if kind == "self" else ops.zero_gradients(rows[0])
    if kind in ("self", "own rows"):
        into = [into[0], None]
    return {
        "pair_stats": (*pairs, *forward_weights, True, True, mean),
        "pair_stats_backward": (*pairs, *weights, n, p, u, v, w, a, *other, True, True, *into),
        "positive_softplus": (*rows, *forward_weights, n, 0.25),
        "positive_softplus_backward": (*rows, *weights, n, 0.25, w, other[0], other[2], *into),
    }


KINDS = ["self", "candidates", "self index", "own rows"]
OPERATORS = list(_all_operators(torch.float64, "self"))


@needs_extension
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_keep_the_dispatcher_contract(name: str, kind: str) -> None:
    arguments = _all_operators(torch.float32, kind)[name]
    torch.library.opcheck(getattr(torch.ops.pysupcon, name).default, arguments)


@needs_extension
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPERATORS)
def test_compiled_and_tiled_operators_agree(name: str, kind: str) -> None:
    """Outputs and gradients are equal."""
    arguments = _all_operators(torch.float64, kind)[name]
    theirs = copy.deepcopy(arguments)
    got, want = getattr(ops, name)(*arguments), getattr(tiled, name)(*theirs)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for mine, other in zip(arguments, theirs, strict=True):
        if isinstance(mine, torch.Tensor):
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in OPERATORS if name.endswith("_backward")])
def test_backward_operators_add(name: str, kind: str, backend: str) -> None:
    """Two calls with the same buffers give twice the gradient; no other argument changes."""
    operator = getattr(tiled if backend == "tiled" else ops, name)
    arguments = _all_operators(torch.float64, kind)[name]
    before = copy.deepcopy(arguments)
    operator(*arguments)
    once = copy.deepcopy(arguments)
    operator(*arguments)
    for mine, start in zip(arguments[:-2], before, strict=False):
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine, start)
    for mine, first, start in zip(arguments[-2:], once[-2:], before[-2:], strict=True):
        if mine is not None:
            assert not torch.equal(first, start)
            torch.testing.assert_close(mine - first, first - start, rtol=1e-10, atol=1e-10)


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g[:5], r"grad_x must be a contiguous tensor of Float and shape \[7, 5\] on cpu, got Float "
                          r"of shape \[5, 5\]"),
        (lambda g: g.double(), r"grad_x must be .* of Float and shape \[7, 5\] on cpu, got Double"),
        (lambda g: g.new_zeros(5, 7).T, r"got Float of shape \[7, 5\] and strides \[1, 7\]"),
    ],
)  # fmt: skip
def test_gradient_buffers_are_checked(change: Any, message: str) -> None:
    *rest, grad_x, _ = _all_operators(torch.float32, "self")["pair_stats_backward"]
    with pytest.raises(ValueError, match=message):
        ops.pair_stats_backward(*rest, change(grad_x), None)


@pytest.mark.parametrize("name", ["pair_stats", "positive_softplus"])
def test_own_rows_form_is_part_of_the_whole_gradient(name: str, backend: str) -> None:
    """Each half of the rows, given the statistics and upstream gradients of the other half, computes its part
    of the gradient."""
    operators = tiled if backend == "tiled" else ops
    x, labels = torch.randn(8, 5, dtype=torch.float64), torch.tensor([2, 0, 2, 1, 0, 2, 5, 2])
    order, scale = torch.argsort(labels, stable=True), torch.tensor(2.0, dtype=torch.float64)
    whole = (x, labels, order, scale, None, None, None, None)
    instances = torch.tensor([0, 0, 0, 4, 0, 3, 4, 4])
    n, p, *_ = operators.pair_stats(*whole, instances, *(None,) * 3, True, True)
    grads = tuple(torch.randn(4, 8, dtype=torch.float64))
    own, all_columns, flags = {
        "pair_stats": ((n, p, *grads), (n, p, *grads), (True, True)),
        "positive_softplus": ((n, 0.25, grads[0]), (n, grads[0]), ()),
    }[name]
    of_pairs = name == "pair_stats"
    backward = getattr(operators, f"{name}_backward")
    no_columns = (None,) * len(all_columns)
    whole_instances = (instances, *(None,) * 3) if of_pairs else (None, None)
    want = added(backward, *whole, *whole_instances, *own, *no_columns, *flags)[0]
    for half in (torch.arange(0, 4), torch.arange(4, 8)):
        own_columns = [value[half] if isinstance(value, torch.Tensor) else value for value in own]
        rows = (
            x[half],
            labels[half],
            torch.argsort(labels[half], stable=True),
            scale,
            x,
            labels,
            order,
            half,
            *((instances[half], instances) if of_pairs else ()),
            *(None, None),
        )
        torch.testing.assert_close(added(backward, *rows, *own_columns, *all_columns, *flags)[0], want[half])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype, backend: str) -> None:
    x, labels = torch.randn(40, 2, 16, requires_grad=True), torch.randint(0, 4, (40,))
    for name, loss in LOSSES.items():
        want = torch.autograd.grad(loss(x, labels, temperature=0.3, backend=backend), x)[0]
        with torch.autocast("cpu", dtype=dtype):
            value = loss(x, labels, temperature=0.3, backend=backend)
            got = torch.autograd.grad(value, x)[0]  # the backward under autocast too
        assert value.dtype == torch.float32
        assert torch.equal(got, want), name


@pytest.mark.parametrize("name", LOSSES)
def test_same_bits_for_any_number_of_threads(name: str, backend: str) -> None:
    x = torch.nn.functional.normalize(torch.randn(300, 2, 24), dim=-1)
    labels = torch.randint(0, 9, (300,))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            leaf = x.clone().requires_grad_()
            loss = LOSSES[name](leaf, labels, temperature=0.1, backend=backend, reduction="none")
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        if backend == "cpu":
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
        else:  # torch's own matrix product may split differently
            torch.testing.assert_close(result, results[0])
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[3], strict=True))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(0, 2, 4), (0, 4)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch(name: str, shape: tuple[int, ...], reduction: str, backend: str) -> None:
    x = torch.zeros(shape, requires_grad=True)
    more = {"instances": torch.zeros(0, dtype=torch.int64)} if len(shape) == 2 else {}
    with pytest.warns(UserWarning, match="no anchor of this batch has a positive"):
        loss = LOSSES[name](
            x, torch.zeros(0, dtype=torch.int64), backend=backend, reduction=reduction, **more
        )
    assert loss.shape == (shape[:-1] if reduction == "none" else ())
    assert loss.sum() == 0
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert grad.shape == shape


@pytest.mark.parametrize("name", LOSSES)
def test_no_positive_anywhere_is_zero_in_the_graph(name: str, backend: str) -> None:
    x = torch.randn(6, 4, requires_grad=True)
    more = {"instances": torch.arange(6)} if name in NEEDS_INSTANCES else {}
    with pytest.warns(UserWarning, match="no anchor of this batch has a positive"):
        loss = LOSSES[name](x, torch.arange(6), backend=backend, **more)
    assert loss == 0
    loss.backward()
    assert x.grad is not None
    assert (x.grad == 0).all()


def test_a_batch_with_positives_does_not_warn(backend: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functional.supcon(torch.randn(4, 2, 3), backend=backend)


@pytest.mark.filterwarnings("ignore:no anchor of this batch has a positive")
@pytest.mark.parametrize("candidates", [0, 1])
def test_few_candidates(candidates: int, backend: str) -> None:
    x, queue = torch.randn(3, 4, requires_grad=True), torch.randn(candidates, 4, requires_grad=True)
    labels, others = torch.tensor([0, 1, 0]), torch.zeros(candidates, dtype=torch.int64)
    loss = functional.supcon(
        x, labels, candidates=queue, candidate_labels=others, backend=backend, reduction="none"
    )
    # A single candidate forms the whole denominator.
    assert_loss_close(loss, torch.zeros(3).double(), torch.float32, largest_similarity(x, queue, 0.07))
    loss.sum().backward()
    assert queue.grad is not None
    assert torch.isfinite(queue.grad).all()


def test_second_derivatives_are_refused(backend: str) -> None:
    x = torch.randn(6, 2, 4, requires_grad=True)
    for loss in LOSSES.values():
        (grad,) = torch.autograd.grad(loss(x, torch.arange(6) % 2, backend=backend), x, create_graph=True)
        with pytest.raises(RuntimeError, match="can be differentiated once only"):
            grad.square().sum().backward()


def test_only_inputs_that_require_a_gradient_get_one(backend: str) -> None:
    queue = torch.randn(5, 4, requires_grad=True)
    x, labels = torch.randn(4, 4), torch.tensor([0, 1, 0, 1])
    loss = functional.supcon(
        x, labels, candidates=queue, candidate_labels=torch.arange(5) % 2, backend=backend
    )
    loss.backward()
    assert queue.grad is not None
    with torch.no_grad():
        assert not functional.supcon(x, labels, backend=backend).requires_grad


def test_candidates_of_another_dtype_are_promoted(backend: str) -> None:
    x = torch.randn(4, 4, dtype=torch.bfloat16, requires_grad=True)
    queue = torch.randn(5, 4, requires_grad=True)
    loss = functional.supcon(
        x, torch.tensor([0, 1, 0, 1]), candidates=queue, candidate_labels=torch.arange(5) % 2, backend=backend
    )
    loss.backward()
    assert x.grad is not None
    assert queue.grad is not None
    assert (x.grad.dtype, queue.grad.dtype) == (torch.bfloat16, torch.float32)


def test_converged_bfloat16_gradient_keeps_its_precision(backend: str) -> None:
    """Attraction and repulsion cancel: they must be added before they are rounded to 16 bits."""
    centres = torch.nn.functional.normalize(torch.randn(4, 32), dim=-1)
    labels = torch.arange(64) % 4
    x = torch.nn.functional.normalize(centres[labels] + 0.02 * torch.randn(64, 32), dim=-1)
    x = x.bfloat16().requires_grad_()
    wide = x.detach().double().requires_grad_()
    functional.supcon(x, labels, temperature=0.1, backend=backend).backward()
    functional.supcon(wide, labels, temperature=0.1, backend="reference").backward()
    assert x.grad is not None
    assert wide.grad is not None
    assert (x.grad.double() - wide.grad).norm() <= 2.0**-8 * wide.grad.norm()


def test_learnable_temperature() -> None:
    loss = pysupcon.SupConLoss(0.2, learnable_temperature=True)
    assert [name for name, _ in loss.named_parameters()] == ["log_temperature"]
    x, labels = torch.randn(8, 2, 4), torch.arange(8) % 3
    torch.testing.assert_close(loss(x, labels), pysupcon.SupConLoss(0.2)(x, labels))
    loss(x, labels).backward()
    assert loss.log_temperature is not None
    assert loss.log_temperature.grad is not None
    assert loss.log_temperature.grad.abs() > 0
    copy = pysupcon.SupConLoss(0.9, learnable_temperature=True)
    copy.load_state_dict(loss.state_dict())
    assert torch.equal(copy(x, labels), loss(x, labels))
    assert list(pysupcon.SupConLoss().parameters()) == []


def test_modules_are_their_functions() -> None:
    x, labels = torch.randn(8, 2, 4), torch.arange(8) % 3
    cnce, info_nce = functional.class_conditional_info_nce, functional.info_nce
    one = {"temperature": 0.1, "contrast_mode": "one", "base_temperature": 0.2}
    sincere = {"alpha": 0.2, "base": "sincere"}
    other = {"reduction": "sum", "normalize": True}
    pairs = [
        (pysupcon.SupConLoss(), functional.supcon(x, labels)),
        (pysupcon.SupConLoss(0.1, "one", 0.2), functional.supcon(x, labels, **one)),
        (pysupcon.SINCERELoss(0.1, 0.3), functional.sincere(x, labels, temperature=0.1, epsilon=0.3)),
        (pysupcon.ClassConditionalInfoNCELoss(0.2), cnce(x, labels, temperature=0.2)),
        (pysupcon.SpreadLoss(), functional.spread(x, labels, temperature=0.5, alpha=0.5, base="supcon")),
        (pysupcon.SpreadLoss(**sincere), functional.spread(x, labels, **sincere)),
        (pysupcon.InfoNCELoss(**other), info_nce(x, **other)),
    ]
    for module, want in pairs:
        got = module(x) if isinstance(module, pysupcon.InfoNCELoss) else module(x, labels)
        assert torch.equal(got, want), module
    assert "temperature=0.1, base_temperature=0.2, contrast_mode='one'" in repr(pairs[1][0])
    assert "(learnable)" in repr(pysupcon.SpreadLoss(learnable_temperature=True))


def test_import_is_light() -> None:
    """Importing the losses must not import what only the trainer or one drop-in class needs."""
    code = (
        "import sys, pysupcon, pysupcon.compat; "
        "heavy = {'accelerate', 'timm', 'sklearn', 'torchvision', 'matplotlib', 'pytorch_metric_learning'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["supcon", "spread_sincere"])
def test_memory_grows_with_rows_not_pairs(name: str, backend: str) -> None:
    """8,000 rows: one float32 matrix of pairs would take 256 MB."""
    x = torch.nn.functional.normalize(torch.randn(4000, 2, 8), dim=-1).requires_grad_()
    labels = torch.randint(0, 100, (4000,))
    LOSSES[name](x[:600], labels[:600], backend=backend).backward()  # libraries and thread pools
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    LOSSES[name](x, labels, backend=backend).backward()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 100e6, f"{grown / 1e6:.0f} MB"


def test_every_loss_is_registered_and_exported() -> None:
    modules = {getattr(pysupcon, name) for name in pysupcon.__all__ if name.endswith("Loss")}
    modules.remove(pysupcon.HierarchicalSupConLoss)  # the trainer has one label per sample
    assert modules == set(losses.LOSSES_BY_NAME.values())
    assert modules == {loss for loss in vars(losses).values() if is_loss(loss)}
    assert set(get_args(losses.LossName)) == set(losses.LOSSES_BY_NAME)
    assert {loss.__name__ for loss in modules} <= set(losses.__all__)
    assert all(hasattr(functional, name) for name in functional.__all__)


def is_loss(value: Any) -> bool:
    """Whether the value is a class of a loss."""
    return isinstance(value, type) and issubclass(value, ContrastiveLoss) and value is not ContrastiveLoss
