"""The implementations that are compared: those of pysupcon and the alternatives.

Each is a function of :class:`~pysupcon.profiling.workload.Inputs` that returns a differentiable loss. Dense
implementations declare how many N x N matrices they hold at their peak, so that a run skips them if the
matrices do not fit into memory.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import pysupcon
from benchmarks.kernels.cases import DTYPES, LOSSES, MANY_LABELS, TWO_SETS, VIEWS, Problem, label_rows
from pysupcon import functional
from pysupcon.pairs import ops
from pysupcon.profiling.workload import Inputs, loss_function

Implementation = Callable[[Inputs], Tensor]


def _of_pairs(problem: Problem, loss: Callable[[Tensor, Tensor], Tensor]) -> Implementation:
    """Adapts a loss of (queries, candidates) to interleaved views; "clip" is the mean of both directions."""

    def one(i: Inputs) -> Tensor:
        return loss(i.features[0::VIEWS], i.features[1::VIEWS])

    def both(i: Inputs) -> Tensor:
        first, second = i.features[0::VIEWS], i.features[1::VIEWS]
        return (loss(first, second) + loss(second, first)) / 2

    return one if problem.loss == "infonce" else both


def _functional(problem: Problem, backend: str) -> Implementation:
    if problem.loss in TWO_SETS:
        return _of_pairs(
            problem,
            lambda queries, candidates: functional.supcon(
                queries, candidates=candidates, temperature=problem.temperature, backend=backend
            ),
        )
    if problem.loss in MANY_LABELS:
        options = {"temperature": problem.temperature, "multi_label": problem.loss}
        return lambda i: functional.supcon(i.features, label_rows(i.labels), backend=backend, **options)
    return loss_function(problem.loss, problem.temperature, backend)


def written_supcon(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """SupCon as in most code bases: similarities minus their maximum, float masks, exp and log."""
    same = (labels.unsqueeze(1) == labels.unsqueeze(0)).to(features.dtype)
    similarities = torch.matmul(features, features.T) / temperature
    largest = similarities.max(dim=1, keepdim=True).values
    shifted = similarities - largest.detach()
    others = 1 - torch.eye(len(labels), dtype=features.dtype, device=features.device)
    positives = same * others
    weights = torch.exp(shifted) * others
    log_probabilities = shifted - torch.log(weights.sum(1, keepdim=True))
    per_anchor = (positives * log_probabilities).sum(1) / positives.sum(1)
    return -per_anchor.mean()


def written_sincere(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """SINCERE in the dense form: each positive against the sum over the negatives."""
    similarities = torch.matmul(features, features.T) / temperature
    same = labels.unsqueeze(1) == labels.unsqueeze(0)
    negatives = torch.where(same, -torch.inf, similarities).logsumexp(dim=1, keepdim=True)
    positives = same & ~torch.eye(len(labels), dtype=torch.bool, device=features.device)
    pairs = torch.logaddexp(similarities, negatives) - similarities
    per_anchor = torch.where(positives, pairs, 0.0).sum(1) / positives.sum(1)
    return per_anchor.mean()


def written_info_nce(queries: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    """InfoNCE of two sets as in most code bases: cross entropy with the diagonal as labels."""
    similarities = torch.matmul(queries, candidates.T) / temperature
    own = torch.arange(len(queries), device=queries.device)
    return torch.nn.functional.cross_entropy(similarities, own)


def _written_by(
    problem: Problem, wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
) -> Implementation:
    if problem.loss in TWO_SETS:
        pairs = wrap(written_info_nce)
        return _of_pairs(problem, lambda first, second: pairs(first, second, problem.temperature))
    function = wrap(written_supcon if problem.loss == "supcon" else written_sincere)
    return lambda i: function(i.features, i.labels, problem.temperature)


def _written(problem: Problem) -> Implementation:
    return _written_by(problem, lambda function: function)


def _compiled(problem: Problem) -> Implementation:
    torch._dynamo.reset()  # compile each problem for its own static shape
    return _written_by(problem, lambda function: torch.compile(function, dynamic=False))


def _inf_cl(problem: Problem) -> Implementation:
    """inf_cl computes in float32 (TF32 products). ``scale`` works with several processes only."""
    from inf_cl import cal_inf_loss  # type: ignore[import-not-found]

    head = math.gcd(problem.dim, 256)  # the kernel needs a power of two, at least 16
    if head < 16:
        raise ValueError(f"inf_cl needs a multiple of 16 dimensions, got {problem.dim}")

    def loss(queries: Tensor, candidates: Tensor) -> Tensor:
        scaled = (queries.float() / problem.temperature).contiguous()
        result: Tensor = cal_inf_loss(scaled, candidates.float().contiguous(), head_dim=head)
        return result

    return _of_pairs(problem, loss)


def _memeff(problem: Problem) -> Implementation:
    """stable=False: the exact gradient; margin=2.0: no mask of false negatives."""
    import memeff  # type: ignore[import-not-found]

    common = {"temperature": problem.temperature, "normalized_inputs": True, "stable": False}
    if problem.loss == "infonce":
        return _of_pairs(problem, memeff.MemoryEfficientQwen3Loss(margin=2.0, **common))
    clip = memeff.MemoryEfficientCLIPLoss(**common)
    return lambda i: clip(i.features[0::VIEWS], i.features[1::VIEWS])


def _metric_learning(problem: Problem) -> Implementation:
    from pytorch_metric_learning.losses import SupConLoss

    module = SupConLoss(temperature=problem.temperature)
    return lambda i: module(i.features, i.labels)


def _keops(problem: Problem) -> Implementation:
    from pykeops.torch import LazyTensor  # type: ignore[import-not-found]

    def loss(i: Inputs) -> Tensor:
        x = (i.features / problem.temperature**0.5).contiguous()
        classes = i.labels.to(x.dtype)[:, None]
        rows = torch.arange(len(x), device=x.device, dtype=x.dtype)[:, None]
        s = (LazyTensor(x[:, None, :]) * LazyTensor(x[None, :, :])).sum(-1)
        # Squared differences of integers: 0 for the same class (row), at least 1 otherwise.
        other_class = (LazyTensor(classes[:, None, :]) - LazyTensor(classes[None, :, :])).square()
        self_pair = (LazyTensor(rows[:, None, :]) - LazyTensor(rows[None, :, :])).square()
        not_self = (self_pair - 0.5).step()
        total = s.logsumexp(dim=1, weight=not_self).view(-1)
        positive = not_self * (0.5 - other_class).step()
        mean = (positive * s).sum(dim=1).view(-1) / positive.sum(dim=1).view(-1)
        return (total - mean).mean()

    return loss


@dataclass(frozen=True)
class Peer:
    """One implementation."""

    name: str
    detail: str
    losses: tuple[str, ...]
    build: Callable[[Problem], Implementation]
    matrices: float = 0.0
    """number of N x N matrices at the peak of forward and backward, float32 (float64 for float64 rows)"""
    module: str | None = None
    """module that must be installed"""
    dtypes: tuple[str, ...] = tuple(DTYPES)
    devices: tuple[str, ...] = ("cpu", "cuda")
    normalizes: bool = False
    """normalizes rows itself, so that its gradient has no component along a row"""

    def bytes_needed(self, problem: Problem) -> float:
        """Bytes of the matrices; other tensors are small in comparison."""
        size = 8 if problem.dtype == "float64" else 4
        return self.matrices * problem.anchors * problem.anchors * size

    def missing(self, problem: Problem, memory: float) -> str | None:
        """The reason, as printed in the table, why it cannot run on this machine or problem; None if it can.

        Args:
            problem: what would be measured.
            memory: available memory in bytes.
        """
        if problem.loss not in self.losses:
            return f"no {problem.loss}"
        if problem.dtype not in self.dtypes:
            return f"no {problem.dtype}"
        if problem.device not in self.devices:
            return f"no {problem.device}"
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        if self.name == "pysupcon" and not ops.compiled_for(problem.device):
            return str(pysupcon.backends()[problem.device]["detail"])
        if self.bytes_needed(problem) > memory:
            return f"needs {self.bytes_needed(problem) / 2**30:.0f} GiB"
        return None


_FAMILY = LOSSES + TWO_SETS + MANY_LABELS
_WRITTEN = ("supcon", "sincere", *TWO_SETS)
_SINGLE = ("float64", "float32")
_HALF = ("bfloat16", "float16")
_CUDA = ("cuda",)

PEERS = {
    peer.name: peer
    for peer in (
        Peer("pysupcon", "the compiled operators", _FAMILY, lambda p: _functional(p, "auto")),
        Peer("tiled", "pysupcon in pure PyTorch", _FAMILY, lambda p: _functional(p, "tiled")),
        Peer("dense", "pysupcon's dense reference", _FAMILY, lambda p: _functional(p, "reference"), 6),
        Peer("written", "the dense loss as users write it", _WRITTEN, _written, 9.1),
        Peer("compiled", "torch.compile of it", _WRITTEN, _compiled, 1.1),
        Peer(
            "metric-learning", "pytorch-metric-learning", ("supcon",), _metric_learning, 11.5,
            "pytorch_metric_learning", normalizes=True,
        ),
        Peer("keops", "KeOps map-reduce", ("supcon",), _keops, module="pykeops", dtypes=_SINGLE),
        Peer(
            "inf-cl", "Inf-CL (inf_cl)", TWO_SETS, _inf_cl, module="inf_cl", dtypes=_HALF, devices=_CUDA
        ),
        Peer("memeff", "memeff", TWO_SETS, _memeff, module="memeff", dtypes=_HALF, devices=_CUDA),
    )
}  # fmt: skip
