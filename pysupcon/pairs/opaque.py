"""The differentiable step of every loss as one operator, and its backward as another, for whoever traces.

torch.compile, torch.export and make_fx see ``pysupcon::row_statistics`` and know the shapes of its results
(its fake) and its backward, no more. They cannot follow what a backend does inside: the number of tiles
depends on the number of rows, so that every batch size would be a graph of its own, and several versions of
torch compile such code to wrong gradients without an error. What is not asked for is an empty tensor in place
of None. ``epsilon`` is a tensor: a float argument of an operator is a constant of its graph.

torch.func's transforms get an autograd.Function around the operators, because they do not take an operator
with ``register_autograd``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pysupcon.pairs import statistics, tiles
from pysupcon.pairs.modes import ONCE_ONLY, transformed

__all__ = ["gradients", "positive_count", "row_statistics"]

_Tensors = tuple[Tensor, ...]
_PROBLEM = (
    "Tensor x, Tensor? candidates, Tensor scale, Tensor? epsilon, Tensor labels, Tensor order"
    ", Tensor? candidate_labels, Tensor? candidate_order, Tensor? self_index"
    ", Tensor? instances, Tensor? candidate_instances"
    ", Tensor? mask, Tensor? mask_rows, Tensor? mask_columns"
    ", str backend, bool negatives, bool positives"
)
_PAIRING, _MASK, _CONSTANTS = slice(4, 11), slice(11, 14), slice(14, 17)
_DIFFERENTIABLE = 3  # x, candidates, scale


def _arguments(x: Tensor, candidates: Tensor | None, scale: Tensor, plan: statistics.Plan) -> tuple[Any, ...]:
    """Of the operator."""
    epsilon = None if plan.epsilon is None else torch.ones_like(scale) * plan.epsilon
    mask = plan.mask or (None, None, None)
    return x, candidates, scale, epsilon, *plan.pairing, *mask, plan.backend, plan.negatives, plan.positives


def _plan(arguments: tuple[Any, ...]) -> statistics.Plan:
    mask = arguments[_MASK]
    backend, negatives, positives = arguments[_CONSTANTS]
    return statistics.Plan(
        backend,
        statistics.Pairing(*arguments[_PAIRING]),
        None if mask[0] is None else tiles.PositiveMask(*mask),
        negatives,
        positives,
        arguments[3],
    )


def _rows(x: Tensor | None) -> Tensor | None:
    """A graph, or a transform, may have laid the rows out anew."""
    return x if x is None or x.stride(1) == 1 else x.contiguous()


def _statistics(*arguments: Any) -> _Tensors:
    x, candidates, scale = _rows(arguments[0]), _rows(arguments[1]), arguments[2]
    assert x is not None
    result = statistics.compute(x, candidates, scale, _plan(arguments))
    return tuple(x.new_empty(0) if value is None else value for value in result)


def _fake_statistics(*arguments: Any) -> _Tensors:
    x, epsilon, instances = arguments[0], arguments[3], arguments[9]
    n, p, positive_sum, *others = (x.new_empty(x.shape[0], dtype=tiles.stats_dtype(x)) for _ in range(5))
    asked = instances is not None, epsilon is not None
    some = (value if wanted else x.new_empty(0) for value, wanted in zip(others, asked, strict=True))
    return n, p, positive_sum, *some


def _gradients(*arguments: Any) -> _Tensors:
    """dL/dx, dL/dcandidates, dL/dscale; empty where not needed."""
    *problem, n, p, grad_n, grad_p, grad_positive_sum, grad_instance_sum, grad_softplus, needs = arguments
    x, candidates, scale = _rows(problem[0]), _rows(problem[1]), problem[2]
    assert x is not None
    grads = grad_n, grad_p, grad_positive_sum, grad_instance_sum, grad_softplus
    result = statistics.gradients(_plan(tuple(problem)), x, candidates, scale, n, p, grads, tuple(needs))
    return tuple(x.new_empty(0) if grad is None else grad for grad in result)


def _fake_gradients(*arguments: Any) -> _Tensors:
    needed = zip(arguments[:_DIFFERENTIABLE], arguments[-1], strict=True)
    return tuple(
        arguments[0].new_empty(0) if value is None or not need else value.new_empty(value.shape)
        for value, need in needed
    )


def _one_by_one(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of vmap: every problem of the batch by itself."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        def of(number: int) -> tuple[Any, ...]:
            pairs = zip(arguments, in_dims, strict=True)
            return tuple(value.select(dim, number) if isinstance(dim, int) else value for value, dim in pairs)

        results = [operator(*of(number)) for number in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * len(results[0])

    return rule


def _define(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    definition = torch.library.custom_op(f"pysupcon::{name}", function, mutates_args=(), schema=schema)
    definition.register_fake(fake)
    operator = getattr(torch.ops.pysupcon, name)
    definition.register_vmap(_one_by_one(operator))
    return operator


def _count(mask: Tensor, rows: Tensor, columns: Tensor, self_index: Tensor | None, symmetric: bool) -> Tensor:
    return tiles.positive_count(tiles.PositiveMask(mask, rows, columns), self_index, symmetric)


_forward = _define(
    "row_statistics",
    f"({_PROBLEM}) -> (Tensor n, Tensor p, Tensor positive_sum, Tensor instance_sum, Tensor softplus)",
    _statistics,
    _fake_statistics,
)
_backward = _define(
    "row_statistics_backward",
    f"({_PROBLEM}, Tensor n, Tensor p, Tensor? grad_n, Tensor? grad_p, Tensor? grad_positive_sum"
    ", Tensor? grad_instance_sum, Tensor? grad_softplus, bool[] needs)"
    " -> (Tensor grad_x, Tensor grad_candidates, Tensor grad_scale)",
    _gradients,
    _fake_gradients,
)
positive_count = _define(
    "masked_positive_count",
    "(Tensor mask, Tensor rows, Tensor columns, Tensor? self_index, bool symmetric) -> Tensor",
    _count,
    lambda mask, rows, *_: torch.empty_like(rows),
)
"""|P_i| under a mask, int64 [M]: :func:`pysupcon.pairs.tiles.positive_count`, the mask in its three parts."""


def _wanted(arguments: tuple[Any, ...], grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Without the gradients of what was not asked for: torch may hand in zeros."""
    negatives, positives = arguments[15:17]
    asked = negatives, positives, positives, positives and arguments[9] is not None, arguments[3] is not None
    return tuple(grad if wanted else None for grad, wanted in zip(grads, asked, strict=True))


