"""The cases of tests/distributed/test_queue_processes.py: a MemoryQueue in each process of a group."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pysupcon import MemoryQueue
from pysupcon.distributed import AllGather, Ring

TIMEOUT = timedelta(seconds=20)  # only reached by a hang
SIZE, DIM = 11, 3
SIZES = {
    "equal": [2, 2, 2],
    "ragged": [1, 0, 4],
    "empty": [0, 0, 0],
    "long": [5, 6, 7],
}
"""Number of samples of each process; the first ones of two processes are used"""
STEPS = 3
MODES = {"True": True, "ring": "ring", "object": AllGather, "ring object": Ring}


def batch(rank: int, step: int, samples: int, views: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [samples, views, DIM], or [samples, DIM] for views = 0, labels and instances of one process."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    shape = (samples, views, DIM) if views else (samples, DIM)
    rows = torch.randn(shape, generator=generator)
    return rows, torch.randint(5, (samples,), generator=generator), torch.arange(samples) + 10 * rank


def _gather(mode: str) -> Any:
    gather = MODES[mode]
    return gather(dist.new_group(timeout=TIMEOUT)) if callable(gather) else gather


def gathered(sizes: str, views: int, mode: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The queue of this process after some steps."""
    queue, rank, gather = MemoryQueue(SIZE, DIM, dtype=dtype), dist.get_rank(), _gather(mode)
    for step in range(STEPS):
        queue.enqueue(*batch(rank, step, SIZES[sizes][rank], views), gather=gather)
    return queue.state_dict()


def refused(what: str) -> list[str]:
    """Errors of a call of enqueue whose arguments are wrong or different in the last process, and of a valid
    call afterwards; the number of rows in the queue."""
    last = dist.get_rank() == dist.get_world_size() - 1
    queue = MemoryQueue(SIZE + 1 if last and what == "size" else SIZE, DIM)
    rows, labels, _ = batch(dist.get_rank(), 0, 2, 0)
    changed: dict[str, Any] = {}
    if last:
        changed = {
            "size": {},
            "labels": {"labels": None},
            "instances": {"instances": labels},
            "width": {"rows": torch.ones(2, DIM + 1)},
            "type": {"rows": [1.0]},
            "labels dtype": {"labels": labels.float()},
        }[what]
    gather, errors = AllGather(dist.new_group(timeout=TIMEOUT)), []
    for arguments in (changed, {}):
        try:
            queue.enqueue(**{"rows": rows, "labels": labels, **arguments}, gather=gather)
            errors.append("")
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    return [*errors, str(int(queue.filled))]


def wrapped(options: dict[str, bool]) -> Tensor:
    """Labels of a queue of own rows in a module that DistributedDataParallel wraps, after a forward."""
    model = nn.Linear(DIM, DIM)
    model.queue = MemoryQueue(2, DIM)
    model.queue.enqueue(torch.ones(2, DIM), torch.full((2,), dist.get_rank()))
    DistributedDataParallel(model, **options)(torch.ones(1, DIM)).sum().backward()
    return model.queue.labels


def by_default() -> Tensor:
    return wrapped({})


def without_broadcast() -> Tensor:
    return wrapped({"broadcast_buffers": False})


CASES = {function.__name__: function for function in (gathered, refused, by_default, without_broadcast)}
