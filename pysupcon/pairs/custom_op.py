"""The differentiable step of every loss as one custom operator, and its backward as another, for tracing.

torch.compile, torch.export and make_fx see only ``pysupcon::row_statistics``, the shapes of its results (its
fake) and its backward operator. They must not trace the code inside: the number of tiles depends on the
number of rows, so every batch size would need its own graph, and several versions of torch compile such code
to wrong gradients without an error. Results that are not requested are empty tensors instead of None.
``epsilon`` is a tensor, because a float argument of an operator is a constant of the graph.

For the transforms of torch.func the operators are wrapped in an autograd.Function, because the transforms do
not support operators with ``register_autograd``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pysupcon.pairs import many_labels, ops, statistics, tiles
from pysupcon.pairs.modes import ONCE_ONLY, is_transformed

__all__ = [
    "define",
    "fake_gradients",
    "gradients",
    "overlap_totals",
    "positive_count",
    "refuse_second",
    "row_statistics",
]

_Tensors = tuple[Tensor, ...]
_PROBLEM = (
    "Tensor x, Tensor? candidates, Tensor scale, Tensor? outside, Tensor? epsilon"
    ", Tensor labels, Tensor order"
    ", Tensor? candidate_labels, Tensor? candidate_order, Tensor? self_index"
    ", Tensor? instances, Tensor? candidate_instances"
    ", Tensor? log_weights, Tensor? candidate_log_weights"
    ", Tensor? mask, Tensor? mask_rows, Tensor? mask_columns, Tensor? mask_threshold"
    ", Tensor? memory, Tensor? memory_labels, Tensor? memory_order, Tensor? memory_instances"
    ", Tensor? memory_log_weights"
    ", str backend, bool negatives, bool positives, bool batch_negatives"
)
_DIFFERENTIABLE = 4  # x, candidates, scale, outside
_EPSILON, _TENSORS, _CONSTANTS = 4, slice(5, 23), slice(23, 27)
_INSTANCES = 10


def _arguments(
    x: Tensor, candidates: Tensor | None, scale: Tensor, outside: Tensor | None, plan: statistics.Plan
) -> tuple[Any, ...]:
    """Flattens a problem into the arguments of the operators (:data:`_PROBLEM`)."""
    epsilon = None if plan.epsilon is None else torch.ones_like(scale) * plan.epsilon
    constants = plan.backend, plan.negatives, plan.positives, plan.batch_negatives
    return x, candidates, scale, outside, epsilon, *plan.tensors, *constants


def _plan(arguments: tuple[Any, ...]) -> statistics.Plan:
    """Restores the plan from :func:`_arguments`."""
    tensors = arguments[_TENSORS]
    first = len(statistics.Pairing._fields)
    second = first + len(tiles.PositiveMask._fields)
    mask, memory = tensors[first:second], tensors[second:]
    backend, negatives, positives, batch_negatives = arguments[_CONSTANTS]
    return statistics.Plan(
        backend,
        statistics.Pairing(*tensors[:first]),
        None if mask[0] is None else tiles.PositiveMask(*mask),
        negatives,
        positives,
        arguments[_EPSILON],
        None if memory[0] is None else statistics.Memory(*memory),
        batch_negatives,
    )


def _contiguous_rows(x: Tensor | None) -> Tensor | None:
    """Restores contiguous rows, which a graph or a transform may have changed."""
    return x if x is None or x.stride(1) == 1 else x.contiguous()


def _statistics(*arguments: Any) -> _Tensors:
    x, candidates = _contiguous_rows(arguments[0]), _contiguous_rows(arguments[1])
    assert x is not None
    result, _ = statistics.compute(x, candidates, arguments[2], arguments[3], _plan(arguments))
    return tuple(x.new_empty(0) if value is None else value for value in result)


def _fake_statistics(*arguments: Any) -> _Tensors:
    x, epsilon, instances = arguments[0], arguments[_EPSILON], arguments[_INSTANCES]
    n, p, positive_sum, *optional = (x.new_empty(x.shape[0], dtype=ops.stats_dtype(x)) for _ in range(5))
    requested = instances is not None, epsilon is not None
    some = (value if wanted else x.new_empty(0) for value, wanted in zip(optional, requested, strict=True))
    return n, p, positive_sum, *some


def _gradients(*arguments: Any) -> _Tensors:
    """Returns dL/dx, dL/dcandidates, dL/dscale and dL/doutside; empty if not needed."""
    *problem, n, p, grad_n, grad_p, grad_positive_sum, grad_instance_sum, grad_softplus, needs = arguments
    x, candidates = _contiguous_rows(problem[0]), _contiguous_rows(problem[1])
    assert x is not None
    grads = grad_n, grad_p, grad_positive_sum, grad_instance_sum, grad_softplus
    plan, scale, outside = _plan(tuple(problem)), problem[2], problem[3]
    result = statistics.gradients(plan, x, candidates, scale, outside, n, p, grads, tuple(needs))
    return tuple(x.new_empty(0) if grad is None else grad for grad in result)


def fake_gradients(*arguments: Any) -> _Tensors:
    """The fake of a backward operator, whose last argument says which first arguments need a gradient."""
    needs = arguments[-1]
    needed = zip(arguments[: len(needs)], needs, strict=True)
    return tuple(
        arguments[0].new_empty(0) if value is None or not need else value.new_empty(value.shape)
        for value, need in needed
    )


def _vmap_rule(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a vmap rule that calls the operator for each problem of the batch."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        def select(index: int) -> tuple[Any, ...]:
            pairs = zip(arguments, in_dims, strict=True)
            return tuple(value.select(dim, index) if isinstance(dim, int) else value for value, dim in pairs)

        results = [operator(*select(index)) for index in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * len(results[0])

    return rule


def define(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers an operator without autograd, with a vmap rule that calls it for each problem."""
    definition = torch.library.custom_op(f"pysupcon::{name}", function, mutates_args=(), schema=schema)
    definition.register_fake(fake)
    operator = getattr(torch.ops.pysupcon, name)
    definition.register_vmap(_vmap_rule(operator))
    return operator


