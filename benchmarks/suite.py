"""Runs cases: each point is validated, then timed, then its peak memory is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks import machine, measure
from benchmarks.cases import Case, Point, Problem, make_inputs
from benchmarks.oracle import Errors, Truth, errors, tangent, truth
from benchmarks.peers import PEERS, Implementation
from pysupcon.profiling.workload import Inputs

VALIDATED_ROWS = 2048
INPUT_SETS = 4

Row = dict[str, Any]
"""One line of the results: plain numbers and text, as they are stored"""


class Tolerance(NamedTuple):
    """Largest relative error."""

    loss: float
    gradient: float


#: Of pysupcon's backends; for half precisions the gradient is rounded to the dtype of the rows.
OURS = {
    "float64": Tolerance(1e-12, 1e-12),
    "float32": Tolerance(2e-6, 5e-6),
    "bfloat16": Tolerance(1e-5, 4e-3),
    "float16": Tolerance(1e-5, 1e-3),
}
#: Of everybody else: wrong by so much would be another function.
OTHERS = {
    "float64": Tolerance(1e-9, 1e-9),
    "float32": Tolerance(1e-4, 1e-3),
    "bfloat16": Tolerance(5e-2, 1e-1),
    "float16": Tolerance(5e-2, 1e-1),
}
_EXACT = ("pysupcon", "tiled")


def wrong(implementation: str, dtype: str, found: Errors) -> str | None:
    """What is out of tolerance, in words; None if nothing is. NaN is out."""
    allowed = (OURS if implementation in _EXACT else OTHERS)[dtype]
    parts = [
        f"{name} error {error:.1e} > {limit:.0e}"
        for name, error, limit in zip(("loss", "gradient"), found, allowed, strict=True)
        if not error <= limit
    ]
    return ", ".join(parts) or None


def run_cases(
    cases: Iterable[Case],
    *,
    implementations: Sequence[str] | None,
    seconds: float,
    report: Callable[[Row], None],
) -> list[Row]:
    """All rows of all cases.

    Args:
        implementations: only these; None: each case's own.
        seconds: for the repetitions of one implementation at one point.
        report: gets each row as soon as it is complete.
    """
    rows: list[Row] = []
    for case in cases:
        names = [name for name in (implementations or case.implementations) if name in PEERS]
        for points in [case.points] if case.in_turns else [(point,) for point in case.points]:
            with measure.threads(points[0].threads):
                found = run_points(case, points, names, seconds)
            for row in found:
                report(row)
            rows += found
    return rows


class _Running(NamedTuple):
    """A point, what runs at it, and the row of each implementation."""

    problem: Problem
    functions: dict[str, Implementation]
    rows: dict[str, Row]


def run_points(case: Case, points: Sequence[Point], names: Sequence[str], seconds: float) -> list[Row]:
    """One row for each point and implementation; all of them are timed in turns, on the same inputs."""
    found = [_prepare(case, point, names) for point in points]
    if "time" in case.measures:
        _time(case, found, seconds)
    if "memory" in case.measures:
        for problem, functions, rows in found:
            for name, function in functions.items():
                _remember(name, function, problem, rows[name])
    return [row for running in found for row in running.rows.values()]


def _prepare(case: Case, point: Point, names: Sequence[str]) -> _Running:
    problem = point.problem
    rows = {name: _row(case, point, name) for name in names}
    memory = 0.75 * machine.available_memory(problem.device)
    for name, row in rows.items():
        reason = PEERS[name].missing(problem, memory)
        if reason is not None:
            row["skipped"] = reason
            if reason.startswith("needs"):
                row["needs_bytes"] = PEERS[name].bytes_needed(problem)
    _validate(problem, rows)
    functions = {name: PEERS[name].build(problem) for name, row in rows.items() if _runs(row)}
    return _Running(problem, functions, rows)


def _row(case: Case, point: Point, name: str) -> Row:
    count = torch.get_num_threads() if point.threads is None else point.threads
    return {"case": case.name, "implementation": name, **point.problem.to_dict(), "threads": count}


def _runs(row: Row) -> bool:
    return "skipped" not in row and "failed" not in row


def _validate(problem: Problem, rows: dict[str, Row]) -> None:
    """Errors against float64, at the problem's own size or at as many rows as float64 takes in a moment."""
    if not any(map(_runs, rows.values())):
        return
    small = problem.smaller(VALIDATED_ROWS)
    inputs = make_inputs(small, seed=1000)
    expected = truth(small, inputs)
    for name, row in rows.items():
        if not _runs(row):
            continue
        gradient = (
            tangent(expected.gradient, inputs.features) if PEERS[name].normalizes else expected.gradient
        )
        function = PEERS[name].build(small)
        found = errors(*measure.evaluate(function, inputs), expected._replace(gradient=gradient))
        row |= {"validated_n": small.n, "loss_error": found.loss, "gradient_error": found.gradient}
        problem_found = wrong(name, problem.dtype, found)
        if problem_found is not None:
            row["failed"] = problem_found


