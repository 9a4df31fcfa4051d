"""Labels of the user's own data: integers or text, as classes 0, 1, ... with names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pysupcon.data.samples import Family, Images, Samples, Source
from pysupcon.errors import ConfigError

LabelValue = int | str


def plain_label(value: object, where: str) -> LabelValue:
    """Convert a label to int or str: Python's own types, NumPy scalars, and tensors of one number.

    Args:
        value: the label.
        where: place of the label, for the message.

    Raises:
        ConfigError: it is something else.
    """
    if getattr(value, "size", None) == 1 or (isinstance(value, Tensor) and value.numel() == 1):
        value = value.item()  # type: ignore[attr-defined]
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (bool, int)):
        return int(value)
    if isinstance(value, str):
        return value
    raise ConfigError(f"{where} must be a label, an int or str, got {type(value).__name__} {value!r:.60}")


def number_classes(values: Sequence[LabelValue], names: Sequence[str] | None = None) -> dict[LabelValue, int]:
    """Number the values that occur in ascending order, numbers before text; with ``names`` the class of an
    integer is its place among the names."""
    found = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    if names is not None and all(isinstance(v, int) and 0 <= v < len(names) for v in found):
        return {number: number for number in range(len(names))}
    return {value: number for number, value in enumerate(found)}


def as_labels(values: Sequence[LabelValue], numbers: dict[LabelValue, int]) -> Tensor:
    """The classes of ``values``, int64 [N]."""
    return torch.tensor([numbers[value] for value in values], dtype=torch.int64)


def class_names(numbers: dict[LabelValue, int], names: Sequence[str] | None = None) -> list[str]:
    """The names of the classes: ``names`` if the values index them, else the values themselves."""
    if names is not None and list(numbers) == list(range(len(names))):
        return [str(name) for name in names]
    return [str(value) for value in numbers]


class Labels:
    """Coarse and fine labels of all samples, and their names.

    Args:
        coarse, fine: values of all samples; None means that the level equals the other one.
        names: names of the fine classes that integers index, or None.
    """

    def __init__(
        self,
        coarse: Sequence[LabelValue] | None,
        fine: Sequence[LabelValue] | None,
        names: Sequence[str] | None = None,
    ) -> None:
        fine = coarse if fine is None else fine
        assert fine is not None
        numbers = number_classes(fine, names)
        self.fine, self.fine_names = as_labels(fine, numbers), class_names(numbers, names)
        self.coarse, self.coarse_names = self.fine, self.fine_names
        if coarse is not None and coarse is not fine:
            numbers = number_classes(coarse)
            self.coarse, self.coarse_names = as_labels(coarse, numbers), class_names(numbers)


def split_source(
    images: Images, labels: Labels, split: Tensor, field: str, *, family: Family, channels: int,
    image_size: int, mean: tuple[float, ...], std: tuple[float, ...],
) -> Source:  # fmt: skip
    """Divide samples into the splits that the data have.

    Args:
        images: all samples.
        labels: their labels.
        split: int64 [N], 0 for training, 1 for validation, 2 for testing.
        field: field of the config that names the data, for messages.
        family, channels, image_size, mean, std: see :class:`~pysupcon.data.samples.Source`.

    Raises:
        ConfigError: there is no training sample, or a class of the others has none.
    """
    samples = Samples(images, labels.coarse, labels.fine)
    parts: list[Samples | None] = []
    for number in range(3):
        rows = (split == number).nonzero().flatten()
        parts.append(samples.select(rows) if len(rows) else None)
    train, val, test = parts
    if train is None:
        raise ConfigError(f"{field} has no training sample")
    if len(train) == len(samples):
        train = samples
    known = torch.zeros(len(labels.fine_names), dtype=torch.bool)
    known[train.fine] = True
    for name, part in (("validation", val), ("test", test)):
        if part is not None and not bool(known[part.fine].all()):
            missing = labels.fine_names[int(part.fine[~known[part.fine]][0])]
            raise ConfigError(f"{field}: the {name} split has the class {missing!r}, which training has not")
    return Source(
        train, test, labels.fine_names, labels.coarse_names, family, channels, image_size, mean, std, val,
        labels_by_name=True,
    )  # fmt: skip
