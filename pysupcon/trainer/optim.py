"""Optimiser and learning rate."""

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
    """timm's optimiser of that name; biases, normalisation parameters and those of ``objective`` are not
    decayed."""
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
    own = list(objective.parameters()) if objective is not None else []
    if own:
        optimizer.add_param_group({"params": own, "weight_decay": 0.0})
    return optimizer


def learning_rate_factor(step: int, *, config: OptimizerConfig, steps: int, steps_per_epoch: int) -> float:
    """Learning rate of a step, as a share of its greatest value: linear warm-up, then half a cosine.

    Args:
        step: 0 for the first.
        config: shares and length of the warm-up.
        steps, steps_per_epoch: of the training.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.warmup_start + (1 - config.warmup_start) * step / warmup
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return config.final + (1 - config.final) * (1 + math.cos(math.pi * progress)) / 2


def build_scheduler(
    config: OptimizerConfig, optimizer: Optimizer, *, steps: int, steps_per_epoch: int
) -> LambdaLR:
    """Scheduler to be stepped once after every step of the optimiser."""
    factor = partial(learning_rate_factor, config=config, steps=steps, steps_per_epoch=steps_per_epoch)
    return LambdaLR(optimizer, factor)
