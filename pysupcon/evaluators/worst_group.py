"""Worst-group robustness of linear heads (Sohoni et al. 2020, arXiv 2011.12945; Thanos, arXiv 2204.07596).

The heads are the one trained with the encoder and new ones on frozen features. Classes are the coarse labels.
True groups are pairs of a class and a fine label, which are not used for training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from pysupcon.evaluators.base import FeatureSet, FeatureSplits, LinearHead, Result, class_index
from pysupcon.evaluators.clustering import SubgroupConfig
from pysupcon.evaluators.group_dro import FittedHead, GroupedFeatures, HeadConfig, fit_head
from pysupcon.evaluators.metrics import metric_results
from pysupcon.evaluators.subgroups import Subgroups, head_losses, infer_groups, recovery

Method = Literal["trained", "erm", "dro_inferred", "dro_true"]
METHODS: tuple[Method, ...] = ("trained", "erm", "dro_inferred", "dro_true")


@dataclass
class WorstGroupConfig:
    """Worst-group accuracy of the head trained with the encoder and of heads on its frozen features."""

    methods: list[Method] = field(default_factory=lambda: ["trained", "erm", "dro_inferred", "dro_true"])
    """trained: the classification head trained with the encoder, skipped if there is none. The others are
    fitted to frozen features: erm by the mean loss; dro_inferred by GroupDRO over groups inferred from the
    features; dro_true by GroupDRO over the true groups, an upper bound for inferred groups."""

    selection: Literal["known", "true"] = "known"
    """Validation groups whose worst accuracy selects weight decay and epoch. known: the groups that a method
    knows, i.e. classes for erm, inferred groups for dro_inferred, true groups for dro_true. true: the true
    groups for all methods, the protocol with an annotated validation set."""

    auroc: bool = False
    """For two classes, also report the area under the ROC curve, over all test samples and of the worst group
    (its samples against those of the other class)."""

    adjusted: bool = False
    """Also report the accuracy with the true groups weighted by their training proportions: the mean accuracy
    of Waterbirds in the literature, whose test groups have other proportions (Sagawa et al. 2020)."""

    subgroups: SubgroupConfig = field(default_factory=SubgroupConfig)
    """Arguments of the group inference."""

    head: HeadConfig = field(default_factory=HeadConfig)
    """Arguments of the heads."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if not self.methods or unknown or len(set(self.methods)) != len(self.methods):
            raise ValueError(
                f"worst_group.methods must be one or more of {list(METHODS)}, each once, got {self.methods}"
            )
        if self.selection not in ("known", "true"):
            raise ValueError(f'worst_group.selection must be "known" or "true", got {self.selection!r}')


class TrueGroups(NamedTuple):
    """Pairs of a class and a fine label that occur in any split, numbered in ascending order."""

    pairs: Tensor
    """Class and fine label of each group, [G, 2] int64"""

    def indices(self, split: FeatureSet) -> Tensor:
        """Group index of every sample of ``split``, [N] int64 on the CPU."""
        rows = torch.stack([split.coarse, split.fine], dim=1).cpu()
        found = torch.cat([self.pairs, rows]).unique(dim=0, return_inverse=True)[1]
        return found[len(self.pairs) :]


def true_groups(splits: FeatureSplits) -> TrueGroups:
    """The true groups of all three splits."""
    rows = [torch.stack([split.coarse, split.fine], dim=1).cpu() for _, split in splits.items()]
    return TrueGroups(torch.cat(rows).unique(dim=0))


def _renumbered(groups: Tensor) -> Tensor:
    """Renumber groups without gaps."""
    return groups.unique(return_inverse=True)[1]


def _training_proportions(train: Tensor, test: Tensor) -> Tensor:
    """Weights [N_test] fp64 with which the test groups have the proportions of the training groups.

    Raises:
        ValueError: no group is in both splits.
    """
    size = int(torch.cat([train, test]).max()) + 1
    in_train, in_test = (torch.bincount(part, minlength=size).double() / len(part) for part in (train, test))
    weight = (in_train / in_test)[test]
    if not weight.any():
        raise ValueError("worst_group.adjusted needs test samples of a training group, got none")
    return weight


