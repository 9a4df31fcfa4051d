"""The cases of tests/distributed/test_distributed.py, run by the processes of one process group.

Each case returns tensors or numbers of its process, which the test compares. The expected values come from
the dense reference on the whole batch, which every process computes itself.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pysupcon
from helpers import gradcache_wrappers
from helpers.cases import CASES as LOSS_CASES
from pysupcon.distributed import AllGather, Ring
from pysupcon.gradcache import GradCache

WIDTH, CLASSES = 7, 3
LOSSES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    name: (loss, {"temperature": 0.3 if loss.needs_instances else 0.2, **own})
    for name, (loss, own) in [*LOSS_CASES.items(), ("infonce", (pysupcon.InfoNCELoss, {}))]
}
MODES: dict[str, bool | str] = {"all": True, "ring": "ring"}
MESSAGE = 288  # bytes of the message that compares the arguments


def sizes_of(batches: str, world: int) -> list[int]:
    """Returns the number of samples of each process."""
    return {
        "equal": [4] * world,
        "ragged": [2 + 3 * rank for rank in range(world)],
        "empty": [0] + [5 + rank for rank in range(1, world)],
        "single": [1] + [5] * (world - 1),
        "large": [290 + 20 * rank for rank in range(world)],  # several tiles per process
    }[batches]


class Batch:
    """The whole batch, and the part of this process."""

    def __init__(self, batches: str, layout: str, dtype: torch.dtype) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        sizes = sizes_of(batches, world)
        self.own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        count, generator = sum(sizes), torch.Generator().manual_seed(7)
        shape = {"views": (count, 2, WIDTH), "three views": (count, 3, WIDTH), "rows": (count, WIDTH)}[layout]
        features = F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)
        self.features = features.to(dtype)
        # The last label occurs once, so some anchors have no positive.
        self.labels = torch.randint(CLASSES, (count,), generator=generator)
        self.labels[-1] = CLASSES
        # Rows of one instance have one label; some instances are on two processes, and some have one row.
        self.instances = None if layout != "rows" else self.labels * 100 + torch.arange(count) % 3

    def arguments(self, name: str, part: slice) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        labels = () if name == "infonce" else (self.labels[part],)
        return labels, {} if self.instances is None else {"instances": self.instances[part]}


def _criterion(name: str, **options: Any) -> nn.Module:
    kind, own = LOSSES[name]
    return kind(**own, learnable_temperature=True, **options).double()


def _one_step(criterion: nn.Module, features: Tensor, weights: Tensor | None, arguments: Any) -> list[Tensor]:
    """Returns the loss and the gradients of the features and of the temperature."""
    features = features.clone().requires_grad_()
    labels, instances = arguments
    loss = criterion(features, *labels, **instances)
    (loss if weights is None else (loss * weights).sum()).backward()
    temperature = criterion.log_temperature.grad
    return [loss.detach(), features.grad, torch.zeros(()) if temperature is None else temperature]


def embeddings(
    name: str, mode: str, batches: str, layout: str, dtype: str, reduction: str, backend: str
) -> dict[str, Any]:
    """Returns loss and gradients of this process, and those of one process with the whole batch."""
    batch = Batch(batches, layout, getattr(torch, dtype))
    everything = slice(None)
    weights = None
    if reduction == "none":
        weights = torch.rand(batch.features.shape[:-1], generator=torch.Generator().manual_seed(1)) + 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning for a process without a positive
        warnings.filterwarnings("ignore", message="the rows of features have a mean norm")
        got = _one_step(
            _criterion(name, gather=MODES[mode], reduction=reduction, backend=backend),
            batch.features[batch.own],
            None if weights is None else weights[batch.own],
            batch.arguments(name, batch.own),
        )
    truth = _one_step(
        _criterion(name, reduction=reduction, backend="reference"),
        batch.features.double(),
        weights,
        batch.arguments(name, everything),
    )
    return {"got": got, "truth": truth, "own": batch.own}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, WIDTH))

    def forward(self, views: Tensor) -> Tensor:
        return F.normalize(self.layers(views), dim=-1)


def _train(
    model: nn.Module, criterion: nn.Module, views: Tensor, labels: tuple[Tensor, ...], chunk_size: int | None
) -> dict[str, list[Tensor]]:
    """Returns the losses of five steps, the gradients of the first, the parameters after the last."""
    parameters = [*model.parameters(), *criterion.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.2, momentum=0.9)
    losses, gradients = [], []
    grad_cache = None if chunk_size is None else GradCache(model, chunk_size)
    for step in range(5):
        optimizer.zero_grad()
        if grad_cache is None:
            loss = criterion(model(views), *labels)
            loss.backward()
        else:
            loss = grad_cache(views, lambda z: criterion(z, *labels))
        if step == 0:
            gradients = [parameter.grad.clone() for parameter in parameters]
        optimizer.step()
        losses.append(loss.detach())
    return {
        "losses": losses,
        "gradients": gradients,
        "parameters": [parameter.detach().clone() for parameter in parameters],
    }


def training(name: str, mode: str, batches: str, dtype: str, chunk_size: int | None) -> dict[str, Any]:
    """Five steps under DistributedDataParallel, and five of one process with the whole batch."""
    batch = Batch(batches, "views", torch.float64)
    generator = torch.Generator().manual_seed(11)
    views = torch.randn(len(batch.labels), 2, 6, generator=generator, dtype=torch.float64)
    torch.manual_seed(2)
    model, kind = Encoder(), getattr(torch, dtype)
    views, model = views.to(kind), model.to(kind)
    truth = _train(
        copy.deepcopy(model).double(),
        _criterion(name, backend="reference"),
        views.double(),
        batch.arguments(name, slice(None))[0],
        None,
    )
    together = DistributedDataParallel(model)
    reductions = []

    def count(state, bucket):  # type: ignore[no-untyped-def]  # annotations must not be strings here
        reductions.append(bucket.buffer().numel())
        tensor = bucket.buffer().div_(dist.get_world_size())
        return dist.all_reduce(tensor, async_op=True).get_future().then(lambda done: done.value()[0])

    together.register_comm_hook(None, count)
    criterion = DistributedDataParallel(_criterion(name, gather=MODES[mode]).to(kind))
    got = _train(together, criterion, views[batch.own], batch.arguments(name, batch.own)[0], chunk_size)
    return {
        "got": got,
        "truth": truth,
        "reductions": reductions,
        "weights": sum(p.numel() for p in model.parameters()),
    }


class Stochastic(nn.Module):
    """A model with dropout and batch norm, whose buffers DistributedDataParallel broadcasts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, WIDTH)
        )

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.layers(images), dim=-1)


