"""Labels of the user's own data: integers or text, as classes 0, 1, ... with names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pysupcon.data.config import DataConfig
from pysupcon.data.samples import Family, Images, Samples, Source
from pysupcon.data.tables import SPLITS, Table
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
    if isinstance(value, str) and value.strip():
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


def labels_of_column(table: Table, name: str) -> list[LabelValue]:
    """The labels in a column of a text file: a number that is written as one is an int.

    If one has leading zeros, as in the codes 01, 02, ..., 10, all are text: 1 and 01 are different labels.

    Raises:
        ConfigError: a label is empty.
    """
    texts = table.column(name)
    if "" in texts:
        line = table.lines[texts.index("")]
        raise ConfigError(f"data.root: {table.path}, line {line}, column {name} must not be empty")
    if any(re.fullmatch(r"-?0[0-9]+", text) for text in texts):
        return list(texts)
    return [int(text) if re.fullmatch(r"0|-?[1-9][0-9]{0,17}", text) else text for text in texts]


def labels_of_roles(values: Mapping[str, Sequence[LabelValue]], field: str) -> Labels:
    """The labels of columns by role: label, or coarse and fine, or label (or coarse) and group.

    A group is a spurious attribute of the class; the fine labels are then pairs of class and group.

    Raises:
        ConfigError: the roles contradict each other, or there is no label.
    """
    if "label" in values and ("coarse" in values or "fine" in values):
        raise ConfigError(f"{field} must have label, or coarse and fine, not both")
    coarse, fine = values.get("coarse", values.get("label")), values.get("fine")
    if coarse is None and fine is None:
        raise ConfigError(f"{field} has no labels: name them with --data.columns '{{label: NAME}}'")
    if "group" in values:
        if fine is not None:
            raise ConfigError(f"{field} must have fine labels or groups, not both")
        assert coarse is not None
        pairs = list(zip(coarse, values["group"], strict=True))
        fine = [f"{label}, {group}" for label, group in pairs]
        if len(set(fine)) < len(set(pairs)):  # "a, b" with "c", and "a" with "b, c"
            raise ConfigError(f"{field}: two pairs of label and group have the same name LABEL, GROUP")
    return Labels(coarse, fine)


def columns_of_levels(names: Mapping[str, str]) -> dict[str, str]:
    """The columns of the coarse and of the fine labels, from the columns by role, for
    :func:`labels_of_roles`."""
    fine = names.get("fine", names.get("label", names.get("coarse", "")))
    coarse = names.get("coarse", fine)
    return {"coarse": coarse, "fine": f"{coarse}, {names['group']}" if "group" in names else fine}


def splits_of_role(
    values: Mapping[str, Sequence[LabelValue]], count: int, field: str, path: Path, config: DataConfig
) -> Tensor:
    """The split of every sample, int64 [count]: 0, the training, without a column of that role.

    Raises:
        ConfigError: a value is not a split, or the test samples contradict ``data.test_fraction``.
    """
    if "split" not in values:
        return torch.zeros(count, dtype=torch.int64)
    numbers = []
    for row, value in enumerate(values["split"]):
        if str(value).lower() not in SPLITS:
            raise ConfigError(
                f"{field}: split of row {row} must be one of {', '.join(SPLITS)}, got {value!r}"
            )
        numbers.append(SPLITS[str(value).lower()])
    if config.test_fraction is not None and 2 in numbers:
        raise ConfigError(
            f"data.test_fraction has no effect: {path} has test rows in its split; leave it out"
        )
    return torch.tensor(numbers)


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
