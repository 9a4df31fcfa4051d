"""Inputs, results and protocol of the evaluators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

Level = Literal["coarse", "fine"]
LEVELS: tuple[Level, ...] = ("fine", "coarse")

#: A result is a name, with parts separated by "/", and a number or an outcome. An outcome is a tensor
#: [N_test] on the CPU with one entry per test sample, used for bootstrap intervals and paired comparisons.
#: NaN marks samples without a value. The last part of its name is its kind, e.g. "correct" (bool) or
#: "predicted" (int64 label).
Result = tuple[str, "float | Tensor"]


def _check_labels(name: str, labels: Tensor, rows: int) -> None:
    if labels.dtype != torch.int64 or labels.shape != (rows,):
        raise ValueError(
            f"{name} must be int64 of shape [N]=[{rows}] (one label per feature row), "
            f"got {labels.dtype} of shape {list(labels.shape)}"
        )


@dataclass(frozen=True)
class FeatureSet:
    """Frozen features of one split and their labels, all on one device.

    Args:
        features: [N, D] of a floating-point dtype, finite, N >= 1 and D >= 1.
        coarse: [N] int64, the training labels of the encoder.
        fine: [N] int64, labels not used for training; equal to ``coarse`` in data sets with one level.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device, or features are not finite.
    """

    features: Tensor
    coarse: Tensor
    fine: Tensor

    def __post_init__(self) -> None:
        features = self.features
        if features.ndim != 2 or not features.is_floating_point() or 0 in features.shape:
            raise ValueError(
                "features must be floating point of shape [N, D] with N >= 1 and D >= 1, "
                f"got {features.dtype} of shape {list(features.shape)}"
            )
        _check_labels("coarse", self.coarse, len(features))
        _check_labels("fine", self.fine, len(features))
        for name, labels in (("coarse", self.coarse), ("fine", self.fine)):
            if labels.device != features.device:
                raise ValueError(
                    f"{name} must be on the features' device {features.device}, got {labels.device}"
                )
        finite = torch.isfinite(features).all(dim=1)
        if not finite.all():
            bad = (~finite).nonzero().flatten()
            raise ValueError(
                f"features must be finite, got NaN or infinity in {len(bad)} of {len(features)} rows, "
                f"the first of them row {int(bad[0])}"
            )

    def __len__(self) -> int:
        return len(self.features)

    def labels(self, level: Level) -> Tensor:
        """``coarse`` or ``fine``, [N] int64."""
        if level not in LEVELS:
            raise ValueError(f'level must be "fine" or "coarse", got {level!r}')
        return self.coarse if level == "coarse" else self.fine

    def labelled(self, ignore_index: int) -> FeatureSet:
        """The rows whose labels are known.

        Args:
            ignore_index: a row with this coarse or fine label is left out.

        Raises:
            ValueError: no row is left.
        """
        known = (self.coarse != ignore_index) & (self.fine != ignore_index)
        if not known.any():
            raise ValueError(f"all {len(self)} rows have the label ignore_index={ignore_index}")
        return FeatureSet(self.features[known], self.coarse[known], self.fine[known])


@dataclass(frozen=True)
class LinearHead:
    """A linear classifier of unnormalised features: ``weight`` [C, D] and ``bias`` [C], fp64 on the CPU."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Logits [N, C], fp64, of ``features`` [N, D]."""
        return torch.addmm(self.bias, features.to("cpu", torch.float64), self.weight.T)


def _cloned(features: Tensor | None) -> Tensor | None:
    return None if features is None else features.clone()