def stochastic() -> dict[str, Any]:
    """GradCache under DistributedDataParallel, and the same chunks in one graph, for a stochastic model."""
    rank = dist.get_rank()
    torch.manual_seed(3)
    model = DistributedDataParallel(Stochastic().double())
    views = torch.randn(10, 6, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    labels = torch.arange(10) % 3
    criterion = pysupcon.SupConLoss(0.2, gather=True)
    plain = copy.deepcopy(model.module)
    torch.manual_seed(10 + rank)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message="the rows of features have a mean norm")
            GradCache(model, 4)(views, lambda z: criterion(z, labels))
    torch.manual_seed(10 + rank)
    for step in range(2):
        if step:  # as DistributedDataParallel before a step
            for buffer in plain.buffers():
                dist.broadcast(buffer, 0)
        criterion(torch.cat([plain(chunk) for chunk in views.split(4)]), labels).backward()
    for parameter in plain.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    return {
        "got": [*(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())],
        "truth": [*(p.grad for p in plain.parameters()), *plain.buffers()],
    }


def wrapped(kind: str, batches: str) -> dict[str, Any]:
    """GradCache with one kind of wrapped models."""
    return gradcache_wrappers.steps(kind, sizes_of(batches, dist.get_world_size()))


COLLECTIVES = (
    "all_gather_single", "all_gather_into_tensor", "batch_isend_irecv", "all_gather", "all_reduce",
    "reduce_scatter", "reduce_scatter_tensor", "all_to_all", "broadcast", "reduce", "gather", "scatter",
    "send", "recv", "all_gather_object", "barrier",
)  # fmt: skip