def _differentiate(
    operator: Callable[..., Any],
    arguments: tuple[Any, ...],
    n: Tensor,
    p: Tensor,
    grads: tuple[Tensor | None, ...],
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    result = operator(*arguments, n, p, *_wanted(arguments, grads), needs)
    found = (grad if need else None for grad, need in zip(result, needs, strict=True))
    return *found, *(None,) * (len(arguments) - _DIFFERENTIABLE)


def _save(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[: _CONSTANTS.start], *output[:2])
    ctx.constants = inputs[_CONSTANTS]


def _pull_back(
    ctx: Any, *grads: Tensor | None, operator: Callable[..., Any] | None = None
) -> tuple[Tensor | None, ...]:
    """``operator``: in place of the backward's own."""
    *tensors, n, p = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
    return _differentiate(operator or _backward, (*tensors, *ctx.constants), n, p, grads, needs)


def _refuse_second(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(ONCE_ONLY)


torch.library.register_autograd("pysupcon::row_statistics", _pull_back, setup_context=_save)
torch.library.register_autograd("pysupcon::row_statistics_backward", _refuse_second)


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
        return _pull_back(ctx, *grads, operator=_TransformableGradients.apply)


class _TracedTransformableStatistics(torch.autograd.Function):
    """The same inside torch.compile, which cannot trace a ``setup_context`` of its own."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        result = _forward(*arguments)
        _save(ctx, arguments, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return _pull_back(ctx, *grads)


def row_statistics(
    x: Tensor, candidates: Tensor | None, scale: Tensor, plan: statistics.Plan
) -> tuple[Tensor | None, ...]:
    """What :func:`pysupcon.pairs.statistics.compute` returns, differentiable once."""
    operator = _forward
    if transformed():
        traced = torch.compiler.is_compiling()
        operator = (_TracedTransformableStatistics if traced else _TransformableStatistics).apply
    n, p, positive_sum, instance_sum, softplus = operator(*_arguments(x, candidates, scale, plan))
    if plan.pairing.instances is None:
        instance_sum = None
    return n, p, positive_sum, instance_sum, None if plan.epsilon is None else softplus


def gradients(
    plan: statistics.Plan,
    x: Tensor,
    candidates: Tensor | None,
    scale: Tensor,
    n: Tensor,
    p: Tensor,
    grads: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """What :func:`pysupcon.pairs.statistics.gradients` returns, for upstream gradients batched by vmap."""
    arguments = _arguments(x, candidates, scale, plan)
    needed = list(needs[:_DIFFERENTIABLE])
    return _differentiate(_backward, arguments, n, p, grads, needed)[:_DIFFERENTIABLE]
