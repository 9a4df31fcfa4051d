"""Losses over several processes: each process contrasts its rows with the rows of all processes.

``SupConLoss(gather=True)`` (and every other loss) uses :class:`AllGather`, ``gather="ring"`` uses
:class:`Ring`; pass an object of either class to choose a process group. ``torch.distributed`` must be
initialised, for example by torchrun, ``accelerate launch`` or ``init_process_group``. If it is not, or if
there is one process, a loss behaves as with ``gather=False``. Any backend that supports all-gather (for a
ring: send and receive) works, such as NCCL and gloo, with or without DistributedDataParallel. This module
only exchanges rows; the differentiable step, with its backward, is :mod:`pysupcon.pairs.gathered`.

>>> import torch, pysupcon
>>> loss = pysupcon.SupConLoss(temperature=1.0, gather=True)  # here in one process
>>> loss(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1]))
tensor(0.5514)

Inputs of each process: features, and labels or instances, of its own samples. The number of samples may
differ between processes and may be 0. A class must have the same label on all processes. If ``instances``
are given, rows with the same id on two processes are views of one sample.

With ``candidates`` (two towers) the anchors of each process are contrasted with the candidates of all
processes, whose number may differ, too. Candidates that every process holds count once per process. Both
sides get complete gradients. Without labels, and in losses that need views (cNCE, spread), candidate k of a
process matches its sample k unless ``instances`` are given; each process then needs as many candidates as
samples. With ``contrast_mode="one"`` the candidates are all rows. A ``mask`` is refused.

``candidate_weights``, ``anchor_weights``, ``hard_negatives``, ``ignore_index``, ``unlabeled``,
``class_balance`` and ``batch_negatives`` mean what they mean in one process with the whole batch. The memory
of a process is contrasted with the anchors of this process only. For equal results, fill it with the rows of
all processes: ``queue.enqueue(rows, labels, gather=True)``. ``exclude_batch_from_memory`` leaves out the
instances of the batches of all processes. ``class_balance`` with ``memory`` is refused, because the weight of
a candidate would depend on the process.

Everything else must be the same: the loss and its parameters, the options of the loss, which arguments are
given, which of features and candidates need gradients, numbers of views, D and dtype. One message from each
process compares them before any rows are sent (:mod:`pysupcon.pairs.agreement`). If a value differs, or if a
process refuses its arguments, all processes raise an error that names the value and the ranks. On a CPU all
processes also refuse rows of one process that are not finite or too large. Numbers count as the same if they
differ by at most 1e-6 of the larger one, because each process may compute a schedule. A learnable temperature
that differs by more than 1e-4 causes a warning, once, and no error. A temperature or ``base_temperature`` on
a GPU is compared only if the process group has no CPU backend; otherwise the host would have to wait for the
GPU.

Results of each process, for W processes and K anchors in total that have a loss:
    reduction="mean"  W / K times the sum over its own anchors. The mean over the processes is the loss of one
                      process with the whole batch. After DistributedDataParallel has averaged the gradients,
                      each parameter's gradient is that of one process, also for batches of unequal size. With
                      anchor_weights the sum is weighted, and K is the sum of the weights of these anchors.
    "sum"             the sum over its own anchors. The sum over the processes is that of one process.
    "none"            the losses of its own anchors, equal to those of one process.
The gradient of the features, and of the candidates, is that of the sum of the results of all processes, not
only of the own result, because the losses of other processes depend on the own rows, too. With "mean" it is W
times the gradient of one process, before the average over processes; with "sum" it is equal to it, so the
average of DistributedDataParallel must be multiplied by W. The gradient of a learnable temperature is
partial: its average (with "sum": its sum) over the processes is complete. DistributedDataParallel averages
it; without it, all-reduce the gradient.

Bytes received per process and step, with N rows of D elements of e bytes in total, M of them its own (a ring
sends as many):
    rows            (N - M) D e; for a ring once more in the backward, and for SINCERE twice each way
    labels          8 per sample of another process; the same for given instances, on both sides
    weights         8 per row of another process for candidate_weights, and per anchor for anchor_weights
    counts          with memory or hard_negatives 8 to 24 per anchor of another process
    backward        at most 32 per anchor (:mod:`pysupcon.pairs.gathered`)
    arguments       one message of 288 from each process
With candidates, N, M and D are those of the candidates in the first line. If they need a gradient, or with
``contrast_mode="one"``, the backward also receives the anchors of other processes (D e per row); if not, its
scalars are not sent. Gradients of rows are not communicated. Batches of unequal size are padded to the
largest, except for a ring.

Every process must call the loss with ``gather``, and its backward, equally often. Under ``torch.compile`` the
loss is a graph break. The host reads the message about the arguments, which blocks on a GPU unless the
process group also has a CPU backend (``init_process_group()`` without a backend, or
``"cpu:gloo,cuda:nccl"``).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from pysupcon.caller import warn_caller
from pysupcon.pairs.agreement import Code, check_norms, describe_difference, largest_norm
from pysupcon.pairs.global_batch import Block
from pysupcon.ranges import named, region

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["AllGather", "Ring"]

_warned: set[str] = set()


class AllGather:
    """All-gathers the rows once; every process keeps all candidates until its backward.

    Args:
        group: process group; None: the default group.
    """

    _mode = "True"  # as the argument ``gather`` of a loss

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group

    @torch.compiler.disable
    def begin(
        self, features: Tensor, must_match: dict[str, int], candidates: Tensor | None = None
    ) -> _Communicator | None:
        """Implements :meth:`pysupcon.pairs.global_batch.Gather.begin`."""
        if _world_size(self.group) == 1:
            _warn_without_group()
            return None
        must_match = {**must_match, "gather": Code.of(self._mode)}
        samples, of_candidates = _exchange_arguments(features, must_match, self.group, candidates)
        communicator = self._communicator(samples, _views(features))
        if candidates is not None:
            communicator.candidates = self._communicator(of_candidates, _views(candidates))
        return communicator

    def _communicator(self, samples: tuple[int, ...], views: int) -> _Communicator:
        return _AllGatherCommunicator(samples, views, self.group)


class Ring(AllGather):
    """Passes the rows around a ring: each process stores its own rows and two blocks of other processes.

    For batches whose rows do not fit into the memory of one device. Rows are sent once more in the backward
    (for SINCERE twice each way), while the previous block is processed.

    Args:
        group: process group; None: the default group.
    """

    _mode = "'ring'"

    def _communicator(self, samples: tuple[int, ...], views: int) -> _Communicator:
        return _RingCommunicator(samples, views, self.group)


class _Communicator(ABC):
    """Implements :class:`pysupcon.pairs.global_batch.Communicator`."""

    def __init__(self, samples: tuple[int, ...], views: int, group: ProcessGroup | None) -> None:
        self.samples = samples
        self.views = views
        self.rows = tuple(count * views for count in samples)
        self.group = group
        self.rank = dist.get_rank(group)
        self.candidates: _Communicator | None = None
        self.bounds = [0]
        for count in samples:
            self.bounds.append(self.bounds[-1] + count)

    def with_views(self, views: int) -> _Communicator:
        return type(self)(self.samples, views, self.group)

    def ids(self, own: Tensor) -> Tensor:
        return _all_gather(own, self.samples, self.group)

    def exchange(self, columns: Tensor) -> Tensor:
        return _all_gather(columns.T, self.rows, self.group).T.contiguous()

    @abstractmethod
    def keep(self, rows: Tensor) -> Tensor | None: ...

    @abstractmethod
    def blocks(self, rows: Tensor, kept: Tensor | None) -> Generator[Block, None, None]: ...


class _AllGatherCommunicator(_Communicator):
    def keep(self, rows: Tensor) -> Tensor | None:
        return _all_gather(rows.detach(), self.rows, self.group)

    def blocks(self, rows: Tensor, kept: Tensor | None) -> Generator[Block, None, None]:
        yield Block(0, self.bounds[-1], kept)


class _RingCommunicator(_Communicator):
    def keep(self, rows: Tensor) -> Tensor | None:
        return None

    def blocks(self, rows: Tensor, kept: Tensor | None) -> Generator[Block, None, None]:
        world, closed = len(self.samples), False
        successor, predecessor = (self.rank + 1) % world, (self.rank - 1) % world
        current = rows.detach().contiguous()
        for step in range(world):
            owner = (self.rank - step) % world
            last = step == world - 1
            incoming = current.new_empty((0 if last else self.rows[owner - 1], current.shape[1]))
            operations = [
                dist.P2POp(operation, _bytes(block), self._global_rank(peer), self.group)
                for operation, block, peer in (
                    (dist.isend, current, successor),
                    (dist.irecv, incoming, predecessor),
                )
                if block.numel() and not last
            ]
            with region("pysupcon::gather"):
                requests = dist.batch_isend_irecv(operations) if operations else []
            if not closed:
                try:
                    yield Block(self.bounds[owner], self.bounds[owner + 1], None if step == 0 else current)
                except GeneratorExit:  # after an error; the other processes still need the remaining blocks
                    closed = True
            with region("pysupcon::gather"):
                for request in requests:
                    request.wait()
            current = incoming

    def _global_rank(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


def _world_size(group: ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def _bytes(tensor: Tensor) -> Tensor:
    """Views a tensor as bytes, which every backend can copy."""
    return tensor.view(-1).view(torch.uint8)


@named("pysupcon::gather")
def _all_gather(own: Tensor, counts: tuple[int, ...], group: ProcessGroup | None) -> Tensor:
    """All-gathers rows: [counts[rank], ...] of each process -> [sum of counts, ...], ordered by rank."""
    largest = max(counts)
    if largest == 0:
        return own.new_empty(own.shape)
    if own.shape[0] == largest:
        own = own.contiguous()
    else:
        padded = own.new_zeros((largest, *own.shape[1:]))
        padded[: own.shape[0]] = own
        own = padded
    gathered = own.new_empty((len(counts), *own.shape))
    # Its name is all_gather_into_tensor in torch before 2.14.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(_bytes(gathered), _bytes(own), group=group)
    if min(counts) == largest:
        return gathered.flatten(0, 1)
    return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])


def _views(features: Tensor) -> int:
    return features.shape[1] if features.dim() == 3 else 1


def _exchange_arguments(
    features: Tensor, must_match: dict[str, int], group: ProcessGroup | None, candidates: Tensor | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Compares the arguments of all processes, and returns the numbers of samples and of candidates of each.

    It all-gathers a few integers, in CPU memory if the group has a CPU backend, because reading them from a
    GPU would block the host. A temperature on a GPU is compared only if the message is on the GPU, too.

    Raises:
        ValueError: on every process, if a value that must be the same differs, or if rows of a process on a
            CPU are not finite or too large.
    """
    codes = {
        **must_match,
        "number of dimensions of features": Code(features.dim()),
        "number of views of features": Code(_views(features)),
        "number of views of candidates": Code(0 if candidates is None else _views(candidates)),
        "width D of features": Code(features.shape[-1]),
        "dtype of features": Code.of(features.dtype),
    }
    backends = dist.get_backend_config(group)
    device = torch.device("cpu") if "cpu:" in backends else features.device
    counts: list[int] = []
    for rows in (features, candidates):
        counts += (0, Code.of(0.0)) if rows is None else (rows.shape[0], Code.of(largest_norm(rows)))
    first = len(counts)
    own = torch.tensor([*counts, *codes.values()], device=device)
    for column, code in enumerate(codes.values(), start=first):
        if isinstance(code, Code) and code.tensor is not None and device.type == code.tensor.device.type:
            own[column] = code.tensor.double().view(torch.int64)
    world = _world_size(group)
    gathered = _all_gather(own.unsqueeze(0), (1,) * world, group).tolist()
    ranks = range(world) if group is None else dist.get_process_group_ranks(group)
    if any(row[first:] != gathered[0][first:] for row in gathered):
        _compare(codes, [row[first:] for row in gathered], ranks)
    norms, candidate_norms = ([Code.of(0.0).decode(row[column]) for row in gathered] for column in (1, 3))
    temperature = codes.get("temperature")
    if isinstance(temperature, Code):
        column = first + list(codes).index("temperature")
        temperatures = [temperature.decode(row[column]) for row in gathered]
        check_norms(norms, None if candidates is None else candidate_norms, temperatures, ranks)
    return tuple(row[0] for row in gathered), tuple(row[2] for row in gathered)


