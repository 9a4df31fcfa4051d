"""Processes and threads that load and augment images. Their numbers do not change a batch."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pysupcon.data.samples import FileImages, Images, LazyImages

MOST = 8
"""Processes that are chosen at most"""
FILES_PER_WORKER = 256
"""A process takes longer to start than to read fewer files."""
PREFETCHED = 3
"""Batches of a process in shared memory: two that wait, and one that is written."""


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_per_process(default: int = 1) -> int:
    """The share of the cores of this machine for each process of the launcher, at least 1.

    Args:
        default: processes on this machine if LOCAL_WORLD_SIZE does not tell.
    """
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(available_cores() // (int(local) if local.isdecimal() and int(local) else default), 1)


def choose_workers(workers: int | None, images: Images, batch_bytes: int) -> int:
    """The number of loader processes, of ``data.workers``.

    Args:
        workers: the number; None chooses it: 0 unless every image is a file; for files one less than this
            process has cores, with limits by :data:`MOST`, the number of files, and the shared memory.
        images: the images to load.
        batch_bytes: size of a batch.
    """
    if workers is not None:
        return workers
    if not isinstance(images, FileImages) or multiprocessing.current_process().daemon:
        return 0  # a daemon must not start processes
    limits = [cores_per_process() - 1, MOST, len(images) // FILES_PER_WORKER]
    if os.path.isdir("/dev/shm"):  # containers often have 64 MiB
        memory = os.statvfs("/dev/shm")
        limits.append(memory.f_bavail * memory.f_frsize // (PREFETCHED * max(batch_bytes, 1)))
    return max(min(limits), 0)


def prepare_worker(_: int) -> None:
    """Set up a loader process."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the main process ends the workers


@contextmanager
def threads_for(images: Images) -> Iterator[None]:
    """Run a block on one thread if the images are read one by one.

    Between the small operations on single images, threads of OpenMP wait actively. With other busy processes
    on the machine each operation then waits for a thread that has no core.
    """
    threads = torch.get_num_threads()
    if threads == 1 or not isinstance(images, LazyImages):
        yield
        return
    torch.set_num_threads(1)  # takes less than a microsecond
    try:
        yield
    finally:
        torch.set_num_threads(threads)
