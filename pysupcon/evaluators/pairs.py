"""Losses and related statistics per anchor, over all pairs of one split, computed in blocks of rows.

Symbols as in SINCERE (arXiv 2309.14277): anchor i with positives P_i (same class, not itself) and negatives
N_i, s_ij = cosine / temperature, n_i and p_i the logsumexp over N_i and P_i.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pysupcon.evaluators.base import FeatureSplits, Result
from pysupcon.evaluators.knn import similarity_chunks
from pysupcon.evaluators.metrics import metric_results


@dataclass
class PairsConfig:
    """Losses, KL bound and repelled positives over all pairs of one split."""

    split: Literal["train", "val", "test"] = "test"
    """"train", "val" or "test". Only metrics of the test split have intervals and outcomes."""

    temperature: float = 0.1
    """Temperature of the losses. The KL bound holds at any and is tightest at the training temperature."""

    per_class: bool = True
    """Also report the KL bound of every class."""

    chunk_bytes: int = 1 << 26
    """Memory of one block of similarities (rows x all rows), in bytes."""

    def __post_init__(self) -> None:
        if self.split not in ("train", "val", "test"):
            raise ValueError(f'pairs.split must be "train", "val" or "test", got {self.split!r}')
        if not self.temperature > 0:
            raise ValueError(f"pairs.temperature must be > 0, got {self.temperature}")
        if self.chunk_bytes < 1:
            raise ValueError(f"pairs.chunk_bytes must be positive, got {self.chunk_bytes}")


class PairStatistics(NamedTuple):
    """Statistics per anchor, [N] each, on the CPU. Losses are fp64, and NaN for anchors without positives."""

    supcon: Tensor
    """logaddexp(n_i, p_i) - mean_{P_i} s"""
    sincere: Tensor
    """mean_{p in P_i} softplus(n_i - s_ip)"""
    positives: Tensor
    """|P_i|, int64"""
    negatives: Tensor
    """|N_i|, int64"""
    supcon_repels: Tensor
    """Number of positives that SupCon repels, dL_i/ds_ip = softmax_p - 1/|P_i| > 0, int64"""
    sincere_repels: Tensor
    """Number of positives that SINCERE repels, dL_i/ds_ip = (sigma_p - 1) / |P_i| > 0, int64"""


def pair_statistics(
    features: Tensor,
    labels: Tensor,
    temperature: float,
    *,
    chunk_bytes: int = 1 << 26,
    progress: bool = False,
) -> PairStatistics:
    """Statistics of ``features`` [N, D] with ``labels`` [N] int64. Memory grows with N, not with N
    squared."""
    blocks: list[tuple[Tensor, ...]] = []
    columns = torch.arange(len(features), device=features.device)
    # Repulsion depends on a sign, which fp32 rounding would decide at softmax = 1/|P|.
    bank = features.double()
    for rows, cosines in similarity_chunks(bank, bank, chunk_bytes, progress, description="pairs"):
        s = cosines / temperature
        same = labels[rows, None] == labels
        positive = same & (columns[rows, None] != columns)
        p = s.masked_fill(~positive, -torch.inf).logsumexp(dim=1)
        n = s.masked_fill(same, -torch.inf).logsumexp(dim=1)
        count = positive.sum(dim=1)
        none = count == 0
        total = torch.logaddexp(n, p)
        mean = s.masked_fill(~positive, 0.0).sum(dim=1) / count
        away = F.softplus(n[:, None] - s).masked_fill(~positive, 0.0).sum(dim=1) / count
        softmax = (s - total[:, None]).exp()
        sigma = torch.sigmoid(s - n[:, None])
        # With one positive and no negative, softmax is 1 = 1/|P| up to the rounding of logsumexp.
        supcon_repels = positive & (softmax - 1 / count[:, None] > 1e-12)
        sincere_repels = positive & (sigma - 1 > 0)
        blocks.append(
            (
                (total - mean).masked_fill(none, torch.nan),
                away.masked_fill(none, torch.nan),
                count,
                len(labels) - same.sum(dim=1),
                supcon_repels.sum(dim=1),
                sincere_repels.sum(dim=1),
            )
        )
    return PairStatistics(*(torch.cat(column).cpu() for column in zip(*blocks, strict=True)))


def kl_bound(losses: Tensor, negatives: Tensor) -> Tensor:
    """Bound log|N_i| - L_i per anchor, [N] fp64, in nats (SINCERE, arXiv 2309.14277).

    Its mean is a lower bound of the symmetrised KL divergence between the target and the noise distribution.
    It is at most log|N_i|.

    Args:
        losses: [N] SINCERE losses per anchor, NaN for anchors without a loss.
        negatives: [N] int64, |N_i|. The result is NaN for anchors without negatives.
    """
    counts = negatives.double()
    return torch.where(negatives > 0, counts.log() - losses.double(), torch.nan)


def loss_floors(
    positives: Tensor, negatives: Tensor, temperature: float, *, instances: int = 1, gap: float = 2.0
) -> dict[str, Tensor]:
    """Lower bounds of the losses over all unit-length embeddings, [N] fp64 each, by the name of the loss.

    Cosines of positives are at most 1, cosines of negatives at least 1 - ``gap``. With Jensen's inequality
    over the positives:

        supcon                      log(|P| + |N| e^(-gap/t))
        sincere                     log(1 + |N| e^(-gap/t))
        class_conditional_info_nce  log(|A| + (|P| - |A|) e^(-2/t))

    ``gap`` = 2 holds for any embedding. C classes of equal size reach cosines of -1/(C - 1) at best (a
    simplex; Graf et al. 2021, arXiv 2102.08817). Then the mean of SupCon or SINCERE over all anchors is at
    least the bound with ``gap`` = C/(C - 1), with equality if each class is one point. The bound of cNCE is
    reached if |P| = 1 or the other positives are opposite to the anchor.

    Args:
        positives, negatives: [N] int64, |P_i| >= 1 and |N_i|.
        temperature: t above.
        instances: |A_i|, the number of other views of the anchor's sample.
        gap: 1 minus the smallest cosine of negatives, in (0, 2].
    """
    if not temperature > 0 or not 0 < gap <= 2:
        raise ValueError(f"temperature must be > 0 and gap in (0, 2], got {temperature} and {gap}")
    p, n = positives.double(), negatives.double()
    return {
        "supcon": (p + n * torch.tensor(-gap / temperature).double().exp()).log(),
        "sincere": (n * torch.tensor(-gap / temperature).double().exp()).log1p(),
        "class_conditional_info_nce": (
            instances + (p - instances) * torch.tensor(-2 / temperature).double().exp()
        ).log(),
    }


def simplex_gap(labels: Tensor) -> float:
    """The ``gap`` of :func:`loss_floors` for ``labels`` [N]: C/(C - 1) for C classes of equal size, else
    2."""
    counts = labels.unique(return_counts=True)[1]
    classes = len(counts)
    return classes / (classes - 1) if classes > 1 and bool((counts == counts[0]).all()) else 2.0


class Pairs:
    """Yields, under ``pairs/{fine,coarse}/``, over the samples of one split:

    - ``supcon_loss``, ``sincere_loss``: means over the anchors with a positive;
    - ``supcon_floor``, ``sincere_floor``: lower bounds of these means (:func:`loss_floors`);
    - ``supcon_repelling``, ``sincere_repelling``: fraction of positive pairs that the loss repels;
    - ``kl_bound``: mean_i(log|N_i| - L_i), with the SINCERE loss L, a lower bound of the symmetrised KL
      divergence;
    - ``kl_limit``: mean_i log|N_i|, the largest possible bound;
    - ``class=C/kl_bound``: the bound of the anchors of class C.

    A level without any sample that has a positive and a negative yields nothing. Labels of one level give the
    results of ``fine`` only.
    """

    name: ClassVar[str] = "pairs"
    units: ClassVar[Mapping[str, str]] = {
        "supcon_loss": "nats",
        "sincere_loss": "nats",
        "supcon_floor": "nats",
        "sincere_floor": "nats",
        "supcon_repelling": "fraction",
        "sincere_repelling": "fraction",
        "kl_bound": "nats",
        "kl_limit": "nats",
    }

    meanings: ClassVar[Mapping[str, str]] = {
        "supcon_loss": "SupCon loss over all pairs of the split, at pairs.temperature",
        "sincere_loss": "SINCERE loss over all pairs of the split, at pairs.temperature",
        "supcon_floor": "smallest possible SupCon loss of this split",
        "sincere_floor": "smallest possible SINCERE loss of this split",
        "supcon_repelling": "pairs of one class that the SupCon gradient pushes apart",
        "sincere_repelling": "pairs of one class that the SINCERE gradient pushes apart",
        "kl_bound": "lower bound of the KL divergence of own-class and other-class similarities",
        "kl_limit": "largest possible kl_bound of this split",
    }
    headline: ClassVar[Sequence[str]] = ("fine/kl_bound", "coarse/kl_bound")

    def __init__(self, config: PairsConfig | None = None) -> None:
        self.config = config or PairsConfig()

    def __call__(self, splits: FeatureSplits, *, progress: bool = False) -> Iterator[Result]:
        config = self.config
        split = dict(splits.items())[config.split]
        for level in splits.levels:
            labels = split.labels(level)
            table = pair_statistics(
                split.features,
                labels,
                config.temperature,
                chunk_bytes=config.chunk_bytes,
                progress=progress,
            )
            labels = labels.cpu()
            valid = table.positives > 0
            bound = kl_bound(table.sincere, table.negatives)
            known = bound[~bound.isnan()]
            if len(known) == 0:
                continue
            prefix = f"pairs/{level}"
            metrics = ["supcon_loss", "sincere_loss", "supcon_repelling", "sincere_repelling", "kl_bound"]
            if config.per_class:
                metrics += [f"class={c}/kl_bound" for c in labels[~bound.isnan()].unique().tolist()]
            outcomes = {
                "supcon": table.supcon,
                "sincere": table.sincere,
                "supcon_repels": table.supcon_repels,
                "sincere_repels": table.sincere_repels,
                "positives": table.positives,
                "bound": bound,
                "class": labels,
            }
            for name, value in metric_results(prefix, metrics, outcomes):
                if config.split == "test" or not isinstance(value, Tensor):
                    yield name, value
            floors = loss_floors(
                table.positives[valid], table.negatives[valid], config.temperature, gap=simplex_gap(labels)
            )
            yield f"{prefix}/supcon_floor", floors["supcon"].mean().item()
            yield f"{prefix}/sincere_floor", floors["sincere"].mean().item()
            limit = table.negatives[~bound.isnan()].double().log().mean()
            yield f"{prefix}/kl_limit", limit.item()
