"""GradCache, its two passes over the chunks of a batch. :mod:`pysupcon.gradcache` describes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pysupcon.caller import warn_caller
from pysupcon.gradcache.chunks import rebuild, tensors
from pysupcon.gradcache.ddp import broadcast_buffers, has_static_graph, no_sync
from pysupcon.gradcache.replay import (
    AutocastState,
    Buffers,
    RandomState,
    ambient_autocast,
    autocast,
    devices_of,
)
from pysupcon.gradcache.towers import ChunkLoss, Forward, Tower, build_towers, check_models

__all__ = ["GradCache"]

_TOLERANCE = 0.02
"""Relative difference of the two passes that different kernels may cause; different dropout causes more."""


class GradCache:
    """Runs forward and backward of a batch in chunks; adds the gradients to ``.grad``.

    Args:
        model: called as ``model(chunk)``, twice per chunk, with or without DistributedDataParallel. Or a list
            of models (an image and a text encoder), each with its own inputs, which may contain a model
            twice.
        chunk_size: samples (entries of the inputs' first dimension) per chunk, at least 1. With a list of
            models: one number for all, or a list with one number per model.
        forward: called as ``forward(model, chunk)`` instead of ``model(chunk)``, for example
            ``lambda model, views: model(views.flatten(0, 1))`` or ``lambda model, batch: model(**batch)``.
            With a list of models: one function for all, or a list with one function (or None) per model.
        scaler: of mixed precision; the caller steps and updates it.

    Raises:
        TypeError: model is not a module, nor a list of modules.
        ValueError: chunk_size is less than 1; a list does not have one entry per model.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        chunk_size: int | Sequence[int],
        *,
        forward: Forward | Sequence[Forward | None] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.model = model
        self.chunk_size = chunk_size
        self.forward = forward
        self.scaler = scaler
        check_models(model, chunk_size, forward)
        self._compare = True
        self._uncounted: set[tuple[nn.Module, str]] = set()
        self._started: set[nn.Module] = set()

    def __call__(
        self,
        inputs: Any,
        loss: Callable[..., Tensor],
        chunk_loss: ChunkLoss | Sequence[ChunkLoss | None] | None = None,
    ) -> Tensor:
        """Forward and backward of one batch.

        Args:
            inputs: tensors [B, ...], alone or in tuples, lists, dicts (also ``UserDict``, ``BatchEncoding``)
                and dataclasses; e.g. images [B, C, H, W] or views [B, V, C, H, W]. With a list of models: a
                list with the inputs of each model; B may differ between them. What is split:

                - Tensors and NumPy arrays are split along their first dimension, which must be B in all of
                  them. Those of no dimensions go to every chunk.
                - A list or tuple without tensors and arrays (of strings, PIL images, dicts of numbers) is
                  split if it has B entries. If the inputs contain no tensor and no array, B is the length of
                  the lists.
                - A list of tensors is a structure of several [B, ...], not one tensor per sample.
                - All other values go to every chunk unchanged.

                The model gets copies of the chunk's tensors and arrays in new containers. It may change them
                in place: both passes see the same values, and the caller's inputs do not change. For data of
                another form pass ``torch.arange(B)`` and look up the samples in ``forward``.
            loss: called with the outputs for the whole batch, in the structure that the model returns. Their
                tensors are concatenated along the first dimension; other values come from the last chunk.
                With a list of models it gets one argument per model. Returns a tensor of no dimensions.
            chunk_loss: a further loss that is a sum over samples (reconstruction, cross-entropy), called with
                the outputs of one chunk and the slice of its samples. Its values are added to the loss. A
                mean over the batch is a sum divided by B. With a list of models: a list with one function,
                or None, per model.

        Returns:
            The loss, without a graph.

        Raises:
            ValueError: the inputs have no samples, different first dimensions, or an ambiguous structure;
                inputs or chunk_loss do not have one entry per model; a loss is not a scalar; a
                DistributedDataParallel with static_graph=True is in the list twice.
            RuntimeError: gradients are disabled; chunk_loss changed the model's outputs in place.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("GradCache computes gradients: call it outside torch.no_grad()")
        # The attributes may have changed since the last step.
        options = check_models(self.model, self.chunk_size, self.forward)
        towers = build_towers(options, inputs, chunk_loss, single=isinstance(self.model, nn.Module))
        models = list(dict.fromkeys(tower.model for tower in towers))
        devices = devices_of(models, inputs)
        ambient = ambient_autocast(devices)
        # With several processes all must take the same branch, and others may have more chunks.
        if all(len(tower.batch.slices) == 1 and not tower.wrappers for tower in towers):
            return self._single_pass(towers, loss, ambient)

        # First pass: embed without a graph, then differentiate the loss of the whole batch.
        embedded = [self._embed(tower, devices, ambient) for tower in towers]
        value = _scalar("loss", loss(*(rebuild(outputs, iter(leaves)) for _, leaves, outputs in embedded)))
        if value.requires_grad:
            self._backward([value], [None], ambient)
        elif all(tower.chunk_loss is None for tower in towers):
            raise ValueError("loss must depend on the model's outputs, got a tensor without a graph")
        total = value.detach()
        tasks = [
            _Task(
                tower,
                chunks,
                [leaf.grad for leaf in leaves],
                [leaf.detach() for leaf in leaves] if self._compare else None,
            )
            for tower, (chunks, leaves, _) in zip(towers, embedded, strict=True)
        ]
        del value, embedded

        # Second pass: each chunk with a graph, from the state of the first pass.
        random_after = RandomState(devices, models)
        buffers_after = Buffers(models, None, self._uncounted, running=True)
        last = {wrapper: task.chunks[-1] for task in tasks for wrapper in task.tower.wrappers}
        try:
            for task in tasks:
                self._start_static_graphs(task, ambient)
                for chunk in task.chunks:
                    with no_sync(wrapper for wrapper in task.tower.wrappers if last[wrapper] is not chunk):
                        total = total + self._recompute(task, chunk, ambient)
        finally:
            random_after.restore()
            buffers_after.restore()
        self._compare = False
        return total

    def _embed(
        self, tower: Tower, devices: list[torch.device], ambient: AutocastState
    ) -> tuple[list[_Chunk], list[Tensor], Any]:
        """Runs all chunks without a graph.

        Returns:
            The chunks; the concatenated output tensors, as leaves; and the outputs of the last chunk, for
            their structure.
        """
        starts: list[tuple[RandomState, Buffers]] = []
        parts: list[list[Tensor]] = []
        outputs: Any = None

        def find_uncounted() -> None:
            if self._compare:
                self._uncounted |= starts[-1][1].changed_uncounted()

        with torch.no_grad():
            for samples in tower.batch.slices:
                if starts:
                    find_uncounted()
                buffers = Buffers([tower.model], starts[-1][1] if starts else None, self._uncounted)
                if not starts:
                    for wrapper in tower.wrappers:
                        broadcast_buffers(wrapper, buffers)
                starts.append((RandomState(devices, [tower.model]), buffers))
                with autocast(ambient):
                    outputs = tower.run(samples)
                parts.append(list(tensors(outputs)))
            find_uncounted()
        leaves = [_concatenate(pieces) for pieces in zip(*parts, strict=True)]
        chunks, offsets = [], [0] * len(leaves)
        for samples, start, pieces in zip(tower.batch.slices, starts, parts, strict=True):
            stops = [offset + len(piece) for offset, piece in zip(offsets, pieces, strict=True)]
            rows = [slice(offset, stop) for offset, stop in zip(offsets, stops, strict=True)]
            chunks.append(_Chunk(samples, rows, *start))
            offsets = stops
        return chunks, leaves, outputs

    def _start_static_graphs(self, task: _Task, ambient: AutocastState) -> None:
        """Runs a backward of zero gradients: the first backward of a static graph must synchronise."""
        new = {wrapper for wrapper in task.tower.wrappers if has_static_graph(wrapper)} - self._started
        if new:
            with no_sync(wrapper for wrapper in task.tower.wrappers if wrapper not in new):
                self._recompute(task, task.chunks[0], ambient, zero=True)
            self._started |= new

    def _recompute(
        self, task: _Task, chunk: _Chunk, ambient: AutocastState, *, zero: bool = False
    ) -> Tensor | float:
        """Runs forward and backward of one chunk, with zero gradients if ``zero``; returns its chunk loss."""
        chunk.random.restore()
        chunk.buffers.restore()
        chunk_loss = task.tower.chunk_loss
        with autocast(ambient):
            outputs = task.tower.run(chunk.samples)
            pieces = list(tensors(outputs))
            versions = [piece._version for piece in pieces]
            extra = None if chunk_loss is None else _scalar("chunk_loss", chunk_loss(outputs, chunk.samples))
        if versions != [piece._version for piece in pieces]:
            raise RuntimeError(
                "chunk_loss changed the model's outputs in place, which the loss sees unchanged"
            )
        roots: list[Tensor] = []
        upstream: list[Tensor | None] = []
        for number, (piece, part) in enumerate(zip(pieces, chunk.outputs, strict=True)):
            grad = task.grads[number]
            if task.first_outputs is not None and piece.is_floating_point():
                self._check_repeated(piece.detach(), task.first_outputs[number][part])
            if grad is not None and piece.requires_grad:
                roots.append(piece)
                upstream.append(torch.zeros_like(piece) if zero else grad[part])
        if extra is not None and extra.requires_grad:
            roots.append(extra)
            upstream.append(torch.zeros_like(extra) if zero else None)
        self._backward(roots, upstream, ambient)
        return 0.0 if extra is None else extra.detach()

    def _single_pass(
        self, towers: list[Tower], loss: Callable[..., Tensor], ambient: AutocastState
    ) -> Tensor:
        """Runs a batch of one chunk per model without a second pass."""
        outputs = [tower.run(tower.batch.slices[0]) for tower in towers]
        value = _scalar("loss", loss(*outputs))
        for tower, output in zip(towers, outputs, strict=True):
            if tower.chunk_loss is not None:
                value = value + _scalar("chunk_loss", tower.chunk_loss(output, tower.batch.slices[0]))
        self._backward([value], [None], ambient)
        return value.detach()

    def _backward(self, roots: list[Tensor], upstream: list[Tensor | None], ambient: AutocastState) -> None:
        """Backpropagates from losses (upstream None), which it scales, and from outputs."""
        if self.scaler is not None:
            scaled = zip(roots, upstream, strict=True)
            roots = [self.scaler.scale(root) if grad is None else root for root, grad in scaled]
        with autocast(ambient, enabled=False):
            torch.autograd.backward(roots, upstream)

    def _check_repeated(self, second: Tensor, first: Tensor) -> None:
        """Warns once if the second pass over a chunk differs from the first."""
        if not self._compare:
            return
        difference = ((second - first).float().norm() / first.float().norm().clamp(min=1e-30)).item()
        if difference > _TOLERANCE:
            self._compare = False
            warn_caller(
                "the model's second pass over a chunk did not repeat its first (relative difference "
                f"{difference:.2g}): it uses random numbers that are not torch's, or keeps state outside "
                "its buffers, so the gradients are not those of the loss"
            )


class _Chunk(NamedTuple):
    """A part of the batch, and the state before its first pass."""

    samples: slice
    outputs: list[slice]
    """rows of each output tensor"""
    random: RandomState
    buffers: Buffers


class _Task(NamedTuple):
    """Inputs of a model's second pass."""

    tower: Tower
    chunks: list[_Chunk]
    grads: list[Tensor | None]
    """of the loss, with respect to each output tensor of the whole batch"""
    first_outputs: list[Tensor] | None
    """outputs of the first pass; None: the second pass is not compared with them"""


def _scalar(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must return a tensor of no dimensions, got {got}")
    return value


def _concatenate(pieces: tuple[Tensor, ...]) -> Tensor:
    if pieces[0].dim() == 0:
        raise ValueError(
            "the model must return tensors whose first dimension counts rows, got one of no dimensions; "
            "a loss that is computed chunk by chunk goes into chunk_loss"
        )
    joined = torch.cat(pieces) if len(pieces) > 1 else pieces[0].detach()
    return joined.requires_grad_(joined.is_floating_point())
