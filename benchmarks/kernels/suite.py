"""Runs benchmark cases: each point is validated, then timed, then its peak memory is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks import fault_tolerance, machine
from benchmarks.kernels import measure, tolerances
from benchmarks.kernels.cases import DTYPES, Case, Point, Problem, make_inputs
from benchmarks.kernels.oracle import Errors, Truth, errors, tangent, truth
from benchmarks.kernels.peers import PEERS, Implementation
from pysupcon.profiling.workload import Inputs

VALIDATED_ROWS = 2048
INPUT_SETS = 4

Row = dict[str, Any]
"""One row of the results, as stored in JSON."""

_EXACT = ("pysupcon", "tiled")


def out_of_tolerance(implementation: str, problem: Problem, expected: Truth, found: Errors) -> str | None:
    """A message if an error is out of tolerance or NaN, else None."""
    allowed = tolerances.OTHERS[DTYPES[problem.dtype]]
    if implementation in _EXACT:
        allowed = _bars(problem, expected)
    parts = [
        f"{name} error {error:.1e} > {limit:.0e}"
        for name, error, limit in zip(("loss", "gradient"), found, allowed, strict=True)
        if not error <= limit
    ]
    return ", ".join(parts) or None


def _bars(problem: Problem, expected: Truth) -> tuple[float, float]:
    """Largest allowed errors of pysupcon, as :class:`~benchmarks.kernels.oracle.Errors`."""
    dtype, similarity = DTYPES[problem.dtype], 1 / problem.temperature
    both = tolerances.parts(similarity / problem.anchors, problem.n)
    loss = tolerances.loss_bar(expected.loss, dtype, similarity)
    gradient = tolerances.gradient_bar(expected.norm, dtype, similarity, both)
    return loss / (abs(expected.loss) or 1.0), gradient / (expected.norm or 1.0)


def run_cases(
    cases: Iterable[Case],
    *,
    implementations: Sequence[str] | None,
    seconds: float,
    rows: list[Row],
    report: Callable[[Row], None],
    save: Callable[[], None] = lambda: None,
) -> None:
    """Measure all cases.

    The row of an implementation that fails gets "failed"; the others continue. After an interruption or the
    loss of the device, ``rows`` has all results until then, and "failed" names what a row lacks.

    Args:
        cases: the cases.
        implementations: names of implementations; None: those of each case.
        seconds: time for the repetitions of one implementation at one point.
        rows: the results are appended to this list.
        report: called with each completed row.
        save: called after each change of ``rows``.

    Raises:
        DeviceLost: the CUDA context of this process is unusable.
        KeyboardInterrupt: the user or a signal ended the run.
    """
    for case in cases:
        names = [name for name in (implementations or case.implementations) if name in PEERS]
        for points in [case.points] if case.in_turns else [(point,) for point in case.points]:
            own = [{name: _row(case, point, name) for name in names} for point in points]
            found = [row for of_point in own for row in of_point.values()]
            rows += found
            try:
                with measure.threads(points[0].threads):
                    _run_points(case, points, own, seconds, save)
            except BaseException as error:
                _mark_unfinished(found, case, fault_tolerance.describe(error))
                save()
                raise
            for row in found:
                report(row)
            save()


def _mark_unfinished(rows: Iterable[Row], case: Case, message: str) -> None:
    """Set "failed" in the rows that lack a measurement."""
    for row in rows:
        missing = [m for m in case.measures if {"time": "both_s", "memory": "peak_bytes"}[m] not in row]
        if missing and _runs(row):
            row["failed"] = f"no {' and no '.join(missing)}: {message}"


class _Running(NamedTuple):
    """A point, the implementations that run at it, and their rows."""

    problem: Problem
    functions: dict[str, Implementation]
    rows: dict[str, Row]

    def running(self) -> dict[str, Implementation]:
        """The implementations that have not failed."""
        return {name: function for name, function in self.functions.items() if _runs(self.rows[name])}


def _run_points(
    case: Case,
    points: Sequence[Point],
    rows: Sequence[dict[str, Row]],
    seconds: float,
    save: Callable[[], None],
) -> None:
    """Fill one row for each point and implementation; all are timed in turns on the same inputs."""
    found = [_prepare(point.problem, of_point, save) for point, of_point in zip(points, rows, strict=True)]
    if "time" in case.measures:
        _time(case, found, seconds)
        save()
    if "memory" in case.measures:
        for running in found:
            for name, function in running.running().items():
                _measure_memory(name, function, running.problem, running.rows[name])
                save()


def _prepare(problem: Problem, rows: dict[str, Row], save: Callable[[], None]) -> _Running:
    memory = 0.75 * machine.available_memory(problem.device)
    for name, row in rows.items():
        reason = PEERS[name].missing(problem, memory)
        if reason is not None:
            row["skipped"] = reason
            if reason.startswith("needs"):
                row["needs_bytes"] = PEERS[name].bytes_needed(problem)
    _validate(problem, rows, save)
    functions = {}
    for name, row in rows.items():
        if _runs(row):
            function, message = fault_tolerance.attempt(
                lambda name=name: PEERS[name].build(problem), problem.device
            )
            if function is None:
                row["failed"] = message
            else:
                functions[name] = function
    return _Running(problem, functions, rows)


def _row(case: Case, point: Point, name: str) -> Row:
    count = torch.get_num_threads() if point.threads is None else point.threads
    return {"case": case.name, "implementation": name, **point.problem.to_dict(), "threads": count}


def _runs(row: Row) -> bool:
    return "skipped" not in row and "failed" not in row


def _validate(problem: Problem, rows: dict[str, Row], save: Callable[[], None]) -> None:
    """Errors against float64, for at most VALIDATED_ROWS rows."""
    if not any(map(_runs, rows.values())):
        return
    small = problem.smaller(VALIDATED_ROWS)
    inputs = make_inputs(small, seed=1000)
    expected, message = fault_tolerance.attempt(lambda: truth(small, inputs), problem.device)
    if expected is None:
        for row in filter(_runs, rows.values()):
            row["failed"] = f"no float64 truth to compare with: {message}"
        return
    for name, row in rows.items():
        if not _runs(row):
            continue
        gradient = (
            tangent(expected.gradient, inputs.features) if PEERS[name].normalizes else expected.gradient
        )
        result, message = fault_tolerance.attempt(
            lambda name=name: measure.evaluate(PEERS[name].build(small), inputs), problem.device
        )
        inputs.features.grad = None
        if result is None:
            row["failed"] = message
            continue
        found = errors(*result, expected._replace(gradient=gradient))
        row |= {"validated_n": small.n, "loss_error": found.loss, "gradient_error": found.gradient}
        problem_found = out_of_tolerance(name, small, expected, found)
        if problem_found is not None:
            row["failed"] = problem_found
        save()


def _time(case: Case, found: Sequence[_Running], seconds: float) -> None:
    device = found[0].problem.device
    everything = {
        (at, name): function for at, point in enumerate(found) for name, function in point.functions.items()
    }
    inputs, message = fault_tolerance.attempt(
        lambda: [make_inputs(found[0].problem, seed) for seed in range(INPUT_SETS)], device
    )
    if inputs is None:
        for at, name in everything:
            found[at].rows[name]["failed"] = message
        return
    timings: dict[tuple[int, str], measure.Timing] = {}
    failures: dict[tuple[int, str], str] = {}
    try:
        _, failures = measure.interleaved(everything, inputs, seconds=seconds, timings=timings)
    finally:
        for (at, name), timing in timings.items():
            found[at].rows[name] |= timing.summary()
    for (at, name), message in failures.items():
        found[at].rows[name]["failed"] = message
    for problem, functions, rows in found:
        if "pysupcon" not in functions or not _runs(rows["pysupcon"]):
            continue
        _compare_at_size(problem, functions, rows, inputs[0])
        if case.name == "rate":
            _rate(problem, functions["pysupcon"], rows["pysupcon"], inputs)


def _compare_at_size(
    problem: Problem, running: dict[str, Implementation], rows: dict[str, Row], inputs: Inputs
) -> None:
    """Hash of pysupcon's result at the timed size, and the distances of the other results to it."""
    own, message = fault_tolerance.attempt(
        lambda: measure.evaluate(running["pysupcon"], inputs), problem.device
    )
    if own is None:
        rows["pysupcon"]["failed"] = message
        return
    rows["pysupcon"]["bits"] = measure.digest(own)
    for name, function in running.items():
        if name == "pysupcon" or not _runs(rows[name]) or rows[name]["both_s"] > measure.SLOW:
            continue
        gradient = own.gradient.double()
        if PEERS[name].normalizes:
            gradient = tangent(gradient, inputs.features)
        expected = Truth(own.loss.item(), gradient)
        distance, message = fault_tolerance.attempt(
            lambda function=function, expected=expected: errors(
                *measure.evaluate(function, inputs), expected
            ),
            problem.device,
        )
        if distance is None:
            rows[name]["failed"] = message
        else:
            rows[name] |= {"loss_distance": distance.loss, "gradient_distance": distance.gradient}


