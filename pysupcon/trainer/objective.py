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
from pysupcon.data.unlabelled import UNKNOWN
from pysupcon.evaluators import GroupDRO
from pysupcon.functional import contrastive_metrics
from pysupcon.losses import LOSSES_BY_NAME
from pysupcon.memory import MemoryQueue
from pysupcon.models.model import ModelOutput
from pysupcon.pairs.autograd import RowStatistics
from pysupcon.trainer.config import LossConfig, LossName


def build_loss(
    config: LossConfig, name: LossName | None = None, *, unlabelled: bool = False
) -> ContrastiveLoss:
    """The contrastive loss of a resolved config, or the loss called ``name`` with the same temperature.

    With ``unlabelled``, labels may be :data:`pysupcon.data.unlabelled.UNKNOWN`.
    """
    assert config.temperature is not None, "call LossConfig.resolve() first; name=none has no loss"
    name = name or config.name
    self_supervised = LOSSES_BY_NAME[name].self_supervised
    of_labels = {} if self_supervised else _missing_labels(config, unlabelled)
    if not self_supervised and config.multi_label is not None:
        of_labels |= {"multi_label": config.multi_label, "overlap_threshold": config.overlap_threshold}
    return LOSSES_BY_NAME[name](
        temperature=config.temperature,
        contrast_mode=config.contrast_mode,
        gather=config.gather,
        backend=config.backend,
        batch_negatives=config.batch_negatives,
        learnable_temperature=config.learnable_temperature,
        **_own(config, name),
        **of_labels,
    )


