"""A known-answer test of the operators of :mod:`pysupcon.pairs.ops`.

:func:`disagreement` calls every operator with the problems of :func:`_questions` and compares the results
with those of :mod:`pysupcon.pairs.tiled` in float64 on the CPU. These come from the CPU so that
they do not depend on the device under test, nor on torch's settings for it (cuBLAS refuses to run under
``torch.use_deterministic_algorithms``, and keeps a workspace after its first call).

All numbers of the rows are positive, and the upstream gradients of one call have one sign. Nothing cancels in
a gradient, so *each element* has the relative error of its terms. The tolerance holds for every element, and
one wrong element is detected.
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
    # (dtype, number of bfloat16 numbers that represent one float32 number)
    (torch.float64, 0): Tolerance(1e-12, 1e-11),
    # Similarities reach 40. A tensor core sums with a relative error of 5e-7, which is 2e-5 in an exponent.
    (torch.float32, 3): Tolerance(2e-5, 5e-5),
    # Two parts: rows have an error of 2^-17; a product has two of these and omits a term of 2^-16. A
    # similarity has an error of 1.2e-3 if all errors have one sign.
    (torch.float32, 2): Tolerance(2e-4, 1e-3),
    # One part: rows that bfloat16 represents exactly. Sums are float32; a weight of 8 bits has an error of at
    # most 3.9e-3, half its last bit.
    (torch.float32, 1): Tolerance(2e-5, 4.2e-3),
    (torch.bfloat16, 0): Tolerance(2e-5, 4.2e-3),
    # A weight of 11 bits has an error of at most 4.9e-4.
    (torch.float16, 0): Tolerance(2e-5, 6e-4),
}
_NEAR_ZERO = 0.01  # errors of elements below this part of the largest are relative to that part

_EXPECTED: Any = tiled
# No multiples of a tile: blocks have 128 or 256 rows, tiles 64 or 128 columns, slices 64 numbers.
_ROWS = 300
_ANCHORS = slice(37, 187)  # the anchors of the problems with candidates
_CANDIDATES, _SHARED = 60, 40  # one tile: a GPU splits larger numbers of columns
# D and 1 / temperature. 16-bit rows are kept in registers, kept in shared memory, or loaded in slices.
_PROBLEMS = ((72, 16.0), (200, 30.0), (264, 40.0))
_CLASSES = (150, 60, 40, 25, 15, 5, 3, 1, 1)  # whole tiles of one class, classes within a tile, single rows
_EPSILON = 0.25
# From 8,192 rows on, another kernel computes n if the anchors are the candidates (kTriangularRows in
# csrc/cuda/launch.h). The CPU is too slow for so many pairs: the reference is the kernel for candidates.
_MANY = 8193
_START = 0.25  # initial value of the gradients, to which operators add


class _Question(NamedTuple):
    """One call of an operator."""

    form: str
    operator: str
    arguments: tuple[Any, ...]
    """float64, on the CPU; of a backward operator all but the buffers for gradients"""
    candidates: bool = False
    """whether the gradient of the candidates is computed"""


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
    """Returns the stable argsort by label and then by instance."""
    order = torch.argsort(instances, stable=True)
    return order[torch.argsort(labels[order], stable=True)]


def _questions(width: int, temperature_inverse: float, dtype: torch.dtype, parts: int) -> Iterator[_Question]:
    """Yields every operator in every form in which a loss calls it."""
    generator = torch.Generator().manual_seed(width)
    row_dtype = torch.bfloat16 if parts == 1 else dtype

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.to(dtype).double()

    everything = torch.nn.functional.normalize(0.1 + random(_ROWS + _CANDIDATES - _SHARED, width), dim=1)
    everything = rounded(everything, row_dtype)
    x, others = everything[:_ROWS], everything[_ROWS:]
    labels = torch.repeat_interleave(torch.arange(len(_CLASSES)) - 4, torch.tensor(_CLASSES))
    labels = labels[torch.randperm(_ROWS, generator=generator)]
    scale = torch.tensor(temperature_inverse, dtype=torch.float64)

    instances = torch.randint(0, _ROWS // 4, (_ROWS,), generator=generator)

    one_set = Pairing(labels, _order(labels, instances), instances=instances)
    anchors, own, own_instances = x[_ANCHORS], labels[_ANCHORS], instances[_ANCHORS]
    own_order = _order(own, own_instances)
    # The first candidates are anchors.
    candidates = torch.cat([anchors[:_SHARED], others])
    candidate_labels = torch.cat([own[:_SHARED], labels[: len(others)]])
    candidate_instances = torch.cat([own_instances[:_SHARED], instances[: len(others)]])
    candidate_order = _order(candidate_labels, candidate_instances)
    self_index = torch.full_like(own, -1)
    self_index[:_SHARED] = torch.arange(_SHARED)
    separate = Pairing(
        own, own_order, candidate_labels, candidate_order, self_index, own_instances, candidate_instances
    )
    index_in_x = torch.arange(_ROWS)[_ANCHORS]
    own_rows = Pairing(own, own_order, labels, one_set.order, index_in_x, own_instances, instances)

    def columns(
        rows: tuple[Any, ...], pairing: Pairing, sign: float, kinds: tuple[bool, bool] = (True, True)
    ) -> _Columns:
        n, p, *_ = _EXPECTED.pair_stats(*rows, *pairing[5:], *kinds)
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
        need_candidates = rows[4] is not None and all_ is None
        yield _Question(form, "positive_softplus", (*rows, None, None, c.n, _EPSILON))
        arguments = (*rows, None, None, c.n, _EPSILON, c.grad_softplus, back_n, back)
        yield _Question(form, "positive_softplus_backward", arguments, need_candidates)

    rows = operands(x, None, scale, one_set)
    whole = columns(rows, one_set, 1.0)
    yield from pairs("one set", rows, one_set, (True, True), whole)
    yield from sums("one set", rows, whole)
    if width == _PROBLEMS[0][0]:  # flags of the kernels, independent of the width
        without_instances = one_set._replace(instances=None)
        for form, pairing, kinds in (
            ("negatives only", without_instances, (True, False)),
            ("positives only", one_set, (False, True)),
            ("no instances", without_instances, (True, True)),
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
    """Returns the results of the operator, float64, on the CPU; gradients without their initial values."""
    moved: dict[int, Any] = {}  # an argument that occurs twice stays one tensor

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
        found = dict(zip(names, result, strict=True)) if isinstance(result, tuple) else {"the sum": result}
    else:
        wide: dict[str, Any] = {"dtype": torch.promote_types(dtype, torch.float32), "device": device}
        grad_x = torch.full(arguments[0].shape, _START, **wide)
        grad_candidates = torch.full(arguments[4].shape, _START, **wide) if question.candidates else None
        grad_n = operator(*arguments, grad_x, grad_candidates)
        found = {"grad_x": grad_x, "grad_candidates": grad_candidates, "grad_n": grad_n}
    results = {name: value.to("cpu", torch.float64) for name, value in found.items() if value is not None}
    added = ("grad_x", "grad_candidates")
    return {name: value - _START if name in added else value for name, value in results.items()}


def _difference(got: Tensor, want: Tensor, tolerance: float) -> str | None:
    """Describes the error of ``got``; None if it is within the tolerance."""
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


def _difference_for_many_rows(
    operators: Any, device: torch.device, dtype: torch.dtype, rows: int, tolerance: float
) -> str | None:
    """Compares n of many rows as their own candidates with n of the same rows as separate candidates."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.nn.functional.normalize(0.1 + torch.rand(rows, _PROBLEMS[0][0], generator=generator), dim=1)
    labels = torch.arange(rows, device=device)
    scale = torch.tensor(_PROBLEMS[0][1], dtype=torch.float64, device=device)
    x = x.to(device, dtype)
    forms = (None,) * 4, (x, labels, labels, labels)
    one_set, separate = (
        operators.pair_stats(x, labels, labels, scale, *form, *(None,) * 4, True, False)[0].cpu()
        for form in forms
    )
    difference = _difference(one_set, separate, tolerance)
    return None if difference is None else f"pair_stats (negatives only, {rows} rows): n {difference}"


