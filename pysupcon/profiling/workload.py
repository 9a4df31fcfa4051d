"""Work to measure: random inputs, a loss, and a training step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pysupcon.losses import LOSSES_BY_NAME
from pysupcon.ranges import region

VIEWS = 2
LOSSES = tuple(LOSSES_BY_NAME)


class Inputs(NamedTuple):
    """Arguments of a loss."""

    features: Tensor
    """[N, D], rows of unit length, with requires_grad."""
    labels: Tensor
    """[N] int64 classes."""
    instances: Tensor
    """[N] int64, the sample of each row."""


def unit_rows(
    n: int, dim: int, classes: int, *, dtype: torch.dtype, device: torch.device | str, seed: int
) -> Inputs:
    """Return two views of n / 2 samples in classes of equal size, in random order.

    The rows are scattered around the centre of their class with a cosine of about 0.5.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = n // VIEWS
    of_sample = (torch.arange(samples) % classes)[torch.randperm(samples, generator=generator)]
    instances = torch.arange(samples).repeat_interleave(VIEWS)
    labels = of_sample[instances]
    features = torch.randn(classes, dim, generator=generator)[labels]
    features += torch.randn(n, dim, generator=generator)
    features /= torch.linalg.vector_norm(features, dim=1, keepdim=True)
    features = features.to(device, dtype).requires_grad_()
    return Inputs(features, labels.to(device), instances.to(device))


def loss_function(name: str, temperature: float, backend: str = "auto") -> Callable[[Inputs], Tensor]:
    """Return the loss ``name`` of LOSSES as a function of its inputs."""
    description = LOSSES_BY_NAME[name]
    own: dict[str, Any] = {**description.trainer_defaults[name], "temperature": temperature}

    def loss(i: Inputs) -> Tensor:
        arguments = dict(own)
        if not description.self_supervised:
            arguments["labels"] = i.labels
        if description.self_supervised or description.needs_instances:
            arguments["instances"] = i.instances
        return description.function(i.features, backend=backend, **arguments)

    return loss


class Seconds(NamedTuple):
    """Median times in seconds."""

    forward: float
    backward: float
    both: float


@dataclass
class LossWork:
    """Forward and backward of a loss on N rows."""

    loss: Callable[[Inputs], Tensor]
    inputs: Inputs

    @property
    def device(self) -> torch.device:
        return self.inputs.features.device

    def __call__(self) -> None:
        self.inputs.features.grad = None
        self.loss(self.inputs).backward()
        self.inputs.features.grad = None

    def once(self) -> Seconds:
        """Run once and return the times."""
        self.inputs.features.grad = None
        start = _now(self.device)
        loss = self.loss(self.inputs)
        middle = _now(self.device)
        loss.backward()
        end = _now(self.device)
        self.inputs.features.grad = None
        forward, backward = middle - start, end - middle
        return Seconds(forward, backward, forward + backward)

    def seconds(self, budget: float) -> Seconds:
        """Return medians over up to 20 repetitions within ``budget`` seconds, at least one."""
        found = [self.once()]
        while sum(run.both for run in found) < budget and len(found) < 20:
            found.append(self.once())
        return Seconds(*(statistics.median(part) for part in zip(*found, strict=True)))


class StepSeconds(NamedTuple):
    """Times of the parts of a step."""

    train: float
    """Forward and backward of the encoder, with the loss."""
    update: float
    """The step of the optimizer."""
    encode: float
    """Forward without gradients, the first pass of each chunk."""


class StepWork:
    """A training step on N images: encoder, loss, backward, optimizer step. The gradients are cleared.

    Args:
        model: maps images [N, 3, S, S] to rows [N, D] of unit length.
        optimizer: optimizer of the model.
        loss: the loss.
        images: [N, 3, S, S].
        inputs: labels and instances; its features are replaced by the model's output.
        chunk: images per forward pass of the encoder (GradCache); None disables chunks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[Inputs], Tensor],
        images: Tensor,
        inputs: Inputs,
        chunk: int | None,
    ) -> None:
        self.model, self.loss, self.images, self.inputs, self.chunk = model, loss, images, inputs, chunk
        self.optimizer = optimizer
        self.cache: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor] | None = None
        if chunk is not None:
            from pysupcon.gradcache import GradCache

            self.cache = GradCache(model, chunk, forward=_encode)

    def __call__(self) -> None:
        if self.cache is not None:
            self.cache(self.images, self._loss)
        else:
            self._loss(_encode(self.model, self.images)).backward()
        with region("optimizer"):
            self.optimizer.step()
        self.optimizer.zero_grad()

    def parts(self) -> StepSeconds:
        """Run a step without chunks, and encode once more without gradients; return their times."""
        device = self.images.device
        start = _now(device)
        self._loss(_encode(self.model, self.images)).backward()
        trained = _now(device)
        self.optimizer.step()
        self.optimizer.zero_grad()
        updated = _now(device)
        with torch.no_grad():
            _encode(self.model, self.images)
        return StepSeconds(trained - start, updated - trained, _now(device) - updated)

    def seconds(self) -> float:
        """Return the time of one step."""
        start = _now(self.images.device)
        self()
        return _now(self.images.device) - start

    def _loss(self, embeddings: Tensor) -> Tensor:
        return self.loss(self.inputs._replace(features=embeddings))


def _encode(model: nn.Module, images: Tensor) -> Tensor:
    with region("encoder"):
        rows: Tensor = model(images)
        return rows


class Encoder(nn.Module):
    """A timm model with a linear head to ``dim`` dimensions; its output rows have unit length."""

    def __init__(self, name: str, dim: int, image_size: int) -> None:
        super().__init__()
        from pysupcon.models.backbones import build_backbone
        from pysupcon.models.config import ModelConfig

        self.backbone, width = build_backbone(ModelConfig(backbone=name), channels=3, image_size=image_size)
        self.head = nn.Linear(width, dim)

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.head(self.backbone(images)).float(), dim=1)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