def _compare(codes: dict[str, int], gathered: list[list[int]], ranks: Sequence[int]) -> None:
    """Refuses the first of ``codes`` that differs between the processes; ``gathered``: codes by process."""
    for (name, own), values in zip(codes.items(), zip(*gathered, strict=True), strict=True):
        code = own if isinstance(own, Code) else Code(own)
        if not code.same(values):
            message = describe_difference(name, code, values, ranks)
            if not code.learnable:
                raise ValueError(message)
            _warn_drift(message)


def _warn_drift(message: str) -> None:
    """Warns once that a learnable temperature differs between processes."""
    if "drift" not in _warned:
        _warned.add("drift")
        warn_caller(
            f"{message}. It is learnable, and its gradient in each process is only a part: average the "
            "gradient over the processes, with DistributedDataParallel around the loss or with "
            "torch.distributed.all_reduce, and start from the same value (this warning is shown once)"
        )


def resolve(gather: object) -> AllGather:
    """Returns the object that ``gather=True`` or ``gather="ring"`` of a loss stands for."""
    return Ring() if gather == "ring" else AllGather()


def _warn_without_group() -> None:
    """Warns once if a launcher started several processes, but ``torch.distributed`` is not initialised."""
    if "no group" in _warned or (dist.is_available() and dist.is_initialized()):
        return
    # torchrun sets both; WORLD_SIZE alone is also set by other tools.
    started = os.environ.get("WORLD_SIZE", "1")
    if not (started.isdecimal() and int(started) > 1 and "LOCAL_RANK" in os.environ):
        return
    _warned.add("no group")
    warn_caller(
        f"gather is given and a launcher started {started} processes (WORLD_SIZE), but torch.distributed is "
        "not initialised: this process contrasts its own rows only; call "
        "torch.distributed.init_process_group() or create an accelerate.Accelerator before (this warning is "
        "shown once)"
    )


def warn_without_gather(name: str) -> None:
    """Warns once that a loss in one of several processes contrasts only the rows of its process.

    Args:
        name: of the loss.
    """
    if "no gather" in _warned or _world_size(None) == 1:
        return
    _warned.add("no gather")
    warn_caller(
        f"{name} runs in {_world_size(None)} processes, and each contrasts its own rows only; "
        f"{name}(..., gather=True), in the trainer --loss.gather true, contrasts with the rows of all "
        "processes, as one process with the whole batch would (this warning is shown once)"
    )