@contextmanager
def counted() -> Iterator[list[tuple[str, int, int]]]:
    """Records (function, bytes sent, bytes received) of every collective."""
    calls: list[tuple[str, int, int]] = []
    kept = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if name == "batch_isend_irecv":
                sent, received = (
                    sum(item.tensor.nbytes for item in arguments[0] if item.op is kind)
                    for kind in (dist.isend, dist.irecv)
                )
            elif name.startswith("all_gather_"):
                received, sent = arguments[0].nbytes - arguments[1].nbytes, arguments[1].nbytes
            else:
                sent = received = -1
            calls.append((name.replace("into_tensor", "single"), sent, received))
            return function(*arguments, **options)

        return call

    for name, function in kept.items():
        setattr(dist, name, wrapped(name, function))
    try:
        yield calls
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


def traffic(name: str, mode: str, dtype: str, layout: str) -> dict[str, Any]:
    """Records the communication of one forward and one backward, call by call."""
    batch = Batch("equal", layout, getattr(torch, dtype))
    features = batch.features[batch.own].clone().requires_grad_()
    criterion = LOSSES[name][0](**LOSSES[name][1], gather=MODES[mode])
    labels, instances = batch.arguments(name, batch.own)
    with counted() as forward:
        loss = criterion(features, *labels, **instances)
    with counted() as backward:
        loss.backward()
    return {"forward": forward, "backward": backward}


def not_finite(mode: str) -> str:
    """A NaN on the last process raises an error on all processes, and no process hangs."""
    features = torch.randn(5, 2, WIDTH)
    if dist.get_rank() == dist.get_world_size() - 1:
        features[3, 1, 2] = float("nan")
    try:
        pysupcon.SupConLoss(gather=MODES[mode])(features, torch.arange(5) % 2)
    except ValueError as error:
        return str(error)
    return ""


def one_sample(mode: str, classes: int) -> dict[str, list[Tensor]]:
    """cNCE in float32 with one sample of two views per process: 20 batches.

    Returns for each batch the gradient of this process, its exact value, that of a dense float32 loss, and
    the sum of the absolute values of its terms.
    """
    rank, world, temperature = dist.get_rank(), dist.get_world_size(), 0.07
    labels = torch.arange(world) % classes
    others = ~torch.eye(2 * world, dtype=torch.bool)
    samples, same = torch.arange(world).repeat_interleave(2), labels.repeat_interleave(2)
    own_views = (samples[:, None] == samples) & others
    positives = (same[:, None] == same) & others
    dense = LOSSES["cnce"][0](temperature, backend="reference")
    results: dict[str, list[Tensor]] = {"got": [], "truth": [], "dense": [], "terms": []}
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(world, 1, 16, generator=generator)  # the views of a sample are similar
        features = F.normalize(features + torch.randn(world, 2, 16, generator=generator), dim=-1)

        def gradient(criterion: nn.Module, features: Tensor, labels: Tensor) -> Tensor:
            features = features.clone().requires_grad_()
            criterion(features, labels).backward()
            return features.grad.double()

        own = slice(rank, rank + 1)
        gathered = LOSSES["cnce"][0](temperature, gather=MODES[mode])
        results["got"].append(gradient(gathered, features[own], labels[own]) / world)
        results["truth"].append(gradient(dense, features.double(), labels)[own])
        results["dense"].append(gradient(dense, features, labels)[own])
        rows = features.double().flatten(0, 1)
        similarity = (rows @ rows.T / temperature).masked_fill(~positives, -torch.inf)
        weights = (similarity.softmax(dim=1) + own_views) / (len(rows) * temperature)
        results["terms"].append(((weights + weights.T) @ rows.abs()).view_as(features)[own])
    return results


def no_positive() -> dict[str, Any]:
    """No process has a positive: the loss is 0, connected to the graph, with a warning."""
    features = torch.randn(3, WIDTH, requires_grad=True)
    labels = torch.arange(3) + 3 * dist.get_rank()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message="the rows of features have a mean norm")
        loss = pysupcon.SupConLoss(gather=True)(features, labels)
    loss.backward()
    return {
        "loss": loss.item(),
        "gradient": features.grad,
        "warnings": [str(entry.message) for entry in caught],
    }