def disagreement(
    operators: Any, device: torch.device, dtype: torch.dtype, parts: int = 0, many: int | None = None
) -> str | None:
    """Tests operators with known answers.

    Args:
        operators: a module with the operators of :mod:`pysupcon.pairs.ops`.
        device: of the tensors given to the operators.
        dtype: of the rows.
        parts: for float32 rows the number of bfloat16 numbers that represent one number: 3, 2 or 1;
            otherwise 0.
        many: rows of the problem with many rows; 0: none. By default as many as the kernels of a GPU need.

    Returns:
        A description of the first wrong answer; None if all are right.

    Raises:
        torch.OutOfMemoryError: the device has too little memory, so the result is unknown.
    """
    with torch.device("cpu"):  # independent of the default device of the process
        return _disagreement(operators, device, dtype, parts, many)


def _disagreement(
    operators: Any, device: torch.device, dtype: torch.dtype, parts: int, many: int | None
) -> str | None:
    cpu, tolerances = torch.device("cpu"), TOLERANCES[dtype, parts]
    for width, temperature_inverse in _PROBLEMS:
        for question in _questions(width, temperature_inverse, dtype, parts):
            expected = _answers(_EXPECTED, question, cpu, torch.float64)
            where = f"{question.operator} ({question.form}, D={width})"
            try:
                got = _answers(operators, question, device, dtype)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                return f"{where} did not run: {lines[0]}"
            for name, want in expected.items():
                gradient = question.operator.endswith("_backward")
                allowed = tolerances.gradient if gradient else tolerances.statistic
                if difference := _difference(got[name], want, allowed):
                    return f"{where}: {name} {difference}"
    if many is None:
        many = _MANY if device.type == "cuda" and (dtype.itemsize == 2 or parts == 1) else 0
    return _difference_for_many_rows(operators, device, dtype, many, tolerances.statistic) if many else None
