"""GradCache: the gradient of one large batch with the encoder's memory of a small one.

A contrastive loss needs the embeddings of the whole batch at once, but not the encoder's activations. So (Gao
et al. 2021, arXiv 2101.06983): embed the batch chunk by chunk without a graph; take the loss's gradient with
respect to the embeddings; run each chunk again, with a graph, and push its share of that gradient through.
The result is the gradient of the whole batch, for one more forward.

    grad_cache = GradCache(model, chunk_size=64)
    for images, labels in loader:
        optimizer.zero_grad()
        loss = grad_cache(images, lambda embeddings: criterion(embeddings, labels))
        optimizer.step()

What holds for one step, compared with ``criterion(model(images), labels).backward()``:

Randomness
    of torch (dropout, random augmentation inside the model) is replayed, on every device of the model and of
    the inputs, and goes on afterwards as after the first pass. That of Python and NumPy is not: a model that
    draws from there, or keeps state outside its buffers, is warned of in the first step, when the two passes
    disagree.
BatchNorm
    in training mode normalises each chunk by its own mean and variance, as any accumulation of gradients
    does: the step then is not that of the whole batch. Running statistics move once per chunk, not twice; all
    other buffers are replayed. With SyncBatchNorm every process must have as many chunks.
DistributedDataParallel
    synchronises once, in the backward of the last chunk; buffers are broadcast once, before the first. The
    loss may gather (``gather=True``); processes may have batches, and so numbers of chunks, that differ.
    Parameters that DDP owns must be used inside its forward, not in the loss.
Mixed precision
    surround the call with ``torch.autocast`` as one would surround the forward; give a ``GradScaler`` as
    ``scaler`` (of Accelerate: ``accelerator.scaler``, and no ``accelerator.backward``).
Parameters of the loss
    (a learnable temperature) get their gradient in the same call.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["GradCache"]

_Autocast = dict[str, torch.dtype]
"""Device types on which autocast is on, and its dtype."""

_REPEATED = 0.02
"""Relative difference of the two passes that other kernels may cause; other dropout causes far more."""


class GradCache:
    """Runs forward and backward of a batch in chunks; gradients are added to ``.grad``.

    Args:
        model: called as ``model(chunk)``, twice per chunk. Wrapped by DistributedDataParallel or not.
        chunk_size: samples (entries of the inputs' first dimension) per chunk, at least 1.
        forward: ``forward(model, chunk)`` instead, e.g. ``lambda model, views: model(views.flatten(0, 1))``.
        scaler: of mixed precision; the caller steps and updates it.

    Raises:
        TypeError, ValueError: model is not a module; chunk_size is less than 1.
    """

    def __init__(
        self,
        model: nn.Module,
        chunk_size: int,
        *,
        forward: Callable[[Any, Any], Any] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
            raise ValueError(f"chunk_size must be an integer of at least 1, got {chunk_size!r}")
        self.model = model
        self.chunk_size = chunk_size
        self.forward = forward
        self.scaler = scaler
        self._compare = True

    def __call__(
        self,
        inputs: Any,
        loss: Callable[[Any], Tensor],
        chunk_loss: Callable[[Any, slice], Tensor] | None = None,
    ) -> Tensor:
        """Forward and backward of one batch.

        Args:
            inputs: tensors [B, ...], alone or in tuples, lists, dicts and dataclasses; e.g. images
                [B, C, H, W] or views [B, V, C, H, W].
            loss: of the whole batch's outputs: what the model gives, its tensors joined along their first
                dimension, in the structure in which the model gives them. Returns a tensor of no dimensions.
            chunk_loss: a further loss that is a sum over samples (reconstruction, cross-entropy), of one
                chunk's outputs and the slice of samples that they are; the chunks' values are added to the
                loss. A mean over the batch is a sum divided by B.

        Returns:
            the loss, without a graph.

        Raises:
            ValueError: inputs without tensors or with differing first dimensions; a loss that is no scalar.
        """
        samples = _samples(inputs)
        slices = [slice(at, min(at + self.chunk_size, samples)) for at in range(0, samples, self.chunk_size)]
        slices = slices or [slice(0, 0)]  # other processes wait for this one's part
        devices = _devices(self.model, inputs)
        ambient = _ambient_autocast(devices)
        # Among processes all must go the same way, and others may have more chunks.
        if len(slices) == 1 and not hasattr(self.model, "no_sync"):
            return self._at_once(inputs, loss, chunk_loss, slices[0], ambient)

        # Embed without a graph, then the loss of the whole batch, down to the embeddings.
        chunks, leaves, outputs = self._embed(inputs, slices, devices, ambient)
        value = _scalar("loss", loss(_rebuilt(outputs, iter(leaves))))
        if value.requires_grad:
            self._backward([value], [None], ambient)
        elif chunk_loss is None:
            raise ValueError("loss must depend on the model's outputs, got a tensor without a graph")
        total = value.detach()
        grads = [leaf.grad for leaf in leaves]
        first = [leaf.detach() for leaf in leaves] if self._compare else None
        del value, leaves, outputs

        # Each chunk again, with a graph, from what it started from.
        random_after, buffers_after = _Random(devices), _Buffers(self.model, None, running=True)
        for chunk in chunks:
            no_sync = nullcontext if chunk is chunks[-1] else getattr(self.model, "no_sync", nullcontext)
            with no_sync():
                total = total + self._push_through(inputs, chunk, grads, first, chunk_loss, ambient)
        random_after.restore()
        buffers_after.restore()
        self._compare = False
        return total

    def _embed(
        self, inputs: Any, slices: list[slice], devices: list[torch.device], ambient: _Autocast
    ) -> tuple[list[_Chunk], list[Tensor], Any]:
        """All chunks without a graph: the joined outputs as leaves, the last outputs for their structure."""
        starts: list[tuple[_Random, _Buffers]] = []
        parts: list[list[Tensor]] = []
        outputs: Any = None
        with torch.no_grad():
            for rows in slices:
                starts.append((_Random(devices), _Buffers(self.model, starts[-1][1] if starts else None)))
                with _autocast(ambient):
                    outputs = self._run(inputs, rows)
                parts.append(list(_leaves(outputs)))
        leaves = [_joined(pieces) for pieces in zip(*parts, strict=True)]
        chunks, offsets = [], [0] * len(leaves)
        for rows, start, pieces in zip(slices, starts, parts, strict=True):
            stops = [at + len(piece) for at, piece in zip(offsets, pieces, strict=True)]
            here = [slice(at, stop) for at, stop in zip(offsets, stops, strict=True)]
            chunks.append(_Chunk(rows, here, *start))
            offsets = stops
        return chunks, leaves, outputs

    def _push_through(
        self,
        inputs: Any,
        chunk: _Chunk,
        grads: list[Tensor | None],
        first: list[Tensor] | None,
        chunk_loss: Callable[[Any, slice], Tensor] | None,
        ambient: _Autocast,
    ) -> Tensor | float:
        """One chunk's forward with a graph and its backward; its own loss."""
        chunk.random.restore()
        chunk.buffers.restore()
        with _autocast(ambient):
            outputs = self._run(inputs, chunk.samples)
            extra = None if chunk_loss is None else _scalar("chunk_loss", chunk_loss(outputs, chunk.samples))
        roots: list[Tensor] = []
        upstream: list[Tensor | None] = []
        for number, (piece, part) in enumerate(zip(_leaves(outputs), chunk.outputs, strict=True)):
            grad = grads[number]
            if first is not None and piece.is_floating_point():
                self._check(piece.detach(), first[number][part])
            if grad is not None and piece.requires_grad:
                roots.append(piece)
                upstream.append(grad[part])
        if extra is not None and extra.requires_grad:
            roots.append(extra)
            upstream.append(None)
        self._backward(roots, upstream, ambient)
        return 0.0 if extra is None else extra.detach()

    def _run(self, inputs: Any, rows: slice) -> Any:
        chunk = _rebuilt(inputs, (leaf[rows] for leaf in _leaves(inputs)))
        return self.model(chunk) if self.forward is None else self.forward(self.model, chunk)

    def _at_once(
        self,
        inputs: Any,
        loss: Callable[[Any], Tensor],
        chunk_loss: Callable[[Any, slice], Tensor] | None,
        samples: slice,
        ambient: _Autocast,
    ) -> Tensor:
        outputs = self._run(inputs, samples)
        value = _scalar("loss", loss(outputs))
        if chunk_loss is not None:
            value = value + _scalar("chunk_loss", chunk_loss(outputs, samples))
        self._backward([value], [None], ambient)
        return value.detach()

    def _backward(self, roots: list[Tensor], upstream: list[Tensor | None], ambient: _Autocast) -> None:
        """From losses (upstream None), which are scaled here, and outputs, whose gradients are already."""
        if self.scaler is not None:
            scaled = zip(roots, upstream, strict=True)
            roots = [self.scaler.scale(root) if grad is None else root for root, grad in scaled]
        with _autocast(ambient, enabled=False):
            torch.autograd.backward(roots, upstream)

    def _check(self, again: Tensor, first: Tensor) -> None:
        if not self._compare:
            return
        difference = ((again - first).float().norm() / first.float().norm().clamp(min=1e-30)).item()
        if difference > _REPEATED:
            self._compare = False
            warnings.warn(
                "the model's second pass over a chunk did not repeat its first (relative difference "
                f"{difference:.2g}): it draws random numbers that are not torch's, or keeps state outside "
                "its buffers, so the gradients are not those of the loss",
                stacklevel=4,
            )


class _Chunk(NamedTuple):
    """A part of the batch, and the state from which it was embedded."""

    samples: slice
    outputs: list[slice]
    """of each output tensor"""
    random: _Random
    buffers: _Buffers


class _Random:
    """State of torch's random numbers."""

    def __init__(self, devices: list[torch.device]) -> None:
        self.cpu = torch.get_rng_state()
        self.others = [
            (device, torch.get_device_module(device).get_rng_state(device))
            for device in devices
            if device.type != "cpu"
        ]

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.others:
            torch.get_device_module(device).set_rng_state(state, device)


class _Buffers:
    """Buffers of a model; those that did not change since ``before`` share its copies.

    Running statistics of normalisation, which do not enter a forward in training, only if ``running``.
    """

    def __init__(self, model: nn.Module, before: _Buffers | None, *, running: bool = False) -> None:
        self.running = running
        self.copies: dict[tuple[nn.Module, str], tuple[Tensor, int, Tensor]] = {}
        for module in model.modules():
            if isinstance(module, _NormBase) and module.training and not running:
                continue
            for name, buffer in module._buffers.items():
                if buffer is None:
                    continue
                known = None if before is None else before.copies.get((module, name))
                if known is None or known[0] is not buffer or known[1] != buffer._version:
                    known = buffer, buffer._version, buffer.detach().clone()
                self.copies[module, name] = known

    @torch.no_grad()
    def restore(self) -> None:
        for (module, name), (buffer, version, values) in self.copies.items():
            if module._buffers[name] is not buffer:
                module._buffers[name] = buffer
            # Batch norm moves its statistics without counting a version.
            if self.running or buffer._version != version:
                buffer.copy_(values)


def _devices(model: nn.Module, inputs: Any) -> list[torch.device]:
    found = {tensor.device for tensor in (*model.parameters(), *_leaves(inputs))}
    return sorted(found, key=str)


def _ambient_autocast(devices: list[torch.device]) -> _Autocast:
    """The caller's."""
    kinds = sorted({"cpu", *(device.type for device in devices)})
    return {kind: torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}


def _autocast(ambient: _Autocast, *, enabled: bool = True) -> AbstractContextManager[Any]:
    """The caller's autocast, without its cache: a pass with a graph must not meet weights cast without."""
    stack = ExitStack()
    for kind, dtype in ambient.items():
        stack.enter_context(torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False))
    return stack


