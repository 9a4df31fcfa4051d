"""What the labels of the training samples mean for the contrastive loss, known before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pysupcon.config import Config
from pysupcon.data.datamodule import DataModule
from pysupcon.data.partners import balanced_share, per_class_share, shuffled_share
from pysupcon.data.unlabelled import UNKNOWN
from pysupcon.errors import ConfigError
from pysupcon.losses import LOSSES_BY_NAME
from pysupcon.trainer.diagnosis import ZERO_LOSS

ENOUGH = 0.9
"""Share of the samples with a partner from which on nothing is printed."""
SHOWN = 3
"""Names of classes that a line shows."""
OF_ONE_CLASS = ("cnce", "spread")
"""Losses of labels that separate samples of one class."""


class BatchNotes(NamedTuple):
    """Lines for the user, and the faults that they name, of :mod:`pysupcon.trainer.diagnosis`."""

    lines: list[str]
    told: set[str]


def batch_notes(config: Config, data: DataModule, processes: int) -> BatchNotes:
    """Compare the batches with what a contrastive loss of labels needs: partners of the class, and two
    classes.

    Args:
        config: resolved config.
        data: its data.
        processes: number of processes.

    Returns:
        The notes. There are none for losses without labels, and for samples with several labels.

    Raises:
        ConfigError: the training samples have one class, which leaves the loss without negatives.
    """
    samples = data.training
    labels = samples.coarse if config.data.labels == "coarse" else samples.fine
    name = config.loss.name
    of_labels = name != "none" and not LOSSES_BY_NAME[name].self_supervised
    if labels.dim() > 1 or not of_labels:
        return BatchNotes([], set())
    known = labels[labels != UNKNOWN]
    counts = torch.bincount(known, minlength=len(data.class_names))
    _check_classes(config, data, counts, len(labels) - len(known))
    notes = BatchNotes([], set())
    single = [data.class_names[label] for label in (counts == 1).nonzero().flatten().tolist()]
    if single:
        count = "1 class has" if len(single) == 1 else f"{len(single)} classes have"
        shown = ", ".join(single[:SHOWN]) + (", ..." if len(single) > SHOWN else "")
        notes.lines.append(
            f"{count} a single training sample ({shown}), which has no partner but itself. Add samples, or "
            "leave these classes out"
        )
    together = processes if config.loss.gather is False else 1
    share_of = _share_of(config, data, counts, len(labels) - len(known), together)
    size = max(config.data.global_batch_size // together, 1)
    share = share_of(size)
    if share >= ENOUGH or config.loss.queue > 0:  # the queue holds partners
        return notes
    if single and _repeats_samples(config, data, counts, size * together):
        views = "" if config.data.views == 1 else "and views "
        effect = f"the other samples have at most copies {views}of themselves as positives"
    elif share == 0 and config.data.views == 1:
        effect = "so the contrastive loss is 0"
        notes.told.add(ZERO_LOSS)
    elif config.data.views == 1:
        effect = "the other samples have no contrastive loss"
    else:
        effect = "the other samples have only their own views as positives"
    where = "a batch" if together == 1 else f"the part of a batch of each of the {processes} processes"
    notes.lines.append(
        f"{share:.0%} of the samples have a partner, another sample of their class, in {where} "
        f"(data.sampler {config.data.sampler}, {size} samples, {int((counts > 0).sum())} classes); {effect}. "
        "To change this: " + _remedies(config, counts, share_of, together)
    )
    return notes


def _check_classes(config: Config, data: DataModule, counts: Tensor, unknown: int) -> None:
    """Refuse a single class. Samples of unknown class may be negatives."""
    found = (counts > 0).nonzero().flatten().tolist()
    negatives = unknown > 0 and config.loss.unlabeled == "instance"
    if len(found) > 1 or config.loss.name in OF_ONE_CLASS or negatives:
        return
    level = config.data.labels
    other, names = ("fine", data.fine_names) if level == "coarse" else ("coarse", data.coarse_names)
    remedy = f"data.labels {other} ({len(names)} classes), " if len(names) > 1 else ""
    raise ConfigError(
        f"data.labels={level}: the {len(data.training)} training samples must have two or more classes for "
        f"loss.name={config.loss.name}, which contrasts classes, got one class, "
        f"{data.class_names[found[0]]!r}: use {remedy}a data.root whose "
        "folders are the classes, or loss.name infonce, which needs no labels"
    )


def _repeats_samples(config: Config, data: DataModule, counts: Tensor, size: int) -> bool:
    """Whether a batch can hold a sample of a class of one sample several times."""
    if config.data.sampler in ("per_class", "shuffled"):
        return config.data.sampler == "per_class"
    return size > (int((counts > 0).sum()) if data.groups is None else len(data.groups.parent))


def _share_of(
    config: Config, data: DataModule, counts: Tensor, unknown: int, together: int
) -> Callable[[int], float]:
    """The share of the samples with a partner as a function of the number of samples in the batch, or in the
    part of each of ``together`` processes."""
    if config.data.sampler == "per_class":
        return lambda size: per_class_share(counts)
    if config.data.sampler == "shuffled":
        return lambda size: shuffled_share(counts, size, unknown)
    if config.data.sampler == "groups":
        assert data.groups is not None, "call Config.resolve() first"
        parents, sizes = data.groups.parent, data.groups.counts
    else:
        parents = (counts > 0).nonzero().flatten()
        sizes = counts[parents]
    return lambda size: balanced_share(parents, sizes, size, together)


def _remedies(config: Config, counts: Tensor, share_of: Callable[[int], float], together: int) -> str:
    size, classes = config.data.global_batch_size, int((counts > 0).sum())
    remedies = [
        f"data.sampler per_class with data.samples_per_class {count} (pysupcon.data.PerClassBatches in a "
        "loop of your own)"
        for count in range(2, size // 2 + 1)
        if size % count == 0
        and size // count <= classes
        and size // count % together == 0
        and per_class_share(counts) > share_of(size // together)
    ][:1]
    low, high = size // together, int(counts.sum()) // together
    if share_of(high) >= ENOUGH:
        while low < high - 1:  # the share rises with the number of samples
            middle = (low + high) // 2
            low, high = (low, middle) if share_of(middle) >= ENOUGH else (middle, high)
        remedies.append(f"data.batch_size of at least {high * together}")
    if together > 1:
        remedies.append("loss.gather true")
    return ", or ".join(remedies) or "more samples of each class"
