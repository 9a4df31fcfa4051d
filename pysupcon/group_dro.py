"""Group distributionally robust optimisation (Sagawa et al. 2020, arXiv 1911.08731).

The objective is sum_g q_g loss_g over the groups of a batch, with weights that follow the worst group:
q_g <- q_g exp(eta (loss_g + C / sqrt(n_g))), normalised. Knows torch alone: a head on frozen features and a
whole network are trained with the same class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pysupcon.errors import check


@dataclass
class GroupDROConfig:
    """Cross-entropy weighted by group, in place of its mean."""

    eta: float = 0.01
    """Step of the groups' weights."""

    adjustment: float = 0.0
    """C: C / sqrt(n_g) is added to the loss of a group of n_g training samples when the weights are set;
    small groups, which generalise less, count for more."""

    def check(self) -> None:
        """Refuse values that cannot run.

        Raises:
            ConfigError: names the field.
        """
        check(self.eta > 0, "loss.group_dro.eta", "be greater than 0", self.eta)
        check(self.adjustment >= 0, "loss.group_dro.adjustment", "be at least 0", self.adjustment)


class GroupDRO(nn.Module):
    """The robust loss of batches; remembers the groups' weights from one to the next.

    The weights move in training mode, before they are used; in eval mode they stay.

    Args:
        counts: [G] int64, training samples of each group, n_g.
        eta: step of the weights.
        adjustment: C, which makes small groups count for more, since they generalise less.
        add_up: several processes: the sum of a tensor over them. Then the loss of each process is its part of
            the robust loss of the joint batch, such that the mean over the processes (of the values, and of
            the gradients, as DistributedDataParallel takes it) is that of one process with the whole batch.

    Attributes:
        weights: [G] fp64, q_g, sums to 1.
        losses: [G] fp64, mean loss of each group in the last training batch that held it; 0 before.
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
        add_up: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if counts.ndim != 1 or len(counts) == 0 or bool((counts < 1).any()):
            raise ValueError(
                f"counts must be of shape [G] with every group at least 1, got {counts.tolist()}"
            )
        if not eta >= 0 or not adjustment >= 0:
            raise ValueError(f"eta and adjustment must be >= 0, got {eta} and {adjustment}")
        self.eta, self.adjustment, self.counts, self._add_up = eta, adjustment, counts.tolist(), add_up
        uniform = torch.full((len(counts),), 1 / len(counts), dtype=torch.float64, device=counts.device)
        self.register_buffer("weights", uniform)
        self.register_buffer("losses", torch.zeros_like(uniform))
        self.register_buffer("offset", adjustment / counts.double().sqrt(), persistent=False)

    def forward(self, losses: Tensor, groups: Tensor) -> Tensor:
        """Updates the weights by the batch, and gives its robust loss, a scalar.

        Args:
            losses: [B], one per sample, differentiable.
            groups: [B] int64 in [0, G).

        A group without a sample in the batch keeps its weight but for the normalisation, and has no loss
        here.
        """
        if losses.shape != groups.shape or losses.ndim != 1:
            raise ValueError(
                f"groups must be of shape [B]=[{len(losses)}] (one group per loss), got {list(groups.shape)}"
            )
        size = len(self.weights)
        members = one_hot(groups, size)  # not index_add, whose order of sums varies on some devices
        sums, counts = losses @ members.to(losses.dtype), members.sum(dim=0).double()
        processes: Tensor | float = 1.0
        totals = sums.detach().double()
        if self._add_up is not None:
            together = self._add_up(torch.cat([totals, counts, counts.new_ones(1)]))
            totals, counts, processes = together[:size], together[size:-1], together[-1]
        if self.training:
            self._update(totals / counts.clamp(min=1), counts > 0)
        share = self.weights / counts.clamp(min=1) * processes
        return (share.to(losses.dtype) * sums).sum()

    @torch.no_grad()
    def _update(self, means: Tensor, present: Tensor) -> None:
        step = (self.eta * (means + self.offset)).masked_fill(~present, 0.0)
        # The shift by the largest changes nothing after normalising, and keeps exp in range.
        weights = self.weights * (step - step.max()).exp()
        self.weights.copy_(weights / weights.sum())
        self.losses.copy_(torch.where(present, means, self.losses))

    def figures(self) -> dict[str, Tensor]:
        """``group=G/loss`` and ``group=G/weight`` of every group, tensors of no dimensions."""
        return {
            f"group={group}/{name}": values[group]
            for group in range(len(self.weights))
            for name, values in (("loss", self.losses), ("weight", self.weights))
        }

    def get_extra_state(self) -> Tensor:
        """[G] int64, the groups' sizes: weights of other groups must not be taken for these."""
        return torch.tensor(self.counts, dtype=torch.int64)

    def set_extra_state(self, state: Any) -> None:
        """Refuse the state of other groups.

        Raises:
            ValueError: their sizes differ.
        """
        if state.tolist() != self.counts:
            raise ValueError(
                f"the groups must be those that the weights belong to, of {_sizes(state.tolist())} training "
                f"samples, got groups of {_sizes(self.counts)}"
            )


def _sizes(counts: Sequence[int]) -> str:
    shown = ", ".join(map(str, counts[:8]))
    return shown + (f", ... ({len(counts)} groups)" if len(counts) > 8 else "")
