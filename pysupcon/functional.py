"""The losses as functions. Formulas, shapes and arguments are the same for all; see :func:`supcon`.

Similarity s_ij = z_i . z_j / temperature; for an anchor i, P_i are the candidates of its class without
itself, N_i those of other classes, A_i the other rows of its sample (its views). The N x N matrix is never
written down.

Common arguments
    features      [B, V, D] (V views of B samples) or [N, D]; float64, float32, bfloat16 or float16. Not
                  normalised unless ``normalize=True``.
    labels        integers [B] or [N] of any integer dtype, any values (uint64 beyond int64: modulo 2^64).
                  None: the positives of a row are the other rows of its sample.
    mask          bool [B, B] (or [samples of features, samples of candidates]) instead of labels: row i takes
                  row j as positive where ``mask[i, j]``; need not be symmetric. Runs on the tiled backend.
    temperature   a number, of Python or NumPy, or a tensor of one element; from 1e-12 to 1e12. A tensor gets
                  a gradient in its own shape; its value is looked at only on a CPU and not while it is traced
                  (``torch.compile``). ``base_temperature`` likewise. ``epsilon`` (from -1e4 to 1e4) and
                  ``alpha`` (from 0 to 1) are numbers, or tensors of one element that want no gradient.
    contrast_mode "all": every row is an anchor; "one": only view 0 is.
    candidates    [Nc, D] or [Bc, V, D]: rows to contrast with instead of the features themselves (a queue,
                  another tower). Features are anchors only, and no self is left out. ``candidate_labels``
                  [Bc] go with labels; without labels candidate sample k is the positive of sample k.
    instances     integers [B] or [N]: which rows are views of one sample, where that is not the second
                  dimension of features; ``candidate_instances`` likewise.
    reduction     "mean" over the anchors that have a loss (that have a positive), "sum", or "none": one loss
                  per anchor, [B, V] or [N] ([B] for contrast_mode="one"), 0 where there is none.
    normalize     L2-normalise rows first. A row whose norm is below 1e-12 (float16: 2^-14, its smallest
                  normal number) has no direction: it becomes zero, and so is its gradient. A row whose
                  squared norm overflows (float64: float64, otherwise float32) counts as not finite.
    backend       "auto": the compiled kernel of the device, or else tiled PyTorch (with one warning); "cpu",
                  "cuda", "tiled", or "reference" (dense, for tests; differentiable twice). The first call
                  with a dtype on a GPU checks the CUDA kernels; if they answer wrongly or cannot run, "auto"
                  takes tiled PyTorch and "cuda" raises (``PYSUPCON_TRUST=1`` skips the check).
    gather        None, or an object that contrasts with the rows of other processes (:class:`Gather`; of
                  :mod:`pysupcon.distributed`, where what each process returns is written).

The result is float32 (float64 for float64 features); gradients have the dtype of their inputs. A batch in
which no anchor has a positive gives 0, connected to the graph, and on a CPU a warning. Derivatives of second
order are refused (except by backend="reference").

torch.compile(fullgraph=True), torch.export, make_fx, fake and meta tensors see one operator,
``pysupcon::row_statistics``: batch sizes and numbers (temperature, alpha, epsilon, base_temperature) may
change without a graph for each. torch.func's grad, vmap and jacrev work. Forward mode (jvp, jacfwd, hessian,
dual numbers) and torch.jit.trace are refused, except by backend="reference"; of torch.func inside
torch.compile only what torch can trace works (it refuses vmap of grad).

Errors: ValueError or TypeError naming the argument, what it must be and what came; on a CPU also for features
that are not finite, and where the largest |z| |z| / temperature is beyond 7e14 (on a GPU, where looking would
make the caller wait, the loss is NaN then). RuntimeError for a backend that is not compiled, and for CUDA
kernels that answer wrongly or cannot run on the device. An argument that is changed in place between forward
and backward: autograd refuses the backward (RuntimeError), or the change has no effect. It sees no change
that is made through NumPy or ``.data``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pysupcon.pairs import reference
from pysupcon.pairs.autograd import RowStatistics
from pysupcon.pairs.checks import check_choice, check_epsilon, check_number, check_temperature
from pysupcon.pairs.problem import Gather, Problem, prepare
from pysupcon.pairs.rows import cnce_rows, reduce_rows, sincere_rows, supcon_reduced, supcon_rows
from pysupcon.profiling.ranges import named

if TYPE_CHECKING:
    from pysupcon.pairs.gathered import RowLoss

__all__ = [
    "Gather",
    "PairStatistics",
    "class_conditional_info_nce",
    "info_nce",
    "pair_statistics",
    "sincere",
    "spread",
    "supcon",
]


def _dense(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """s, P, N of the reference backend."""
    pairing, mask = problem.pairing, problem.mask
    dense_mask = None if mask is None else mask.mask[mask.rows[:, None], mask.columns[None, :]]
    positives, negatives = reference.pair_sets(
        pairing.labels, pairing.candidate_labels, pairing.self_index, dense_mask
    )
    return reference.similarity(problem.x, problem.candidates, problem.temperature), positives, negatives


def _dense_instances(problem: Problem) -> Tensor:
    pairing = problem.pairing
    if pairing.instances is None:
        return _dense(problem)[1]
    same = reference.pair_sets(pairing.instances, pairing.candidate_instances, pairing.self_index)[0]
    return same if problem.mask is not None else same & _dense(problem)[1]


def _streamed(problem: Problem, rows: RowLoss, **asked: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Losses [M], which anchors have one, and, of several processes, how many anchors of all have one."""
    if problem.global_batch is not None:
        from pysupcon.pairs.gathered import (
            gathered_losses,  # brings torch._dynamo with it: seconds, for those who gather
        )

        return gathered_losses(problem, rows, asked)
    return *rows(problem.statistics(**asked), problem.count, problem.instance_count), None


