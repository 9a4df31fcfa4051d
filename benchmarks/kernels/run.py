"""Measures the losses of pysupcon and of alternative implementations.

    python benchmarks/kernels/run.py --device cpu --cases small speed memory --json results.json --plot plots
    python benchmarks/kernels/run.py --device cpu --cases speed --sizes 4096 --compare results.json

Every point is validated against float64, then timed, then its peak memory is measured. The --json file is
rewritten after every new result, so that it has all results until the run ends. If an implementation raises
or runs out of memory, its row gets "failed" and the run continues. SIGINT, SIGTERM and CUDA errors that make
the GPU unusable end the run; "ended" has the reason.

Exit status: 0: success; 1: a result is wrong, missing, or slower or larger than --compare allows; 2: invalid
arguments; 3: the GPU became unusable; 130: interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks import fault_tolerance, machine, table
from benchmarks.kernels import bars
from benchmarks.kernels.cases import build_cases
from benchmarks.kernels.compare import TOLERANCE, regressions
from benchmarks.kernels.peers import PEERS
from benchmarks.kernels.suite import run_cases

SCHEMA = 1


def parser() -> argparse.ArgumentParser:
    names = list(build_cases("cpu"))
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    found.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE", help=_cases())
    found.add_argument(
        "--sizes", nargs="+", type=int, metavar="N", help="numbers of rows (default: those of each case)"
    )
    found.add_argument(
        "--implementations", nargs="+", choices=list(PEERS), metavar="NAME",
        help=f"some of {', '.join(PEERS)} (default: those of each case)",
    )  # fmt: skip
    found.add_argument(
        "--seconds",
        type=float,
        default=2.0,
        help="time for the repetitions of one implementation at one point (default %(default)s)",
    )
    found.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    found.add_argument("--plot", type=Path, metavar="DIR", help="plot time and memory against N here")
    found.add_argument(
        "--compare", type=Path, metavar="FILE", help="results of an earlier run to compare with"
    )
    found.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="largest ratio to --compare (default %(default)s)",
    )
    return found


def _cases() -> str:
    cases = build_cases("cpu").values()
    return "; ".join(f"{case.name}: {case.purpose}" for case in cases)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no CUDA device", file=sys.stderr)
        return 2
    try:
        cases = build_cases(options.device, options.sizes)
        old = None if options.compare is None else json.loads(options.compare.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    absent = [name for name in options.cases if name not in cases]
    if absent and len(absent) == len(options.cases):
        print(f"--cases: {', '.join(absent)} cannot run on {options.device}", file=sys.stderr)
        return 2
    about = machine.describe(options.device)
    print(table.heading(about), flush=True)
    rows: list[dict[str, Any]] = []
    results: dict[str, Any] = {"schema": SCHEMA, "machine": about, "rows": rows}

    def save() -> None:
        if options.json is not None:
            fault_tolerance.write_json(options.json, results)

    status = 0
    with fault_tolerance.interruptible():
        save()
        try:
            run_cases(
                [cases[name] for name in options.cases if name in cases],
                implementations=options.implementations,
                seconds=options.seconds,
                rows=rows,
                report=_progress,
                save=save,
            )
        except fault_tolerance.DeviceLost as error:
            results["ended"], status = f"the GPU is unusable for this process: {error}", 3
        except KeyboardInterrupt as error:
            results["ended"], status = f"interrupted by {error or 'SIGINT'}", 130
    save()
    print(f"\n{table.results(rows)}")
    measured = bars.measured(rows)
    if measured:
        print(f"\n{table.align(bars.lines(measured))}")
    if "ended" in results:
        print(f"\nENDED EARLY: {results['ended']}", file=sys.stderr)
        return status
    if options.plot is not None:
        from benchmarks.kernels import plot

        for path in plot.draw(results, options.plot):
            print(f"drew {path}")
    status = 1 if any("failed" in row for row in rows) else 0
    if old is not None:
        found = regressions(old, results, options.tolerance)
        print(f"\n{found.text}")
        status = max(status, 1 if found.slower else 0)
    return status


def _progress(row: dict[str, Any]) -> None:
    outcome = row.get("skipped") or row.get("failed") or table.seconds(row.get("both_s"))
    print(
        f"  {row['case']} {row['loss']} N={row['n']} D={row['dim']} {row['implementation']}: "
        f"{outcome or table.memory(row.get('peak_bytes'))}",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
