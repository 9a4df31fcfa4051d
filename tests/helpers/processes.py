"""Starts the processes of one process group, which run a list of cases and write their results to files."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

Case = tuple[Any, ...]
Results = list[dict[Any, Any]]
_results: dict[tuple[str, int], Results] = {}


def run_cases(
    rank: int, world: int, folder: str, functions: dict[str, Callable[..., Any]], cases: list[Case]
) -> None:
    """Runs ``cases``, (name of a function, arguments...), in one process."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=300),
    )
    results: dict[Any, Any] = {"world": dist.get_world_size()}
    for case in cases:
        results[case] = functions[case[0]](*case[1:])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _start(
    functions: dict[str, Callable[..., Any]], world: int, cases: list[Case], folder: Path, seconds: int
) -> None:
    folder.mkdir()
    context = multiprocessing.get_context("forkserver")  # imports torch once for all
    context.set_forkserver_preload(["helpers.distributed_worker", "pysupcon.pairs.gathered"])
    arguments = (world, str(folder), functions, cases)
    running = multiprocessing.start_processes(
        run_cases, arguments, nprocs=world, join=False, start_method="forkserver"
    )
    try:
        deadline = time.monotonic() + seconds
        while not running.join(timeout=1):  # True when all have ended, an error when one has failed
            if time.monotonic() > deadline:
                raise TimeoutError(f"{world} processes did not finish within {seconds} seconds")
    finally:
        for process in running.processes:
            if process.is_alive():
                process.kill()


def results_of(
    name: str,
    functions: dict[str, Callable[..., Any]],
    world: int,
    cases: list[Case],
    factory: pytest.TempPathFactory,
    seconds: int,
) -> Results:
    """Returns the results by rank. Each (name, world) runs once, also with several workers of pytest-xdist.

    Args:
        name: of the list of cases.
        functions: by name; module-level functions, which the processes import.
        world: number of processes.
        cases: (name of a function, arguments...).
        factory: of temporary folders.
        seconds: after which the processes are killed; only reached by a hang.
    """
    if (name, world) not in _results:
        base = factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:
            base = base.parent
        folder = base / f"{name}{world}"
        with open(base / f"{name}{world}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / f"{world - 1}.pt").exists():
                assert not folder.exists(), "the processes failed before"
                _start(functions, world, cases, folder, seconds)
        results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
        assert [result["world"] for result in results] == [world] * world
        _results[name, world] = results
    return _results[name, world]
