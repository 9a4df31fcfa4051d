"""Losses and group accuracies on the validation split during a training."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from pysupcon.config import Config
from pysupcon.data.datamodule import DataModule
from pysupcon.errors import RunError
from pysupcon.models.model import ModelOutput, memory_format
from pysupcon.trainer.config import ACCURACIES
from pysupcon.trainer.group_dro import GroupAccuracy
from pysupcon.trainer.objective import METRICS, Objective, finite


class Validation:
    """Mean losses over the validation split, with each batch divided among the processes.

    The views are augmented as in training and are the same in each validation. The model is in eval mode with
    the buffers of the main process. No random state changes.

    Args:
        accelerator: the Accelerate object of this process.
        config: resolved config.
        data: the data of the config.
        objective: the loss.
    """

    def __init__(
        self, accelerator: Accelerator, config: Config, data: DataModule, objective: Objective
    ) -> None:
        self.accelerator, self.config, self.data, self.objective = accelerator, config, data, objective
        self.memory_format = memory_format(config.model)
        batches = data.validation_batch_sampler(
            seed=config.seed, rank=accelerator.process_index, world_size=accelerator.num_processes
        )
        self.loader: DataLoader[tuple[Tensor, Tensor]] = data.loader(batches, split="val")
        by_group = config.trainer.best_by in ACCURACIES
        self.group_accuracy = GroupAccuracy(accelerator, config, data) if by_group else None

    @torch.no_grad()
    def __call__(self, model: nn.Module, max_batches: int | None = None) -> dict[str, float]:
        """Compute the losses.

        Args:
            model: the model without Accelerate's wrappers.
            max_batches: number of batches, without accuracies; None: the whole split.

        Returns:
            "loss" and its terms; the metrics of the features, those that are finite, unless
            ``trainer.metrics_steps`` is None; accuracies if ``trainer.best_by`` is an accuracy.

        Raises:
            RunError: a feature is not finite.
        """
        if self.accelerator.num_processes > 1:
            for buffer in model.buffers():
                buffer.copy_(broadcast(buffer.contiguous()))
        training = model.training
        model.eval()
        hidden = None if self.accelerator.is_main_process else True  # None: hidden without a terminal
        count = min(len(self.loader), max_batches or len(self.loader))
        batches = islice(self.loader, count)
        bar = tqdm(batches, total=count, desc="validate", unit="batch", leave=False, delay=2, disable=hidden)
        totals: dict[str, Tensor] = {}
        accuracies: dict[str, float] = {}
        try:
            for views, labels in bar:
                for name, value in self._losses(model, views, labels).items():
                    totals[name] = totals.get(name, torch.zeros_like(value)) + value / count
            if self.group_accuracy is not None and max_batches is None:
                accuracies = self.group_accuracy(model)
        finally:
            model.train(training)
        means = self.accelerator.reduce(torch.stack(list(totals.values())), "mean").tolist()
        values = dict(zip(totals, means, strict=True))
        metrics = finite({name: values.pop(name) for name in METRICS if name in values})
        return values | metrics | accuracies

    def _losses(self, model: nn.Module, views: Tensor, labels: Tensor) -> dict[str, Tensor]:
        views, labels = views.to(self.accelerator.device), labels.to(self.accelerator.device)
        parts: list[ModelOutput] = []
        size = self.config.trainer.chunk_size or len(views)
        for chunk, chunk_labels in zip(views.split(size), labels.split(size), strict=True):
            images = self.data.normalize(chunk).flatten(0, 1).contiguous(memory_format=self.memory_format)
            with self.accelerator.autocast():
                parts.append(model(images, chunk_labels.repeat_interleave(chunk.shape[1], dim=0)))
        joined: list[Any] = [
            None if pieces[0] is None else torch.cat(pieces).float() for pieces in zip(*parts, strict=True)
        ]
        try:
            losses = self.objective(ModelOutput(*joined), labels)
            if self.config.trainer.metrics_steps is not None:
                losses |= self.objective.metrics(ModelOutput(*joined), labels)
        except ValueError as error:
            raise RunError(f"validation: {error}") from error
        return {name: value.to(torch.float64) for name, value in losses.items()}
