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

Several models (two towers) are given as a list, each with its own chunk size:

    grad_cache = GradCache([image_encoder, text_encoder], chunk_size=[32, 256])
    loss = grad_cache([images, tokens], lambda image_embeddings, text_embeddings: ...)

What holds for one step, compared with ``criterion(model(images), labels).backward()``:

Inputs
    are copied chunk by chunk (one chunk of extra memory), so a model may change them in place.
Randomness
    of torch (dropout, random augmentation inside the model) is replayed, on every device of the model and of
    the inputs, and goes on afterwards as after the first pass. A ``torch.Generator`` that is an attribute of
    a module is replayed too. Random numbers of Python and NumPy are not: a model that draws from there, or
    keeps state outside its buffers, is warned of in the first step, when the two passes disagree.
BatchNorm
    in training mode normalises each chunk by its own mean and variance, as any accumulation of gradients
    does: the step then is not that of the whole batch. Running statistics move once per chunk, not twice; all
    other buffers are replayed. With SyncBatchNorm every process must have as many chunks.
DistributedDataParallel
    synchronises once, in the backward of the last chunk; buffers are broadcast once, before the first. The
    loss may gather (``gather=True``); processes may have batches, and so numbers of chunks, that differ.
    Parameters that DDP owns must be used inside its forward, not in the loss. With ``static_graph=True`` the
    first step has one more forward and backward, of zero gradients, that synchronises.
Mixed precision
    surround the call with ``torch.autocast`` as one would surround the forward; give a ``GradScaler`` as
    ``scaler`` (of Accelerate: ``accelerator.scaler``, and no ``accelerator.backward``).
Parameters of the loss
    (a learnable temperature) get their gradient in the same call.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pysupcon.gradcache.chunks import Batch, rebuilt, tensors
from pysupcon.gradcache.replay import Buffers, Random, ambient_autocast, autocast, devices_of

__all__ = ["GradCache"]

_Autocast = dict[str, torch.dtype]
_Forward = Callable[[Any, Any], Any]
_ChunkLoss = Callable[[Any, slice], Tensor]

_REPEATED = 0.02
"""Relative difference of the two passes that other kernels may cause; other dropout causes far more."""


