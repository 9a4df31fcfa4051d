"""What is minimised: a contrastive loss, and cross-entropy beside it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pysupcon.errors import ConfigError
from pysupcon.losses import ClassConditionalInfoNCELoss, InfoNCELoss, SINCERELoss, SpreadLoss, SupConLoss
from pysupcon.models.model import Outputs
from pysupcon.trainer.config import LossConfig

Contrastive = SupConLoss | SINCERELoss | ClassConditionalInfoNCELoss | SpreadLoss | InfoNCELoss


def build_loss(config: LossConfig) -> Contrastive:
    """The contrastive loss of a resolved config.

    Raises:
        ConfigError: this version has no such ``loss.gather``.
    """
    assert config.temperature is not None, "LossConfig.resolve() first"
    common: dict[str, Any] = {
        "temperature": config.temperature,
        "contrast_mode": config.contrast_mode,
        "gather": config.gather,
        "backend": config.backend,
        "learnable_temperature": config.learnable_temperature,
    }
    try:
        if config.name == "supcon":
            return SupConLoss(**common)
        if config.name == "sincere":
            return SINCERELoss(**common)
        if config.name == "eps_supinfonce":
            return SINCERELoss(epsilon=config.epsilon or 0.0, **common)
        if config.name == "cnce":
            return ClassConditionalInfoNCELoss(**common)
        if config.name == "infonce":
            return InfoNCELoss(**common)
        assert config.alpha is not None
        return SpreadLoss(alpha=config.alpha, base=config.base or "supcon", **common)
    except NotImplementedError as error:
        raise ConfigError(f"loss.gather: {error}") from error


class Objective(nn.Module):
    """``loss.weight * contrastive + loss.cross_entropy_weight * cross_entropy``."""

    def __init__(self, config: LossConfig, views: int) -> None:
        super().__init__()
        self.config, self.views = config, views
        self.contrastive = build_loss(config)

    @property
    def temperature(self) -> float:
        """As it is now."""
        with torch.no_grad():
            return float(self.contrastive.temperature)

    def forward(self, outputs: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """Loss and its parts.

        Args:
            outputs: of B * V images, the views of a sample one after another.
            labels: int64 [B].

        Returns:
            "loss", "contrastive", and with a classification head "cross_entropy"; tensors of no dimensions.
        """
        features = outputs.projection.unflatten(0, (-1, self.views))
        given = None if self.config.name == "infonce" else labels
        parts = {"contrastive": self.contrastive(features, given)}
        loss = self.config.weight * parts["contrastive"]
        if outputs.logits is not None:
            targets = labels.repeat_interleave(self.views)
            parts["cross_entropy"] = F.cross_entropy(outputs.logits.float(), targets)
            loss = loss + self.config.cross_entropy_weight * parts["cross_entropy"]
        return {"loss": loss, **parts}


def batch_statistics(config: LossConfig, labels: Tensor, class_counts: Tensor, views: int) -> Tensor:
    """How many anchors have a positive, and the contrastive loss if all rows were the same point.

    Args:
        config: resolved.
        labels: of this process's samples, int64 [B].
        class_counts: samples of each class among all that the loss contrasts with, int64 [classes].
        views: rows of a sample.

    Returns:
        [valid anchors of this process; their mean loss at equal similarities, the "chance level": log(N - 1)
        for SupCon and N rows], float64 on the device of ``labels``.
    """
    if config.name == "infonce":
        rows = torch.full_like(labels, views, dtype=torch.float64)
    else:
        rows = (class_counts[labels] * views).to(torch.float64)
    positives = rows - 1
    negatives = class_counts.sum() * views - rows
    epsilon = config.epsilon or 0.0
    supcon, cnce = (positives + negatives).log(), positives.log()
    sincere = (negatives * torch.exp(labels.new_tensor(epsilon, dtype=torch.float64))).log1p() - epsilon
    if config.name in ("supcon", "infonce"):
        level = supcon
    elif config.name == "cnce":
        level = cnce
    elif config.name == "spread":
        assert config.alpha is not None, "LossConfig.resolve() first"
        base = supcon if config.base == "supcon" else sincere
        level = (1 - config.alpha) * base + config.alpha * cnce
    else:
        level = sincere
    valid = positives > 0
    anchors = views if config.contrast_mode == "all" else 1
    mean = torch.where(valid, level, 0.0).sum() / valid.sum().clamp(min=1)
    return torch.stack([valid.sum() * float(anchors), mean])
