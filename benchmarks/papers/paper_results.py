"""Trains and evaluates the methods of the two papers and stores the results.

    python benchmarks/papers/paper_results.py  # train the missing runs of all tables
    python benchmarks/papers/paper_results.py --tables mnist5k_none --seeds 0  # one table, one seed
    python benchmarks/papers/paper_results.py --collect  # train nothing, store the finished runs
    python benchmarks/papers/paper_table.py  # render the page

Runs are stored in runs/paper/TABLE/METHOD_seedN. Finished runs are not repeated, so a stopped command can be
started again. Each run is a training of a config of configs/small, as by `python pysupcon/train.py`, on one
thread, and its evaluation; for frozen Thanos also `python -m pysupcon concatenate`. The results are the
figures of each run and the paired differences of `python -m pysupcon compare`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.papers.paper_runs import ROOT, SEEDS, TABLES, Job, Table, jobs, title

if TYPE_CHECKING:
    from pysupcon.commands.compare import Comparison

RESULTS = ROOT / "benchmarks" / "results"
RUNS = ROOT / "runs" / "paper"
FASHION_ROOT = "/usr/share/datasets/fashion-mnist"  # of Debian's dataset-fashion-mnist
COST_FILE = "cost.json"
FIGURES = {
    "probe": "coarse_to_fine/fine/accuracy",
    "coarse": "coarse_to_fine/coarse/accuracy",
    "logistic": "linear_probe/fine/accuracy",
    "knn": "knn/k=1/fine/accuracy",
    "margin": "separation/fine/margin",
    "spread": "geometry/spread/coarse",
    "within": "geometry/variance/within_coarse",
    "explained": "geometry/variance/explained_by_fine",
    "val_probe": "coarse_to_fine/fine/val_accuracy",
}
"""Name in the results -> name in a run's evaluation."""
COMPARED = ("probe", "coarse", "logistic", "knn", "margin")


def run_job(job: Job, runs: Path, arguments: list[str]) -> str:
    """Train and evaluate one run.

    Args:
        job: the run.
        runs: folder of all runs.
        arguments: arguments of pysupcon/train.py; none for concatenated encoders.

    Returns:
        The key of the job.
    """
    import torch

    from pysupcon.commands.concatenate import concatenate_runs
    from pysupcon.config import parse_args
    from pysupcon.evaluation.evaluate import evaluate_run
    from pysupcon.trainer.loop import train

    torch.set_num_threads(1)
    folder = _folder(job, runs)
    wall, processor = time.perf_counter(), time.process_time()
    if job.method.parts:
        evaluation = None
        if not (folder / "config.yaml").is_file():
            first, second = (folder.with_name(name) for name in job.needs)
            concatenate_runs(first, second, folder)
    else:
        config, _ = parse_args([*arguments, "--resume_from_checkpoint", "auto"])
        evaluation = config.evaluation
        evaluation.progress = False
        train(config)
    trained = time.perf_counter(), time.process_time()
    evaluate_run(folder, evaluation)
    cost = {
        "train_minutes": (trained[0] - wall) / 60,
        "train_processor_minutes": (trained[1] - processor) / 60,
        "evaluate_minutes": (time.perf_counter() - trained[0]) / 60,
        "evaluate_processor_minutes": (time.process_time() - trained[1]) / 60,
    }
    (folder / COST_FILE).write_text(json.dumps(cost), encoding="utf-8")
    return job.key


def finished(job: Job, runs: Path) -> bool:
    """Whether a run is trained and evaluated: the file that is written last exists."""
    return (_folder(job, runs) / COST_FILE).is_file()


def _folder(job: Job, runs: Path) -> Path:
    return runs / job.table.name / job.name


def train_all(
    wanted: Iterable[Job], runs: Path, roots: Mapping[str, Sequence[str]], processes: int
) -> list[str]:
    """Run the jobs in order, each after the runs that it needs. Returns the keys of failed jobs."""
    pending = [job for job in wanted if not finished(job, runs)]
    running: dict[Future[str], Job] = {}
    failed: list[str] = []
    start, total = time.perf_counter(), len(pending)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_quiet) as pool:
        while pending or running:
            for job in list(pending):
                if len(running) == processes:
                    break
                if all((_folder(job, runs).with_name(name) / COST_FILE).is_file() for name in job.needs):
                    pending.remove(job)
                    arguments = job.arguments(_folder(job, runs), roots.get(job.table.data, ()))
                    running[pool.submit(run_job, job, runs, arguments)] = job
            if not running:  # the runs that they need have failed
                return failed + [job.key for job in pending]
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                error = future.exception()
                if error is not None:
                    failed.append(job.key)
                    traceback.print_exception(error)
                minutes = (time.perf_counter() - start) / 60
                state = "failed" if error else "done"
                left = len(pending) + len(running)
                print(f"{minutes:6.1f} min  {state} {job.key}, {left} of {total} left", flush=True)
    return failed


