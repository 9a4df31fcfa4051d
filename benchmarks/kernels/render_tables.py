"""Renders the tables of benchmarks/README.md from stored results, between two markers.

    python benchmarks/kernels/render_tables.py            # write them
    python benchmarks/kernels/render_tables.py --check    # exit status 1 if the page differs from the results

The results are those of run.py in benchmarks/results/*.json, or in the files named.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import table
from benchmarks.kernels import bars
from benchmarks.kernels.peers import PEERS

BEGIN = "<!-- benchmark:begin -->"
END = "<!-- benchmark:end -->"
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "benchmarks" / "README.md"

Rows = Sequence[Mapping[str, Any]]


def render(results: Mapping[str, Any], source: str) -> str:
    """The tables of one run.

    Args:
        results: as run.py stores them.
        source: name of the file, for the heading.
    """
    rows = results["rows"]
    problem = next((row for row in rows if row["case"] in ("small", "speed", "memory")), None)
    parts = [f"{table.heading(results['machine'])} (`{source}`)."]
    if problem is not None:
        what = f"SupCon, D={problem['dim']}, {problem['classes']} classes, {problem['dtype']}"
        parts += [
            f"{what}: forward and backward, median, and in brackets how many times ours.",
            _by_size([row for row in rows if row["case"] in ("small", "speed")], "both_s"),
            f"{what}: peak memory beside the inputs.",
            _by_size([row for row in rows if row["case"] in ("memory", "memory65k")], "peak_bytes"),
        ]
    losses = [row for row in rows if row["case"] == "losses" and "both_s" in row]
    if losses:
        head = f"Four losses, N={losses[0]['n']}, D={losses[0]['dim']}, {losses[0]['classes']} classes."
        parts += [head, _losses(losses)]
    found = bars.measured(rows)
    if found:
        parts += ["Performance targets of the CPU kernels.", table.markdown(bars.lines(found))]
    return "\n\n".join(part for part in parts if part)


def _by_size(rows: Rows, measure: str) -> str:
    """Implementations down, N across; empty where nothing was measured."""
    sizes = sorted({row["n"] for row in rows})
    names = [name for name in PEERS if any(row["implementation"] == name and measure in row for row in rows)]
    if not names:
        return ""
    lines = [["", *(f"N = {n:,}" for n in sizes)]]
    for name in names:
        cells = [_cell(rows, name, n, measure) for n in sizes]
        lines.append([f"**{name}**" if name == "pysupcon" else PEERS[name].detail, *cells])
    return table.markdown(lines)


def _cell(rows: Rows, name: str, n: int, measure: str) -> str:
    row = _find(rows, name, n, measure)
    if row is None:
        return ""
    if measure not in row:
        return str(row.get("skipped", "failed"))
    if measure == "peak_bytes":
        return table.memory(row[measure])
    own = _find(rows, "pysupcon", n, measure)
    shown = table.seconds(row[measure])
    if name == "pysupcon" or own is None or measure not in own:
        return shown
    return f"{shown} ({row[measure] / own[measure]:.1f})"


def _find(rows: Rows, name: str, n: int, measure: str) -> Mapping[str, Any] | None:
    found = [row for row in rows if row["implementation"] == name and row["n"] == n]
    return next((row for row in found if measure in row), found[0] if found else None)


def _losses(rows: Rows) -> str:
    lines = [["loss", "forward", "backward", "both", "relative to SupCon"]]
    own = next((row["both_s"] for row in rows if row["loss"] == "supcon"), None)
    for row in rows:
        times = [table.seconds(row[key]) for key in ("forward_s", "backward_s", "both_s")]
        lines.append([row["loss"], *times, f"{row['both_s'] / own:.3f}" if own else ""])
    return table.markdown(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="*", type=Path, help="files written by run.py --json")
    parser.add_argument("--page", type=Path, default=PAGE, help="Markdown file that holds the markers")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if the page is out of date"
    )
    options = parser.parse_args(arguments)
    try:
        stored = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in _paths(options.results)]
        page = options.page.read_text(encoding="utf-8")
        sections = [render(results, path.name) for path, results in stored if "schema" in results]
        if not sections:
            raise ValueError("no results of run.py")
        new = table.between_markers(page, BEGIN, END, "\n\n".join(sections))
    except (OSError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if options.check:
        if new != page:
            message = (
                f"{options.page} does not show the stored results; run benchmarks/kernels/render_tables.py"
            )
            print(message, file=sys.stderr)
        return int(new != page)
    options.page.write_text(new, encoding="utf-8")
    return 0


def _paths(named: Sequence[Path]) -> list[Path]:
    return list(named) or sorted(RESULTS.glob("*.json"))


if __name__ == "__main__":
    sys.exit(main())
