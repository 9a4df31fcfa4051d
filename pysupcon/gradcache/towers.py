"""The models of a GradCache with their options, checked: one :class:`Tower` per model and step."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from pysupcon.gradcache.chunks import Batch
from pysupcon.gradcache.ddp import has_static_graph, wrappers_of

__all__ = ["ChunkLoss", "Forward", "ModelOptions", "Tower", "build_towers", "check_models"]

Forward = Callable[[Any, Any], Any]
"""(model, chunk) -> outputs"""
ChunkLoss = Callable[[Any, slice], Tensor]
"""(outputs of a chunk, its samples) -> loss"""


class ModelOptions(NamedTuple):
    """One model with its options."""

    model: nn.Module
    chunk_size: int
    forward: Forward | None


class Tower(NamedTuple):
    """One model in one step."""

    model: nn.Module
    forward: Forward | None
    batch: Batch
    chunk_loss: ChunkLoss | None
    wrappers: list[nn.Module]
    """DistributedDataParallel and other modules with a ``no_sync``"""

    def run(self, samples: slice) -> Any:
        """Computes the outputs for some samples."""
        chunk = self.batch.chunk(samples)
        return self.model(chunk) if self.forward is None else self.forward(self.model, chunk)


def check_models(
    model: nn.Module | Sequence[nn.Module],
    chunk_size: int | Sequence[int],
    forward: Forward | Sequence[Forward | None] | None,
) -> list[ModelOptions]:
    """Checks the arguments of :class:`pysupcon.GradCache` and returns one entry per model.

    Raises:
        TypeError: ``model`` is not a module, nor a list of modules.
        ValueError: a chunk size is less than 1; a list does not have one entry per model.
    """
    if isinstance(model, nn.Module):
        if isinstance(chunk_size, (list, tuple)) or isinstance(forward, (list, tuple)):
            raise ValueError(
                "a list as chunk_size or forward has one entry per model, but model is one module "
                f"({type(model).__name__}): give a list of modules"
            )
        size = _check_size("chunk_size", chunk_size)
        return [ModelOptions(model, size, forward)]  # type: ignore[arg-type]
    if not isinstance(model, (list, tuple)):
        raise TypeError(f"model must be a torch.nn.Module, or a list of them, got {type(model).__name__}")
    if not model:
        raise ValueError("model must hold at least one torch.nn.Module, got an empty list")
    for index, entry in enumerate(model):
        if not isinstance(entry, nn.Module):
            raise TypeError(f"model[{index}] must be a torch.nn.Module, got {type(entry).__name__}")
    sizes = _per_model("chunk_size", chunk_size, len(model))
    if isinstance(chunk_size, (list, tuple)):
        sizes = [_check_size(f"chunk_size[{index}]", size) for index, size in enumerate(sizes)]
    else:
        sizes = [_check_size("chunk_size", size) for size in sizes]
    return list(map(ModelOptions, model, sizes, _per_model("forward", forward, len(model))))


def build_towers(models: list[ModelOptions], inputs: Any, chunk_loss: Any, *, single: bool) -> list[Tower]:
    """Pairs the models with the inputs and chunk losses of one step.

    Args:
        models: as :func:`check_models` returns them.
        inputs: of one step; a list with one entry per model unless ``single``.
        chunk_loss: likewise; None: no model has one.
        single: whether the caller gave one module instead of a list.

    Raises:
        ValueError: a list does not have one entry per model; a static graph is used twice.
    """
    if single:
        inputs, chunk_loss = [inputs], [chunk_loss]
    else:
        if not isinstance(inputs, (list, tuple)):
            raise ValueError(
                f"inputs must be a list with one entry per model ({len(models)}), got {type(inputs).__name__}"
            )
        if chunk_loss is not None and not isinstance(chunk_loss, (list, tuple)):
            raise ValueError(
                f"chunk_loss must be a list with one function, or None, per model ({len(models)}), got "
                f"{type(chunk_loss).__name__}"
            )
        inputs = _per_model("inputs", inputs, len(models))
        chunk_loss = _per_model("chunk_loss", chunk_loss, len(models))
    towers = [
        Tower(model, forward, Batch(model_inputs, size), model_loss, wrappers_of(model))
        for (model, size, forward), model_inputs, model_loss in zip(models, inputs, chunk_loss, strict=True)
    ]
    static = [wrapper for tower in towers for wrapper in tower.wrappers if has_static_graph(wrapper)]
    if len(set(static)) < len(static):
        raise ValueError(
            "a DistributedDataParallel with static_graph=True has one graph per step, but it is in the "
            "list of models twice: use static_graph=False, and find_unused_parameters=True if needed"
        )
    return towers


def _per_model(name: str, value: Any, models: int) -> list[Any]:
    """Returns one entry per model: a list unchanged, any other value repeated."""
    if not isinstance(value, (list, tuple)):
        return [value] * models
    if len(value) != models:
        raise ValueError(f"{name} must have one entry per model, got {len(value)} for {models} models")
    return list(value)


def _check_size(name: str, value: Any) -> int:
    try:
        size = operator.index(value)
    except TypeError:
        size = 0
    if isinstance(value, bool) or size < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return size