class GradCache:
    """Runs forward and backward of a batch in chunks; gradients are added to ``.grad``.

    Args:
        model: called as ``model(chunk)``, twice per chunk. Wrapped by DistributedDataParallel or not. Or a
            list of models (an image and a text encoder), each with its own inputs; one may be in it twice.
        chunk_size: samples (entries of the inputs' first dimension) per chunk, at least 1. With a list of
            models: one number for all, or a list with one per model.
        forward: ``forward(model, chunk)`` instead, e.g. ``lambda model, views: model(views.flatten(0, 1))``
            or ``lambda model, batch: model(**batch)``. With a list of models: one function for all, or a list
            with one function (or None) per model.
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
        forward: _Forward | Sequence[_Forward | None] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.model = model
        self.chunk_size = chunk_size
        self.forward = forward
        self.scaler = scaler
        self._models()  # refuses what is wrong
        self._compare = True
        self._uncounted: set[tuple[nn.Module, str]] = set()
        self._started: set[nn.Module] = set()

    def __call__(
        self,
        inputs: Any,
        loss: Callable[..., Tensor],
        chunk_loss: _ChunkLoss | Sequence[_ChunkLoss | None] | None = None,
    ) -> Tensor:
        """Forward and backward of one batch.

        Args:
            inputs: tensors [B, ...], alone or in tuples, lists, dicts (also ``UserDict``, ``BatchEncoding``)
                and dataclasses; e.g. images [B, C, H, W] or views [B, V, C, H, W]. With a list of models: a
                list with the inputs of each model; B may differ between them. What is split:

                - Tensors and NumPy arrays are split along their first dimension, which must be B in all of
                  them. Those of no dimensions go to every chunk.
                - A list or tuple without tensors and arrays (of strings, PIL images, dicts of numbers) is
                  split if it has B entries. If the inputs hold no tensor and no array at all, B is the length
                  of the lists.
                - A list of tensors is a structure of several [B, ...], not one tensor per sample.
                - Everything else goes to every chunk as it is.

                The model gets copies of the chunk's tensors and arrays in new containers, so it may change
                them in place: both passes see the same values, and the caller's inputs do not change. For
                data of another form give ``torch.arange(B)`` and look the samples up in ``forward``.
            loss: of the whole batch's outputs: what the model gives, its tensors joined along their first
                dimension, in the structure in which the model gives them; what is no tensor comes from the
                last chunk. With a list of models it gets one argument per model. Returns a tensor of no
                dimensions.
            chunk_loss: a further loss that is a sum over samples (reconstruction, cross-entropy), of one
                chunk's outputs and the slice of samples that they are; the chunks' values are added to the
                loss. A mean over the batch is a sum divided by B. With a list of models: a list with one
                function, or None, per model.

        Returns:
            the loss, without a graph.

        Raises:
            ValueError: inputs without samples, with differing first dimensions, or where it is not clear what
                belongs to a sample; inputs or chunk_loss without one entry per model; a loss that is no
                scalar; a DistributedDataParallel with static_graph=True that is in the list twice.
            RuntimeError: gradients are disabled; chunk_loss changed the model's outputs in place.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("GradCache computes gradients: call it outside torch.no_grad()")
        towers = self._towers(inputs, chunk_loss)
        models = list(dict.fromkeys(tower.model for tower in towers))
        devices = devices_of(models, inputs)
        ambient = ambient_autocast(devices)
        # Among processes all must go the same way, and others may have more chunks.
        if all(len(tower.batch.slices) == 1 and not tower.wrappers for tower in towers):
            return self._at_once(towers, loss, ambient)

        # Embed without a graph, then the loss of the whole batch, down to the embeddings.
        embedded = [self._embed(tower, devices, ambient) for tower in towers]
        value = _scalar("loss", loss(*(rebuilt(outputs, iter(leaves)) for _, leaves, outputs in embedded)))
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

        # Each chunk again, with a graph, from what it started from.
        random_after = Random(devices, models)
        buffers_after = Buffers(models, None, self._uncounted, running=True)
        last = {wrapper: task.chunks[-1] for task in tasks for wrapper in task.tower.wrappers}
        try:
            for task in tasks:
                self._start(task, ambient)
                for chunk in task.chunks:
                    with _no_sync(wrapper for wrapper in task.tower.wrappers if last[wrapper] is not chunk):
                        total = total + self._push_through(task, chunk, ambient)
        finally:
            random_after.restore()
            buffers_after.restore()
        self._compare = False
        return total

    def _models(self) -> list[tuple[nn.Module, int, _Forward | None]]:
        """Each model with its chunk size and forward."""
        if isinstance(self.model, nn.Module):
            if isinstance(self.chunk_size, (list, tuple)) or isinstance(self.forward, (list, tuple)):
                raise ValueError(
                    "a list as chunk_size or forward has one entry per model, but model is one module "
                    f"({type(self.model).__name__}): give a list of modules"
                )
            return [(self.model, _size("chunk_size", self.chunk_size), self.forward)]  # type: ignore[list-item]
        if not isinstance(self.model, (list, tuple)):
            raise TypeError(
                f"model must be a torch.nn.Module, or a list of them, got {type(self.model).__name__}"
            )
        if not self.model:
            raise ValueError("model must hold at least one torch.nn.Module, got an empty list")
        for at, model in enumerate(self.model):
            if not isinstance(model, nn.Module):
                raise TypeError(f"model[{at}] must be a torch.nn.Module, got {type(model).__name__}")
        sizes = _per_model("chunk_size", self.chunk_size, len(self.model))
        if isinstance(self.chunk_size, (list, tuple)):
            sizes = [_size(f"chunk_size[{at}]", size) for at, size in enumerate(sizes)]
        else:
            sizes = [_size("chunk_size", size) for size in sizes]
        return list(zip(self.model, sizes, _per_model("forward", self.forward, len(self.model)), strict=True))

    def _towers(self, inputs: Any, chunk_loss: Any) -> list[_Tower]:
        models = self._models()
        if isinstance(self.model, nn.Module):
            inputs, chunk_loss = [inputs], [chunk_loss]
        else:
            if not isinstance(inputs, (list, tuple)):
                raise ValueError(
                    f"inputs must be a list with one entry per model ({len(models)}), "
                    f"got {type(inputs).__name__}"
                )
            if chunk_loss is not None and not isinstance(chunk_loss, (list, tuple)):
                raise ValueError(
                    f"chunk_loss must be a list with one function, or None, per model ({len(models)}), got "
                    f"{type(chunk_loss).__name__}"
                )
            inputs = _per_model("inputs", inputs, len(models))
            chunk_loss = _per_model("chunk_loss", chunk_loss, len(models))
        towers = [
            _Tower(model, forward, Batch(own, size), extra, _wrappers(model))
            for (model, size, forward), own, extra in zip(models, inputs, chunk_loss, strict=True)
        ]
        used = [wrapper for tower in towers for wrapper in tower.wrappers if _static(wrapper)]
        if len(set(used)) < len(used):
            raise ValueError(
                "a DistributedDataParallel with static_graph=True has one graph per step, but it is in the "
                "list of models twice: use static_graph=False, and find_unused_parameters=True where needed"
            )
        return towers

    def _embed(
        self, tower: _Tower, devices: list[torch.device], ambient: _Autocast
    ) -> tuple[list[_Chunk], list[Tensor], Any]:
        """All chunks without a graph: the joined outputs as leaves, the last outputs for their structure."""
        starts: list[tuple[Random, Buffers]] = []
        parts: list[list[Tensor]] = []
        outputs: Any = None

        def seek() -> None:
            if self._compare:
                self._uncounted |= starts[-1][1].changed_uncounted()

        with torch.no_grad():
            for samples in tower.batch.slices:
                if starts:
                    seek()
                buffers = Buffers([tower.model], starts[-1][1] if starts else None, self._uncounted)
                if not starts:
                    for wrapper in tower.wrappers:
                        _broadcast(wrapper, buffers)
                starts.append((Random(devices, [tower.model]), buffers))
                with autocast(ambient):
                    outputs = tower.run(samples)
                parts.append(list(tensors(outputs)))
            seek()
        leaves = [_joined(pieces) for pieces in zip(*parts, strict=True)]
        chunks, offsets = [], [0] * len(leaves)
        for samples, start, pieces in zip(tower.batch.slices, starts, parts, strict=True):
            stops = [at + len(piece) for at, piece in zip(offsets, pieces, strict=True)]
            here = [slice(at, stop) for at, stop in zip(offsets, stops, strict=True)]
            chunks.append(_Chunk(samples, here, *start))
            offsets = stops
        return chunks, leaves, outputs

    def _start(self, task: _Task, ambient: _Autocast) -> None:
        """The first backward of a static graph (DDP) must synchronise: one of zeros does it."""
        new = {wrapper for wrapper in task.tower.wrappers if _static(wrapper)} - self._started
        if new:
            with _no_sync(wrapper for wrapper in task.tower.wrappers if wrapper not in new):
                self._push_through(task, task.chunks[0], ambient, zero=True)
            self._started |= new

    def _push_through(
        self, task: _Task, chunk: _Chunk, ambient: _Autocast, *, zero: bool = False
    ) -> Tensor | float:
        """One chunk's forward with a graph and its backward (of zeros instead); its own loss."""
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
            if task.first is not None and piece.is_floating_point():
                self._check(piece.detach(), task.first[number][part])
            if grad is not None and piece.requires_grad:
                roots.append(piece)
                upstream.append(torch.zeros_like(piece) if zero else grad[part])
        if extra is not None and extra.requires_grad:
            roots.append(extra)
            upstream.append(torch.zeros_like(extra) if zero else None)
        self._backward(roots, upstream, ambient)
        return 0.0 if extra is None else extra.detach()

    def _at_once(self, towers: list[_Tower], loss: Callable[..., Tensor], ambient: _Autocast) -> Tensor:
        outputs = [tower.run(tower.batch.slices[0]) for tower in towers]
        value = _scalar("loss", loss(*outputs))
        for tower, own in zip(towers, outputs, strict=True):
            if tower.chunk_loss is not None:
                value = value + _scalar("chunk_loss", tower.chunk_loss(own, tower.batch.slices[0]))
        self._backward([value], [None], ambient)
        return value.detach()

    def _backward(self, roots: list[Tensor], upstream: list[Tensor | None], ambient: _Autocast) -> None:
        """From losses (upstream None), which are scaled here, and outputs, whose gradients are already."""
        if self.scaler is not None:
            scaled = zip(roots, upstream, strict=True)
            roots = [self.scaler.scale(root) if grad is None else root for root, grad in scaled]
        with autocast(ambient, enabled=False):
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


