"""Runs the studies of the two papers' claims, stores their records, and writes the tables and pictures.

    python benchmarks/papers/results.py                 # all studies; says its processor minutes first
    python benchmarks/papers/results.py --quick         # two seeds and fewer methods; changes no page
    python benchmarks/papers/results.py --studies mnist5k_strong threshold
    python benchmarks/papers/results.py --missing       # only what has no stored record, e.g. a new row
    python benchmarks/papers/results.py --plan          # what is left to do, and its minutes
    python benchmarks/papers/results.py --render        # run nothing; write the pages from the stored records
    python benchmarks/papers/results.py --check         # exit status 1 if the pages differ from them

Runs and records are in runs/paper/STUDY. A finished job is not repeated, so a stopped command can be started
again; remove the runs and records of a method after changing its arguments. The records of a study are stored
in benchmarks/results/paper_STUDY.json; records that are stored there and were not made again here stay, with
the machine that made them. Each job runs on one thread.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.papers import page
from benchmarks.papers.page import RESULTS
from benchmarks.papers.studies import STUDIES
from benchmarks.papers.study import ROOT, Job, Records, Study

RUNS = ROOT / "runs" / "paper"
RECORDS = "records"
BY_NAME: Mapping[str, Study] = {study.NAME: study for study in STUDIES}


def record_file(study: Study, job: Job | str, runs: Path) -> Path:
    """The file of a job's record."""
    name = job if isinstance(job, str) else job.name
    return runs / study.NAME / RECORDS / f"{name}.json"


def run_job(name: str, job: Job, runs: Path) -> float:
    """Do a job and write its record. Returns its processor minutes."""
    import torch

    torch.set_num_threads(1)
    study, start = BY_NAME[name], time.process_time()
    file = record_file(study, job, runs)
    file.parent.mkdir(parents=True, exist_ok=True)
    record = study.run(job, runs / name)
    minutes = (time.process_time() - start) / 60
    text = json.dumps({**record, "processor_minutes": round(minutes, 3)})
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)
    return minutes


def left(
    studies: Sequence[Study], runs: Path, quick: bool, have: Mapping[str, Records] | None = None
) -> list[tuple[Study, Job]]:
    """The jobs without a record, in order.

    Args:
        studies: the studies.
        runs: folder of the runs.
        quick: the jobs of the quick form.
        have: records of each study that need not be made, except for another job that needs their runs.
    """
    found: list[tuple[Study, Job]] = []
    for study in studies:
        jobs = {job.name: job for job in study.jobs(quick)}
        open_jobs = [name for name in jobs if name not in (have or {}).get(study.NAME, {})]
        wanted: set[str] = set()
        while open_jobs:
            name = open_jobs.pop()
            if name not in wanted and not record_file(study, name, runs).is_file():
                wanted.add(name)
                open_jobs += jobs[name].needs
        found += [(study, job) for name, job in jobs.items() if name in wanted]
    return found


def run_all(
    jobs: Sequence[tuple[Study, Job]], runs: Path, processes: int, pool: Executor | None = None
) -> list[str]:
    """Run jobs, each after those that it needs.

    Args:
        jobs: the jobs in order.
        runs: folder of the runs.
        processes: jobs at once.
        pool: where they run; None makes a pool of processes.

    Returns:
        The names of the jobs that failed, or that need one that failed.
    """
    if pool is None:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context, initializer=_quiet) as new:
            return run_all(jobs, runs, processes, new)
    pending = list(jobs)
    running: dict[Future[float], tuple[Study, Job]] = {}
    failed: list[str] = []
    start, total, spent = time.perf_counter(), len(pending), 0.0
    while pending or running:
        for study, job in list(pending):
            if len(running) == processes:
                break
            if all(record_file(study, name, runs).is_file() for name in job.needs):
                pending.remove((study, job))
                running[pool.submit(run_job, study.NAME, job, runs)] = (study, job)
        if not running:  # the jobs that they need have failed
            return failed + [f"{study.NAME}/{job.name}" for study, job in pending]
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            study, job = running.pop(future)
            error = future.exception()
            if error is not None:
                failed.append(f"{study.NAME}/{job.name}")
                traceback.print_exception(error)
            else:
                spent += future.result()
            print(
                f"{(time.perf_counter() - start) / 60:6.1f} min, {spent:.1f} processor minutes: "
                f"{study.NAME}/{job.name} {'failed' if error else 'done'}, "
                f"{len(pending) + len(running)} of {total} left",
                flush=True,
            )
    return failed


