"""Losses among several processes: contrast with the rows of all of them.

``SupConLoss(gather=True)`` (and every other loss) is :class:`AllGather`, ``gather="ring"`` is :class:`Ring`;
an object of either class may be given instead, to name a process group. They need ``torch.distributed`` to be
initialised, however that came about (torchrun, ``accelerate launch``, by hand); where it is not, or where
there is one process, a loss behaves as with ``gather=False``. NCCL, gloo and whatever else can gather; the
loss may stand inside DistributedDataParallel or alone.

What each process hands in: features, and labels or instances, of its own samples. Their number may differ
from process to process and may be 0. Views, width and dtype must agree; a class has the same label
everywhere, and an instance (where ``instances`` are given) the same id: rows of one id on two processes are
views of one sample.

What each process gets, with W processes and K anchors that have a loss among all of them:
    reduction="mean"  W / K times the sum over its own anchors: the mean over the processes is the loss of one
                      process that holds the whole batch, and so is, once DistributedDataParallel has averaged
                      it over the processes, every parameter's gradient, equal batches or not.
    "sum"             the sum over its own anchors: the sum over the processes is that of one process.
    "none"            the losses of its own anchors: those that one process would give them.
The gradient of the features is that of the sum over all processes of what they minimise, not only of the own
loss: the other processes' anchors pull at the own rows too. (With "mean" it is W times that of one process,
as everything is before it is averaged; with "sum" it is just that of one process, so that the average over
processes, DistributedDataParallel's habit, must be multiplied by W.) The gradient of a learnable temperature
is a part, whose average (with "sum": sum) over the processes is complete: let DistributedDataParallel take
it, or do so by hand.

What travels, per process and step, with N rows of D elements of e bytes in all, M of them its own; counted
are bytes received (as many are sent around a ring): (N - M) D e for the rows, once (a ring: once more in the
backward; SINCERE: twice each way); 8 a sample of another process for labels, as many for given instances; in
the backward at most 16 a row (32 for float64 rows; see :mod:`pysupcon.pairs.gathered`); and from each process
one message of 64 in which they agree on their sizes. Gradients of rows never travel. Batches of unequal size
are padded to the largest, except around a ring.

Every process must call the loss, and its backward, equally often. Under ``torch.compile`` this is a graph
break. The message about sizes is read by the host: on a GPU that means waiting for it, unless the process
group can also talk through the memory of the CPU (``init_process_group()`` without a backend, or
``"cpu:gloo,cuda:nccl"``).
"""

from __future__ import annotations

import warnings
from collections.abc import Generator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from pysupcon.pairs.global_batch import Block
from pysupcon.profiling.ranges import named, region

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["AllGather", "Ring"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_warned = False


class AllGather:
    """Every process gathers all rows, once, and keeps them until its backward.

    Args:
        group: of the processes; None means all.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group

    @torch.compiler.disable
    def begin(self, features: Tensor, must_match: dict[str, int]) -> _Communicator | None:
        """See :class:`pysupcon.pairs.global_batch.Gather`."""
        if _processes(self.group) == 1:
            return None
        views = features.shape[1] if features.dim() == 3 else 1
        return self._communicator(_agree(features, must_match, self.group), views)

    def _communicator(self, samples: tuple[int, ...], views: int) -> _Communicator:
        return _AllGatherCommunicator(samples, views, self.group)


class Ring(AllGather):
    """Processes pass their rows around: each holds its own, those of one process and those of the next.

    For batches whose rows do not fit into one device's memory. Rows travel once more in the backward (with
    SINCERE twice each way), while the block before is being worked on.

    Args:
        group: of the processes; None means all.
    """

    def _communicator(self, samples: tuple[int, ...], views: int) -> _Communicator:
        return _RingCommunicator(samples, views, self.group)


class _Communicator:
    """See :class:`pysupcon.pairs.global_batch.Communicator`."""

    def __init__(self, samples: tuple[int, ...], views: int, group: ProcessGroup | None) -> None:
        self.samples = samples
        self.views = views
        self.group = group
        self.rank = dist.get_rank(group)
        self.bounds = [0]
        for count in samples:
            self.bounds.append(self.bounds[-1] + count)

    def ids(self, own: Tensor) -> Tensor:
        return _gather(own, self.samples, self.group)

    def exchange(self, columns: Tensor) -> Tensor:
        counts = tuple(count * self.views for count in self.samples)
        return _gather(columns.T, counts, self.group).T.contiguous()

    def keep(self, rows: Tensor) -> Tensor | None:
        raise NotImplementedError

    def blocks(self, rows: Tensor, kept: Tensor | None) -> Generator[Block, None, None]:
        raise NotImplementedError


class _AllGatherCommunicator(_Communicator):
    def keep(self, rows: Tensor) -> Tensor | None:
        return _gather(rows.detach(), tuple(count * self.views for count in self.samples), self.group)

    def blocks(self, rows: Tensor, kept: Tensor | None) -> Generator[Block, None, None]:
        yield Block(0, self.bounds[-1], kept)


class _RingCommunicator(_Communicator):
    def keep(self, rows: Tensor) -> Tensor | None:
        return None

    def blocks(self, rows: Tensor, kept: Tensor | None) -> Generator[Block, None, None]:
        processes, stopped = len(self.samples), False
        following, preceding = (self.rank + 1) % processes, (self.rank - 1) % processes
        held = rows.detach().contiguous()
        for step in range(processes):
            owner = (self.rank - step) % processes
            last = step == processes - 1
            incoming = held.new_empty(
                (self.samples[owner - 1] * self.views if not last else 0, held.shape[1])
            )
            operations = [
                dist.P2POp(operation, _bytes(block), self._global(peer), self.group)
                for operation, block, peer in (
                    (dist.isend, held, following),
                    (dist.irecv, incoming, preceding),
                )
                if block.numel() and not last
            ]
            with region("pysupcon::gather"):
                requests = dist.batch_isend_irecv(operations) if operations else []
            if not stopped:
                try:
                    yield Block(self.bounds[owner], self.bounds[owner + 1], None if step == 0 else held)
                except GeneratorExit:  # an error here; the others still wait for what comes through here
                    stopped = True
            with region("pysupcon::gather"):
                for request in requests:
                    request.wait()
            held = incoming

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


def _processes(group: ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory: copying needs no arithmetic, and every backend knows bytes."""
    return tensor.view(-1).view(torch.uint8)


