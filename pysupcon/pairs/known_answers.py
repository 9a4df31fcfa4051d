"""A small problem with known answers: do these operators compute what :mod:`pysupcon.pairs.ops` promises?

:func:`disagreement` gives every operator the problems of :func:`_questions` and compares its answers with
those of :mod:`pysupcon.pairs.tiled` in float64 on the CPU. The truth is computed on the CPU because it must
not depend on the device under examination, nor on torch's settings for it (cuBLAS refuses to run under
``torch.use_deterministic_algorithms``, and keeps a workspace once it ran).

Every number of the rows is positive, and the upstream gradients of one call have one sign. So nothing
cancels in a gradient, and *each element* of it has the relative error of its terms: the tolerance holds for
every element, and one wrong element is seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pysupcon.pairs import tiled
from pysupcon.pairs.statistics import Pairing, operands

__all__ = ["TOLERANCES", "Tolerance", "disagreement"]


class Tolerance(NamedTuple):
    """Largest relative error of an element."""

    statistic: float
    gradient: float


TOLERANCES = {
    # dtype, and of float32 the number of bfloat16 numbers that stand for one
    (torch.float64, 0): Tolerance(1e-12, 1e-11),
    # A similarity reaches 40. A tensor core sums it to about 5e-7 of that, 2e-5, and it is an exponent.
    (torch.float32, 3): Tolerance(2e-5, 5e-5),
    # Two parts: rows are off by 2^-17, a product by two of these and by 2^-16 that is left out, a similarity
    # by 1.2e-3 if all errors have one sign.
    (torch.float32, 2): Tolerance(2e-4, 1e-3),
    # One part: rows that bfloat16 holds exactly. Sums are float32; a weight of 8 bits is off by 3.9e-3 at
    # most, half its last one.
    (torch.float32, 1): Tolerance(2e-5, 4.2e-3),
    (torch.bfloat16, 0): Tolerance(2e-5, 4.2e-3),
    # A weight of 11 bits is off by 4.9e-4 at most.
    (torch.float16, 0): Tolerance(2e-5, 6e-4),
}
_NEAR_ZERO = 0.01  # below this part of the largest element, an error is measured against that part

_TRUTH: Any = tiled
# Sizes that no tile divides: blocks of 128 or 256 rows, tiles of 64 or 128 columns, slices of 64 numbers.
_ROWS = 300
_ANCHORS = slice(37, 187)  # those that meet candidates
_CANDIDATES, _SHARED = 60, 40  # one tile of columns: the only size whose columns a GPU does not split
# D and 1 / temperature. 16-bit rows: kept in registers, kept in shared memory, passing by in slices.
_PROBLEMS = ((72, 16.0), (200, 30.0), (264, 40.0))
_CLASSES = (150, 60, 40, 25, 15, 5, 3, 1, 1)  # whole tiles of one class, classes within a tile, lone rows
_EPSILON = 0.25
# From 8,192 rows on, n of one set of rows comes from another kernel (kTriangularRows in csrc/cuda/launch.h).
# So many pairs are too many for the truth; the answer is held against that of the kernel for candidates.
_MANY = 8193
_START = 0.25  # gradients are added to what is there


class _Question(NamedTuple):
    """One call of an operator."""

    form: str
    operator: str
    arguments: tuple[Any, ...]
    """float64, on the CPU; of a backward operator all but the buffers for gradients"""
    candidates: bool = False
    """whether the gradient of the candidates is asked for"""


class _Columns(NamedTuple):
    """Per row: statistics, and upstream gradients of n, p and the sums over positives."""

    n: Tensor
    p: Tensor
    grad_n: Tensor
    grad_p: Tensor
    grad_positive_sum: Tensor | None
    grad_instance_sum: Tensor | None
    grad_softplus: Tensor

    def at(self, rows: slice) -> _Columns:
        columns = (None if column is None else column[rows].clone() for column in self)
        return _Columns(*columns)  # type: ignore[arg-type]


def _order(labels: Tensor, instances: Tensor) -> Tensor:
    """By label, then by instance."""
    order = torch.argsort(instances, stable=True)
    return order[torch.argsort(labels[order], stable=True)]


def _questions(width: int, temperature_inverse: float, dtype: torch.dtype, parts: int) -> Iterator[_Question]:
    """Every operator in every form in which a loss calls it."""
    generator = torch.Generator().manual_seed(width)
    held = torch.bfloat16 if parts == 1 else dtype

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.to(dtype).double()

    everything = torch.nn.functional.normalize(0.1 + random(_ROWS + _CANDIDATES - _SHARED, width), dim=1)
    everything = rounded(everything, held)
    x, others = everything[:_ROWS], everything[_ROWS:]
    labels = torch.repeat_interleave(torch.arange(len(_CLASSES)) - 4, torch.tensor(_CLASSES))
    labels = labels[torch.randperm(_ROWS, generator=generator)]
    scale = torch.tensor(temperature_inverse, dtype=torch.float64)

    instances = torch.randint(0, _ROWS // 4, (_ROWS,), generator=generator)

    one_set = Pairing(labels, _order(labels, instances), instances=instances)
    anchors, own, own_instances = x[_ANCHORS], labels[_ANCHORS], instances[_ANCHORS]
    own_order = _order(own, own_instances)
    # The first candidates are anchors themselves.
    candidates = torch.cat([anchors[:_SHARED], others])
    candidate_labels = torch.cat([own[:_SHARED], labels[: len(others)]])
    candidate_instances = torch.cat([own_instances[:_SHARED], instances[: len(others)]])
    candidate_order = _order(candidate_labels, candidate_instances)
    self_index = torch.full_like(own, -1)
    self_index[:_SHARED] = torch.arange(_SHARED)
    separate = Pairing(
        own, own_order, candidate_labels, candidate_order, self_index, own_instances, candidate_instances
    )
    in_everybody = torch.arange(_ROWS)[_ANCHORS]
    own_rows = Pairing(own, own_order, labels, one_set.order, in_everybody, own_instances, instances)

    def columns(
        rows: tuple[Any, ...], pairing: Pairing, sign: float, kinds: tuple[bool, bool] = (True, True)
    ) -> _Columns:
        n, p, *_ = _TRUTH.pair_stats(*rows, *pairing[5:], *kinds)
        grads = [sign * (0.5 + random(rows[0].shape[0])) for _ in range(5)]
        if pairing.instances is None:
            grads[2:4] = [None, None]  # type: ignore[list-item]
        return _Columns(n, p, *grads)

    def pairs(
        form: str,
        rows: tuple[Any, ...],
        pairing: Pairing,
        kinds: tuple[bool, bool],
        c: _Columns,
        all_: _Columns | None = None,
    ) -> Iterator[_Question]:
        back = (None,) * 6 if all_ is None else all_[:6]
        yield _Question(form, "pair_stats", (*rows, *pairing[5:], *kinds))
        arguments = (*rows, *pairing[5:], *c[:6], *back, *kinds)
        yield _Question(form, "pair_stats_backward", arguments, rows[4] is not None and all_ is None)

    def sums(
        form: str, rows: tuple[Any, ...], c: _Columns, all_: _Columns | None = None
    ) -> Iterator[_Question]:
        back_n, back = (None, None) if all_ is None else (all_.n, all_.grad_softplus)
        both = rows[4] is not None and all_ is None
        yield _Question(form, "positive_softplus", (*rows, c.n, _EPSILON))
        arguments = (*rows, c.n, _EPSILON, c.grad_softplus, back_n, back)
        yield _Question(form, "positive_softplus_backward", arguments, both)

    rows = operands(x, None, scale, one_set)
    whole = columns(rows, one_set, 1.0)
    yield from pairs("one set", rows, one_set, (True, True), whole)
    yield from sums("one set", rows, whole)
    if width == _PROBLEMS[0][0]:  # the kernels of every width see these as flags
        nobody = one_set._replace(instances=None)
        for form, pairing, kinds in (
            ("negatives only", nobody, (True, False)),
            ("positives only", one_set, (False, True)),
            ("no instances", nobody, (True, True)),
        ):
            yield from pairs(form, rows, pairing, kinds, columns(rows, pairing, -1.0, kinds))

    rows = operands(anchors, candidates, scale, separate)
    c = columns(rows, separate, -1.0)
    yield from pairs("candidates", rows, separate, (True, True), c)
    yield from sums("candidates", rows, c)

    rows = operands(anchors, x, scale, own_rows)
    yield from pairs("rows of one process", rows, own_rows, (True, True), whole.at(_ANCHORS), whole)
    yield from sums("rows of one process", rows, whole.at(_ANCHORS), whole)


def _answers(
    operators: Any, question: _Question, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What the operator says, float64, on the CPU; gradients without what was in their buffers."""
    moved: dict[int, Any] = {}  # an argument given twice stays one tensor

    def move(place: int, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in moved:
            wanted = dtype if place in (0, 4) else torch.float64
            moved[id(value)] = value.to(device, wanted if value.is_floating_point() else value.dtype)
        return moved[id(value)]

    arguments = [move(*item) for item in enumerate(question.arguments)]
    operator = getattr(operators, question.operator)
    found: dict[str, Any] = {}
    if not question.operator.endswith("_backward"):
        result = operator(*arguments)
        names = ("n", "p", "positive_sum", "instance_sum")
        one = {"the sum": result}
        found = dict(zip(names, result, strict=True)) if isinstance(result, tuple) else one
    else:
        wide: dict[str, Any] = {"dtype": torch.promote_types(dtype, torch.float32), "device": device}
        grad_x = torch.full(arguments[0].shape, _START, **wide)
        grad_candidates = torch.full(arguments[4].shape, _START, **wide) if question.candidates else None
        grad_n = operator(*arguments, grad_x, grad_candidates)
        found = {"grad_x": grad_x, "grad_candidates": grad_candidates, "grad_n": grad_n}
    kept = {name: value.to("cpu", torch.float64) for name, value in found.items() if value is not None}
    added = ("grad_x", "grad_candidates")
    return {name: value - _START if name in added else value for name, value in kept.items()}


def _difference(got: Tensor, want: Tensor, tolerance: float) -> str | None:
    """What is wrong with ``got``, in words; None if nothing."""
    if got.shape != want.shape:
        return f"has shape {list(got.shape)} instead of {list(want.shape)}"
    empty = want.isinf()
    if not torch.equal(got[empty], want[empty]):
        return "is not -inf where a set is empty"
    got, want = got[~empty], want[~empty]
    if not got.isfinite().all():
        return f"is not finite in {int((~got.isfinite()).sum())} of {got.numel()} places"
    if not want.numel():
        return None
    error = (got - want).abs() / torch.maximum(want.abs(), _NEAR_ZERO * want.abs().max())
    wrong, worst = int((error > tolerance).sum()), error.max().item()
    if not wrong:
        return None
    return (
        f"differs in {wrong} of {got.numel()} places, by {worst:.1e} of the right value at worst, where "
        f"{tolerance:.1e} is allowed"
    )


def _of_many(
    operators: Any, device: torch.device, dtype: torch.dtype, rows: int, tolerance: float
) -> str | None:
    """Whether n of many rows is the same where the rows are their own candidates."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.nn.functional.normalize(0.1 + torch.rand(rows, _PROBLEMS[0][0], generator=generator), dim=1)
    labels = torch.arange(rows, device=device)
    scale = torch.tensor(_PROBLEMS[0][1], dtype=torch.float64, device=device)
    x = x.to(device, dtype)
    forms = (None,) * 4, (x, labels, labels, labels)
    one_set, separate = (
        operators.pair_stats(x, labels, labels, scale, *form, None, None, True, False)[0].cpu()
        for form in forms
    )
    words = _difference(one_set, separate, tolerance)
    return None if words is None else f"pair_stats (negatives only, {rows} rows): n {words}"


def disagreement(
    operators: Any, device: torch.device, dtype: torch.dtype, parts: int = 0, many: int | None = None
) -> str | None:
    """The first wrong answer of ``operators``, in words; None if every answer is right.

    Args:
        operators: a module with the operators of pairs of :mod:`pysupcon.pairs.ops`.
        device: where they compute.
        dtype: of the rows.
        parts: of float32 rows, how many bfloat16 numbers stand for one number: 3, 2 or 1; 0 otherwise.
        many: rows of the one question that needs many; None: as many as the kernels of a GPU need, 0: none.

    Raises:
        torch.OutOfMemoryError: the device has no room left; nothing was learned.
    """
    with torch.device("cpu"):  # whatever default device the process has set
        return _disagreement(operators, device, dtype, parts, many)


def _disagreement(
    operators: Any, device: torch.device, dtype: torch.dtype, parts: int, many: int | None
) -> str | None:
    cpu, tolerances = torch.device("cpu"), TOLERANCES[dtype, parts]
    for width, temperature_inverse in _PROBLEMS:
        for question in _questions(width, temperature_inverse, dtype, parts):
            wanted = _answers(_TRUTH, question, cpu, torch.float64)
            where = f"{question.operator} ({question.form}, D={width})"
            try:
                got = _answers(operators, question, device, dtype)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                return f"{where} did not run: {lines[0]}"
            for name, want in wanted.items():
                gradient = question.operator.endswith("_backward")
                allowed = tolerances.gradient if gradient else tolerances.statistic
                if words := _difference(got[name], want, allowed):
                    return f"{where}: {name} {words}"
    if many is None:
        many = _MANY if device.type == "cuda" and (dtype.itemsize == 2 or parts == 1) else 0
    return _of_many(operators, device, dtype, many, tolerances.statistic) if many else None
