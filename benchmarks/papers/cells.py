"""How the tables of the studies write numbers."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev


def show_interval(value: float, low: float, high: float, factor: float = 1.0, digits: int = 3) -> str:
    """``value [low, high]`` times ``factor``, with signs.

    An end beside 0 gets more digits, at most two, so that its side can be seen.
    """
    for _ in range(2):
        if all(round(factor * end, digits) != 0 or end == 0 for end in (low, high)):
            break
        digits += 1
    shown, left, right = (f"{factor * number:+.{digits}f}" for number in (value, low, high))
    return f"{shown} [{left}, {right}]"


def bold_interval(value: float, low: float, high: float, factor: float = 1.0, digits: int = 3) -> str:
    """:func:`show_interval`, bold if the interval excludes 0."""
    text = show_interval(value, low, high, factor, digits)
    return f"**{text}**" if low > 0 or high < 0 else text


def with_deviation(values: Sequence[float], factor: float = 1.0, digits: int = 1) -> str:
    """Mean over the seeds ± their standard deviation, times ``factor``; empty without values."""
    if not values:
        return ""
    text = f"{factor * fmean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {factor * stdev(values):.{digits}f}"


def with_interval(
    values: Sequence[float],
    factor: float = 1.0,
    digits: int = 3,
    limits: tuple[float, float] = (-float("inf"), float("inf")),
) -> str:
    """Mean over the seeds and its 95 % Student-t interval within ``limits``, times ``factor``; empty without
    values."""
    from pysupcon.evaluators.bootstrap import mean_interval

    if not values:
        return ""
    text = f"{factor * fmean(values):.{digits}f}"
    if len(values) < 2:
        return text
    low, high = mean_interval(values, 0.95)
    low, high = max(low, limits[0]), min(high, limits[1])
    return f"{text} [{factor * low:.{digits}f}, {factor * high:.{digits}f}]"
