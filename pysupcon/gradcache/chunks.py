"""Splits the inputs of GradCache into samples, and copies the samples of a chunk for a model.

Tensors may be in tuples, lists, dicts, ``UserDict`` and other mappings, and dataclasses, at any depth.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict, UserList
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
from torch import Tensor, nn

_Cut = Callable[[slice, dict[int, Any]], Any]
"""Copies the samples of a slice; the dict maps ids of the originals to the copies of this chunk."""


class Batch:
    """Inputs, and their division into chunks.

    Args:
        inputs: see :class:`pysupcon.GradCache`.
        chunk_size: samples per chunk.

    Attributes:
        slices: the samples of each chunk; at least one chunk, which may be empty.

    Raises:
        ValueError: the number of samples, or the parts that belong to samples, are ambiguous.
    """

    def __init__(self, inputs: Any, chunk_size: int) -> None:
        self._samples = _samples(inputs)
        starts = range(0, self._samples, chunk_size)
        self.slices = [slice(at, min(at + chunk_size, self._samples)) for at in starts] or [slice(0, 0)]
        self._cut = self._plan(inputs)

    def chunk(self, samples: slice) -> Any:
        """Returns the structure of the inputs with copies of these samples, which the model may change."""
        return self._cut(samples, {})

    def _plan(self, tree: Any) -> _Cut:
        if isinstance(tree, (Tensor, np.ndarray)):
            return lambda samples, copies: _copy_samples(tree, samples, copies)
        if self._is_column(tree):
            return lambda samples, _: _rebuild(tree, [_copy_containers(entry) for entry in tree[samples]])
        children = _children(tree)
        if children is None:
            self._refuse_unknown(tree)
            return lambda samples, copies: tree
        cuts = [self._plan(child) for child in children]
        attributes = (
            {} if not isinstance(tree, Mapping) or _is_own_dict(tree) else getattr(tree, "__dict__", {})
        )
        # For example the encodings of a BatchEncoding.
        columns = {
            name: value for name, value in attributes.items() if name != "data" and self._is_column(value)
        }

        def cut(samples: slice, copies: dict[int, Any]) -> Any:
            result = _rebuild(tree, [part(samples, copies) for part in cuts])
            for name, value in columns.items():
                setattr(result, name, value[samples])
            return result

        return cut

    def _is_column(self, tree: Any) -> bool:
        """Whether the value is a list with one entry per sample."""
        if not _is_list(tree) or len(tree) != self._samples or any(True for _ in _arrays(tree)):
            return False
        square = self._samples > 0 and all(_is_list(entry) and len(entry) == len(tree) for entry in tree)
        if square and len(self.slices) > 1:
            raise ValueError(
                f"inputs hold a {type(tree).__name__} of {len(tree)} lists of {len(tree)} entries for a "
                f"batch of {len(tree)} samples: it is not clear which count the samples; give a dict with "
                "one list per key, or a tensor"
            )
        return True

    def _refuse_unknown(self, tree: Any) -> None:
        if len(self.slices) == 1 or isinstance(tree, (str, bytes, nn.Module)) or not isinstance(tree, Sized):
            return
        if len(tree) == self._samples:
            raise ValueError(
                f"inputs hold a {type(tree).__name__} of {len(tree)} entries, as many as the batch has "
                "samples; GradCache does not know how to split it: give a list, a tensor or an array"
            )


def tensors(tree: Any) -> Iterator[Tensor]:
    """Yields the tensors of a structure, in order."""
    return (leaf for leaf in _arrays(tree) if isinstance(leaf, Tensor))


def rebuild(tree: Any, leaves: Iterator[Tensor]) -> Any:
    """Returns the same structure with other tensors and the same other values."""
    if isinstance(tree, Tensor):
        return next(leaves)
    children = _children(tree)
    return tree if children is None else _rebuild(tree, [rebuild(child, leaves) for child in children])


def _samples(inputs: Any) -> int:
    """Counts the samples by tensors and arrays, or by lists if there are none."""
    shapes = [list(leaf.shape) for leaf in _arrays(inputs) if leaf.ndim > 0]
    if len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            "inputs must hold tensors and arrays with one and the same first dimension (the samples), got "
            f"shapes {_shorten(shapes)}; what does not belong to single samples goes into forward"
        )
    if shapes:
        return int(shapes[0][0])
    lengths = [len(column) for column in _flat_lists(inputs)]
    if len(set(lengths)) != 1:
        raise ValueError(
            "inputs must hold the samples: tensors or arrays with one and the same first dimension, or, "
            "without these, lists of one and the same length, alone or in a dict and without lists inside; "
            f"got lists of lengths {_shorten(lengths)} in {type(inputs).__name__}"
        )
    return lengths[0]


def _shorten(numbers: list[Any]) -> str:
    return str(numbers) if len(numbers) <= 8 else f"{str(numbers[:8])[:-1]}, ...]"


def _flat_lists(tree: Any) -> Iterator[Any]:
    """Yields lists without lists inside. Lists of lists are ambiguous: either could be the samples."""
    if _is_list(tree):
        if not any(map(_holds_list, tree)):
            yield tree
        return
    for child in _children(tree) or ():
        yield from _flat_lists(child)


def _holds_list(tree: Any) -> bool:
    return _is_list(tree) or any(map(_holds_list, _children(tree) or ()))


def _is_list(tree: Any) -> bool:
    return isinstance(tree, (list, tuple, UserList)) and not hasattr(tree, "_fields")


def _arrays(tree: Any) -> Iterator[Tensor | np.ndarray[Any, Any]]:
    """Yields tensors and NumPy arrays."""
    if isinstance(tree, (Tensor, np.ndarray)):
        yield tree
        return
    for child in _children(tree) or ():
        yield from _arrays(child)


def _children(tree: Any) -> list[Any] | None:
    """Returns the entries of a container; None for all other values."""
    if isinstance(tree, (str, bytes, int, float)):  # avoids the slower checks for each sample
        return None
    if _is_dataclass(tree):
        return [getattr(tree, name) for name in _names(tree)]
    if isinstance(tree, Mapping):
        return list(tree.values())
    return list(tree) if isinstance(tree, (list, tuple, UserList)) else None


def _rebuild(tree: Any, children: list[Any]) -> Any:
    """Returns a container of the same type with other entries."""
    if _is_dataclass(tree):
        other = copy.copy(tree)  # dataclasses.replace() would run __post_init__ again
        assign = object.__setattr__ if type(tree).__dataclass_params__.frozen else setattr
        for name, child in zip(_names(tree), children, strict=True):
            assign(other, name, child)
        return other
    if isinstance(tree, Mapping):
        entries = dict(zip(tree, children, strict=True))
        if isinstance(tree, (dict, UserDict)):
            other = copy.copy(tree)
            other.update(entries)
            if _is_own_dict(tree):
                other.__dict__ = other  # type: ignore[assignment]
            return other
        return type(tree)(entries)  # type: ignore[call-arg]
    return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)


def _is_own_dict(tree: Any) -> bool:
    """Whether the attributes of a dict are its entries, by ``self.__dict__ = self``."""
    return getattr(tree, "__dict__", None) is tree


def _is_dataclass(tree: Any) -> bool:
    return dataclasses.is_dataclass(tree) and not isinstance(tree, type)


def _names(tree: Any) -> list[str]:
    return [entry.name for entry in dataclasses.fields(tree) if hasattr(tree, entry.name)]


def _copy_samples(array: Any, samples: slice, copies: dict[int, Any]) -> Any:
    """Copies these samples of an array, or the whole array if it has no dimensions; once per chunk."""
    if id(array) not in copies:
        part = array[samples] if array.ndim > 0 else array
        copies[id(array)] = part.clone() if isinstance(part, Tensor) else part.copy()
    return copies[id(array)]


def _copy_containers(tree: Any) -> Any:
    """Copies the containers of a sample, which the model may change."""
    children = _children(tree)
    return tree if children is None else _rebuild(tree, [_copy_containers(child) for child in children])
