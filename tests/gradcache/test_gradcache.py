"""GradCache gives the step of the whole batch, and replays random numbers of a model."""

from __future__ import annotations

import copy
import random
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pysupcon
from pysupcon.gradcache import GradCache

IMAGES, LABELS = 12, 3


class Pair(NamedTuple):
    embedding: Tensor
    logits: Tensor


@dataclass
class Named:
    embedding: Tensor
    logits: Tensor
    note: str = "stays"


class Encoder(nn.Module):
    def __init__(
        self, structure: str = "tensor", dropout: float = 0.0, norm: type[nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 16), *([norm(16)] if norm else []), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 8)
        )
        self.classifier = nn.Linear(8, LABELS)
        self.structure = structure

    def forward(self, images: Tensor) -> Any:
        z = self.body(images)
        z = F.normalize(z, dim=-1)
        if self.structure == "tensor":
            return z
        logits = self.classifier(z)
        if self.structure == "dict":
            return {"embedding": z, "logits": logits, "none": None}
        kinds: dict[str, Any] = {"tuple": lambda *both: both, "named tuple": Pair, "dataclass": Named}
        return kinds[self.structure](z, logits)


def _field(outputs: Any, name: str) -> Tensor:
    if isinstance(outputs, dict):
        return outputs[name]
    return getattr(outputs, name) if hasattr(outputs, name) else outputs[("embedding", "logits").index(name)]


