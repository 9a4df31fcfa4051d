"""GradCache with models wrapped by DistributedDataParallel: static graphs, broadcast buffers, several models.

Run by the processes of tests/helpers/distributed_worker.py.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pysupcon
from pysupcon.gradcache import GradCache

STEPS = 3
KINDS = (
    "static graph", "static graph, unused", "static graph, dropout", "drifting", "drifting, compiled",
    "two wrappers", "two towers", "one wrapper, two branches", "wrappers inside",
)  # fmt: skip


class Encoder(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 7))
        self.double()

    def forward(self, views: Tensor) -> Tensor:
        return F.normalize(self.layers(views), dim=-1)


class Drifting(nn.Module):
    """A model whose forward depends on a buffer that it changes and that differs between processes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 7)
        self.register_buffer("gain", torch.ones(()))
        self.double()

    def forward(self, views: Tensor) -> Tensor:
        self.gain.mul_(1.1)
        return F.normalize(self.linear(views) + self.gain.clone(), dim=-1)


class Branches(nn.Module):
    """Encoders for images and texts, and an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.texts = Encoder(), Encoder()
        self.unused = nn.Linear(2, 2)

    def forward(self, images: Tensor | None = None, texts: Tensor | None = None) -> Tensor:
        return self.texts(texts) if images is None else self.images(images)


def _build(kind: str) -> tuple[nn.Module, Any, Any, Any]:
    """Returns the plain model, and model, chunk sizes and forward for GradCache."""
    if kind.startswith("static graph"):
        encoder = Encoder(0.3 if "dropout" in kind else 0.0)
        if "unused" in kind:
            encoder.register_parameter("unused", nn.Parameter(torch.ones(2)))
        return encoder, DistributedDataParallel(encoder, static_graph=True), 3, None
    if kind.startswith("drifting"):
        drifting = Drifting()
        if "compiled" in kind:
            drifting.compile(backend="aot_eager", fullgraph=True)
        return drifting, DistributedDataParallel(drifting), 3, None
    branches = Branches()
    if kind == "one wrapper, two branches":
        wrapper = DistributedDataParallel(branches, find_unused_parameters=True)
        forwards = [lambda model, views: model(images=views), lambda model, views: model(texts=views)]
        return branches, [wrapper, wrapper], [3, 4], forwards
    towers = [DistributedDataParallel(branches.images), DistributedDataParallel(branches.texts)]
    if kind in ("two wrappers", "two towers"):
        return branches, towers, [4, 2], None
    inside = nn.ModuleList(towers)
    return (
        branches,
        inside,
        3,
        lambda model, views: [tower(part) for tower, part in zip(model, views, strict=True)],
    )


def _wrappers(model: Any) -> Iterator[DistributedDataParallel]:
    models = dict.fromkeys(model) if isinstance(model, list) else [model]
    for entry in models:
        yield from (module for module in entry.modules() if isinstance(module, DistributedDataParallel))


def _gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def steps(kind: str, sizes: list[int]) -> dict[str, Any]:
    """Runs steps of GradCache, and the same chunks in one graph whose gradients are averaged.

    Args:
        kind: of KINDS.
        sizes: samples of each process.
    """
    rank = dist.get_rank()
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    generator = torch.Generator().manual_seed(9)
    images, texts = torch.randn(2, sum(sizes), 2, 6, generator=generator, dtype=torch.float64)[:, own]
    labels = (torch.arange(sum(sizes)) % 3)[own]
    criterion = pysupcon.SupConLoss(0.2, gather=True)
    clip = pysupcon.InfoNCELoss(0.2, symmetric=True, gather=True)
    torch.manual_seed(2)
    plain, model, chunk_size, forward = _build(kind)
    reductions: list[int] = []

    def count(state, bucket):  # type: ignore[no-untyped-def]  # annotations must not be strings here
        reductions.append(bucket.buffer().numel())
        tensor = bucket.buffer().div_(dist.get_world_size())
        return dist.all_reduce(tensor, async_op=True).get_future().then(lambda done: done.value()[0])

    for wrapper in _wrappers(model):
        wrapper.register_comm_hook(None, count)
    two = isinstance(plain, Branches)

    def loss(*outputs: Any) -> Tensor:
        if kind == "two towers":
            return clip(outputs[0], candidates=outputs[1])
        first, second = outputs[0] if kind == "wrappers inside" else (*outputs, 0.0)[:2]
        return criterion((first + 2 * second) / 3 if two else first, labels)

    other, grad_cache = copy.deepcopy(plain), GradCache(model, chunk_size, forward=forward)
    got, truth = [], []
    torch.manual_seed(10 + rank)
    for _ in range(STEPS):
        if isinstance(plain, Drifting):
            plain.gain.add_(rank)
        plain.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message="the rows of features have a mean norm")
            grad_cache((images, texts) if two else images, loss)
        got.append(_gradients(plain))
    torch.manual_seed(10 + rank)
    for _ in range(STEPS):
        for buffer in other.buffers():  # as DistributedDataParallel before a step
            dist.broadcast(buffer, 0)
        other.zero_grad()
        if isinstance(other, Branches):
            outputs = [other.images(images), other.texts(texts)]
            (loss(outputs) if kind == "wrappers inside" else loss(*outputs)).backward()
        else:
            loss(torch.cat([other(chunk) for chunk in images.split(chunk_size)])).backward()
        for parameter in other.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        truth.append(_gradients(other))
    return {
        "got": [*got, [*plain.buffers()]],
        "truth": [*truth, [*other.buffers()]],
        "reduced": sum(reductions),
        "weights": sum(p.numel() for wrapper in _wrappers(model) for p in wrapper.parameters()),
    }


def static_graph_twice() -> str:
    """Returns the error for one static graph that is used by two models."""
    model = DistributedDataParallel(Encoder(), static_graph=True)
    try:
        GradCache([model, model], 3)([torch.zeros(4, 6)] * 2, lambda first, second: first.sum())
    except ValueError as error:
        return str(error)
    return ""
