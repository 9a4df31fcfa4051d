"""Performance targets ("bars") of the CPU kernels, computed from the rows of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import table

Rows = Sequence[Mapping[str, Any]]
N = 16_384
LARGE = 65_536


class Bar(NamedTuple):
    name: str
    value: float
    bar: float
    at_least: bool
    show: Callable[[float], str]

    @property
    def met(self) -> bool:
        return self.value >= self.bar if self.at_least else self.value <= self.bar


def measured(rows: Iterable[Mapping[str, Any]]) -> list[Bar]:
    """The targets whose problems were measured on the CPU."""
    own = [row for row in rows if row["device"] == "cpu"]
    return [*_speed(own), *_memory(own), *_rate(own), *_losses(own), *_small(own), *_threads(own)]


def lines(found: Sequence[Bar]) -> list[list[str]]:
    """The cells of a table; the first line is the header."""
    cells = [["quantity", "measured", "target", ""]]
    for bar in found:
        sign = ">=" if bar.at_least else "<="
        verdict = "met" if bar.met else "MISSED"
        cells.append([bar.name, bar.show(bar.value), f"{sign} {bar.show(bar.bar)}", verdict])
    return cells


def _ratio(value: float) -> str:
    return f"{value:.3g} x"


def _value(rows: Rows, field: str, **wanted: Any) -> float | None:
    for row in rows:
        if row.get(field) is not None and all(row[key] == value for key, value in wanted.items()):
            return float(row[field])
    return None


def _quotient(above: float | None, below: float | None) -> Iterator[float]:
    """The ratio, if both were measured."""
    if above is not None and below:
        yield above / below


def _speed(rows: Rows) -> Iterator[Bar]:
    own = _value(rows, "both_s", case="speed", n=N, implementation="pysupcon")
    for name, label, bar in (
        ("written", "the dense loss as users write it", 20.0),
        ("compiled", "torch.compile of it", 5.0),
    ):
        other = _value(rows, "both_s", case="speed", n=N, implementation=name)
        for ratio in _quotient(other, own):
            yield Bar(f"time of {label} / ours, N={N}", ratio, bar, True, _ratio)


def _memory(rows: Rows) -> Iterator[Bar]:
    own = _value(rows, "peak_bytes", case="memory", n=N, implementation="pysupcon")
    dense = _value(rows, "peak_bytes", case="memory", n=N, implementation="written")
    for ratio in _quotient(dense, own):
        yield Bar(f"memory of the dense loss as users write it / ours, N={N}", ratio, 50.0, True, _ratio)
    peak = _value(rows, "peak_bytes", case="memory65k", n=LARGE)
    if peak is not None:
        yield Bar(f"peak memory, N={LARGE}", peak, 2.0**30, False, table.memory)
    row = _value(rows, "bytes_a_row", case="memory65k", n=LARGE)
    if row is not None:
        yield Bar("memory per row, without gradient and fixed buffers", row, 64.0, False, table.memory)


def _rate(rows: Rows) -> Iterator[Bar]:
    ratio = _value(rows, "rate_ratio", case="rate", n=N)
    if ratio is not None:
        yield Bar("4u / time against torch.mm of 2048 x 128 by 128 x 2048", ratio, 1.3, True, _ratio)


def _losses(rows: Rows) -> Iterator[Bar]:
    supcon = _value(rows, "both_s", case="losses", n=N, loss="supcon", implementation="pysupcon")
    for loss, bar in (("sincere", 1.15), ("cnce", 0.05)):
        other = _value(rows, "both_s", case="losses", n=N, loss=loss, implementation="pysupcon")
        for ratio in _quotient(other, supcon):
            yield Bar(f"time of {loss} / SupCon, 1000 classes, N={N}", ratio, bar, False, _ratio)


def _small(rows: Rows) -> Iterator[Bar]:
    for n in sorted({row["n"] for row in rows if row["case"] == "small"}):
        own = _value(rows, "both_s", case="small", n=n, implementation="pysupcon")
        others = [
            value
            for name in ("dense", "written", "compiled")
            if (value := _value(rows, "both_s", case="small", n=n, implementation=name)) is not None
        ]
        for ratio in _quotient(min(others, default=None), own):
            yield Bar(f"time of the best of dense and compiled / ours, N={n}", ratio, 1.0, True, _ratio)


def _threads(rows: Rows) -> Iterator[Bar]:
    """Whether the results of a point are bitwise equal for all numbers of threads."""
    bits: dict[tuple[Any, ...], set[str]] = {}
    counts: dict[tuple[Any, ...], set[int]] = {}
    for row in rows:
        if row["case"] == "threads" and "bits" in row:
            point = (row["loss"], row["n"])
            bits.setdefault(point, set()).add(row["bits"])
            counts.setdefault(point, set()).add(row["threads"])
    for (loss, n), found in bits.items():
        threads = sorted(counts[loss, n])
        if len(threads) > 1:
            name = f"different results of {loss} with {' and '.join(map(str, threads))} threads, N={n}"
            yield Bar(name, float(len(found) - 1), 0.0, False, lambda value: f"{value:.0f}")
