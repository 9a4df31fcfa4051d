"""What the losses see in frozen features: per anchor, over all pairs of one split, a block of rows at a time.

Symbols as in SINCERE (arXiv 2309.14277): anchor i, its positives P_i (same class, not itself) and negatives
N_i, s_ij = cosine / temperature, n_i and p_i the logsumexp over N_i and P_i.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pysupcon.evaluators.base import LEVELS, FeatureSplits, Result
from pysupcon.evaluators.knn import similarity_chunks
from pysupcon.evaluators.metrics import metric_results


@dataclass
class PairsConfig:
    """Losses, KL bound and repelling positives over all pairs of one split."""

    split: Literal["train", "val", "test"] = "test"
    """"train", "val" or "test". Only the test split's figures have intervals and outcomes."""

    temperature: float = 0.1
    """Divides the cosines. The KL bound holds at any; the temperature of training makes it tightest."""

    per_class: bool = True
    """Also the KL bound of every class."""

    chunk_bytes: int = 1 << 26
    """Memory for one block of similarities (rows x all rows), in bytes."""

    def __post_init__(self) -> None:
        if self.split not in ("train", "val", "test"):
            raise ValueError(f'pairs.split must be "train", "val" or "test", got {self.split!r}')
        if not self.temperature > 0:
            raise ValueError(f"pairs.temperature must be > 0, got {self.temperature}")
        if self.chunk_bytes < 1:
            raise ValueError(f"pairs.chunk_bytes must be positive, got {self.chunk_bytes}")


class PairStatistics(NamedTuple):
    """Per anchor, [N] each, on the CPU; losses are fp64 and NaN for an anchor without a positive."""

    supcon: Tensor
    """logaddexp(n_i, p_i) - mean_{P_i} s"""
    sincere: Tensor
    """mean_{p in P_i} softplus(n_i - s_ip)"""
    positives: Tensor
    """|P_i|, int64"""
    negatives: Tensor
    """|N_i|, int64"""
    supcon_repels: Tensor
    """How many of the positives SupCon pushes away: dL_i/ds_ip = softmax_p - 1/|P_i| > 0, int64"""
    sincere_repels: Tensor
    """The same of SINCERE: dL_i/ds_ip = (sigma_p - 1) / |P_i| > 0, int64"""


def pair_statistics(
    features: Tensor,
    labels: Tensor,
    temperature: float,
    *,
    chunk_bytes: int = 1 << 26,
    progress: bool = False,
) -> PairStatistics:
    """The table of ``features`` [N, D] with ``labels`` [N] int64. Memory grows with N, not with N squared."""
    blocks: list[tuple[Tensor, ...]] = []
    columns = torch.arange(len(features), device=features.device)
    bank = (
        features.double()
    )  # repulsion is a matter of sign: fp32 rounding would decide it at softmax = 1/|P|
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
        # One positive and no negative: softmax is 1 = 1/|P| but for the rounding of logsumexp.
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
    """log|N_i| - L_i, [N] fp64, whose mean is a lower bound of the symmetrised KL divergence between the
    target and the noise distribution, in nats (SINCERE, arXiv 2309.14277). It cannot exceed log|N_i|.

    Args:
        losses: [N] SINCERE losses per anchor, NaN where there is none.
        negatives: [N] int64, |N_i|. An anchor without one gives NaN.
    """
    counts = negatives.double()
    return torch.where(negatives > 0, counts.log() - losses.double(), torch.nan)


def loss_floors(
    positives: Tensor, negatives: Tensor, temperature: float, *, instances: int = 1, gap: float = 2.0
) -> dict[str, Tensor]:
    """Values below which no unit-length embedding takes a loss, [N] fp64 each, by its name.

    With the cosine of a positive at most 1 and of a negative at least 1 - ``gap``, and Jensen's inequality
    over the positives:

        supcon                      log(|P| + |N| e^(-gap/t))
        sincere                     log(1 + |N| e^(-gap/t))
        class_conditional_info_nce  log(|A| + (|P| - |A|) e^(-2/t))

    ``gap`` = 2 holds for any embedding. C classes of equal size reach cosines of -1/(C - 1) at best (a
    simplex; Graf et al. 2021, arXiv 2102.08817): there the *mean* of SupCon or SINCERE over all anchors is at
    least the floor with ``gap`` = C/(C - 1), and reaches it where each class is one point. The floor of cNCE
    is reached where |P| = 1 or the other positives lie opposite.

    Args:
        positives, negatives: [N] int64, |P_i| >= 1 and |N_i|.
        instances: |A_i|, the other views of the anchor's sample.
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
    """The ``gap`` of :func:`loss_floors` that holds for ``labels`` [N]: C/(C - 1) for C equal classes, or
    2."""
    counts = labels.unique(return_counts=True)[1]
    classes = len(counts)
    return classes / (classes - 1) if classes > 1 and bool((counts == counts[0]).all()) else 2.0


class Pairs:
    """Yields, under ``pairs/{fine,coarse}/``, over the samples of one split, one row each:

    - ``supcon_loss``, ``sincere_loss``: means over the anchors that have a positive;
    - ``supcon_floor``, ``sincere_floor``: the smallest values these means can take (:func:`loss_floors`);
    - ``supcon_repelling``, ``sincere_repelling``: the share of positive pairs that the loss pushes apart;
    - ``kl_bound``: mean_i(log|N_i| - L_i), with L SINCERE's loss: a lower bound of the symmetrised KL
      divergence;
    - ``kl_limit``: mean_i log|N_i|, where that bound saturates;
    - ``class=C/kl_bound``: the bound of the anchors of class C.

    A level in which no sample has a positive and a negative yields nothing.
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

    def __init__(self, config: PairsConfig | None = None) -> None:
        self.config = config or PairsConfig()

    def __call__(self, splits: FeatureSplits, *, progress: bool = False) -> Iterator[Result]:
        config = self.config
        chosen = dict(splits.items())[config.split]
        for level in LEVELS:
            labels = chosen.labels(level)
            table = pair_statistics(
                chosen.features,
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
            figures = ["supcon_loss", "sincere_loss", "supcon_repelling", "sincere_repelling", "kl_bound"]
            if config.per_class:
                figures += [f"class={c}/kl_bound" for c in labels[~bound.isnan()].unique().tolist()]
            outcomes = {
                "supcon": table.supcon,
                "sincere": table.sincere,
                "supcon_repels": table.supcon_repels,
                "sincere_repels": table.sincere_repels,
                "positives": table.positives,
                "bound": bound,
                "class": labels,
            }
            for name, value in metric_results(prefix, figures, outcomes):
                if config.split == "test" or not isinstance(value, Tensor):
                    yield name, value
            floors = loss_floors(
                table.positives[valid], table.negatives[valid], config.temperature, gap=simplex_gap(labels)
            )
            yield f"{prefix}/supcon_floor", floors["supcon"].mean().item()
            yield f"{prefix}/sincere_floor", floors["sincere"].mean().item()
            limit = table.negatives[~bound.isnan()].double().log().mean()
            yield f"{prefix}/kl_limit", limit.item()
