"""Batches of a fixed number of classes with a fixed number of samples each, for any DataLoader."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

__all__ = ["PerClassBatches", "as_integers", "deal_batches", "group_by_label"]


def group_by_label(labels: Iterable[Any]) -> list[list[int]]:
    """Groups samples by label.

    Args:
        labels: [N], a list, NumPy array, tensor or another iterable of integers, whole floats, strings or
            other hashable values.

    Returns:
        Indices of the samples of each class. Classes are in the order of their first samples.

    Raises:
        TypeError: ``labels`` is not a one-dimensional collection of hashable values, or one is None.
        ValueError: a label is NaN or another float that is no whole number.
    """
    members: dict[Any, list[int]] = {}
    try:
        values = labels.tolist() if hasattr(labels, "tolist") else list(labels)
        for index, value in enumerate(values):
            label = value.item() if isinstance(value, Tensor) else value
            if isinstance(label, (tuple, frozenset)):
                raise TypeError("a label is one value; a dataset of (sample, label) pairs is not its labels")
            members.setdefault(label, []).append(index)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"labels must be one label per sample, in one dimension, got {describe_labels(labels)}"
        ) from error
    for label, (first, *_) in members.items():
        if label is None:
            raise TypeError(f"labels must be integers or strings, got None at index {first}")
        if label != label:
            raise ValueError(f"labels must not be NaN, which equals no other label, got one at index {first}")
        if isinstance(label, float) and not label.is_integer():
            raise ValueError(f"labels must be integers or strings, got {label!r} at index {first}")
    return list(members.values())


def as_integers(labels: Any) -> Tensor:
    """Convert labels to int64 [N] on the CPU.

    Args:
        labels: integers or bools [N]: a tensor, an array or a sequence.

    Raises:
        TypeError: they are something else, e.g. floats, text or of another shape; the message says what.
    """
    found = _as_tensor(labels)
    if found is not None and found.dim() == 1:
        kind = found.dtype
        if found.numel() == 0 or not (kind.is_floating_point or kind.is_complex):
            return found.to("cpu", torch.int64)
    raise TypeError(f"labels must be integers [N], one per sample, got {describe_labels(labels)}")


def _as_tensor(labels: Any) -> Tensor | None:
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def describe_labels(labels: Any) -> str:
    """The type, shape, dtype and first value of something that was passed as labels."""
    shape, dtype = getattr(labels, "shape", None), getattr(labels, "dtype", None)
    text = type(labels).__name__
    text += "" if dtype is None else f" of {str(dtype).removeprefix('torch.')}"
    text += "" if shape is None else f" of shape {list(shape)}"
    if isinstance(labels, (list, tuple)):
        text += f" of {len(labels)}"
        if labels:
            text += f", the first one {labels[0]!r:.40}"
    found = _as_tensor(labels)
    missing = 0 if found is None or not found.is_floating_point() else int(found.isnan().sum())
    return text + (f" with {missing} NaN" if missing else "")


def _integer(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


class _Deck:
    """Deals numbers 0 to size - 1 in random order: each once, then each once again, and so on."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self.size, self.generator = size, generator
        self.rest: list[int] = []

    def deal(self, count: int) -> list[int]:
        """The next ``count`` numbers. They differ if ``count`` is at most ``size``; otherwise each number
        occurs floor(count / size) or ceil(count / size) times."""
        rounds, count = divmod(count, self.size)
        dealt = list(range(self.size)) * rounds if rounds else []
        if len(self.rest) < count:  # numbers that are left come first, and once more at the end
            order = torch.randperm(self.size, generator=self.generator).tolist()
            left = set(self.rest)
            self.rest += [k for k in order if k not in left] + [k for k in order if k in left]
        dealt += self.rest[:count]
        del self.rest[:count]
        return dealt


def deal_batches(
    members: list[list[int]], classes_per_batch: int, samples_per_class: int, generator: torch.Generator
) -> Iterator[list[int]]:
    """Yields batches without end, as :class:`PerClassBatches` describes them.

    Args:
        members: indices of the samples of each class.
        classes_per_batch: at most the number of classes.
        samples_per_class: samples of each class in a batch.
        generator: source of the order.
    """
    classes = _Deck(len(members), generator)
    samples = [_Deck(len(indices), generator) for indices in members]
    while True:
        batch: list[int] = []
        for label in classes.deal(classes_per_batch):
            own = members[label]
            batch += [own[k] for k in samples[label].deal(samples_per_class)]
        yield batch


