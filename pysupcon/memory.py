"""A queue of embeddings of earlier batches, which the losses take as ``memory``.

``loss(embeddings, labels, memory=queue)`` contrasts the batch with the filled slots of the queue, too.

>>> import torch, pysupcon
>>> queue = pysupcon.MemoryQueue(size=4, dim=2)
>>> queue.enqueue(torch.eye(2), torch.tensor([0, 1]))
>>> queue.weights  # 0: an empty slot
tensor([1., 1., 0., 0.])
>>> queue.enqueue(torch.ones(3, 2), torch.tensor([2, 3, 4]))  # the oldest row is replaced
>>> queue.labels
tensor([4, 1, 2, 3])
>>> queue.enqueue(torch.ones(1, 2, 2), torch.tensor([5]))  # two views of one sample
>>> queue.labels
tensor([4, 5, 5, 3])
"""

from __future__ import annotations

import importlib
from typing import Literal

import torch
from torch import Tensor, nn

from pysupcon.pairs.agreement import Code
from pysupcon.pairs.checks import check_choice, check_features, check_gather, check_ids, describe
from pysupcon.pairs.global_batch import Gather
from pysupcon.pairs.memory import NO_ID

__all__ = ["MemoryQueue"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class MemoryQueue(nn.Module):
    """First-in, first-out queue of rows, with a label and an instance id each (He et al. 2020, MoCo).

    All its state is in buffers: ``rows`` [size, dim], ``labels`` and ``instances`` int64 [size], ``position``
    (the next slot) and ``filled`` (number of filled slots), int64 without dimensions. ``state_dict`` holds
    them, and ``to`` moves them; the rows follow a change of the dtype. Nothing here waits for a GPU.

    :meth:`enqueue` writes in place. Call it after the backward. If the memory of a loss has changed since its
    forward, the backward raises an error, or (with ``normalize=True`` or another dtype, which copy the rows)
    the change has no effect.

    DistributedDataParallel copies the buffers of rank 0 to all ranks before every forward
    (``broadcast_buffers=True``, its default). If the queue is a submodule of the wrapped module, this costs
    the transfer of the whole queue, and without ``gather`` it replaces the rows of the other ranks. Keep the
    queue outside of the wrapped module, or pass ``broadcast_buffers=False``.

    Args:
        size: number of rows that the queue holds.
        dim: width D of the rows.
        dtype: float64, float32, bfloat16 or float16; None: torch's default dtype.
        device: of the buffers; None: torch's default device.

    Raises:
        TypeError: ``size`` or ``dim`` is not an integer.
        ValueError: ``size`` or ``dim`` is less than 1, or ``dtype`` is another one.
    """

    rows: Tensor
    labels: Tensor
    instances: Tensor
    position: Tensor
    filled: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {describe(value)}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be float64, float32, bfloat16 or float16, got {describe(dtype)}")
        self.size, self.dim = size, dim
        self.register_buffer("rows", torch.zeros(size, dim, dtype=dtype, device=device))
        for name in ("labels", "instances"):
            ids = torch.full((size,), NO_ID, dtype=torch.int64, device=device)
            self.register_buffer(name, ids)
        for name in ("position", "filled"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=device))

    @property
    def weights(self) -> Tensor:
        """1 for a filled slot and 0 for an empty one: [size], in the dtype of the rows."""
        slots = torch.arange(self.size, device=self.rows.device)  # they are filled in this order
        return (slots < self.filled).to(self.rows.dtype)

    @torch.no_grad()
    def enqueue(
        self,
        rows: Tensor,
        labels: Tensor | None = None,
        instances: Tensor | None = None,
        *,
        gather: bool | Literal["ring"] | Gather = False,
    ) -> None:
        """Appends rows; the oldest rows are replaced if the queue is full.

        The rows are copied without gradient and converted to the dtype of the queue. Their number may be 0,
        and it may be larger than the queue, which then keeps the last ``size`` rows.

        Args:
            rows: [N, dim], or [B, V, dim] with V views of each sample, on the queue's device.
            labels: integers [N], or [B]. None: the rows have no label, and a loss with labels takes them as
                negatives of every anchor. They are stored with the smallest int64.
            instances: integers [N], or [B]: rows of one number are views of one sample. None: the rows are
                views of no sample of a batch (stored likewise).
            gather: True appends the rows of all processes, ordered by rank, in every process. Their number
                may differ between processes. All processes must call this method, with queues of one size.
                The other values that a loss takes as ``gather`` have the same effect; an object says which
                process group. Several processes with ``gather`` are a graph break for torch.compile.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: an argument has the wrong dtype, shape or device. With ``gather`` all processes raise
                an error if one process does, or if their queues or the given arguments differ.
        """
        found = self._check_gather(gather)
        if found is None:
            self._append(*self._check(rows, labels, instances))
            return
        failure: Exception | None = None
        given = (labels is not None, instances is not None)
        checked = self.rows.new_empty(0, self.dim), self.labels.new_empty(0), self.labels.new_empty(0)
        try:
            checked = self._check(rows, labels, instances)
        except (TypeError, ValueError) as error:
            failure = error
        try:
            communicator = found.begin(checked[0], {
                "size of the queue": Code(self.size),
                "whether the arguments of enqueue are valid": Code.of(failure is None),
                "whether labels are given": Code.of(given[0]),
                "whether instances are given": Code.of(given[1]),
            })  # fmt: skip
        except ValueError:
            if failure is None:
                raise
        if failure is not None:
            raise failure
        if communicator is not None:
            # One sample has one row here; rows and ids are exchanged in the same way.
            checked = tuple(communicator.ids(values) for values in checked)  # type: ignore[assignment]
        self._append(*checked)

    def reset(self) -> None:
        """Empties the queue. Its buffers are as in a new queue."""
        for buffer in (self.rows, self.position, self.filled):
            buffer.zero_()
        for buffer in (self.labels, self.instances):
            buffer.fill_(NO_ID)

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.dim}, dtype={self.rows.dtype}"

    def _check(
        self, rows: Tensor, labels: Tensor | None, instances: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns rows [N, D] in the queue's dtype, labels and instances int64 [N]."""
        check_features("rows", rows)
        if rows.shape[-1] != self.dim:
            raise ValueError(f"rows must have the width D={self.dim} of the queue, got {describe(rows)}")
        if rows.device != self.rows.device:
            raise ValueError(f"rows must be on the queue's device, {self.rows.device}, got {rows.device}")
        views = rows.shape[1] if rows.dim() == 3 else 1

        def ids(name: str, given: Tensor | None) -> Tensor:
            if given is None:
                return self.labels.new_full((rows.shape[0] * views,), NO_ID)
            return check_ids(name, given, rows).repeat_interleave(views)

        flat = rows.detach().reshape(-1, self.dim).to(self.rows.dtype)
        return flat, ids("labels", labels), ids("instances", instances)

    def _append(self, rows: Tensor, labels: Tensor, instances: Tensor) -> None:
        count = rows.shape[0]
        kept = min(count, self.size)  # two writes to one slot have no order
        slots = torch.arange(count - kept, count, device=self.rows.device).add_(self.position)
        slots.remainder_(self.size)
        self.rows.index_copy_(0, slots, rows[count - kept :])
        self.labels.index_copy_(0, slots, labels[count - kept :])
        self.instances.index_copy_(0, slots, instances[count - kept :])
        self.position.add_(count).remainder_(self.size)
        self.filled.add_(count).clamp_(max=self.size)

    @staticmethod
    def _check_gather(gather: bool | str | Gather) -> Gather | None:
        if isinstance(gather, (bool, str)):
            check_choice("gather", gather, (False, True, "ring"))
            if gather is False or not _among_processes():
                return None
            found: Gather = importlib.import_module("pysupcon.distributed").resolve(gather)
            return found
        check_gather(gather)
        return gather


def _among_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