@dataclass(frozen=True)
class FeatureSplits:
    """Three splits of one data set: ``train`` for fitting, ``val`` for model selection, ``test`` for testing.

    ``head`` is the classifier trained with the encoder, or None. Row c of its weight belongs to coarse label
    c. ``augmented`` are features [R, N, D] of R passes over augmented images of ``train``, in its order, or
    None; only the probes see them. They may lie on another device, as they need R times the memory.
    """

    train: FeatureSet
    val: FeatureSet
    test: FeatureSet
    head: LinearHead | None = None
    augmented: Tensor | None = None

    def __post_init__(self) -> None:
        widths = {name: split.features.shape[1] for name, split in self.items()}
        if len(set(widths.values())) != 1:
            raise ValueError(f"the features of all splits must have the same width D, got {widths}")
        devices = {name: str(split.features.device) for name, split in self.items()}
        if len(set(devices.values())) != 1:
            raise ValueError(f"the features of all splits must be on one device, got {devices}")
        width = self.train.features.shape[1]
        if self.head is not None and self.head.weight.shape[1] != width:
            raise ValueError(
                f"head.weight must have the shape [C, D] with D={width}, the features' width, got "
                f"{list(self.head.weight.shape)}"
            )
        if self.augmented is not None:
            self._check_augmented(self.augmented)

    def _check_augmented(self, augmented: Tensor) -> None:
        rows = self.train.features.shape
        if augmented.ndim != 3 or 0 in augmented.shape or augmented.shape[1:] != rows:
            raise ValueError(
                f"augmented must have the shape [R, N, D] with R >= 1 and [N, D]={list(rows)}, the shape of "
                f"the training features, got {list(augmented.shape)}"
            )
        if not augmented.is_floating_point():
            raise ValueError(f"augmented must be floating point, got {augmented.dtype}")
        if not all(bool(features.isfinite().all()) for features in augmented):
            raise ValueError("augmented must be finite, got NaN or infinity")

    def augmented_passes(self, count: int) -> Tensor | None:
        """The first ``count`` passes of ``augmented``, [count, N, D]; None for 0.

        Raises:
            ValueError: there are fewer.
        """
        if count == 0:
            return None
        passes = 0 if self.augmented is None else len(self.augmented)
        if self.augmented is None or passes < count:
            raise ValueError(
                f"augmented_passes={count} needs as many passes in FeatureSplits.augmented [R, N, D], "
                f"got {passes}"
            )
        return self.augmented[:count]

    def copy(self) -> FeatureSplits:
        """The same splits in memory of their own."""
        copies = {
            name: FeatureSet(split.features.clone(), split.coarse.clone(), split.fine.clone())
            for name, split in self.items()
        }
        head = self.head and LinearHead(self.head.weight.clone(), self.head.bias.clone())
        return FeatureSplits(**copies, head=head, augmented=_cloned(self.augmented))

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """The levels of labels: "fine" alone if every coarse class is one fine class."""
        pairs = torch.cat([torch.stack([split.coarse, split.fine]) for _, split in self.items()], dim=1)
        sizes = {pairs.unique(dim=1).shape[1], *(len(labels.unique()) for labels in pairs)}
        return ("fine",) if len(sizes) == 1 else LEVELS

    def labelled(self, ignore_index: int) -> FeatureSplits:
        """The splits without the rows whose labels are not known, for every evaluator.

        Args:
            ignore_index: a row with this coarse or fine label is left out.

        Raises:
            ValueError: a split has no other row; the message names it.
        """
        known: dict[str, FeatureSet] = {}
        for name, split in self.items():
            try:
                known[name] = split.labelled(ignore_index)
            except ValueError as error:
                raise ValueError(f"the {name} split holds no row of a known class: {error}") from None
        augmented = self.augmented
        if augmented is not None:
            keep = (self.train.coarse != ignore_index) & (self.train.fine != ignore_index)
            augmented = augmented[:, keep.to(augmented.device)]
        return FeatureSplits(**known, head=self.head, augmented=augmented)

    def items(self) -> Iterator[tuple[str, FeatureSet]]:
        """("train", ...), ("val", ...), ("test", ...)."""
        yield "train", self.train
        yield "val", self.val
        yield "test", self.test


class Evaluator(Protocol):
    """Evaluates frozen features. It prints nothing and is deterministic.

    Attributes:
        name: its name in a config and the first part of the name of every result.
        units: the unit of each result, by the last parts of its name.
        meanings: what each result says, in some words, by the last parts of its name.
        headline: patterns (fnmatch, without the evaluator's name) of the results that a terminal shows.
    """

    name: ClassVar[str]
    units: ClassVar[Mapping[str, str]]
    meanings: ClassVar[Mapping[str, str]]
    headline: ClassVar[Sequence[str]]

    def __init__(self, config: Any) -> None: ...

    def __call__(self, splits: FeatureSplits, *, progress: bool = False) -> Iterator[Result]:
        """Yield (name, value) pairs; ``progress`` shows progress bars on standard error."""
        ...


def class_index(labels: Tensor, classes: Tensor) -> Tensor:
    """Position of each label [N] in the sorted, distinct ``classes`` [C]; -1 for other labels."""
    index = torch.searchsorted(classes, labels).clamp_(max=len(classes) - 1)
    return torch.where(classes[index] == labels, index, -1)


def accuracy_results(prefix: str, predicted: Tensor, truth: Tensor) -> Iterator[Result]:
    """Yield ``prefix/accuracy`` and its outcomes ``prefix/correct``, [N] bool, ``prefix/predicted``, [N]
    int64."""
    predicted, truth = predicted.detach().cpu(), truth.cpu()
    correct = predicted == truth
    yield f"{prefix}/accuracy", correct.double().mean().item()
    yield f"{prefix}/correct", correct
    yield f"{prefix}/predicted", predicted
