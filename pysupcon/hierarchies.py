"""Supervised contrastive loss of a hierarchy of labels.

>>> import torch, pysupcon
>>> loss = pysupcon.HierarchicalSupConLoss(level_weights=(1.0, 0.5), temperature=1.0)
>>> species, families = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 0, 0, 1, 1])
>>> loss(torch.eye(6), [species, families])
tensor(2.4142)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from pysupcon.contrastive import ContrastiveLoss, build_problem, dense_weighted
from pysupcon.options import LevelOptions, LevelRowOptions, ModuleOptions, expand_signature
from pysupcon.pairs.checks import check_choice, check_number, describe
from pysupcon.pairs.many_labels import LEVELS
from pysupcon.pairs.rows import get_divisor

__all__ = ["HierarchicalSupConLoss", "hierarchical_supcon"]


@expand_signature
def hierarchical_supcon(
    features: Tensor,
    labels: Sequence[Tensor],
    *,
    level_weights: Sequence[float],
    constrained: bool = False,
    temperature: float | Tensor = 0.07,
    **options: Unpack[LevelOptions],
) -> Tensor:
    """Hierarchical multi-label contrastive loss, HiMulCon (Zhang et al. 2022, "Use All The Labels",
    arXiv 2204.13207).

    sum_l level_weights_l * L_l, where L_l is :func:`supcon` with the labels of level l. The denominator of
    SupCon is the same at all levels, so the time is that of one SupCon plus O(L N D).

    With ``constrained=True`` it is sum_l level_weights_l * max(L_0, ..., L_l): a coarser level has at least
    the loss of each finer level (the gradient is that of the largest). This is the form of the authors'
    released code, HMCE, for all rows; that code keeps one row per class of the finer level at the next level
    and divides by the number of levels. The paper takes the maximum pair by pair instead, which needs a pass
    over all pairs per level.

    Args:
        features: as in the module docstring of :mod:`pysupcon.functional`, like ``temperature`` and
            ``options``. ``gather``, ``memory``, ``class_balance``, ``ignore_index``, ``multi_label`` and
            ``overlap_threshold`` are not supported.
        labels: sequence of L integer tensors [B], finest level first; ``candidate_labels`` likewise [Bc].
        level_weights: L finite numbers, at least 0.
        constrained: needs ``reduction="mean"``.

    Returns:
        As the other losses. ``reduction="mean"`` takes the mean of each level over the anchors that have a
        positive at that level.
    """
    name, weights = "hierarchical_supcon", check_level_weights(level_weights)
    check_constrained(constrained, options.get("reduction", "mean"))
    if options.get("gather") is not None:
        raise ValueError(f"{name} does not support gather")
    if isinstance(labels, (list, tuple)) and len(labels) != len(weights):
        raise ValueError(
            f"labels must hold one tensor per level, as level_weights {len(weights)}, got {describe(labels)}"
        )
    problem, reduction = build_problem(
        name, features, labels, None, options, temperature, False, HierarchicalSupConLoss.refused_keywords(),
        HierarchicalSupConLoss,
    )  # fmt: skip
    valid = problem.count > 0  # [L, M]
    if problem.backend == "reference":
        rows = torch.where(valid, dense_weighted(problem), 0.0)
    else:
        n = problem.statistics(negatives=True).n
        rows = torch.where(valid, n - problem.positive_means(), 0.0)
    divisor = get_divisor(valid.any(dim=0).sum(), reduction, "a positive")  # warns if there is no anchor
    size = valid.to(rows.dtype)
    if problem.anchor_weights is not None:
        size = size * problem.anchor_weights
        rows = rows * size
    factors = torch.stack([rows.new_ones(()) * weight for weight in weights])
    if divisor is None:
        return (factors[:, None] * rows).sum(dim=0).to(problem.loss_dtype).view(problem.shape)
    levels = rows.sum(dim=1)
    if reduction == "mean":
        total = size.sum(dim=1)
        levels = levels / torch.where(total > 0, total, 1.0)
    if constrained:
        levels = torch.cummax(levels, dim=0).values
    return (factors * levels).sum().to(problem.loss_dtype)


def check_level_weights(value: Any) -> tuple[float, ...]:
    """Checks the weights of the levels, finest first."""
    if not isinstance(value, (list, tuple)) or not value:
        raise TypeError(f"level_weights must be a list or tuple of numbers, got {describe(value)}")
    return tuple(check_number(f"level_weights[{k}]", weight, 0.0, 1e30) for k, weight in enumerate(value))


def check_constrained(constrained: Any, reduction: str) -> None:
    """Checks the constraint, which compares the mean losses of the levels."""
    check_choice("constrained", constrained, (False, True))
    if constrained and reduction != "mean":
        raise ValueError(
            'constrained=True compares the mean losses of the levels, so reduction must be "mean", got '
            f"{reduction!r}"
        )


class HierarchicalSupConLoss(ContrastiveLoss):
    """Hierarchical multi-label contrastive loss (Zhang et al. 2022).

    ``level_weights``: one number per level, finest level first. The forward takes features and a sequence of
    labels [B], one tensor per level. See :func:`pysupcon.functional.hierarchical_supcon`.
    """

    function = staticmethod(hierarchical_supcon)
    own_parameters = ("level_weights", "constrained")
    trainer_defaults: ClassVar = {}
    multi_labels = (LEVELS,)

    @expand_signature
    def __init__(
        self,
        level_weights: Sequence[float],
        constrained: bool = False,
        temperature: float = 0.07,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__(temperature, **options)
        self.level_weights = tuple(map(float, check_level_weights(level_weights)))
        check_constrained(constrained, self.reduction)
        if self._gather is not None:
            raise ValueError("HierarchicalSupConLoss does not support gather")
        self.constrained = constrained

    @expand_signature
    def forward(  # type: ignore[override]
        self, features: Tensor, labels: Sequence[Tensor], **options: Unpack[LevelRowOptions]
    ) -> Tensor:
        """The loss; arguments as in :func:`pysupcon.functional.hierarchical_supcon`."""
        return self._checked(self.function(features, labels, **self._options(), **options), features)
