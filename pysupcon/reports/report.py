"""A report of named metrics with units and intervals, as JSON, as Markdown and as a summary for the terminal.

The name of a metric consists of parts separated by "/". Tables are grouped by the first part.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from pysupcon.reading import parse_json

SCHEMA = 1
_PART = re.compile(r"(^|/)(class|group)=")


_MARKUP = re.compile(r"[\\`*\[\]|~$#]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=\bwww)\.")
"""Characters that Markdown would not show, or that start a link; underscores within words are left alone."""


OF_ONE_RUN = (
    "Bootstrap intervals resample the test samples of this one training: they say nothing about other seeds."
)


class Markdown(str):
    """Text that is Markdown already: :func:`escape` returns it unchanged."""

    __slots__ = ()


def escape(text: str) -> str:
    """Return text as one line of Markdown that shows it as it is: no markup, no HTML, no link, no math."""
    if isinstance(text, Markdown):
        return text
    line = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    return _MARKUP.sub(r"\\\g<0>", html.escape(line, quote=False))


@dataclass(frozen=True)
class Metric:
    """One number.

    Attributes:
        value: finite.
        unit: "fraction" is shown in per cent; any other unit is shown next to the number.
        low, high: ends of the interval, both or neither.
        meaning: what the number says, in some words.

    Raises:
        ValueError: a number is not finite, or one end of the interval is missing.
    """

    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    meaning: str = ""

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError(
                f"a metric needs both ends of its interval or neither, got {self.low} and {self.high}"
            )
        numbers = [number for number in (self.value, self.low, self.high) if number is not None]
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"a metric must be finite, got {numbers}")

    def _number(self, value: float | None) -> str:
        if value is None:
            return ""
        if self.unit == "fraction":
            return f"{100 * value:.2f}"
        if self.unit == "1 or 0":
            return "yes" if value else "no"
        return f"{value:.4g}"

    def columns(self) -> tuple[str, str, str]:
        """Return value, interval ("" if there is none) and unit as text."""
        interval = "" if self.low is None else f"[{self._number(self.low)}, {self._number(self.high)}]"
        unit = {"fraction": "%", "1 or 0": ""}.get(self.unit, self.unit)
        return self._number(self.value), Markdown(interval), unit


def metrics_of(
    results: Iterable[tuple[str, float]], describe: Callable[[str], tuple[str, str]]
) -> dict[str, Metric]:
    """Build metrics from (name, value) pairs; ``name/low`` and ``name/high`` become the interval of ``name``.

    Args:
        results: names and values.
        describe: maps a name to its unit and its meaning.

    Raises:
        ValueError: a name occurs twice, an interval has no metric, or a number is not finite; the message
            gives the name.
    """
    values: dict[str, float] = {}
    for name, value in results:
        if name in values:
            raise ValueError(f"metric {name!r} came twice")
        values[name] = value
    ends = {name for name in values if name.endswith(("/low", "/high"))}
    for name in ends:
        if name.rpartition("/")[0] not in values:
            raise ValueError(
                f"metric {name!r} is the end of an interval, but there is no {name.rpartition('/')[0]!r}"
            )
    metrics = {}
    for name, value in values.items():
        if name in ends:
            continue
        unit, meaning = describe(name)
        try:
            metrics[name] = Metric(
                value, unit, values.get(f"{name}/low"), values.get(f"{name}/high"), meaning
            )
        except ValueError as error:
            raise ValueError(f"metric {name!r}: {error}") from None
    return metrics


@dataclass(frozen=True)
class Picture:
    """A picture in the folder of the report: its file name and its caption."""

    file: str
    caption: str


@dataclass
class Report:
    """Results of an evaluation.

    Attributes:
        title: one line.
        metrics: metrics by name.
        metadata: settings behind the numbers; JSON types, nested mappings allowed.
        warnings: sentences that are shown first.
        pictures: shown in the Markdown and HTML forms.
        confidence: confidence level of the intervals, in (0, 1).
        notes: sentences that are shown after the warnings.
        headline: names of the metrics that matter most.
    """

    title: str
    metrics: dict[str, Metric]
    metadata: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    confidence: float = 0.95
    notes: list[str] = field(default_factory=list)
    headline: list[str] = field(default_factory=list)

    def groups(self) -> list[tuple[str, list[tuple[str, Metric]]]]:
        """Metrics grouped by the first part of the name, in order of first occurrence, with the rest of the
        name."""
        pairs = [(*name.partition("/")[::2], metric) for name, metric in self.metrics.items()]
        order = {group: rank for rank, group in reversed(list(enumerate(group for group, _, _ in pairs)))}
        pairs.sort(key=lambda pair: order[pair[0]])
        return [
            (group, [(name or group, metric) for _, name, metric in members])
            for group, members in groupby(pairs, key=lambda pair: pair[0])
        ]

    @property
    def header(self) -> tuple[str, ...]:
        """Headings of a table of metrics: name, value, interval, unit, meaning."""
        return "metric", "value", f"{100 * self.confidence:g} % interval", "unit", "meaning"

    @property
    def about_intervals(self) -> str:
        """What the intervals say; "" if there are none."""
        return OF_ONE_RUN if any(metric.low is not None for metric in self.metrics.values()) else ""

    def to_json(self) -> str:
        """Return the report as JSON, the metrics in their order, with numbers in full precision."""
        metrics = {}
        for name, metric in self.metrics.items():
            entry: dict[str, Any] = {"value": metric.value, "unit": metric.unit}
            if metric.low is not None:
                entry |= {"low": metric.low, "high": metric.high}
            if metric.meaning:
                entry["meaning"] = metric.meaning
            metrics[name] = entry
        content = {
            "schema": SCHEMA,
            "title": self.title,
            "metrics": metrics,
            "metadata": self.metadata,
            "warnings": self.warnings,
            "pictures": [{"file": picture.file, "caption": picture.caption} for picture in self.pictures],
            "confidence": self.confidence,
            "notes": self.notes,
            "headline": self.headline,
        }
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read the output of :meth:`to_json`.

        Raises:
            ValueError: the text is not JSON, is nested too deeply, or has another schema.
        """
        content = parse_json(text)
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            found = content.get("schema") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"a report must be a JSON object with schema {SCHEMA}, got {found!r}")
        return cls(
            title=content["title"],
            metrics={name: Metric(**entry) for name, entry in content["metrics"].items()},
            metadata=content["metadata"],
            warnings=content["warnings"],
            pictures=[Picture(**picture) for picture in content["pictures"]],
            confidence=content["confidence"],
            notes=content.get("notes", []),
            headline=content.get("headline", []),
        )

    def to_markdown(self) -> str:
        """Return the report as Markdown, with its pictures."""
        lines = [f"# {escape(self.title)}", ""]
        for warning in self.warnings:
            lines += [f"> **Warning:** {escape(warning)}", ""]
        said = [*self.notes, *([self.about_intervals] if self.about_intervals else [])]
        lines += [line for note in said for line in (escape(note), "")]
        for group, members in self.groups():
            rows = [(name, *metric.columns(), metric.meaning) for name, metric in members]
            width = len(self.header) - (not any(row[-1] for row in rows))
            table = markdown_table(self.header[:width], (row[:width] for row in rows))
            lines += [f"## {escape(group)}", "", *table, ""]
        for picture in self.pictures:
            lines += [f"![{escape(picture.caption)}]({picture.file})", "", escape(picture.caption), ""]
        if self.metadata:
            lines += ["## Settings", "", *markdown_table(("", ""), self.settings()), ""]
        return "\n".join(lines)

    def settings(self) -> list[tuple[str, str]]:
        """Names and values of the metadata as text; the name of a nested value is NAME.NAME."""
        return [(name, _plain(value)) for name, value in _flatten(self.metadata)]

    def summary(self, lines: int = 12) -> str:
        """Return the title, the most important metrics and the warnings for a terminal.

        All metrics but those of single classes and groups are shown if they fit, else those of ``headline``.

        Args:
            lines: the largest number of lines, at least 3.
        """
        said = [f"warning: {text}" for text in self.warnings] + [f"note: {text}" for text in self.notes]
        most = max(1, lines // 3)
        if len(said) > most:
            said = [*said[: most - 1], f"note: the report has {len(said) - most + 1} more warnings and notes"]
        room = lines - 1 - len(said)
        kept = self.metadata.get("kept", {})  # of an earlier evaluation: these are not news
        names = [name for name in self.metrics if not _PART.search(name) and _group(name) not in kept]
        if len(names) > room:
            names = _one_of_each([name for name in self.headline if name in names] or names, room)
        _, _, interval, *_ = self.header
        rows = [(self.title, "", interval if names else "", "", "")]
        rows += [(f"  {name}", *self.metrics[name].columns(), self.metrics[name].meaning) for name in names]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        text = []
        for name, value, interval, unit, meaning in rows:
            cells = (name.ljust(widths[0]), value.rjust(widths[1]), interval.rjust(widths[2]))
            text.append("  ".join((*cells, unit.ljust(widths[3]), meaning)).rstrip())
        return "\n".join(text + said)


def _group(name: str) -> str:
    return name.partition("/")[0]


def _one_of_each(names: list[str], count: int) -> list[str]:
    """``count`` of the names in their order: first one of each group, then the second, ..."""
    ranks: dict[str, int] = {}
    turns = []
    for name in names:
        ranks[_group(name)] = ranks.get(_group(name), -1) + 1
        turns.append(ranks[_group(name)])
    chosen = sorted(range(len(names)), key=lambda index: turns[index])[:count]
    return [names[index] for index in sorted(chosen)]


def markdown_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Return the lines of a Markdown table; all cells are escaped except :class:`Markdown`."""
    lines = [header, ("---",) * len(header), *rows]
    return ["| " + " | ".join(escape(cell) for cell in line) + " |" for line in lines]


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