def without_gather() -> list[str]:
    """Returns the warnings of losses without gather."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message="the rows of features have a mean norm")
        for _ in range(2):
            pysupcon.SupConLoss()(torch.randn(4, 2, WIDTH), torch.arange(4) % 2)
            pysupcon.SINCERELoss()(torch.randn(4, 2, WIDTH), torch.arange(4) % 2)
    return [str(entry.message) for entry in caught]


def subgroup(mode: str) -> dict[str, Any]:
    """The last two processes gather in a group of their own; process 0 is alone in its group."""
    world, rank = dist.get_world_size(), dist.get_rank()
    groups = [dist.new_group([0]), dist.new_group([world - 2, world - 1])] if world > 2 else [None, None]
    pair = rank >= world - 2
    features = torch.randn(
        world, 4, 2, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    labels = torch.arange(4) % 2
    if not pair and rank > 0:
        return {"got": torch.zeros(()), "truth": torch.zeros(())}
    gather = {"all": AllGather, "ring": Ring}[mode](groups[1 if pair else 0])
    got = pysupcon.SupConLoss(gather=gather)(features[rank], labels)
    if pair:
        dist.all_reduce(got, group=groups[1])
        whole = features[-2:].reshape(8, 2, WIDTH)
        return {
            "got": got / 2,
            "truth": pysupcon.functional.supcon(whole, labels.repeat(2), backend="reference"),
        }
    return {"got": got, "truth": pysupcon.functional.supcon(features[rank], labels, backend="reference")}


def compiled() -> dict[str, Any]:
    """A gathered loss in a compiled function: a graph break, and the same results."""
    torch.manual_seed(0)
    model = Encoder()
    criterion = pysupcon.SupConLoss(0.2, gather=True)
    views = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(dist.get_rank()))
    labels = torch.arange(4) % 2

    def step(views: Tensor, labels: Tensor) -> Tensor:
        return criterion(model(views) * 1.0, labels) * 2.0

    results = []
    for function in (torch.compile(step, backend="aot_eager"), step):
        model.zero_grad()
        loss = function(views, labels)
        loss.backward()
        results.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    return {"got": results[0], "truth": results[1]}


def pair_statistics(mode: str) -> dict[str, Any]:
    """The statistics for a custom loss, here SupCon."""
    batch = Batch("ragged", "views", torch.float64)
    gather = {"all": AllGather, "ring": Ring}[mode]()

    def loss(part: slice, **options: Any) -> tuple[Tensor, Tensor]:
        features = batch.features[part].clone().requires_grad_()
        s = pysupcon.functional.pair_statistics(features, batch.labels[part], temperature=0.2, **options)
        valid = s.positive_count > 0
        denominator = torch.logaddexp(s.negative_logsumexp, torch.where(valid, s.positive_logsumexp, 0.0))
        total = torch.where(valid, denominator - s.positive_mean, 0.0).sum()
        total.backward()
        return total.detach(), features.grad

    got, truth = loss(batch.own, gather=gather), loss(slice(None), backend="reference")
    return {"got": [got[0], got[1]], "truth": [truth[0], truth[1][batch.own]]}


CASES: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        embeddings, training, stochastic, traffic, not_finite, one_sample, no_positive, without_gather,
        subgroup, compiled, pair_statistics, wrapped, gradcache_wrappers.static_graph_twice,
    )
}  # fmt: skip


if __name__ == "__main__":  # started by a launcher
    if sys.argv[1] == "accelerate":
        from accelerate import PartialState

        PartialState(cpu=True)
    else:
        dist.init_process_group("gloo")
    for gather in MODES:
        result = embeddings("supcon", gather, "ragged", "views", "float64", "mean", "auto")
        mean = result["got"][0].clone()
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
        torch.testing.assert_close(mean, result["truth"][0], rtol=1e-10, atol=0)
        wanted = result["truth"][1][result["own"]] * dist.get_world_size()
        torch.testing.assert_close(result["got"][1], wanted, rtol=1e-10, atol=1e-12)
    if dist.get_rank() == 0:
        print(f"equal among {dist.get_world_size()} processes")
    dist.destroy_process_group()
