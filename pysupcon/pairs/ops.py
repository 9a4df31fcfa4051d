"""The compiled operators ``torch.ops.pysupcon``: contracts, fakes for tracing, and what this build supports.

This is the only module that uses the compiled extension ``_C``, which :mod:`pysupcon.pairs.extension` loads.
It has no autograd.
:mod:`pysupcon.pairs.tiled` has functions of the same names and signatures in pure PyTorch.

Symbols (similarity ``s_ij = scale * x_i . c_j``, ``scale = 1 / temperature``)
    anchors      ``x`` [M, D], any float dtype, rows may be strided; ``labels`` [M] int64, any values;
                 ``order`` [M] int64, the stable argsort of ``labels``; ``scale`` a tensor of no dimensions,
                 :func:`stats_dtype`, on x's device.
    candidates   ``candidates`` [N, D], ``candidate_labels``, ``candidate_order`` likewise. All three None:
                 the candidates are the anchors themselves and an anchor is not its own candidate (j != i).
    self_index   [M] int64, only with candidates: the candidate row that *is* anchor i and is left out, -1 for
                 none. It must have the anchor's label. None: no anchor is among the candidates.
    instances    [M] int64, and ``candidate_instances`` [N] with candidates; None: not needed. If given,
                 ``order`` must sort by label and, within a label, by instance.
    log_weights  [M] and ``candidate_log_weights`` [N] in stats_dtype; None: all 0. w_j is e to the log weight
                 of candidate j; -inf: row j is not a candidate, and must be a positive of no anchor. Without
                 candidates ``log_weights`` are those of the rows as candidates. With candidates
                 ``candidate_log_weights`` are those of the candidates, and only a backward with the
                 candidates' own statistics takes ``log_weights``, those of the anchors as candidates of
                 the others. Weights have no gradient.
    P_i, N_i     candidates of the anchor's label without the anchor itself; candidates of another label.
    A_i          candidates in P_i of the anchor's instance.

Operators
    pair_stats          n_i = log sum_{N_i} w_j e^{s_ij}, p_i = log sum_{P_i} w_j e^{s_ij}, -inf if the set
                        is empty; positive_sum_i = sum_{P_i} s_ij, instance_sum_i = sum_{A_i} s_ij, without
                        weights, 0 if the set is empty or ``instances`` is None; all [M] in stats_dtype.
                        ``negatives=False`` does not compute n: all are -inf; ``positives=False`` does not
                        compute p and both sums: -inf and 0. p and the sums come from the same rounded
                        similarities, so p - positive_sum / |P_i| and p - instance_sum / |A_i|, which
                        go to 0 as a loss converges, keep their digits.
                        ``negative_mean``, zeros of x's shape and a gradient's dtype, only with candidates,
                        receives sum_{N_i} w_j e^{s_ij - n_i} c_j, which is dn_i/dx_i / scale: a backward
                        through n then needs no pass over the negatives. Rows without negatives get 0.
                        CUDA kernels refuse it.
    positive_softplus   sum_{j in P_i} log(w_j + e^{n_i - s_ij + epsilon}), [M] in stats_dtype; n [M] is an
                        input. Without weights softplus(n_i - s_ij + epsilon). 0 if P_i is empty.
    order_by_class      (ids [B] int64, views) -> the stable argsort of the rows' ids, where row b * views + v
                        is view v of sample b, and the number of other rows with the same id; both
                        [B * views] int64. CPU only: one call instead of five of torch, because overhead
                        dominates small batches.

Rows or a scale that are not finite: on a CPU pair_stats raises a ValueError; on a GPU, where reading values
would block the host, all statistics of the call are NaN. The same holds for similarities above 7e14: float64
statistics would then have no digits left for an exponent.

Backward operators take n and p as returned by pair_stats: no similarity is larger than its logsumexp. They
add to ``grad_x`` (x's shape) and, unless it is None, to ``grad_candidates`` (the candidates' shape). Both are
contiguous and have x's dtype but at least float32, as :func:`zero_gradients` makes them. The parts of a
gradient cancel as a loss converges, so they share one buffer, which its owner rounds once.
``positive_softplus_backward`` returns dL/dn, [M] in stats_dtype. With G_ij = dL/ds_ij from the anchors'
upstream gradients:
    no candidates       grad_x_i += scale * sum_j (G_ij + G_ji) x_j
    candidates          grad_x_i += scale * sum_j G_ij c_j; grad_candidates_j += scale * sum_i G_ij x_i
    candidates and      grad_x_i += scale * sum_j (G_ij + G_ji) c_j, where G_ji comes from the candidates' own
    candidate_... too   statistics and upstream gradients ([N], in the candidates' order): the complete
                        gradient of one process's own rows, if every candidate is an anchor of some process
                        (needs self_index). grad_candidates must then be None.
An anchor whose n (p) is -inf contributes nothing through n (p), whatever its upstream gradient. In
``pair_stats_backward`` grad_positive_sum and grad_instance_sum may be None, which means 0; the parts of a
pair's G_ij are added before G_ij is multiplied by a row, because they cancel, too.

Arguments that do not fit raise a ValueError that names the argument. On a CPU this includes the values of
``scale``, ``order`` (each row once, sorted by label) and ``self_index``. The values of GPU tensors are not
checked, because this would block the host. A gradient must not share memory with another argument.

All results are bitwise reproducible for the same inputs, device and build, for any number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pysupcon.pairs import extension

NO_FLOAT64 = ("mps",)
"""Device types without float64."""

_C: Any
_problem: str | None  # why the extension cannot be used; None if it can
_C, _problem, broken = extension.load()


def stats_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of statistics per row: float64, or float32 on devices without float64.

    Losses are small differences of statistics, and M numbers cost little compared with M x N similarities.
    """
    return torch.float32 if x.device.type in NO_FLOAT64 else torch.float64


