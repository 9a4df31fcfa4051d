"""Group distributionally robust optimisation (GroupDRO; Sagawa et al. 2020, arXiv 1911.08731).

The objective is sum_g q_g loss_g over the groups of a batch, with weights updated towards the worst group:
q_g <- q_g exp(eta (loss_g + C / sqrt(n_g))), normalised. :class:`GroupDRO` trains both networks and linear
heads on frozen features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pysupcon.evaluators.base import LinearHead
from pysupcon.evaluators.linear_probe import progress_bar
from pysupcon.evaluators.metrics import worst_group
from pysupcon.evaluators.passes import standardization


class GroupDRO(nn.Module):
    """The robust loss of a batch, with group weights that are kept between batches.

    In training mode the weights are updated before they are used; in eval mode they are constant.

    Args:
        counts: [G] int64, training samples of each group, n_g.
        eta: step size of the weights.
        adjustment: C. It raises the loss of small groups, which generalise less.
        all_reduce_sum: for several processes, returns the sum of a tensor over them. The loss of a process is
            then scaled so that the mean over the processes, of values and of gradients (as
            DistributedDataParallel averages them), equals that of one process with the global batch.

    Attributes:
        weights: [G] fp64, q_g, sums to 1.
        losses: [G] fp64, mean loss of each group in the last training batch that contained it; initially 0.
    """

    weights: Tensor
    losses: Tensor
    offset: Tensor

    def __init__(
        self,
        counts: Tensor,
        *,
        eta: float = 0.01,
        adjustment: float = 0.0,
        all_reduce_sum: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if counts.ndim != 1 or len(counts) == 0 or bool((counts < 1).any()):
            raise ValueError(
                f"counts must be of shape [G] with every group at least 1, got {counts.tolist()}"
            )
        if not eta >= 0 or not adjustment >= 0:
            raise ValueError(f"eta and adjustment must be >= 0, got {eta} and {adjustment}")
        self.eta, self.adjustment, self.counts = eta, adjustment, counts.tolist()
        self._all_reduce_sum = all_reduce_sum
        uniform = torch.full((len(counts),), 1 / len(counts), dtype=torch.float64, device=counts.device)
        self.register_buffer("weights", uniform)
        self.register_buffer("losses", torch.zeros_like(uniform))
        self.register_buffer("offset", adjustment / counts.double().sqrt(), persistent=False)

    def forward(self, losses: Tensor, groups: Tensor) -> Tensor:
        """Update the weights and compute the robust loss of a batch.

        A group without samples in the batch adds no loss, and its weight changes only by the normalisation.

        Args:
            losses: [B], differentiable.
            groups: [B] int64 in [0, G).

        Returns:
            The loss, a scalar.
        """
        if losses.shape != groups.shape or losses.ndim != 1:
            raise ValueError(
                f"groups must be of shape [B]=[{len(losses)}] (one group per loss), got {list(groups.shape)}"
            )
        size = len(self.weights)
        # index_add is not deterministic on some devices, and autocast lowers the precision of a matrix
        # product.
        members = F.one_hot(groups, size)
        sums, counts = (losses[:, None] * members).sum(dim=0), members.sum(dim=0).double()
        processes: Tensor | float = 1.0
        totals = sums.detach().double()
        if self._all_reduce_sum is not None:
            reduced = self._all_reduce_sum(torch.cat([totals, counts, counts.new_ones(1)]))
            totals, counts, processes = reduced[:size], reduced[size:-1], reduced[-1]
        if self.training:
            self._update(totals / counts.clamp(min=1), counts > 0)
        share = self.weights / counts.clamp(min=1) * processes
        return (share.to(losses.dtype) * sums).sum()

    @torch.no_grad()
    def _update(self, means: Tensor, present: Tensor) -> None:
        step = (self.eta * (means + self.offset)).masked_fill(~present, 0.0)
        # Subtracting the maximum cancels in the normalisation and avoids overflow of exp.
        weights = self.weights * (step - step.max()).exp()
        self.weights.copy_(weights / weights.sum())
        self.losses.copy_(torch.where(present, means, self.losses))

    def metrics(self) -> dict[str, Tensor]:
        """``group=G/loss`` and ``group=G/weight`` of every group, as scalar tensors."""
        return {
            f"group={group}/{name}": values[group]
            for group in range(len(self.weights))
            for name, values in (("loss", self.losses), ("weight", self.weights))
        }

    def get_extra_state(self) -> Tensor:
        """The group sizes, [G] int64, so that the weights of other groups are not loaded."""
        return torch.tensor(self.counts, dtype=torch.int64)

    def set_extra_state(self, state: Any) -> None:
        """Check the group sizes of a loaded state.

        Raises:
            ValueError: the sizes differ.
        """
        if state.tolist() != self.counts:
            raise ValueError(
                f"the groups must be those that the weights belong to, of {_format_sizes(state.tolist())} "
                f"training samples, got groups of {_format_sizes(self.counts)}"
            )


def _format_sizes(counts: Sequence[int]) -> str:
    shown = ", ".join(map(str, counts[:8]))
    return shown + (f", ... ({len(counts)} groups)" if len(counts) > 8 else "")


@dataclass
class HeadConfig:
    """A linear head on frozen features, trained by ERM (mean loss) or GroupDRO."""

    learning_rate: float = 0.05
    """Learning rate of SGD with momentum 0.9 and a cosine schedule to zero."""

    weight_decays: list[float] = field(default_factory=lambda: [1e-4, 1e-2, 1e-1])
    """Weight decays to try. The best worst-group validation accuracy chooses weight decay and epoch. GroupDRO
    differs from ERM only if strong decay or early stopping keeps the head from fitting all samples."""

    epochs: int = 40
    """Passes over the training features."""

    batch_size: int = 128
    """Samples per step."""

    eta: float = 0.01
    """GroupDRO: step size of the group weights."""

    adjustment: float = 0.0
    """GroupDRO: C, where C / sqrt(n_g) is added to the loss of a group of n_g samples."""

    uniform_groups: bool = True
    """GroupDRO: draw every group equally often, with replacement; otherwise shuffle the samples."""

    seed: int = 0
    """Seed of the initial weights and of the batches."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"head.{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"head.learning_rate must be > 0, got {self.learning_rate}")
        if not self.weight_decays or any(not value >= 0 for value in self.weight_decays):
            raise ValueError(f"head.weight_decays must be one or more numbers >= 0, got {self.weight_decays}")
        for name in ("eta", "adjustment"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"head.{name} must be >= 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class FittedHead(LinearHead):
    """A head and its selected hyperparameters."""

    val_worst_group: float
    weight_decay: float
    epoch: int


class GroupedFeatures(NamedTuple):
    """Features [N, D] with class indices and groups, int64 [N] each."""

    features: Tensor
    classes: Tensor
    groups: Tensor


def group_batches(
    groups: Tensor, batch_size: int, uniform: bool, generator: torch.Generator
) -> Iterator[Tensor]:
    """Row indices of the batches of one epoch.

    Args:
        groups: [N] int64.
        uniform: draw every group with equal probability, with replacement; otherwise every sample once,
            shuffled.
    """
    n = len(groups)
    if uniform:
        weights = (1 / torch.bincount(groups).double())[groups]
        order = torch.multinomial(weights, n, replacement=True, generator=generator)
    else:
        order = torch.randperm(n, generator=generator)
    yield from order.split(batch_size)


def fit_head(
    train: GroupedFeatures,
    val: GroupedFeatures,
    classes: int,
    config: HeadConfig,
    *,
    robust: bool,
    progress: bool = False,
) -> FittedHead:
    """Train on ``train`` by GroupDRO over its groups if ``robust``, otherwise by ERM, which ignores them.

    The weight decay and the epoch with the best worst-group accuracy on ``val`` are selected, without its
    samples of group -1, if there are others. A tie goes to the stronger decay, then to the later epoch.
    """
    if (val.groups >= 0).any():
        val = GroupedFeatures(*(part.cpu()[val.groups.cpu() >= 0] for part in val))
    x = train.features.to("cpu", torch.float64)
    mean, std = standardization(x)
    data = ((x - mean) / std).float()
    val_data = ((val.features.to("cpu", torch.float64) - mean) / std).float()
    counts = torch.bincount(train.groups)
    best: FittedHead | None = None
    name = "GroupDRO" if robust else "ERM"
    for decay in sorted(set(config.weight_decays), reverse=True):
        generator = torch.Generator().manual_seed(config.seed)
        head = nn.utils.skip_init(nn.Linear, x.shape[1], classes)  # does not use the global random state
        nn.init.normal_(head.weight, std=0.01, generator=generator)
        nn.init.zeros_(head.bias)
        objective = GroupDRO(counts, eta=config.eta, adjustment=config.adjustment)
        optimizer = torch.optim.SGD(head.parameters(), config.learning_rate, momentum=0.9, weight_decay=decay)
        steps = config.epochs * -(-len(data) // config.batch_size)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for epoch in progress_bar(range(config.epochs), progress, f"{name}, decay {decay:g}"):
            for rows in group_batches(
                train.groups, config.batch_size, robust and config.uniform_groups, generator
            ):
                losses = F.cross_entropy(head(data[rows]), train.classes[rows], reduction="none")
                optimizer.zero_grad()
                (objective(losses, train.groups[rows]) if robust else losses.mean()).backward()
                optimizer.step()
                scheduler.step()
            with torch.no_grad():
                correct = head(val_data).argmax(dim=1) == val.classes
            worst = worst_group(correct, val.groups).item()
            if (
                best is None
                or worst > best.val_worst_group
                or (worst, decay) == (best.val_worst_group, best.weight_decay)
            ):
                weight = head.weight.detach().double() / std
                bias = head.bias.detach().double() - weight @ mean
                best = FittedHead(weight, bias, worst, decay, int(epoch))
    assert best is not None
    return best