def _quiet() -> None:
    """Discard standard error, because progress bars of parallel trainings are not readable."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # open until the process ends
    os.environ["OMP_NUM_THREADS"] = "1"
    os.nice(19)


def collect(study: Study, runs: Path, quick: bool) -> dict[str, Any]:
    """The records of the finished jobs of a study."""
    found = {}
    for job in study.jobs(quick):
        file = record_file(study, job, runs)
        if file.is_file():
            found[job.name] = json.loads(file.read_text(encoding="utf-8"))
    return found


def store(study: Study, records: Records, results: Path) -> Path:
    """Store records beside those that are stored already; each stays with the machine that made it."""
    from benchmarks.machine import describe

    path = page.stored_file(study, results)
    stored = page.read_stored(study, results)
    changed = [name for name, record in records.items() if stored.get(name) != record]
    if not changed:
        return path
    made = [{"machine": describe("cpu"), "records": changed}]
    for maker in page.read_makers(study, results):
        kept = [name for name in maker["records"] if name not in changed]
        made += [{"machine": maker["machine"], "records": kept}] if kept else []
    order = [job.name for job in study.jobs(False)] + [job.name for job in study.jobs(True)]
    merged = {**stored, **records}
    ordered = {name: merged[name] for name in dict.fromkeys([*order, *merged]) if name in merged}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(record)}" for name, record in ordered.items())
    makers = ",\n".join(f"  {json.dumps(maker)}" for maker in made)
    head = f' "study": {json.dumps(study.NAME)},\n "made": [\n{makers}\n ],\n'
    results.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n{head} "records": {{\n{lines}\n }}\n}}\n', encoding="utf-8")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, store the records, write the pages; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--studies", nargs="+", choices=list(BY_NAME), default=list(BY_NAME), metavar="NAME",
        help="default: all (%(choices)s)")  # fmt: skip
    add("--quick", action="store_true", help="the quick form; its results stay in the folder of the runs")
    add("--missing", action="store_true", help="only the jobs whose records are not stored, and those that "
        "they need; for a fresh clone to which a row was added")  # fmt: skip
    add("--runs", type=Path, default=RUNS, help="folder of the runs (default: %(default)s)")
    add("--results", type=Path, help="folder of paper_STUDY.json (default: benchmarks/results, whose tables "
        "stand on the pages; those of another folder are printed)")  # fmt: skip
    add("--processes", type=int, default=2, help="jobs at once (default: %(default)s)")
    add("--plan", action="store_true", help="print what is left to do; run nothing")
    add(
        "--render",
        action="store_true",
        help="run nothing; write the pages, or print, from the stored records",
    )
    add("--check", action="store_true", help="run nothing; exit status 1 if the pages differ")
    options = parser.parse_args(arguments)
    results = options.results or (options.runs / "quick" if options.quick else RESULTS)
    if options.check and results.resolve() != RESULTS.resolve():
        parser.error("--check compares the pages with benchmarks/results: leave out --results and --quick")
    if options.render or options.check:
        return _show(results, check=options.check)
    studies = [study for study in map(BY_NAME.__getitem__, options.studies) if _can_run(study)]
    have = {study.NAME: page.read_stored(study, results) if options.missing else {} for study in studies}
    jobs = left(studies, options.runs, options.quick, have)
    minutes = sum(job.minutes for _, job in jobs)
    print(f"{len(jobs)} jobs, about {minutes:.0f} processor minutes on {options.processes} processes")
    if options.plan:
        for study in studies:
            mine = [job.minutes for of_job, job in jobs if of_job is study]
            print(f"  {study.NAME}: {len(mine)} jobs, {sum(mine):.0f} processor minutes")
        return 0
    failed = run_all(jobs, options.runs, options.processes)
    for study in studies:
        records = collect(study, options.runs, options.quick)
        records = {name: record for name, record in records.items() if name not in have[study.NAME]}
        if records:
            print(f"written: {store(study, records, results)}")
    _show(results)
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return int(bool(failed))


def _show(results: Path, check: bool = False) -> int:
    """Write or check the pages of the project, which show benchmarks/results alone; print other results."""
    if results.resolve() == RESULTS.resolve():
        return page.write(STUDIES, results, check=check)
    print(page.section(STUDIES, results))
    return 0


def _can_run(study: Study) -> bool:
    reason = study.missing()
    if reason:
        print(f"{study.NAME}: skipped: {reason}", file=sys.stderr)
    return not reason


if __name__ == "__main__":
    sys.exit(main())