_ONE_FILL = 32_768
"""Numbers that torch fills with one thread at most"""
_SMALL_GRADIENT = 2**17
"""Numbers of the largest gradient that is filled in parts"""


def zero_gradients(rows: Tensor) -> Tensor:
    """Returns the zeros to which the backward operators add the gradient of ``rows``.

    torch uses all threads to fill more than 32,768 numbers on the CPU. A thread that a busy system does not
    run then delays a small loss, so small gradients are filled in parts.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    if not _ONE_FILL < rows.numel() <= _SMALL_GRADIENT or rows.device.type != "cpu":
        return torch.zeros(rows.shape, dtype=dtype, device=rows.device)
    gradient = torch.empty(rows.shape, dtype=dtype)
    for part in gradient.view(-1).split(_ONE_FILL):
        part.zero_()
    return gradient


def compiled_for(device_type: str) -> bool:
    """Whether the compiled operators support tensors of this device type ("cpu", "cuda", ...)."""
    if _problem is not None:
        return False
    return device_type == "cpu" or (device_type == "cuda" and _C.with_cuda)


def cuda_code() -> tuple[list[str], str | None]:
    """Returns the architectures of the machine code in this build ("80", "90a", ...), and that of its PTX."""
    codes = [code.partition("_") for code in _C.cuda_code.split()]
    machine = [name for kind, _, name in codes if kind == "sm"]
    return machine, next((name for kind, _, name in codes if kind == "compute"), None)


def compiled_backends() -> dict[str, dict[str, Any]]:
    """Returns the entries "cpu" and "cuda" of :func:`pysupcon.backends`, without single CUDA devices."""
    if _problem is not None:
        return {name: {"available": False, "detail": _problem} for name in ("cpu", "cuda")}
    isas = ", ".join(_C.cpu_isas())
    cpu = {
        "available": True,
        "isa": _C.cpu_isa(),
        "detail": f"compiled C++ kernels ({_C.compiler}); instruction sets that run: {isas}",
    }
    if not _C.with_cuda:
        cuda = {"available": False, "detail": f"not compiled: {_C.cuda}"}
    elif not torch.cuda.is_available():
        cuda = {"available": False, "detail": f"compiled ({_C.cuda}), but torch sees no CUDA device"}
    else:
        cuda = {"available": True, "detail": f"compiled CUDA kernels ({_C.cuda})"}
    return {"cpu": cpu, "cuda": cuda}


if _problem is None:
    order_by_class = torch.ops.pysupcon.order_by_class
    pair_stats = torch.ops.pysupcon.pair_stats
    pair_stats_backward = torch.ops.pysupcon.pair_stats_backward
    positive_softplus = torch.ops.pysupcon.positive_softplus
    positive_softplus_backward = torch.ops.pysupcon.positive_softplus_backward

    def _on_one_device(x: Tensor, *args: Any) -> None:
        """A single meta tensor dispatches to the fake, whose results are uninitialised for real rows."""
        for value in args:
            if isinstance(value, Tensor) and value.device != x.device:
                raise ValueError(
                    f"pysupcon: all tensors must be on x's device, {x.device}, got one on {value.device}"
                )

    def _stats(x: Tensor, *args: Any) -> Tensor:
        _on_one_device(x, *args)
        return x.new_empty((x.shape[0],), dtype=stats_dtype(x))

    @torch.library.register_fake("pysupcon::order_by_class")
    def _(ids: Tensor, views: int) -> tuple[Tensor, Tensor]:
        rows = ids.shape[0] * views
        return ids.new_empty((rows,)), ids.new_empty((rows,))

    @torch.library.register_fake("pysupcon::pair_stats")
    def _(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _stats(x, *args), _stats(x), _stats(x), _stats(x)

    @torch.library.register_fake("pysupcon::pair_stats_backward")
    def _(*args: Any) -> None:
        _on_one_device(*args)

    @torch.library.register_fake("pysupcon::positive_softplus")
    def _(x: Tensor, *args: Any) -> Tensor:
        return _stats(x, *args)

    @torch.library.register_fake("pysupcon::positive_softplus_backward")
    def _(x: Tensor, *args: Any) -> Tensor:
        return _stats(x, *args)
