"""Arguments that the drop-in classes share: tensors, and labels of any real dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pysupcon.pairs.checks import describe, describe_no_tensor

__all__ = ["check_tensor", "class_ids", "class_ids_of_both"]


def check_tensor(name: str, value: Any, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {describe_no_tensor(value)}")


def _labels(value: Any, like: Tensor, name: str = "labels") -> Tensor:
    """Labels of any real dtype, shape and device -> float or int64 [N] on the device of ``like``."""
    check_tensor(name, value, "[N]")
    if value.is_complex():
        raise TypeError(f"{name} must be real numbers, got {describe(value)}")
    flat: Tensor = value.reshape(-1).to(like.device)
    return flat.contiguous() if flat.is_floating_point() else flat.long().contiguous()


def class_ids(labels: Any, like: Tensor) -> Tensor:
    """Labels -> int64 [N]: equal labels, equal numbers."""
    flat = _labels(labels, like)
    return torch.unique(flat, return_inverse=True)[1] if flat.is_floating_point() else flat


def class_ids_of_both(labels: Any, ref_labels: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Class ids for both sides, which may be floats on one side and integers on the other."""
    first, second = _labels(labels, like), _labels(ref_labels, like, "ref_labels")
    ids = class_ids(torch.cat([first, second]), like)
    return ids[: len(first)], ids[len(first) :]
