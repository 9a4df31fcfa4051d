"""Detect trainings that do not learn, from the lines of the log."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

ZERO_LOSS = "zero"
"""Name of the fault of :data:`WITHOUT_LOSS`"""

STEPS = 10
"""Successive steps without a loss. A shuffled batch can lack positives by chance, ten in a row do not."""

EPOCHS = 3
"""Successive epochs at the chance level. Healthy trainings leave it in the first epoch after the warm-up."""

CHANCE_MARGIN = 0.01
"""Share of the chance level. The mean loss of an epoch varies by less than 1 % if nothing is learned. SupCon
with two classes, which has the smallest range, falls by log(2) / log(N - 1), 12 % at N = 256."""

COLLAPSED = 0.99
"""Mean cosine of negatives. The similarities of a batch then differ by about 0.01 and the logits, at a
temperature of 0.07, by 0.14, so that the loss is within 0.14 of its chance level."""

MEASUREMENTS = 3
"""Successive measurements that are collapsed, after the first epoch and the warm-up: the embeddings of an
untrained network can be as similar."""

WITHOUT_LOSS = (
    "the contrastive loss is 0 by construction: no anchor of the last {steps} steps has the positives and "
    "negatives that the loss needs. Use data.views 2, a data.sampler that draws several samples per class "
    "(balanced, per_class), a larger data.batch_size, or labels with fewer classes"
)
PLATEAU = (
    "no progress: for {epochs} epochs the contrastive loss ({loss:.3f}) has been at its chance level "
    "({chance:.3f}, that of equal embeddings). Change optimizer.learning_rate (by factors of 3, in both "
    "directions) or raise loss.temperature; check that the labels match the images, and that "
    "data.augmentation keeps what the labels depend on"
)
COLLAPSE = (
    "collapse: the embeddings are almost equal (mean cosine of negatives {negative:.4f}, of positives "
    "{positive:.4f}). Lower optimizer.learning_rate, lengthen optimizer.warmup_epochs, set "
    "trainer.clip_norm 1, or lower loss.temperature; model.projection mlp often helps"
)


class Diagnosis:
    """Find a loss that is 0 by construction, a plateau at the chance level, and a collapse; each once.

    Args:
        steps_per_epoch: optimizer steps per epoch.
        warmup_epochs: epochs of the warm-up, in which a plateau or a collapse is no fault.
        done: number of finished steps.
        told: faults that the user has been told of.
    """

    def __init__(
        self, steps_per_epoch: int, warmup_epochs: float, done: int = 0, told: Iterable[str] = ()
    ) -> None:
        self._steps_per_epoch, self._warmup_epochs = steps_per_epoch, warmup_epochs
        self._without_loss = 0
        self._complete = done % steps_per_epoch == 0  # whether all steps of the epoch were seen
        self._epoch: list[tuple[float, float]] = []
        self._epochs: list[tuple[float, float]] = []
        self._collapsed = 0
        self._said = set(told)

    def add(self, line: dict[str, Any]) -> list[str]:
        """Return the messages that a line of the log gives cause for."""
        messages = (self._find_zero_loss(line), self._find_collapse(line), self._find_plateau(line))
        return [message for message in messages if message is not None]

    def _find_zero_loss(self, line: dict[str, Any]) -> str | None:
        zero = line.get("valid_anchors", line.get("contrastive", 1.0)) == 0
        self._without_loss = self._without_loss + 1 if zero else 0
        return self._once(ZERO_LOSS, WITHOUT_LOSS, steps=STEPS) if self._without_loss == STEPS else None

    def _find_collapse(self, line: dict[str, Any]) -> str | None:
        positive, negative = line.get("positive_similarity"), line.get("negative_similarity")
        if positive is None or negative is None or line["epoch"] <= max(1.0, self._warmup_epochs):
            return None
        self._collapsed = self._collapsed + 1 if min(positive, negative) > COLLAPSED else 0
        if self._collapsed < MEASUREMENTS:
            return None
        return self._once("collapse", COLLAPSE, positive=positive, negative=negative)

    def _find_plateau(self, line: dict[str, Any]) -> str | None:
        if line.get("chance", 0.0) > 0 and "contrastive" in line:
            self._epoch.append((line["contrastive"], line["chance"]))
        if line["step"] % self._steps_per_epoch:
            return None
        steps, self._epoch = self._epoch, []
        complete, self._complete = self._complete, True
        if not complete or not steps or line["epoch"] - 1 < self._warmup_epochs:
            return None
        loss, chance = (sum(values) / len(values) for values in zip(*steps, strict=True))
        self._epochs = [*self._epochs, (loss, chance)][-EPOCHS:]
        above = [(loss - chance) / chance for loss, chance in self._epochs]
        # A loss above the chance level, as that of random features, is no plateau while it falls.
        stays = min(above) > -CHANCE_MARGIN and above[-1] > above[0] - CHANCE_MARGIN
        if len(above) < EPOCHS or not stays or "collapse" in self._said:  # a collapse is at this level too
            return None
        return self._once("plateau", PLATEAU, epochs=EPOCHS, loss=loss, chance=chance)

    def _once(self, name: str, text: str, **values: float) -> str | None:
        if name in self._said:
            return None
        self._said.add(name)
        return text.format(**values)
