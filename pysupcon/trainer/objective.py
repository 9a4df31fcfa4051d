"""The training objective: a contrastive loss plus optional InfoNCE, cross-entropy and reconstruction terms.

Thanos (Chen et al. 2022, "Perfectly Balanced", arXiv 2204.07596) is L_spread plus cross-entropy and
reconstruction by a class-conditional autoencoder. Its baselines use some of the terms.
"""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pysupcon.contrastive import ContrastiveLoss, Counts
from pysupcon.evaluators import GroupDRO
from pysupcon.functional import contrastive_metrics
from pysupcon.losses import LOSSES_BY_NAME
from pysupcon.models.model import ModelOutput
from pysupcon.pairs.autograd import RowStatistics
from pysupcon.trainer.config import LossConfig, LossName


def build_loss(config: LossConfig, name: LossName | None = None) -> ContrastiveLoss:
    """The contrastive loss of a resolved config, or the loss called ``name`` with the same temperature."""
    assert config.temperature is not None, "call LossConfig.resolve() first; name=none has no loss"
    name = name or config.name
    return LOSSES_BY_NAME[name](
        temperature=config.temperature,
        contrast_mode=config.contrast_mode,
        gather=config.gather,
        backend=config.backend,
        learnable_temperature=config.learnable_temperature,
        **_own(config, name),
    )


def _own(config: LossConfig, name: LossName) -> dict[str, Any]:
    """The parameters that only this loss has."""
    fields = LOSSES_BY_NAME[name].trainer_defaults[name]
    return {field: getattr(config, field) for field in fields if field != "temperature"}


METRICS = ("contrastive_accuracy", "positive_similarity", "negative_similarity")
"""Names of :meth:`Objective.metrics` in the log"""