class _Tower(NamedTuple):
    """One model in one step."""

    model: nn.Module
    forward: _Forward | None
    batch: Batch
    chunk_loss: _ChunkLoss | None
    wrappers: list[nn.Module]
    """DistributedDataParallel and what else can leave a synchronisation out"""

    def run(self, samples: slice) -> Any:
        chunk = self.batch.chunk(samples)
        return self.model(chunk) if self.forward is None else self.forward(self.model, chunk)


class _Chunk(NamedTuple):
    """A part of the batch, and the state from which it was embedded."""

    samples: slice
    outputs: list[slice]
    """of each output tensor"""
    random: Random
    buffers: Buffers


class _Task(NamedTuple):
    """What a model's second pass needs."""

    tower: _Tower
    chunks: list[_Chunk]
    grads: list[Tensor | None]
    """of the loss, by each output tensor of the whole batch"""
    first: list[Tensor] | None
    """the outputs of the first pass, where the second is compared with it"""


def _per_model(name: str, value: Any, models: int) -> list[Any]:
    """A list as it is, anything else for every model."""
    if not isinstance(value, (list, tuple)):
        return [value] * models
    if len(value) != models:
        raise ValueError(f"{name} must have one entry per model, got {len(value)} for {models} models")
    return list(value)


def _size(name: str, value: Any) -> int:
    try:
        size = operator.index(value)
    except TypeError:
        size = 0
    if isinstance(value, bool) or size < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return size


