"""Optimizer and learning rate schedule."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pysupcon.trainer.config import OptimizerConfig

TIMM_NAME = {"sgd": "momentum", "adamw": "adamw", "lars": "lars"}  # timm's "sgd" is Nesterov's


def build_optimizer(
    config: OptimizerConfig, model: nn.Module, objective: nn.Module | None = None
) -> Optimizer:
    """Build timm's optimizer without weight decay for biases, normalisation layers and ``objective``.

    Args:
        config: resolved section of the config.
        model: the model; ``optimizer.backbone_scale`` scales the learning rate of ``model.backbone``.
        objective: the loss, if it has parameters.
    """
    from timm.optim import create_optimizer_v2

    momentum: dict[str, Any] = {} if config.momentum is None else {"momentum": config.momentum}
    optimizer: Optimizer = create_optimizer_v2(
        model,
        opt=TIMM_NAME[config.name],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        filter_bias_and_bn=True,
        **momentum,
    )
    if config.backbone_scale < 1:
        _scale_backbone(optimizer, model, config.backbone_scale)
    own = list(objective.parameters()) if objective is not None else []
    if own:
        optimizer.add_param_group({"params": own, "weight_decay": 0.0})
    return optimizer


def _scale_backbone(optimizer: Optimizer, model: nn.Module, scale: float) -> None:
    """Give the parameters of the backbone groups of their own, after those of the heads."""
    backbone = set(model.backbone.parameters())  # type: ignore[union-attr]
    groups = []
    for ours, factor in ((False, 1.0), (True, scale)):
        for group in optimizer.param_groups:
            chosen = [parameter for parameter in group["params"] if (parameter in backbone) == ours]
            if chosen:
                groups.append({**group, "params": chosen, "lr": factor * group["lr"]})
    optimizer.param_groups[:] = groups


def learning_rate_factor(step: int, *, config: OptimizerConfig, steps: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step relative to its maximum: linear warm-up, then the schedule.

    Args:
        step: number of the step, from 0.
        config: the warm-up and the schedule, resolved.
        steps, steps_per_epoch: length of the training and of an epoch in steps.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        end = _cosine(warmup, config, steps, steps_per_epoch) if config.warmup_joins else 1.0
        return config.warmup_start + (end - config.warmup_start) * step / warmup
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "step":
        passed = sum(step >= round(epochs * steps_per_epoch) for epochs in config.milestones)
        return float((0.1 if config.gamma is None else config.gamma) ** passed)
    if config.schedule == "linear":
        return 1 + (config.final - 1) * min((step - warmup) / max(steps - warmup, 1), 1.0)
    return _cosine(step, config, steps, steps_per_epoch)


def _cosine(step: int, config: OptimizerConfig, steps: int, steps_per_epoch: int) -> float:
    start = 0 if config.warmup_joins else round(config.warmup_epochs * steps_per_epoch)
    if config.cosine_epochs is None:
        progress = min((step - start) / max(steps - start, 1), 1.0)
    else:  # the cosine has a period of twice this length
        progress = (step - start) / (config.cosine_epochs * steps_per_epoch)
    return config.final + (1 - config.final) * (1 + math.cos(math.pi * progress)) / 2


def build_scheduler(
    config: OptimizerConfig, optimizer: Optimizer, *, steps: int, steps_per_epoch: int
) -> LambdaLR:
    """Build the scheduler, which is stepped once after each optimizer step."""
    factor = partial(learning_rate_factor, config=config, steps=steps, steps_per_epoch=steps_per_epoch)
    return LambdaLR(optimizer, factor)
