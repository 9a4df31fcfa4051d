"""The loss of pytorch-metric-learning, which its wrappers accept."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pysupcon import functional
from pysupcon.compat.arguments import check_tensor, class_ids, class_ids_of_both
from pysupcon.compat.listed_pairs import ListedPairs
from pysupcon.contrastive import Counts, build_problem, dense_sets
from pysupcon.pairs.checks import (
    BACKENDS,
    check_choice,
    check_features,
    check_ids,
    check_temperature,
    describe,
    shorten,
)
from pysupcon.pairs.modes import is_eager
from pysupcon.pairs.normalize import unit_rows
from pysupcon.pairs.pairing import count_matches
from pysupcon.pairs.reference import log_sum_exp, mean_over, similarity

__all__ = ["MetricLearningSupConLoss"]

if TYPE_CHECKING:
    _Base = nn.Module
else:
    try:  # the package's wrappers ask for its base class and for the class name SupConLoss
        from pytorch_metric_learning.losses import BaseMetricLossFunction as _Base
    except ImportError:
        _Base = nn.Module

# Attributes of CosineSimilarity() and AvgNonZeroReducer(), the defaults of the original.
_DISTANCE = {"normalize_embeddings": True, "p": 2, "power": 1, "is_inverted": True, "collect_stats": False}
_REDUCER = {"low": 0, "high": None, "collect_stats": False}


def _check_default(name: str, value: Any, default: str, attributes: dict[str, Any]) -> None:
    """``value`` must be None or an object like pytorch-metric-learning's ``default``. The check
    compares the class name and attributes, so the package need not be installed."""
    if value is None:
        return
    got = describe(value) if type(value).__name__ != default else None
    for key, wanted in attributes.items():
        if got is None and not hasattr(value, key):
            got = f"a {default} without {key}"
        elif got is None and getattr(value, key) != wanted:
            got = f"{default} with {key}={shorten(repr(getattr(value, key)))}"
    if got is not None:
        raise NotImplementedError(f"{name} must be the default of SupConLoss, {default}(), got {got}")


class SupConLoss(_Base):
    """pytorch-metric-learning: ``SupConLoss(temperature)`` with its default distance and reducer.

    ``embeddings`` [N, D] are L2-normalised, ``labels`` [N]; ``ref_emb`` [M, D] with ``ref_labels`` [M] are
    contrasted with the embeddings instead of the embeddings themselves.

    The mean is over the anchors that have a positive; a batch without any positive or without any negative
    pair gives 0. In the original the mean is over the anchors whose loss is above 0 after rounding, which is
    the same in exact arithmetic: only an anchor whose single candidate is its positive has loss 0.

    ``indices_tuple`` holds pairs (anchors, positives, anchors, negatives) or triplets (anchors, positives,
    negatives) of row numbers; only these pairs count. If they are all pairs, or all but one positive per
    anchor (itself in a memory), the loss needs no N x M matrix. Other pairs, for example those of a miner,
    are computed in plain PyTorch with that matrix, as by the miner. ``labels`` may be None then.

    Where pytorch-metric-learning is installed, the class extends its ``BaseMetricLossFunction``, and these
    wrappers accept it, with the values and gradients of the original:

    ``CrossBatchMemory``
        Also with a miner and ``enqueue_mask``. The wrapper itself lists all pairs of the batch and the memory
        (16 bytes each) and contrasts with the memory only; ``memory`` of :class:`pysupcon.SupConLoss` needs
        neither.
    ``DistributedLossWrapper``
        Also with ``efficient=True`` and around ``CrossBatchMemory``. ``gather=True`` of
        :class:`pysupcon.SupConLoss` does the same without the list of pairs.
    ``SelfSupervisedLoss``
        ``symmetric`` True or False.
    ``MultipleLosses``, miners, ``DistributedMinerWrapper``
        As in the original.

    The other keywords of the original are accepted only with their default values: ``distance`` None or
    ``CosineSimilarity()``, ``reducer`` None or ``AvgNonZeroReducer()``, ``embedding_regularizer`` None (with
    any ``embedding_reg_weight``, which then has no effect), ``collect_stats`` None or False. Anything else
    is a NotImplementedError.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        backend: str = "auto",
        distance: Any = None,
        reducer: Any = None,
        embedding_regularizer: Any = None,
        embedding_reg_weight: float = 1,
        collect_stats: bool | None = None,
    ) -> None:
        _check_default("distance", distance, "CosineSimilarity", _DISTANCE)
        _check_default("reducer", reducer, "AvgNonZeroReducer", _REDUCER)
        for name, value in (
            ("embedding_regularizer", embedding_regularizer),
            ("collect_stats", collect_stats),
        ):
            if value is not None and value is not False:
                raise NotImplementedError(f"{name} is not supported, got {describe(value)}")
        check_choice("backend", backend, BACKENDS)
        super().__init__(**({} if _Base is nn.Module else {"collect_stats": False}))
        self.temperature = temperature
        self.backend = backend

    def get_default_distance(self) -> Any:
        """For the base class: ``distance`` of this loss."""
        from pytorch_metric_learning.distances import CosineSimilarity

        return CosineSimilarity(collect_stats=False)

    def get_default_reducer(self) -> Any:
        """For the base class: ``reducer`` of this loss."""
        from pytorch_metric_learning.reducers import AvgNonZeroReducer

        return AvgNonZeroReducer(collect_stats=False)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        if labels is None and indices_tuple is None:
            raise ValueError("labels must be given, or pairs as indices_tuple")
        check_tensor("embeddings", embeddings, "[N, D]")
        if embeddings.dim() != 2:
            raise ValueError(f"embeddings must be of shape [N, D], got {list(embeddings.shape)}")
        if ref_emb is None or (ref_emb is embeddings and ref_labels is labels):
            ref_emb = ref_labels = None
            labels = None if labels is None else class_ids(labels, embeddings)
        elif ref_labels is None or labels is None:
            if indices_tuple is None:
                raise ValueError("ref_labels must be given with ref_emb")
            labels = ref_labels = None
        elif ref_labels is labels and indices_tuple is None:
            raise NotImplementedError(
                "ref_labels is the same object as labels: it is ambiguous whether ref_emb and embeddings "
                "are the same rows; pass labels.clone() if they are not, and no ref_emb if they are"
            )
        else:
            labels, ref_labels = class_ids_of_both(labels, ref_labels, embeddings)
        if indices_tuple is not None:
            return self._loss_of_pairs(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        assert labels is not None
        loss = functional.supcon(
            embeddings,
            labels,
            temperature=self.temperature,
            candidates=ref_emb,
            candidate_labels=ref_labels,
            reduction="none",
            normalize=True,
            backend=self.backend,
        )
        others, itself = (labels, 1) if ref_labels is None else (ref_labels, 0)
        count = count_matches(torch.sort(others)[0], labels) - itself
        return _mean(loss, count, others.numel() - itself)

    def _loss_of_pairs(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Any,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> Tensor:
        """The loss over listed pairs. Labels only tell whether the pairs are all of them."""
        check_features("embeddings", embeddings)
        references = embeddings if ref_emb is None else ref_emb
        check_features("ref_emb", references, like=embeddings)
        if references.dim() != 2:
            raise ValueError(f"ref_emb must be of shape [M, D], got {list(references.shape)}")
        pairs = ListedPairs.read(indices_tuple, len(embeddings), len(references), embeddings.device)
        if labels is not None:
            labels = check_ids("labels", labels, embeddings)
            others = labels if ref_labels is None else check_ids("ref_labels", ref_labels, references)
            found, left_out = pairs.find_left_out(labels, others) if is_eager(embeddings) else (False, None)
            if found:
                return self._loss_of_all_but(embeddings, labels, references, others, left_out)
        dtype = torch.promote_types(embeddings.dtype, references.dtype)
        rows, columns = (unit_rows(x).to(x.dtype).to(dtype) for x in (embeddings, references))
        s = similarity(rows, columns, check_temperature("temperature", self.temperature))
        positives, negatives = pairs.to_sets(s)
        loss = log_sum_exp(s, positives | negatives) - mean_over(positives, s)
        return _mean(loss, positives.sum(1), positives.sum(1) + negatives.sum(1))

    def _loss_of_all_but(
        self, embeddings: Tensor, labels: Tensor, references: Tensor, others: Tensor, left_out: Tensor | None
    ) -> Tensor:
        """The loss over all pairs; ``left_out`` [N] is the reference that an anchor is not compared with."""
        rows = torch.arange(len(labels), device=labels.device)
        if references is embeddings and left_out is not None and torch.equal(left_out, rows):
            loss: Tensor = self.forward(embeddings, labels)
            return loss
        options = {
            "candidates": references,
            "candidate_labels": others,
            "reduction": "none",
            "normalize": True,
            "backend": self.backend,
        }
        problem, _ = build_problem(
            "SupConLoss", embeddings, labels, None, options, self.temperature, False, ()
        )
        size = len(others)
        if left_out is not None:
            pairing = problem.pairing._replace(self_index=left_out)
            problem = dataclasses.replace(problem, pairing=pairing, count=problem.count - 1)
            size -= 1
        count, supcon = problem.count, functional.SupConLoss
        if problem.backend == "reference":
            value = supcon.dense(*dense_sets(problem))
        else:
            s = problem.statistics(**supcon.statistics())
            value = supcon.per_anchor(s, Counts(count, None, size), count > 0)
        return _mean(value.to(problem.loss_dtype), count, size)


MetricLearningSupConLoss = SupConLoss


def _mean(loss: Tensor, positives: Tensor, pairs: Tensor | int) -> Tensor:
    """Mean over the anchors that have a positive and another pair; 0 if no anchor has a negative.

    Args:
        loss: [N].
        positives: number of positives of each anchor, [N].
        pairs: number of pairs of each anchor, [N], or of all.
    """
    some = torch.as_tensor(pairs, device=loss.device)
    valid = (positives > 0) & (positives < some).any() & (some > 1)
    return torch.where(valid, loss, 0.0).sum() / valid.sum().clamp(min=1)
