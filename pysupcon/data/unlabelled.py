"""Samples whose class is not known: one class of a data set, taken out by ``data.ignore_index``."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from pysupcon.data.samples import Images, LazyImages, Samples, Source
from pysupcon.errors import ConfigError

UNKNOWN = -1
"""Label of a sample whose class is not known."""


def take_out(source: Source, level: Literal["coarse", "fine"], index: int) -> tuple[Source, Samples]:
    """Take the samples of one class out of a data set.

    Args:
        source: the data set.
        level: the labels that ``index`` belongs to.
        index: label of the samples whose class is not known.

    Returns:
        The data set of the other classes, numbered without gaps, and the samples of the training part that
        were taken out, with the label :data:`UNKNOWN`. Those of official test and validation splits are
        dropped.

    Raises:
        ConfigError: no sample has the label, or every sample of a part has it.
    """
    names = source.coarse_names if level == "coarse" else source.fine_names
    if source.labels_by_name and str(index) in names:
        index = names.index(str(index))
    parts = {"train": source.train, "val": source.val, "test": source.test}
    given = {name: samples for name, samples in parts.items() if samples is not None}
    unknown = {name: (samples.coarse if level == "coarse" else samples.fine) == index
               for name, samples in given.items()}  # fmt: skip
    if not any(bool(rows.any()) for rows in unknown.values()):
        shown = ", ".join(f"{label} ({name})" for label, name in enumerate(names[:5]))
        raise ConfigError(
            f"data.ignore_index must be the label of some samples at data.labels={level}, i.e. one of the "
            f"{len(names)} labels {shown}{', ...' if len(names) > 5 else ''}, got {index}"
        )
    for name, rows in unknown.items():
        if bool(rows.all()):
            raise ConfigError(
                f"data.ignore_index={index} leaves no sample of a known class in the {name} split"
            )
    maps: dict[str, Tensor] = {}
    for kind, size in (("coarse", len(source.coarse_names)), ("fine", len(source.fine_names))):
        known = torch.zeros(size, dtype=torch.bool)
        lost = torch.zeros(size, dtype=torch.bool)
        for name, samples in given.items():
            labels = samples.coarse if kind == "coarse" else samples.fine
            known[labels[~unknown[name]]] = True
            lost[labels[unknown[name]]] = True
        kept = known | ~lost  # a class that never occurs keeps its name
        maps[kind] = torch.where(kept, kept.cumsum(0) - 1, UNKNOWN)

    def others(name: str) -> Samples | None:
        if name not in given:
            return None
        rows = given[name].select((~unknown[name]).nonzero().flatten())
        return Samples(rows.images, maps["coarse"][rows.coarse], maps["fine"][rows.fine])

    def names_of(kind: str, before: list[str]) -> list[str]:
        return [name for name, new in zip(before, maps[kind].tolist(), strict=True) if new != UNKNOWN]

    train = others("train")
    assert train is not None
    limits = source.max_per_class
    if limits is not None:
        limits = [n for n, new in zip(limits, maps["fine"].tolist(), strict=True) if new != UNKNOWN]
    rest = source.train.select(unknown["train"].nonzero().flatten())
    labels = torch.full((len(rest),), UNKNOWN)
    kept_source = replace(
        source,
        train=train,
        val=others("val"),
        test=others("test"),
        fine_names=names_of("fine", source.fine_names),
        coarse_names=names_of("coarse", source.coarse_names),
        max_per_class=limits,
    )
    return kept_source, Samples(rest.images, labels, labels)


def concatenate(first: Samples, second: Samples) -> Samples:
    """The samples of ``first``, then those of ``second``."""
    if isinstance(first.images, LazyImages):
        assert isinstance(second.images, LazyImages)
        images: Images = first.images.joined(second.images)
    else:
        assert isinstance(second.images, Tensor)
        images = torch.cat([first.images, second.images])
    return Samples(images, torch.cat([first.coarse, second.coarse]), torch.cat([first.fine, second.fine]))