def _rate(problem: Problem, function: Implementation, row: Row, inputs: Sequence[Inputs]) -> None:
    """Floating-point operations per second of the loss and of torch.mm, measured in turns."""
    products: list[float] = []
    own = measure.Timing()
    for _ in range(5):
        products.append(measure.product_rate(2048, problem.dim, 2048))
        found = measure.interleaved({"own": function}, inputs, seconds=0, least=1)[0]["own"]
        own.forward += found.forward
        own.backward += found.backward
    rate, thin = problem.flops / own.summary()["both_s"], sorted(products)[2]
    square = measure.product_rate(2048, 2048, 2048, repetitions=3)
    row |= {"rate_flops": rate, "mm_flops": thin, "square_mm_flops": square, "rate_ratio": rate / thin}


def _measure_memory(name: str, function: Implementation, problem: Problem, row: Row) -> None:
    """Peak memory. For pysupcon also the bytes per row without the gradient, from half as many rows."""
    peak, message = fault_tolerance.attempt(
        lambda: measure.peak_memory(name, function, problem), problem.device
    )
    if peak is None:
        row["failed"] = message
        return
    row["peak_bytes"] = peak
    if name != "pysupcon" or problem.n < 4:
        return
    half = problem.smaller(problem.n // 4 * 2)
    least, message = fault_tolerance.attempt(
        lambda: measure.peak_memory(name, PEERS[name].build(half), half), problem.device
    )
    if least is None:
        row["failed"] = message
        return
    slope = (peak - least) / (problem.n - half.n)
    row["bytes_a_row"] = slope - problem.input_bytes / problem.n
    row["fixed_bytes"] = peak - slope * problem.n