def _scalar(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() != 0:
        came = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must return a tensor of no dimensions, got {came}")
    return value


def _samples(inputs: Any) -> int:
    leaves = list(_leaves(inputs))
    if not leaves or any(leaf.dim() == 0 for leaf in leaves) or len({len(leaf) for leaf in leaves}) > 1:
        raise ValueError(
            "inputs must hold tensors with one and the same first dimension (the samples), got shapes "
            f"{[list(leaf.shape) for leaf in leaves]}"
        )
    return len(leaves[0])


def _joined(pieces: tuple[Tensor, ...]) -> Tensor:
    if pieces[0].dim() == 0:
        raise ValueError(
            "the model must return tensors whose first dimension counts rows, got one of no dimensions; "
            "a loss that is computed chunk by chunk goes into chunk_loss"
        )
    joined = torch.cat(pieces) if len(pieces) > 1 else pieces[0].detach()
    return joined.requires_grad_(joined.is_floating_point())


def _leaves(tree: Any) -> Iterator[Tensor]:
    """Tensors in tuples, lists, dicts and dataclasses, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif dataclasses.is_dataclass(tree):
        for entry in dataclasses.fields(tree):
            yield from _leaves(getattr(tree, entry.name))
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _leaves(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from _leaves(value)


def _rebuilt(tree: Any, leaves: Iterator[Tensor]) -> Any:
    """The same structure around other tensors; what is no tensor stays."""
    if isinstance(tree, Tensor):
        return next(leaves)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [entry.name for entry in dataclasses.fields(tree)]
        return dataclasses.replace(tree, **{name: _rebuilt(getattr(tree, name), leaves) for name in names})
    if isinstance(tree, dict):
        other = copy.copy(tree)
        other.update({key: _rebuilt(value, leaves) for key, value in tree.items()})
        return other
    if isinstance(tree, (tuple, list)):
        values = [_rebuilt(value, leaves) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return tree