class Objective(nn.Module):
    """The weighted sum of the terms: ``loss.weight * contrastive``, ``loss.infonce_weight *
    infonce``, ``loss.cross_entropy_weight * cross_entropy`` (of both heads, with two encoders) and
    ``loss.reconstruction_weight * reconstruction``.

    With ``group_dro`` and groups (in training), the robust cross-entropy of the groups replaces the mean
    cross-entropy.
    """

    def __init__(self, config: LossConfig, views: int, group_dro: GroupDRO | None = None) -> None:
        super().__init__()
        self.config, self.views, self.group_dro = config, views, group_dro
        self.contrastive = build_loss(config) if config.name != "none" else None
        self.infonce = build_loss(config, "infonce") if config.infonce_weight > 0 else None
        if self.infonce is not None and self.contrastive is not None:  # one temperature, learned by both
            self.infonce.log_temperature = self.contrastive.log_temperature

    @property
    def temperature(self) -> float:
        """Current temperature.

        Raises:
            ValueError: there is no contrastive loss.
        """
        if self.contrastive is None:
            raise ValueError("loss.name is none: there is no temperature")
        with torch.no_grad():
            return float(self.contrastive.temperature)

    def forward(
        self, outputs: ModelOutput, labels: Tensor, groups: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Computes the loss and its terms.

        Args:
            outputs: of B * V images, the views of a sample one after another.
            labels: int64 [B].
            groups: int64 [B], for GroupDRO; updates its group weights.

        Returns:
            Scalar tensors: "loss", and the terms without their weights, those that are used: "contrastive",
            "infonce", "cross_entropy", "second_cross_entropy", "group_dro" and "reconstruction". With groups
            also the loss and weight of each group.
        """
        config = self.config
        features = outputs.projection.unflatten(0, (-1, self.views))
        parts: dict[str, tuple[float, Tensor]] = {}
        if self.contrastive is not None:
            given = None if self.contrastive.self_supervised else labels
            parts["contrastive"] = config.weight, self._contrast(self.contrastive, features, given)
        if self.infonce is not None:
            parts["infonce"] = config.infonce_weight, self._contrast(self.infonce, features, None)
        targets = labels.repeat_interleave(self.views)
        heads = {"cross_entropy": outputs.logits, "second_cross_entropy": outputs.second_logits}
        for name, logits in heads.items():
            if logits is not None:
                parts[name] = config.cross_entropy_weight, F.cross_entropy(logits.float(), targets)
        figures: dict[str, Tensor] = {}
        if self.group_dro is not None and groups is not None and outputs.logits is not None:
            losses = F.cross_entropy(outputs.logits.float(), targets, reduction="none")
            robust = self.group_dro(losses, groups.repeat_interleave(self.views))
            parts["cross_entropy"] = 0.0, losses.detach().mean()
            parts["group_dro"] = config.cross_entropy_weight, robust
            figures = self.group_dro.metrics()
        if outputs.reconstruction_error is not None:
            parts["reconstruction"] = config.reconstruction_weight, outputs.reconstruction_error.mean()
        loss = torch.stack([weight * part for weight, part in parts.values()]).sum()
        return {"loss": loss, **{name: part for name, (_, part) in parts.items()}, **figures}

    def metrics(self, outputs: ModelOutput, labels: Tensor) -> dict[str, Tensor]:
        """Measures the features of the contrastive loss, over the rows of this process.

        Args:
            outputs, labels: as in :meth:`forward`.

        Returns:
            :data:`METRICS`, of :func:`pysupcon.functional.contrastive_metrics`; NaN if no anchor has a
            positive. Empty without a contrastive loss.
        """
        if self.contrastive is None:
            return {}
        features = outputs.projection.unflatten(0, (-1, self.views))
        given = None if self.contrastive.self_supervised else labels
        if self.config.pairing == "cross":
            found = contrastive_metrics(
                features[:, 1], given, candidates=features[:, 0], candidate_labels=given
            )
        else:
            found = contrastive_metrics(features, given, contrast_mode=self.config.contrast_mode)
        return dict(zip(METRICS, found, strict=True))

    def _contrast(self, loss: ContrastiveLoss, features: Tensor, labels: Tensor | None) -> Tensor:
        """``features`` are [B, V, D]."""
        if self.config.pairing == "all":
            return loss(features, labels)
        # Candidate k and anchor k are views of one sample.
        return loss(features[:, 1], labels, candidates=features[:, 0], candidate_labels=labels)


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics that exist: a mean over nothing is NaN."""
    return {name: value for name, value in metrics.items() if isfinite(value)}


def batch_statistics(config: LossConfig, labels: Tensor, class_counts: Tensor, views: int) -> Tensor:
    """Number of anchors that have a loss, and the contrastive loss if all rows were equal.

    Args:
        config: resolved, with a contrastive loss.
        labels: labels of this process's samples, int64 [B].
        class_counts: number of samples of each class among the candidates' samples, int64 [classes].
        views: rows of a sample.

    Returns:
        [valid anchors of this process; their mean loss at equal similarities, the "chance level": log(N - 1)
        for SupCon and N rows], float64 on the device of ``labels``.
    """
    loss, own = LOSSES_BY_NAME[config.name], _own(config, config.name)
    cross = config.pairing == "cross"
    candidates = 1 if cross else views  # of a sample
    if loss.self_supervised:
        rows = torch.full_like(labels, candidates, dtype=torch.float64)
    else:
        rows = (class_counts[labels] * candidates).to(torch.float64)
    positives = rows if cross else rows - 1
    negatives = class_counts.sum() * candidates - rows
    counts = Counts(positives, positives, positives + negatives)
    valid = loss.valid(counts)
    # Every similarity is 0.
    n, p, zeros = negatives.log(), positives.log(), torch.zeros_like(positives)
    epsilon = loss.statistics(**own).get("epsilon", 0.0)
    statistics = RowStatistics(n, p, zeros, zeros, positives * torch.logaddexp(n + epsilon, zeros))
    level = loss.per_anchor(statistics, counts, valid, **own)
    anchors = 1 if cross or config.contrast_mode == "one" else views
    mean = level.sum() / valid.sum().clamp(min=1)
    return torch.stack([valid.sum() * float(anchors), mean])