def _wrappers(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that have a ``no_sync``."""
    if hasattr(model, "no_sync"):
        return [model]
    return list(dict.fromkeys(wrapper for child in model.children() for wrapper in _wrappers(child)))


def _static(wrapper: nn.Module) -> bool:
    return getattr(wrapper, "static_graph", False) is True


def _no_sync(wrappers: Iterator[nn.Module]) -> ExitStack:
    stack = ExitStack()
    for wrapper in wrappers:
        stack.enter_context(wrapper.no_sync())  # type: ignore[operator]
    return stack


def _broadcast(wrapper: nn.Module, buffers: Buffers) -> None:
    """Of replayed buffers, as DDP does it in the coming forward: too late for what is recorded before."""
    wrapper = getattr(wrapper, "_orig_mod", wrapper)
    if not isinstance(wrapper, DistributedDataParallel):
        return
    if not (wrapper.broadcast_buffers and wrapper.require_forward_param_sync):
        return
    for prefix, module in wrapper.module.named_modules():
        for name, buffer in module._buffers.items():
            ignored = (f"{prefix}.{name}" if prefix else name) in wrapper.parameters_to_ignore
            if buffer is not None and (module, name) in buffers.copies and not ignored:
                values = buffer.detach().contiguous()
                dist.broadcast(values, group=wrapper.process_group, group_src=0)
                if values.data_ptr() != buffer.data_ptr():
                    buffer.detach().copy_(values)
    buffers.record(wrapper.module)


def _scalar(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() != 0:
        came = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must return a tensor of no dimensions, got {came}")
    return value


def _joined(pieces: tuple[Tensor, ...]) -> Tensor:
    if pieces[0].dim() == 0:
        raise ValueError(
            "the model must return tensors whose first dimension counts rows, got one of no dimensions; "
            "a loss that is computed chunk by chunk goes into chunk_loss"
        )
    joined = torch.cat(pieces) if len(pieces) > 1 else pieces[0].detach()
    return joined.requires_grad_(joined.is_floating_point())