class WorstGroup:
    """Yields, under ``worst_group/``, for every method M:

    - ``M/accuracy``, ``M/worst_group_accuracy``, ``M/group=G/accuracy``: over all test
      samples and by true group;
    - ``M/adjusted_accuracy``: with ``adjusted``;
    - ``M/val_worst_group``, ``M/weight_decay``, ``M/epoch``: how the head was chosen (not for trained);
    - ``M/auroc``, ``M/worst_group_auroc``: with ``auroc`` and two classes;
    - the outcomes ``correct``, ``predicted`` and ``group``, with ``adjusted`` also ``weight``.

    Also ``group=G/{class,fine,train,val,test}``: class, fine label and sizes of true group G.
    With dro_inferred also ``subgroups/{count,silhouette,f1,purity}``: the inferred groups of the training
    split, and how well they match the true ones.
    """

    name: ClassVar[str] = "worst_group"
    units: ClassVar[Mapping[str, str]] = {
        "accuracy": "fraction",
        "adjusted_accuracy": "fraction",
        "worst_group_accuracy": "fraction",
        "val_worst_group": "fraction",
        "weight_decay": "weight decay",
        "epoch": "epoch",
        "auroc": "fraction",
        "worst_group_auroc": "fraction",
        "class": "label",
        "fine": "label",
        "train": "samples",
        "val": "samples",
        "test": "samples",
        "count": "groups",
        "silhouette": "silhouette",
        "f1": "fraction",
        "purity": "fraction",
    }

    meanings: ClassVar[Mapping[str, str]] = {
        "accuracy": "linear head, all test samples",
        "adjusted_accuracy": "linear head, true groups weighted by their training proportions",
        "worst_group_accuracy": "linear head, the true group with the lowest accuracy",
        "val_worst_group": "worst validation accuracy among the groups that selected the head",
        "weight_decay": "selected weight decay",
        "epoch": "selected epoch",
        "auroc": "area under the ROC curve, all test samples",
        "worst_group_auroc": "area under the ROC curve, the worst true group against the other class",
        "class": "class of the group",
        "fine": "fine label of the group",
        "train": "training samples of the group",
        "val": "validation samples of the group",
        "test": "test samples of the group",
        "count": "inferred groups",
        "silhouette": "how clear the inferred groups are, from -1 to 1",
        "f1": "agreement of inferred and true groups",
        "purity": "training samples whose true group is the most frequent one of their inferred group",
    }
    headline: ClassVar[Sequence[str]] = ("*/worst_group_accuracy", "*/accuracy")

    def __init__(self, config: WorstGroupConfig | None = None) -> None:
        self.config = config or WorstGroupConfig()
        if self.config.adjusted:
            self.headline = (*self.headline, "*/adjusted_accuracy")  # type: ignore[misc]

    def __call__(self, splits: FeatureSplits, *, progress: bool = False) -> Iterator[Result]:
        config = self.config
        truth = true_groups(splits)
        groups = {name: truth.indices(split) for name, split in splits.items()}
        for g, (label, fine) in enumerate(truth.pairs.tolist()):
            yield f"worst_group/group={g}/class", float(label)
            yield f"worst_group/group={g}/fine", float(fine)
            for name in groups:
                yield f"worst_group/group={g}/{name}", float((groups[name] == g).sum())

        inferred: Subgroups | None = None
        if "dro_inferred" in config.methods:
            train, val = splits.train, splits.val
            losses = None if splits.head is None else head_losses(splits.head, train.features, train.coarse)
            inferred = infer_groups(
                train.features, train.coarse, config.subgroups, losses=losses,
                validation=(val.features, val.coarse),
            )  # fmt: skip
            yield "worst_group/subgroups/count", float(len(inferred))
            yield "worst_group/subgroups/silhouette", sum(inferred.silhouettes) / len(inferred.silhouettes)
            found = recovery(inferred.groups, groups["train"])
            yield "worst_group/subgroups/f1", found.f1
            yield "worst_group/subgroups/purity", found.purity

        classes = splits.train.coarse.cpu().unique()
        weight = _training_proportions(groups["train"], groups["test"]) if config.adjusted else None
        for method in config.methods:
            if method == "trained":
                if splits.head is None:
                    continue
                head = LinearHead(splits.head.weight[classes], splits.head.bias[classes])
                yield from self._evaluate(method, head, splits.test, groups["test"], classes, weight)
                continue
            fitted = self._fit(method, splits, groups, classes, inferred, progress)
            yield from self._evaluate(method, fitted, splits.test, groups["test"], classes, weight)
            yield f"worst_group/{method}/val_worst_group", fitted.val_worst_group
            yield f"worst_group/{method}/weight_decay", fitted.weight_decay
            yield f"worst_group/{method}/epoch", float(fitted.epoch)

    def _fit(
        self,
        method: Method,
        splits: FeatureSplits,
        groups: dict[str, Tensor],
        classes: Tensor,
        inferred: Subgroups | None,
        progress: bool,
    ) -> FittedHead:
        train, val = splits.train, splits.val
        known = {"train": groups["train"], "val": groups["val"]}
        if method == "erm":
            known = {"train": train.coarse.cpu(), "val": val.coarse.cpu()}
        elif method == "dro_inferred":
            assert inferred is not None
            known = {"train": inferred.groups, "val": inferred.predict(val.features, val.coarse)}
        chosen_by = groups["val"] if self.config.selection == "true" else known["val"]
        return fit_head(
            GroupedFeatures(
                train.features, class_index(train.coarse.cpu(), classes), _renumbered(known["train"])
            ),
            GroupedFeatures(val.features, class_index(val.coarse.cpu(), classes), chosen_by),
            len(classes),
            self.config.head,
            robust=method != "erm",
            progress=progress,
        )

    def _evaluate(
        self,
        method: Method,
        head: LinearHead,
        test: FeatureSet,
        group: Tensor,
        classes: Tensor,
        weight: Tensor | None,
    ) -> Iterator[Result]:
        prefix = f"worst_group/{method}"
        scores, coarse = head.logits(test.features), test.coarse.cpu()
        predicted = classes[scores.argmax(dim=1)]
        outcomes = {"correct": predicted == coarse, "predicted": predicted, "group": group}
        metrics = ["accuracy", "worst_group_accuracy"]
        metrics += [f"group={g}/accuracy" for g in group.unique().tolist()]
        if weight is not None:
            outcomes["weight"] = weight
            metrics.append("adjusted_accuracy")
        if self.config.auroc and len(classes) == 2:
            outcomes |= {"score": scores[:, 1] - scores[:, 0], "positive": coarse == classes[1]}
            metrics += ["auroc", "worst_group_auroc"]
        yield from metric_results(prefix, metrics, outcomes)