def _finish(
    problem: Problem, loss: Tensor, valid: Tensor, reduction: str, anchors: Tensor | None = None
) -> Tensor:
    """``anchors``: of all processes, how many have a loss."""
    processes = 1 if problem.global_batch is None else len(problem.global_batch.communicator.samples)
    result = reduce_rows(loss, valid, reduction, problem.loss_dtype, anchors, processes)
    return result.view(problem.shape) if reduction == "none" else result


@named("pysupcon::loss")
def supcon(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    contrast_mode: str = "all",
    base_temperature: float | Tensor | None = None,
    candidates: Tensor | None = None,
    candidate_labels: Tensor | None = None,
    instances: Tensor | None = None,
    candidate_instances: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str = "auto",
    gather: Gather | None = None,
) -> Tensor:
    """Supervised contrastive loss, L_out (Khosla et al. 2020, equation 2).

    -mean_{p in P_i} log( e^{s_ip} / sum_{j in P_i + N_i} e^{s_ij} ), times temperature / base_temperature
    where that is given. Without labels it is the multi-view NT-Xent loss. Arguments: see the module.
    """
    if base_temperature is not None:
        base_temperature = check_temperature("base_temperature", base_temperature)
    problem = prepare(
        features, labels, mask, temperature=temperature, contrast_mode=contrast_mode, candidates=candidates,
        candidate_labels=candidate_labels, instances=instances, candidate_instances=candidate_instances,
        reduction=reduction, normalize=normalize, backend=backend, gather=gather, need_instances=False,
    )  # fmt: skip
    loss = _supcon(problem, reduction)
    if base_temperature is None:
        return loss
    temperature = problem.temperature
    if torch.compiler.is_compiling():  # a quotient of numbers would make each of them a graph of its own
        temperature = loss.new_ones(()) * temperature
    factor = temperature / base_temperature
    return loss * (factor.to(loss) if isinstance(factor, Tensor) else factor)