class PerClassBatches(Sampler[list[int]]):
    """Batches of ``classes_per_batch`` classes with ``samples_per_class`` samples each: a ``batch_sampler``.

    Every sample of a batch has a partner of its class. Samples of a class are neighbours in the batch.
    Classes are drawn in random order without replacement, and so are the samples of a class. Therefore all
    classes occur equally often, and samples of a large class occur less often than those of a small class.

    A class with fewer than ``samples_per_class`` samples repeats them within a batch; the counts of its
    samples differ by at most one. The only sample of a class is therefore its own partner. Such a pair is
    useful if the dataset augments at random. If it does not, leave the sample out of the dataset.

    The batches depend on ``seed`` and the epoch only. Every iteration uses the next epoch; :meth:`set_epoch`
    chooses one, for example to resume a training.

    With several processes, process r gets batches r, r + num_processes, ... of the epoch. All processes get
    equally many. A loader that Accelerate prepares divides the batches in the same way, so give
    ``num_processes=1, process_index=0`` then. If it splits every batch (``split_batches=True``),
    ``classes_per_batch`` must be a multiple of the number of processes.

    Args:
        labels: [N], one label per sample: a list, NumPy array or tensor of integers or strings. Whole floats
            count as integers; NaN, None and other floats are refused. Every value is a class, -1 too.
        classes_per_batch: classes in a batch of one process, from 1 to the number of classes.
        samples_per_class: samples of each class in a batch, at least 2.
        batches: batches of an epoch over all processes, rounded up to a multiple of ``num_processes``. None:
            as many as N samples fill, rounded up.
        seed: seed of the order, the same on all processes.
        num_processes: processes that divide the batches. None: 1; with several processes of torch.distributed
            it must be given.
        process_index: index of this process; give it with ``num_processes``.

    Attributes:
        batch_size: classes_per_batch * samples_per_class.
        epoch: epoch of the next iteration, from 0.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. Iteration raises ValueError if
            ``num_processes`` is missing.
    """

    drop_last = False  # read by Accelerate, like batch_size; all batches are full

    def __init__(
        self,
        labels: Iterable[Any],
        classes_per_batch: int,
        samples_per_class: int,
        *,
        batches: int | None = None,
        seed: int = 0,
        num_processes: int | None = None,
        process_index: int | None = None,
    ) -> None:
        self._members = group_by_label(labels)
        self.classes_per_batch = _integer("classes_per_batch", classes_per_batch, 1)
        self.samples_per_class = _integer("samples_per_class", samples_per_class, 2)
        self.seed = _integer("seed", seed, 0)
        if self.classes_per_batch > len(self._members):
            raise ValueError(
                f"classes_per_batch must be at most the {len(self._members)} classes of labels, "
                f"got {classes_per_batch}"
            )
        if (num_processes is None) != (process_index is None):
            raise ValueError(
                "num_processes and process_index must be given together, "
                f"got {num_processes} and {process_index}"
            )
        self._divided = num_processes is not None
        self.num_processes = 1 if num_processes is None else _integer("num_processes", num_processes, 1)
        self.process_index = 0 if process_index is None else _integer("process_index", process_index, 0)
        if self.process_index >= self.num_processes:
            raise ValueError(
                f"process_index must be less than num_processes={num_processes}, got {process_index}"
            )
        self.batch_size = self.classes_per_batch * self.samples_per_class
        if batches is None:
            batches = -(-sum(map(len, self._members)) // self.batch_size)
        self.batches = _integer("batches", batches, 1)
        self.epoch = self._start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Chooses the batches of the next iteration.

        Args:
            epoch: the epoch, from 0.
            start: batches of this process to skip, for example those that an interrupted training has used.
        """
        self.epoch, self._start = _integer("epoch", epoch, 0), _integer("start", start, 0)

    def __len__(self) -> int:
        """Batches of this process in an epoch."""
        return -(-self.batches // self.num_processes)

    def __iter__(self) -> Iterator[list[int]]:
        if not self._divided and _world_size() > 1:
            raise ValueError(
                f"num_processes and process_index must be given among the {_world_size()} processes of "
                "torch.distributed: the world size and the rank, or 1 and 0 if accelerator.prepare divides "
                "the batches of this loader"
            )
        processes, start = self.num_processes, self._start
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        self.epoch, self._start = self.epoch + 1, 0
        drawn = deal_batches(self._members, self.classes_per_batch, self.samples_per_class, generator)
        for index in range(len(self) * processes):
            batch = next(drawn)
            if index % processes == self.process_index and index // processes >= start:
                yield batch


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