def _missing_labels(config: LossConfig, unlabelled: bool) -> dict[str, Any]:
    """Keywords of a loss whose labels may be UNKNOWN."""
    return {"ignore_index": UNKNOWN, "unlabeled": config.unlabeled} if unlabelled else {}


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

    Args:
        config: resolved section of the config.
        views: rows of a sample.
        group_dro: the weights of the groups; None: no GroupDRO.
        queue: rows of earlier batches, which the contrastive losses take as ``memory``; None: none.
        momentum: MoCo: the rows of the first view are contrasted with keys, one per sample.
        unlabelled: whether samples may have the label :data:`pysupcon.data.unlabelled.UNKNOWN`. Cross-entropy
            leaves them out, and ``loss.unlabeled`` says what they are for the contrastive loss.
    """

    def __init__(
        self,
        config: LossConfig,
        views: int,
        group_dro: GroupDRO | None = None,
        queue: MemoryQueue | None = None,
        momentum: bool = False,
        *,
        unlabelled: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.views, self.group_dro, self.unlabelled = config, views, group_dro, unlabelled
        self.queue, self.momentum = queue, momentum
        self.contrastive = build_loss(config, unlabelled=unlabelled) if config.name != "none" else None
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
        self,
        outputs: ModelOutput,
        labels: Tensor,
        groups: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Computes the loss and its terms.

        Args:
            outputs: of B * V images, the views of a sample one after another.
            labels: int64 [B], or int64 [B, L] of 0 and 1 if samples have several labels.
            groups: int64 [B], for GroupDRO; updates its group weights.
            keys: [B, D], of the key encoder; ``outputs`` are then those of the first view. With ``momentum``,
                None takes the second view of ``outputs`` for keys (in validation).

        Returns:
            Scalar tensors: "loss", and the terms without their weights, those that are used: "contrastive",
            "infonce", "cross_entropy", "second_cross_entropy", "group_dro" and "reconstruction". With groups
            also the loss and weight of each group.
        """
        config = self.config
        views = self.views if keys is None else 1
        features = outputs.projection.unflatten(0, (-1, views))
        parts: dict[str, tuple[float, Tensor]] = {}
        if self.contrastive is not None:
            given = None if self.contrastive.self_supervised else labels
            parts["contrastive"] = config.weight, self._contrast(self.contrastive, features, given, keys)
        if self.infonce is not None:
            parts["infonce"] = config.infonce_weight, self._contrast(self.infonce, features, None, keys)
        targets = labels.repeat_interleave(views, dim=0)
        heads = {"cross_entropy": outputs.logits, "second_cross_entropy": outputs.second_logits}
        for name, logits in heads.items():
            if logits is not None:
                parts[name] = config.cross_entropy_weight, self._cross_entropy(logits, targets)
        figures: dict[str, Tensor] = {}
        if self.group_dro is not None and groups is not None and outputs.logits is not None:
            losses = F.cross_entropy(outputs.logits.float(), targets, reduction="none")
            robust = self.group_dro(losses, groups.repeat_interleave(views))
            parts["cross_entropy"] = 0.0, losses.detach().mean()
            parts["group_dro"] = config.cross_entropy_weight, robust
            figures = self.group_dro.metrics()
        if outputs.reconstruction_error is not None:
            parts["reconstruction"] = config.reconstruction_weight, outputs.reconstruction_error.mean()
        loss = torch.stack([weight * part for weight, part in parts.values()]).sum()
        return {"loss": loss, **{name: part for name, (_, part) in parts.items()}, **figures}

    def metrics(self, outputs: ModelOutput, labels: Tensor, keys: Tensor | None = None) -> dict[str, Tensor]:
        """Measures the features of the contrastive loss, over the rows of this process, without the queue.

        Args:
            outputs, labels, keys: as in :meth:`forward`.

        Returns:
            :data:`METRICS`, of :func:`pysupcon.functional.contrastive_metrics`; NaN if no anchor has a
            positive. Empty without a contrastive loss.
        """
        if self.contrastive is None:
            return {}
        features = outputs.projection.unflatten(0, (-1, self.views if keys is None else 1))
        given, options = None, {}
        if not self.contrastive.self_supervised:
            given, options = labels, _missing_labels(self.config, self.unlabelled)
        anchors, candidates = self._pair(features, keys)
        if candidates is not None:
            options = {**options, "candidates": candidates, "candidate_labels": given}
        found = contrastive_metrics(anchors, given, contrast_mode=self.config.contrast_mode, **options)
        return dict(zip(METRICS, found, strict=True))

    def enqueue(self, rows: Tensor, labels: Tensor) -> None:
        """Appends rows to the queue, if there is one, after the backward.

        Args:
            rows: keys or projections, [B * V, D] with V views of each sample.
            labels: int64 [B].
        """
        if self.queue is not None:
            views = rows.unflatten(0, (labels.shape[0], -1))
            self.queue.enqueue(views, labels, gather=self.config.gather)

    def memory_counts(self, classes: int) -> Tensor | None:
        """Number of rows of each class in the queue, float64 [classes]; None without a queue. Empty slots and
        rows of unknown class are left out."""
        if self.queue is None:
            return None
        labels = self.queue.labels
        weights = torch.where(labels >= 0, self.queue.weights.to(torch.float64), 0.0)
        return weights.new_zeros(classes).index_add_(0, labels.clamp(min=0), weights)

    def _pair(self, features: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Anchors and candidates of features [B, V, D]; candidate k and anchor k are views of one sample.
        Candidates are None if the anchors are their own candidates."""
        if self.momentum:
            return features[:, 0], features[:, 1] if keys is None else keys
        if self.config.pairing == "cross":
            return features[:, 1], features[:, 0]
        return features, None

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over the rows whose class is known; 0 if there is none."""
        if not self.unlabelled:
            return F.cross_entropy(logits.float(), targets)
        total = F.cross_entropy(logits.float(), targets, ignore_index=UNKNOWN, reduction="sum")
        return total / (targets != UNKNOWN).sum().clamp(min=1)

    def _contrast(
        self, loss: ContrastiveLoss, features: Tensor, labels: Tensor | None, keys: Tensor | None
    ) -> Tensor:
        """``features`` are [B, V, D]."""
        anchors, candidates = self._pair(features, keys)
        if candidates is None:
            return loss(anchors, labels, memory=self.queue)
        return loss(anchors, labels, candidates=candidates, candidate_labels=labels, memory=self.queue)


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics that exist: a mean over nothing is NaN."""
    return {name: value for name, value in metrics.items() if isfinite(value)}


def batch_statistics(
    config: LossConfig,
    labels: Tensor,
    class_counts: Tensor,
    views: int,
    unknown: Tensor | int = 0,
    memory_counts: Tensor | None = None,
    momentum: bool = False,
) -> Tensor:
    """Number of anchors that have a loss, and the contrastive loss if all rows were equal.

    Args:
        config: resolved, with a contrastive loss.
        labels: labels of this process's samples, int64 [B]; UNKNOWN if the class is not known.
        class_counts: number of samples of each class among the candidates' samples, int64 [classes].
        views: rows of a sample.
        unknown: number of the candidates' samples whose class is not known.
        memory_counts: number of rows of each class in the queue, float64 [classes]; None: no queue.
        momentum: the candidates are keys, one per sample.

    Returns:
        [valid anchors of this process; their mean loss at equal similarities, the "chance level": log(N - 1)
        for SupCon and N rows], float64 on the device of ``labels``.
    """
    loss, own = LOSSES_BY_NAME[config.name], _own(config, config.name)
    cross = momentum or config.pairing == "cross"
    candidates = 1 if cross else views  # of a sample
    if loss.self_supervised:
        rows = torch.full_like(labels, candidates, dtype=torch.float64)
    else:
        samples = torch.where(labels == UNKNOWN, 1, class_counts[labels.clamp(min=0)])
        rows = (samples * candidates).to(torch.float64)
    positives = rows if cross else rows - 1
    every = loss.self_supervised or config.unlabeled == "instance"
    negatives = (class_counts.sum() + (unknown if every else 0)) * candidates - rows
    if not config.batch_negatives:
        negatives = torch.zeros_like(negatives)
    if memory_counts is not None:
        remembered = torch.zeros_like(rows)
        if not loss.self_supervised:
            remembered = torch.where(labels == UNKNOWN, remembered, memory_counts[labels.clamp(min=0)])
        positives, negatives = positives + remembered, negatives + memory_counts.sum() - remembered
    counts = Counts(positives, positives, positives + negatives)
    valid = loss.valid(counts)
    if not every:
        valid = valid & (labels != UNKNOWN)
    # Every similarity is 0.
    n, p, zeros = negatives.log(), positives.log(), torch.zeros_like(positives)
    epsilon = loss.statistics(**own).get("epsilon", 0.0)
    statistics = RowStatistics(n, p, zeros, zeros, positives * torch.logaddexp(n + epsilon, zeros))
    level = loss.per_anchor(statistics, counts, valid, **own)
    anchors = 1 if cross or config.contrast_mode == "one" else views
    mean = torch.where(valid, level, 0.0).sum() / valid.sum().clamp(min=1)
    return torch.stack([valid.sum() * float(anchors), mean])