def _data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(IMAGES, 6, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.arange(IMAGES) % LABELS


def _gradients(*modules: nn.Module) -> list[Tensor]:
    return [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for module in modules
        for parameter in module.parameters()
    ]


def _assert_close(got: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    assert len(got) == len(wanted) > 0
    assert any(gradient.abs().max() > 1e-4 for gradient in wanted), "nothing to compare"
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk_size", [1, 5, 6, 12, 100])
def test_equals_the_whole_batch(chunk_size: int) -> None:
    images, labels = _data()
    model = Encoder().double()
    criterion = pysupcon.SupConLoss(0.3, learnable_temperature=True).double()
    wanted_loss = criterion(model(images), labels)
    wanted_loss.backward()
    wanted = _gradients(model, criterion)
    model.zero_grad()
    criterion.zero_grad()
    loss = GradCache(model, chunk_size)(images, lambda z: criterion(z, labels))
    assert not loss.requires_grad
    torch.testing.assert_close(loss, wanted_loss.detach(), rtol=1e-12, atol=0)
    _assert_close(_gradients(model, criterion), wanted, 1e-10)


@pytest.mark.parametrize("structure", ["tuple", "named tuple", "dict", "dataclass"])
@pytest.mark.parametrize("head", ["whole batch", "chunks"])
def test_a_classification_head_and_any_structure(structure: str, head: str) -> None:
    images, labels = _data()
    model = Encoder(structure).double()
    criterion = pysupcon.SINCERELoss(0.3)

    def contrast(outputs: Any) -> Tensor:
        assert len(_field(outputs, "logits")) == IMAGES
        return criterion(_field(outputs, "embedding"), labels)

    outputs = model(images)
    wanted_loss = contrast(outputs) + 0.5 * F.cross_entropy(_field(outputs, "logits"), labels)
    wanted_loss.backward()
    wanted = _gradients(model)
    model.zero_grad()
    if head == "chunks":
        loss = GradCache(model, 5)(
            images,
            contrast,
            lambda outputs, rows: (
                0.5 * F.cross_entropy(_field(outputs, "logits"), labels[rows], reduction="sum") / IMAGES
            ),
        )
    else:
        loss = GradCache(model, 5)(
            images,
            lambda outputs: contrast(outputs) + 0.5 * F.cross_entropy(_field(outputs, "logits"), labels),
        )
    torch.testing.assert_close(loss, wanted_loss.detach(), rtol=1e-12, atol=0)
    _assert_close(_gradients(model), wanted, 1e-10)


def test_many_views_and_own_forward_and_structured_inputs() -> None:
    model = Encoder().double()
    views = torch.randn(IMAGES, 2, 6, dtype=torch.float64)
    offset = torch.randn(IMAGES, 1, 6, dtype=torch.float64)
    labels = torch.arange(IMAGES) % LABELS
    criterion = pysupcon.SpreadLoss(0.5)

    def forward(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return module((batch["views"] + batch["offset"]).flatten(0, 1))

    def loss(z: Tensor) -> Tensor:
        return criterion(z.view(IMAGES, 2, -1), labels)

    batch = {"views": views, "offset": offset}
    loss(forward(model, batch)).backward()
    wanted = _gradients(model)
    model.zero_grad()
    GradCache(model, 5, forward=forward)(batch, loss)
    _assert_close(_gradients(model), wanted, 1e-10)


class Chunked(nn.Module):
    """The expected step of models whose forward depends on the chunk: the same chunks, in one graph."""

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.model(chunk) for chunk in images.split(self.size)])


def test_dropout_is_replayed() -> None:
    images, labels = _data()
    criterion = pysupcon.SupConLoss(0.3)
    model = Encoder(dropout=0.5).double()
    torch.manual_seed(5)
    wanted_loss = criterion(Chunked(model, 5)(images), labels)
    wanted_loss.backward()
    wanted, random_after = _gradients(model), torch.get_rng_state()
    model.zero_grad()
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = GradCache(model, 5)(images, lambda z: criterion(z, labels))
    torch.testing.assert_close(loss, wanted_loss.detach(), rtol=1e-12, atol=0)
    _assert_close(_gradients(model), wanted, 1e-10)
    assert torch.equal(torch.get_rng_state(), random_after), "the next step must draw anew"


def test_batch_norm_updates_its_statistics_once_per_chunk() -> None:
    images, labels = _data()
    criterion = pysupcon.SupConLoss(0.3)
    model = Encoder(norm=nn.BatchNorm1d).double()
    other = copy.deepcopy(model)
    wanted_loss = criterion(Chunked(other, 5)(images), labels)
    wanted_loss.backward()
    loss = GradCache(model, 5)(images, lambda z: criterion(z, labels))
    torch.testing.assert_close(loss, wanted_loss.detach(), rtol=1e-12, atol=0)
    _assert_close(_gradients(model), _gradients(other), 1e-10)
    for (name, got), (_, wanted) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(got, wanted), name
    assert model.body[1].num_batches_tracked == 3


class Drifting(nn.Module):
    """A model whose forward depends on buffers that it changes: one in place, one by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.gain.mul_(1.5)
        self.shift = self.shift + 0.25
        return F.normalize(self.linear(images) * self.gain.clone() + self.shift, dim=-1)


def test_buffers_of_the_forward_are_replayed() -> None:
    images, labels = _data()
    criterion = pysupcon.SupConLoss(0.3)
    model = Drifting().double()
    other = copy.deepcopy(model)
    criterion(Chunked(other, 5)(images), labels).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GradCache(model, 5)(images, lambda z: criterion(z, labels))
    _assert_close(_gradients(model), _gradients(other), 1e-10)
    assert model.gain == other.gain == 1.5**3
    assert model.shift == other.shift == 0.75


class Unrepeatable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images) * random.random()


def test_random_numbers_without_replay_warn_once() -> None:
    images, _ = _data(torch.float32)
    grad_cache = GradCache(Unrepeatable(), 5)
    with pytest.warns(UserWarning, match="second pass over a chunk did not repeat its first") as caught:
        [grad_cache(images, lambda z: z.square().sum()) for _ in range(2)]
    assert [warning.filename for warning in caught] == [__file__]


def test_under_autocast() -> None:
    images, labels = _data(torch.float32)
    criterion = pysupcon.SupConLoss(0.3)
    model = Encoder()

    def loss(z: Tensor) -> Tensor:
        assert z.dtype == torch.bfloat16, "the loss sees what the model gives"
        return criterion(z, labels)

    with torch.autocast("cpu", torch.bfloat16):
        assert model.body(images).dtype == torch.bfloat16
        wanted_loss = loss(Chunked(model, 5)(images))
    wanted_loss.backward()
    wanted = _gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        got_loss = GradCache(model, 5)(images, loss)
    torch.testing.assert_close(got_loss, wanted_loss.detach())
    # A weight's gradient is a sum over chunks, each rounded to bfloat16; both sides have this rounding.
    _assert_close(_gradients(model), wanted, 1e-2)
    assert all(gradient.abs().sum() > 0 for gradient in _gradients(model.body)), (
        "weights cast without a graph"
    )


def test_with_a_gradient_scaler() -> None:
    images, labels = _data()
    model = Encoder("tuple").double()
    criterion = pysupcon.SupConLoss(0.3, learnable_temperature=True).double()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.5)

    def head(outputs: Any, rows: slice) -> Tensor:
        return F.cross_entropy(outputs[1], labels[rows], reduction="sum") / IMAGES

    other, other_criterion = copy.deepcopy(model), copy.deepcopy(criterion)
    outputs = other(images)
    (other_criterion(outputs[0], labels) + F.cross_entropy(outputs[1], labels)).backward()
    wanted = _gradients(other, other_criterion)

    before = [parameter.detach().clone() for parameter in (*model.parameters(), *criterion.parameters())]
    GradCache(model, 5, scaler=scaler)(images, lambda outputs: criterion(outputs[0], labels), head)
    _assert_close([gradient / 1024 for gradient in _gradients(model, criterion)], wanted, 1e-10)
    scaler.step(optimizer)
    scaler.update()
    after = [parameter.detach() for parameter in (*model.parameters(), *criterion.parameters())]
    _assert_close([(a - b) / 0.5 for a, b in zip(before, after, strict=True)], wanted, 1e-9)


def test_gradients_accumulate_over_calls() -> None:
    images, labels = _data()
    model = Encoder().double()
    grad_cache = GradCache(model, 5)
    grad_cache(images, lambda z: z.square().mul(labels[:, None]).sum())
    once = _gradients(model.body)
    grad_cache(images, lambda z: z.square().mul(labels[:, None]).sum())
    for got, wanted in zip(_gradients(model.body), once, strict=True):
        torch.testing.assert_close(got, 2 * wanted, rtol=1e-10, atol=1e-12)


def test_no_graph_outlives_its_chunk() -> None:
    """At the start of a chunk's forward, no activation of another chunk is alive."""
    images, labels = _data(torch.float32)
    alive: list[int] = []
    activations = 0

    class CountedActivation(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            nonlocal activations
            activations -= 1
            return grad

    class Counting(Encoder):
        def forward(self, images: Tensor) -> Any:
            nonlocal activations
            alive.append(activations)
            z = super().forward(images)
            if torch.is_grad_enabled():
                activations += 1
                z = CountedActivation.apply(z)
            return z

    criterion = pysupcon.SupConLoss(0.3)
    GradCache(Counting(), 4)(images, lambda z: criterion(z, labels))
    assert alive == [0] * 6
    assert activations == 0


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            lambda: GradCache(lambda x: x, 4),
            TypeError,
            "model must be a torch.nn.Module, or a list of them, got function",
        ),
        (lambda: GradCache(Encoder(), 0), ValueError, "chunk_size must be an integer of at least 1, got 0"),
        (
            lambda: GradCache(Encoder(), 2.5),
            ValueError,
            "chunk_size must be an integer of at least 1, got 2.5",
        ),
        (
            lambda: GradCache(Encoder(), 2)((torch.zeros(4, 6), torch.zeros(3)), lambda z: z.sum()),
            ValueError,
            r"one and the same first dimension \(the samples\), got shapes \[\[4, 6\], \[3\]\]",
        ),
        (
            lambda: GradCache(Encoder(), 2)("images", lambda z: z.sum()),
            ValueError,
            r"got lists of lengths \[\] in str",
        ),
        (
            lambda: GradCache(Encoder(), 2)(torch.zeros(4, 6), lambda z: z.sum(1)),
            ValueError,
            r"loss must return a tensor of no dimensions, got shape \[4\]",
        ),
        (
            lambda: GradCache(Encoder(), 2)(torch.zeros(4, 6), lambda z: z.detach().sum()),
            ValueError,
            "loss must depend on the model's outputs",
        ),
        (
            lambda: GradCache(Encoder(), 2, forward=lambda model, x: model(x).sum())(
                torch.zeros(4, 6), lambda z: z.sum()
            ),
            ValueError,
            "the model must return tensors whose first dimension counts rows",
        ),
    ],
)
def test_errors(call: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()