def _supcon(problem: Problem, reduction: str) -> Tensor:
    if problem.backend == "reference":
        return _finish(problem, reference.supcon(*_dense(problem)), problem.count > 0, reduction)
    if problem.global_batch is None:
        s = problem.statistics(negatives=True, positives=True)
        loss = supcon_reduced(s, problem.count, reduction, problem.loss_dtype)
        return loss.view(problem.shape) if reduction == "none" else loss

    def rows(s: RowStatistics, count: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
        return supcon_rows(s, count)

    loss, valid, anchors = _streamed(problem, rows, negatives=True, positives=True)
    return _finish(problem, loss, valid, reduction, anchors)


@named("pysupcon::loss")
def sincere(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    epsilon: float = 0.0,
    contrast_mode: str = "all",
    candidates: Tensor | None = None,
    candidate_labels: Tensor | None = None,
    instances: Tensor | None = None,
    candidate_instances: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str = "auto",
    gather: Gather | None = None,
) -> Tensor:
    """SINCERE (Feeney and Hughes 2023), and with ``epsilon`` > 0 epsilon-SupInfoNCE (Barbano et al. 2022).

    -mean_{p in P_i} log( e^{s_ip} / (e^{s_ip - epsilon} + sum_{j in N_i} e^{s_ij}) ). An anchor without a
    negative gives 0 (minus epsilon). Arguments: see the module.
    """
    epsilon = check_epsilon(epsilon)
    problem = prepare(
        features, labels, mask, temperature=temperature, contrast_mode=contrast_mode, candidates=candidates,
        candidate_labels=candidate_labels, instances=instances, candidate_instances=candidate_instances,
        reduction=reduction, normalize=normalize, backend=backend, gather=gather, need_instances=False,
    )  # fmt: skip
    if problem.backend == "reference":
        loss, valid = reference.sincere(*_dense(problem), epsilon), problem.count > 0
        return _finish(problem, loss, valid, reduction)

    def rows(s: RowStatistics, count: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
        return sincere_rows(s.softplus, count, epsilon)

    loss, valid, anchors = _streamed(problem, rows, negatives=True, epsilon=epsilon)
    return _finish(problem, loss, valid, reduction, anchors)


@named("pysupcon::loss")
def class_conditional_info_nce(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    contrast_mode: str = "all",
    candidates: Tensor | None = None,
    candidate_labels: Tensor | None = None,
    instances: Tensor | None = None,
    candidate_instances: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str = "auto",
    gather: Gather | None = None,
) -> Tensor:
    """Class-conditional InfoNCE, cNCE (Chen et al. 2022): InfoNCE within the class.

    -mean_{a in A_i} log( e^{s_ia} / sum_{p in P_i} e^{s_ip} ); it needs to know which rows are views of one
    sample: V >= 2 or ``instances`` (rows of one instance must share a label). Anchors without another row of
    their sample have no loss. Arguments: see the module.
    """
    problem = prepare(
        features, labels, mask, temperature=temperature, contrast_mode=contrast_mode, candidates=candidates,
        candidate_labels=candidate_labels, instances=instances, candidate_instances=candidate_instances,
        reduction=reduction, normalize=normalize, backend=backend, gather=gather, need_instances=True,
    )  # fmt: skip
    assert problem.instance_count is not None
    if problem.backend == "reference":
        s, positives, _ = _dense(problem)
        loss = reference.class_conditional_info_nce(s, positives, _dense_instances(problem))
        valid = (problem.instance_count > 0) & (problem.count > 0)
        return _finish(problem, loss, valid, reduction)

    def rows(s: RowStatistics, count: Tensor, instance_count: Tensor | None) -> tuple[Tensor, Tensor]:
        assert instance_count is not None
        return cnce_rows(s, instance_count, count, mask is None)

    loss, valid, anchors = _streamed(problem, rows, positives=True)
    return _finish(problem, loss, valid, reduction, anchors)


@named("pysupcon::loss")
def spread(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.5,
    alpha: float = 0.5,
    base: str = "supcon",
    contrast_mode: str = "all",
    candidates: Tensor | None = None,
    candidate_labels: Tensor | None = None,
    instances: Tensor | None = None,
    candidate_instances: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str = "auto",
    gather: Gather | None = None,
) -> Tensor:
    """L_spread (Chen et al. 2022): (1 - alpha) * base + alpha * class-conditional InfoNCE, per anchor.

    ``base`` is "supcon" or "sincere" (the form of the paper's own code). ``alpha`` in [0, 1] weighs cNCE; the
    earlier paper "The Details Matter" writes alpha on the other term. The mean is over the anchors that have
    a positive; one without another row of its sample has no cNCE part. Costs what its base costs. Arguments:
    see the module.
    """
    alpha = check_number("alpha", alpha, 0.0, 1.0)
    check_choice("base", base, ("supcon", "sincere"))
    problem = prepare(
        features, labels, mask, temperature=temperature, contrast_mode=contrast_mode, candidates=candidates,
        candidate_labels=candidate_labels, instances=instances, candidate_instances=candidate_instances,
        reduction=reduction, normalize=normalize, backend=backend, gather=gather, need_instances=True,
    )  # fmt: skip
    assert problem.instance_count is not None
    if problem.backend == "reference":
        sets, valid = _dense(problem), problem.count > 0
        loss = reference.spread(*sets, _dense_instances(problem), alpha, base)
        return _finish(problem, loss, valid, reduction)

    def rows(s: RowStatistics, count: Tensor, instance_count: Tensor | None) -> tuple[Tensor, Tensor]:
        assert instance_count is not None
        if base == "supcon":
            first, valid = supcon_rows(s, count)
        else:
            first, valid = sincere_rows(s.softplus, count, 0.0)
        second, _ = cnce_rows(s, instance_count, count, mask is None)
        return (1 - alpha) * first + alpha * second, valid

    loss, valid, anchors = _streamed(
        problem,
        rows,
        negatives=True,
        positives=True,
        epsilon=0.0 if base == "sincere" else None,
    )
    return _finish(problem, loss, valid, reduction, anchors)


def info_nce(
    features: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    contrast_mode: str = "all",
    candidates: Tensor | None = None,
    instances: Tensor | None = None,
    candidate_instances: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str = "auto",
    gather: Gather | None = None,
) -> Tensor:
    """InfoNCE / NT-Xent (van den Oord et al. 2018; Chen et al. 2020): the positives of a row are the other
    rows of its sample. With V > 2 views it is their mean, as in :func:`supcon` without labels. Arguments: see
    the module."""
    return supcon(
        features, temperature=temperature, contrast_mode=contrast_mode, candidates=candidates,
        instances=instances, candidate_instances=candidate_instances, reduction=reduction,
        normalize=normalize, backend=backend, gather=gather,
    )  # fmt: skip


class PairStatistics(NamedTuple):
    """What is known of every anchor [M] (rows of [B, V, D] are b * V + v); differentiable once."""

    negative_logsumexp: Tensor
    """n_i = log sum over N_i of e^{s_ij}; -inf where there is no negative"""
    positive_logsumexp: Tensor
    """p_i = log sum over P_i of e^{s_ij}; -inf where there is no positive"""
    positive_mean: Tensor
    """mean over P_i of s_ij; 0 where there is no positive"""
    positive_count: Tensor
    """|P_i|, int64"""


def pair_statistics(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    contrast_mode: str = "all",
    candidates: Tensor | None = None,
    candidate_labels: Tensor | None = None,
    instances: Tensor | None = None,
    candidate_instances: Tensor | None = None,
    normalize: bool = False,
    backend: str = "auto",
    gather: Gather | None = None,
) -> PairStatistics:
    """The statistics from which most losses of the family follow, for a loss of your own. Arguments: see the
    module.

    Empty sets are -inf: select (``torch.where``) before using them, or a gradient becomes NaN. Statistics are
    float64 (float32 on devices that have no float64).
    """
    problem = prepare(
        features, labels, mask, temperature=temperature, contrast_mode=contrast_mode, candidates=candidates,
        candidate_labels=candidate_labels, instances=instances, candidate_instances=candidate_instances,
        reduction="none", normalize=normalize, backend=backend, gather=gather, need_instances=False,
    )  # fmt: skip
    count = problem.count if problem.global_batch is None else problem.global_batch.own_counts[0]
    if problem.backend == "reference":
        s, positives, negatives = _dense(problem)
        n, p = reference.log_sum_exp(s, negatives), reference.log_sum_exp(s, positives)
        total = torch.where(positives, s, 0.0).sum(dim=1)
    else:
        asked = {"negatives": True, "positives": True}
        if problem.global_batch is None:
            statistics = problem.statistics(**asked)
        else:
            from pysupcon.pairs.gathered import gathered_statistics

            statistics = gathered_statistics(problem, asked)
        n, p, total = statistics.n, statistics.p, statistics.positive_sum
    return PairStatistics(n, p, total / count.clamp(min=1), count)