def _quiet() -> None:
    """Discard standard error, because progress bars of parallel trainings are not readable."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # open until the process ends
    os.environ["OMP_NUM_THREADS"] = "1"
    os.nice(19)


def collect(table: Table, runs: Path) -> dict[str, Any] | None:
    """The results of the finished runs of a table; None without the baseline and another method.

    Uses the seeds for which every method is finished. If there are none, it uses the seeds of the baseline,
    and the methods that have all of them.
    """
    from pysupcon.commands.compare import compare
    from pysupcon.reports.evaluated_runs import read_run

    there = [job for job in jobs([table], table.seeds) if finished(job, runs)]
    by_seed = {seed: [job for job in there if job.seed == seed] for seed in table.seeds}
    seeds = [seed for seed, done in by_seed.items() if len(done) == len(table.methods)]
    seeds = seeds or [job.seed for job in there if job.name == f"{table.baseline}_seed{job.seed}"]
    there = [job for job in there if job.seed in seeds]
    counts = Counter(job.method for job in there)
    there = [job for job in there if counts[job.method] == len(seeds)]
    if len({job.method for job in there}) < 2:
        return None
    read = {job.name: read_run(runs / table.name / job.name) for job in there}
    patterns = [f"^{FIGURES[name]}$" for name in COMPARED]

    def against(method: str) -> Comparison:
        return compare(list(read.values()), read[f"{method}_seed{seeds[0]}"], figures=patterns)

    found = against(table.baseline)
    rows = []
    for group in found.configurations:
        members = [run.name for run in group.runs]
        row: dict[str, Any] = {"method": title(table, members[0]), "runs": members}
        row["baseline"] = group.name == found.baseline
        for name in COMPARED:
            if FIGURES[name] in found.values:
                row[name] = asdict(found.values[FIGURES[name]][group.name])
                if not row["baseline"]:
                    row[f"{name}_difference"] = asdict(found.differences[FIGURES[name]][group.name])
        rows.append(row)
    others = [name for name in table.also_against if f"{name}_seed{seeds[0]}" in read]
    return {
        "table": table.name,
        "regime": table.regime,
        "seeds": seeds,
        "confidence": found.confidence,
        "rows": rows,
        "orders": [order for name in others for order in _orders(table, against(name))],
        "runs": {job.name: _figures(runs / table.name / job.name) for job in there},
    }


def _orders(table: Table, found: Comparison) -> Iterator[dict[str, Any]]:
    """Differences of all methods to another baseline: fine accuracy of the linear probe, or margin."""
    names = {group.name: title(table, group.runs[0].name) for group in found.configurations}
    figure = next(name for name in ("probe", "margin") if FIGURES[name] in found.values)
    for group, difference in found.differences[FIGURES[figure]].items():
        yield {"method": names[group], "less": names[found.baseline], "figure": figure, **asdict(difference)}


def _figures(folder: Path) -> dict[str, Any]:
    """The metrics of one run (value, and interval if there is one) and its cost in minutes."""
    report = json.loads((folder / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
    metrics = report["metrics"]
    found: dict[str, Any] = json.loads((folder / COST_FILE).read_text(encoding="utf-8"))
    for name, metric in FIGURES.items():
        if metric in metrics:
            entry = metrics[metric]
            found[name] = {key: entry[key] for key in ("value", "low", "high") if entry.get(key) is not None}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tables", nargs="+", default=list(TABLES), choices=list(TABLES), help="default: all")
    add("--seeds", nargs="+", type=int, default=list(SEEDS), help="default: 0 1 2")
    add("--runs", type=Path, default=RUNS, help="folder of the runs (default: %(default)s)")
    add("--results", type=Path, default=RESULTS, help="folder of paper_TABLE.json (default: %(default)s)")
    add("--processes", type=int, default=2, help="parallel trainings (default: %(default)s)")
    add("--fashion-root", default=FASHION_ROOT, help="folder of Fashion-MNIST's files (default: %(default)s)")
    add("--collect", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)
    wanted = [name for name in options.tables if _has_data(name, options.fashion_root)]
    failed: list[str] = []
    if not options.collect:
        roots = {"fashion_mnist_coarse": ["--data.root", options.fashion_root]}
        failed = train_all(
            jobs([TABLES[name] for name in wanted], options.seeds), options.runs, roots, options.processes
        )
    from benchmarks.machine import describe

    for name in wanted:
        results = collect(TABLES[name], options.runs)
        if results is None:
            print(f"{name}: too few runs", file=sys.stderr)
            continue
        path = options.results / f"paper_{name}.json"
        path.write_text(
            json.dumps({"machine": describe("cpu"), **results}, indent=1) + "\n", encoding="utf-8"
        )
        print(f"written: {path}")
    for key in failed:
        print(f"failed: {key}", file=sys.stderr)
    return int(bool(failed))


def _has_data(table: str, fashion_root: str) -> bool:
    there = not table.startswith("fashion") or Path(fashion_root).is_dir()
    if not there:
        print(f"{table}: skipped, {fashion_root} does not exist; see --fashion-root", file=sys.stderr)
    return there


if __name__ == "__main__":
    sys.exit(main())