def _time(case: Case, found: Sequence[_Running], seconds: float) -> None:
    inputs = [make_inputs(found[0].problem, seed) for seed in range(INPUT_SETS)]
    everything = {
        (at, name): function for at, point in enumerate(found) for name, function in point.functions.items()
    }
    for (at, name), timing in measure.interleaved(everything, inputs, seconds=seconds).items():
        found[at].rows[name] |= timing.summary()
    for problem, functions, rows in found:
        if "pysupcon" not in functions:
            continue
        _compare_at_size(problem, functions, rows, inputs[0])
        if case.name == "rate":
            _rate(problem, functions["pysupcon"], rows["pysupcon"], inputs)


def _compare_at_size(
    problem: Problem, running: dict[str, Implementation], rows: dict[str, Row], inputs: Inputs
) -> None:
    """Bits of pysupcon's result at the timed size, and how far from it those are that are not slow."""
    own = measure.evaluate(running["pysupcon"], inputs)
    rows["pysupcon"]["bits"] = measure.digest(own)
    for name, function in running.items():
        if name == "pysupcon" or rows[name]["both_s"] > measure.SLOW:
            continue
        gradient = own.gradient.double()
        if PEERS[name].normalizes:
            gradient = tangent(gradient, inputs.features)
        distance = errors(*measure.evaluate(function, inputs), Truth(own.loss.item(), gradient))
        rows[name] |= {"loss_distance": distance.loss, "gradient_distance": distance.gradient}


def _rate(problem: Problem, function: Implementation, row: Row, inputs: Sequence[Inputs]) -> None:
    """Floating-point operations a second of the loss, and of torch.mm, in turns."""
    products: list[float] = []
    own = measure.Timing()
    for _ in range(5):
        products.append(measure.product_rate(2048, problem.dim, 2048))
        found = measure.interleaved({"own": function}, inputs, seconds=0, least=1)["own"]
        own.forward += found.forward
        own.backward += found.backward
    rate, thin = problem.flops / own.summary()["both_s"], sorted(products)[2]
    square = measure.product_rate(2048, 2048, 2048, repetitions=3)
    row |= {"rate_flops": rate, "mm_flops": thin, "square_mm_flops": square, "rate_ratio": rate / thin}


def _remember(name: str, function: Implementation, problem: Problem, row: Row) -> None:
    """Peak memory; of pysupcon also what a row costs beside its gradient, from half as many rows."""
    try:
        row["peak_bytes"] = measure.peak_memory(name, function, problem)
    except MemoryError as error:
        row["failed"] = f"out of memory ({error})"[:300]
        return
    if name != "pysupcon" or problem.n < 4:
        return
    half = problem.smaller(problem.n // 4 * 2)
    peak = measure.peak_memory(name, PEERS[name].build(half), half)
    slope = (row["peak_bytes"] - peak) / (problem.n - half.n)
    row["bytes_a_row"] = slope - problem.input_bytes / problem.n
    row["fixed_bytes"] = row["peak_bytes"] - slope * problem.n