@named("pysupcon::gather")
def _gather(own: Tensor, counts: tuple[int, ...], group: ProcessGroup | None) -> Tensor:
    """Own rows [counts[rank], ...] -> everybody's [sum of counts, ...], one process after the other."""
    most = max(counts)
    if most == 0:
        return own.new_empty(own.shape)
    if own.shape[0] == most:
        own = own.contiguous()
    else:
        padded = own.new_zeros((most, *own.shape[1:]))
        padded[: own.shape[0]] = own
        own = padded
    gathered = own.new_empty((len(counts), *own.shape))
    # Named all_gather_into_tensor before torch 2.14, or so.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(_bytes(gathered), _bytes(own), group=group)
    if min(counts) == most:
        return gathered.flatten(0, 1)
    return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])


def _agree(features: Tensor, must_match: dict[str, int], group: ProcessGroup | None) -> tuple[int, ...]:
    """Everybody's number of samples; on every process an error if what must be must_match is not.

    One message of a few integers, through the memory of the CPU where the group has a backend for it (as
    ``init_process_group()`` without a backend gives it), so that no GPU is waited for.
    """
    layout = {
        "dimensions of features": features.dim(),
        "views of features": features.shape[1] if features.dim() == 3 else 1,
        "width D of features": features.shape[-1],
        "dtype of features": _DTYPES.index(features.dtype),
        **must_match,
    }
    backends = dist.get_backend_config(group)
    device = torch.device("cpu") if "cpu:" in backends else features.device
    own = torch.tensor([features.shape[0], *layout.values()], device=device).unsqueeze(0)
    everybody = _gather(own, (1,) * _processes(group), group).tolist()
    for place, name in enumerate(layout, start=1):
        values = [row[place] for row in everybody]
        if len(set(values)) > 1:
            shown = [_DTYPES[value] for value in values] if name.startswith("dtype") else values
            raise ValueError(
                f"gather needs the same on every process, but {name}: {', '.join(map(str, shown))} "
                f"on processes 0 to {len(values) - 1}"
            )
    return tuple(row[0] for row in everybody)


def resolve(gather: object) -> AllGather:
    """What ``gather=True`` and ``gather="ring"`` of a loss stand for."""
    return Ring() if gather == "ring" else AllGather()


def warn_without_gather(name: str) -> None:
    """Say once that a loss among several processes sees its own rows only."""
    global _warned
    if _warned or _processes(None) == 1:
        return
    _warned = True
    warnings.warn(
        f"{name} runs in {_processes(None)} processes, and each contrasts its own rows only; "
        f"{name}(..., gather=True) contrasts with the rows of all of them, as one process with the whole "
        "batch would (this is said once)",
        stacklevel=6,  # of who calls the module
    )