def _count(mask: Tensor, rows: Tensor, columns: Tensor, self_index: Tensor | None, symmetric: bool) -> Tensor:
    return tiles.positive_count(tiles.PositiveMask(mask, rows, columns), self_index, symmetric)


_forward = define(
    "row_statistics",
    f"({_PROBLEM}) -> (Tensor n, Tensor p, Tensor positive_sum, Tensor instance_sum, Tensor softplus)",
    _statistics,
    _fake_statistics,
)
_backward = define(
    "row_statistics_backward",
    f"({_PROBLEM}, Tensor n, Tensor p, Tensor? grad_n, Tensor? grad_p, Tensor? grad_positive_sum"
    ", Tensor? grad_instance_sum, Tensor? grad_softplus, bool[] needs)"
    " -> (Tensor grad_x, Tensor grad_candidates, Tensor grad_scale, Tensor grad_outside)",
    _gradients,
    fake_gradients,
)
positive_count = define(
    "masked_positive_count",
    "(Tensor mask, Tensor rows, Tensor columns, Tensor? self_index, bool symmetric) -> Tensor",
    _count,
    lambda mask, rows, *_: torch.empty_like(rows),
)
""":func:`pysupcon.pairs.tiles.positive_count` as an operator, with the three fields of the mask."""
overlap_totals = define(
    "overlap_totals",
    "(Tensor labels, Tensor? candidate_labels, Tensor threshold, bool weighted) -> Tensor",
    many_labels.overlap_totals,
    lambda labels, _, threshold, *rest: threshold.new_empty(labels.shape[0]),
)
""":func:`pysupcon.pairs.many_labels.overlap_totals` as an operator."""


def _requested_grads(
    arguments: tuple[Any, ...], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Removes the gradients of statistics that were not requested, for which torch may pass zeros."""
    instances, epsilon = arguments[_INSTANCES], arguments[_EPSILON]
    _, negatives, positives, _ = arguments[_CONSTANTS]
    requested = negatives, positives, positives, positives and instances is not None, epsilon is not None
    return tuple(grad if wanted else None for grad, wanted in zip(grads, requested, strict=True))


def _differentiate(
    operator: Callable[..., Any],
    arguments: tuple[Any, ...],
    n: Tensor,
    p: Tensor,
    grads: tuple[Tensor | None, ...],
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    result = operator(*arguments, n, p, *_requested_grads(arguments, grads), needs)
    gradients = (grad if need else None for grad, need in zip(result, needs, strict=True))
    return *gradients, *(None,) * (len(arguments) - _DIFFERENTIABLE)


def _save(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[: _CONSTANTS.start], *output[:2])
    ctx.constants = inputs[_CONSTANTS]


def _backpropagate(
    ctx: Any, *grads: Tensor | None, operator: Callable[..., Any] | None = None
) -> tuple[Tensor | None, ...]:
    """Computes the gradients of all arguments with ``operator``, by default the backward operator."""
    *tensors, n, p = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
    return _differentiate(operator or _backward, (*tensors, *ctx.constants), n, p, grads, needs)


def refuse_second(ctx: Any, *grads: Tensor) -> Any:
    """The backward of a backward operator."""
    raise RuntimeError(ONCE_ONLY)


torch.library.register_autograd("pysupcon::row_statistics", _backpropagate, setup_context=_save)
torch.library.register_autograd("pysupcon::row_statistics_backward", refuse_second)


class _TransformableGradients(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(ONCE_ONLY)


class _TransformableStatistics(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return _backpropagate(ctx, *grads, operator=_TransformableGradients.apply)


class _TracedTransformableStatistics(torch.autograd.Function):
    """The same for torch.compile, which cannot trace a ``setup_context``."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        result = _forward(*arguments)
        _save(ctx, arguments, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return _backpropagate(ctx, *grads)


def row_statistics(
    x: Tensor, candidates: Tensor | None, scale: Tensor, outside: Tensor | None, plan: statistics.Plan
) -> tuple[Tensor | None, ...]:
    """Calls :func:`pysupcon.pairs.statistics.compute` as an operator, differentiable once."""
    operator = _forward
    if is_transformed():
        traced = torch.compiler.is_compiling()
        operator = (_TracedTransformableStatistics if traced else _TransformableStatistics).apply
    n, p, positive_sum, instance_sum, softplus = operator(*_arguments(x, candidates, scale, outside, plan))
    if plan.pairing.instances is None:
        instance_sum = None
    return n, p, positive_sum, instance_sum, None if plan.epsilon is None else softplus


def gradients(
    plan: statistics.Plan,
    x: Tensor,
    candidates: Tensor | None,
    scale: Tensor,
    outside: Tensor | None,
    n: Tensor,
    p: Tensor,
    grads: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Calls :func:`pysupcon.pairs.statistics.gradients` for upstream gradients that vmap batches."""
    arguments = _arguments(x, candidates, scale, outside, plan)
    needed = list(needs[:_DIFFERENTIABLE])
    return _differentiate(_backward, arguments, n, p, grads, needed)[:_DIFFERENTIABLE]
