"""Groups of the samples, for GroupDRO and for group-balanced batches.

Groups are the true ones or come from a file that ``python -m pysupcon infer-groups`` wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysupcon.data.samples import LazyImages, Samples
from pysupcon.errors import ConfigError
from pysupcon.reading import parse_json

ANNOTATED = "annotated"
FORMAT = "1"
_SPLITS = ("train", "val")
_TENSORS = (*_SPLITS, "parent")


@dataclass(frozen=True)
class Groups:
    """Groups of the training and validation samples; every group has a training sample.

    Attributes:
        train: [N] int64 in [0, G), numbered class by class.
        val: [M] int64 in [0, G), or -1 for a group without training samples.
        parent: [G] int64, the class of each group.
        made_from: the runs and settings that the groups were inferred from; empty for true groups.
    """

    train: Tensor
    val: Tensor
    parent: Tensor
    made_from: Mapping[str, Any]

    @property
    def counts(self) -> Tensor:
        """Training samples of each group, [G] int64."""
        return torch.bincount(self.train, minlength=len(self.parent))


def index_groups(labels: Mapping[str, Tensor], fine: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Numbers the pairs of a class and a fine label in ascending order over all splits.

    Args:
        labels, fine: class and fine label of every sample, int64 [N], by split name.

    Returns:
        The group of every sample, int64 [N], by split name.
    """
    rows = [torch.stack([labels[name], fine[name]], dim=1) for name in labels]
    numbers = torch.cat(rows).unique(dim=0, return_inverse=True)[1].split([len(part) for part in rows])
    return dict(zip(labels, numbers, strict=True))


def true_groups(labels: Mapping[str, Tensor], numbers: Mapping[str, Tensor]) -> Groups:
    """The true groups that occur in the training split, renumbered without gaps.

    Args:
        labels, numbers: class and true group of every sample of "train" and "val", int64 [N].
    """
    found, train = numbers["train"].unique(return_inverse=True)
    place = torch.searchsorted(found, numbers["val"]).clamp(max=len(found) - 1)
    val = torch.where(found[place] == numbers["val"], place, -1)
    parent = torch.empty(len(found), dtype=torch.int64)
    parent[train] = labels["train"]
    return Groups(train, val, parent, {})


def fingerprint(samples: Samples, labels: Tensor) -> str:
    """SHA-256 of the images and their classes; image files enter by the last two parts of their paths."""
    digest = hashlib.sha256(labels.numpy().tobytes())
    if isinstance(samples.images, LazyImages):
        digest.update(b"".join(samples.images.keys()))
    else:
        digest.update(samples.images.contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_groups(
    path: Path, groups: Groups, samples: Mapping[str, Samples], labels: Mapping[str, Tensor]
) -> None:
    """Write a groups file (safetensors).

    Args:
        path: the file; its folder is created. An existing file is replaced when the new one is complete.
        groups: ``made_from`` holds JSON values; error messages of :func:`read_groups` show its "data".
        samples, labels: those of "train" and "val"; the file stores their fingerprints.
    """
    from safetensors.torch import save

    made_from = json.dumps(dict(groups.made_from), sort_keys=True)
    tensors = {name: getattr(groups, name).contiguous() for name in _TENSORS}
    metadata = {
        "format": FORMAT,
        "made_from": made_from,
        "sha256": _checksum(tensors, made_from),
        **{name: fingerprint(samples[name], labels[name]) for name in _SPLITS},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing_{path.name}")
    try:
        temporary.write_bytes(save(tensors, metadata))
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_groups(path: Path, samples: Mapping[str, Samples], labels: Mapping[str, Tensor]) -> Groups:
    """Read a groups file and check that it was made for these samples.

    Args:
        path: the file.
        samples, labels: those of "train" and "val" in this run.

    Raises:
        ConfigError: the file is missing, damaged or malformed, or was made for other samples.
    """
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):  # Path.is_file raises an error for long names
        raise ConfigError(
            f"data.groups must be {ANNOTATED} or a file that `python -m pysupcon infer-groups` wrote, "
            f"but there is no file {path}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ConfigError(
                    f"data.groups {path} has the format {metadata.get('format')}, this version reads {FORMAT}"
                )
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
        groups = Groups(**tensors, made_from=parse_json(metadata["made_from"]))
        for name, tensor in tensors.items():
            if tensor.dtype != torch.int64 or tensor.dim() != 1 or (name != "val" and not len(tensor)):
                raise ValueError(f"{name} must be [N] int64, got {list(tensor.shape)} {tensor.dtype}")
        if not isinstance(groups.made_from, dict) or not isinstance(groups.made_from.get("data", {}), dict):
            raise ValueError("made_from must hold a mapping")
        # Files of earlier versions have no checksum.
        checksum = _checksum(tensors, metadata["made_from"])
        if metadata.get("sha256", checksum) != checksum:
            raise ValueError("its content does not match its checksum")
    except ConfigError:
        raise
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ConfigError(f"data.groups {path} is damaged or not a groups file: {error!r}") from error
    for name in _SPLITS:
        given, found = getattr(groups, name), labels[name]
        if len(given) != len(found):
            raise ConfigError(
                f"data.groups {path} holds groups of {len(given)} {name} samples, the {name} split has "
                f"{len(found)}: it was made from {_describe_origin(groups)}"
            )
        if metadata.get(name) != fingerprint(samples[name], found):
            raise ConfigError(
                f"data.groups {path} belongs to other {name} samples than this config's: it was made from "
                f"{_describe_origin(groups)}; infer the groups again from a run on this data"
            )
    numbers = groups.train
    if int(numbers.min()) < 0 or int(numbers.max()) >= len(groups.parent) or bool((groups.counts < 1).any()):
        raise ConfigError(
            f"data.groups {path} must number the {len(groups.parent)} groups of the training samples without "
            f"gaps, got {numbers.unique().tolist()!s:.80}"
        )
    val, classes = groups.val, int(labels["train"].max()) + 1
    if bool(((val < -1) | (val >= len(groups.parent))).any()):
        raise ConfigError(
            f"data.groups {path} must give each val sample one of the {len(groups.parent)} groups or -1, got "
            f"{val.unique().tolist()!s:.80}"
        )
    if bool(((groups.parent < 0) | (groups.parent >= classes)).any()):
        raise ConfigError(
            f"data.groups {path} must give each group one of the {classes} classes, got "
            f"{groups.parent.unique().tolist()!s:.80}"
        )
    return groups


def _checksum(tensors: Mapping[str, Tensor], made_from: str) -> str:
    digest = hashlib.sha256(made_from.encode())
    for name in _TENSORS:
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _describe_origin(groups: Groups) -> str:
    data = groups.made_from.get("data", {})
    return ", ".join(f"data.{name}={value}" for name, value in data.items() if value is not None) or "a run"
