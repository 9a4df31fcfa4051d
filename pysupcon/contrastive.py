"""What all losses share: how they are computed, and the base class of their modules.

A loss is one class of :mod:`pysupcon.losses`. It says which statistics of the pairs it needs and what it
makes of them per anchor. :func:`compute` does the rest.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Unpack  # a dependency of torch; typing has it from Python 3.11 on

from pysupcon.options import DEFAULTS, ROW_OPTIONS, GatherArgument, RowOptions, expand_signature
from pysupcon.pairs import reference
from pysupcon.pairs.autograd import RowStatistics
from pysupcon.pairs.checks import BACKENDS, TEMPERATURE_RANGE, check_choice, check_gather, check_number
from pysupcon.pairs.many_labels import LabelOptions, check_label_options
from pysupcon.pairs.positive_means import dense_weights
from pysupcon.pairs.problem import Gather, Problem, prepare
from pysupcon.pairs.rows import get_divisor
from pysupcon.ranges import named

__all__ = ["ContrastiveLoss", "Counts", "build_problem", "compute", "dense_sets", "dense_weighted"]


class Counts(NamedTuple):
    """Sizes of the sets of each anchor, int64 [M].

    Convert before log or exp: ``counts.positives.to(s.n)``. Statistics are float64, but the logarithm of an
    int64 tensor is float32.
    """

    positives: Tensor
    """|P_i|"""
    instances: Tensor | None
    """|A_i|; None unless the loss needs instances"""
    candidates: Any
    """|P_i| + |N_i|, one number (or a tensor) for all anchors"""
    nested: bool = True
    """A_i is a part of P_i; a mask may differ"""
    weighted: bool = False
    """n is over all other rows and positive_sum is a weighted mean over positives (SupCon with several labels
    per sample); ``positives`` is 0 where an anchor has no loss"""


def build_problem(
    name: str, features: Tensor, labels: Any, mask: Any, options: Mapping[str, Any],
    temperature: float | Tensor, need_instances: bool, refused: tuple[str, ...],
    loss: type[ContrastiveLoss] | None = None, parameters: Mapping[str, Any] | None = None,
) -> tuple[Problem, str]:  # fmt: skip
    """The checked problem of one call of the function ``name``, and its reduction. ``refused``: keywords
    that this function does not take. ``parameters``: of this loss only, which processes must share."""
    given = {**DEFAULTS, **options}
    if len(given) != len(DEFAULTS) or any([key in options for key in refused]):
        unknown = next(key for key in options if key not in DEFAULTS or key in refused)
        raise TypeError(f"{name}() got an unexpected keyword argument {unknown!r}")
    takes = ContrastiveLoss.multi_labels if loss is None else loss.multi_labels
    of_labels = LabelOptions(given.pop("multi_label"), given.pop("overlap_threshold"), takes, name)
    given["label_options"] = of_labels
    if given["gather"] is not None:
        from pysupcon.pairs.gathered import prepare_gathered  # imports torch._dynamo, which takes seconds

        shown = name if loss is None else next(iter(vars(loss).get("trainer_defaults", ())), loss.__name__)
        of_loss = (shown, parameters or {})
        problem = prepare_gathered(features, labels, mask, given, of_loss, temperature, need_instances)
    else:
        problem = prepare(
            features, labels, mask, temperature=temperature, need_instances=need_instances, **given
        )  # fmt: skip
    return problem, given["reduction"]


def dense_sets(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s, P, N and A [M, N] of the reference backend."""
    pairing, mask = problem.pairing, problem.mask
    dense_mask = None
    if mask is not None:
        rows, columns = (torch.arange(len(side), device=side.device) for side in (mask.rows, mask.columns))
        dense_mask = mask.relation(rows, columns)[0]
    positives, negatives = reference.pair_sets(
        pairing.labels, pairing.candidate_labels, pairing.self_index, dense_mask
    )
    same = positives
    if pairing.instances is not None:
        same = reference.pair_sets(pairing.instances, pairing.candidate_instances, pairing.self_index)[0]
        same = same if mask is not None else same & positives
    return (
        reference.similarity(problem.x, problem.candidates, problem.temperature), positives, negatives, same
    )  # fmt: skip


@named("pysupcon::loss")
def compute(
    loss: type[ContrastiveLoss], features: Tensor, labels: Tensor | None, mask: Tensor | None,
    options: Mapping[str, Any], temperature: float | Tensor, *,
    further: Mapping[str, Any] | None = None, **own: Any,
) -> Tensor:  # fmt: skip
    """The value of a loss. ``own``: the checked parameters that only this loss has. ``further``: those that
    the caller uses, and that processes must share too."""
    problem, reduction = build_problem(
        loss.function.__name__, features, labels, mask, options, temperature, loss.needs_instances,
        loss.refused_keywords(), loss, own if further is None else further,
    )  # fmt: skip
    global_batch, mean_of = problem.global_batch, 1
    if global_batch is not None:
        from pysupcon.pairs.gathered import gathered_losses  # imports torch._dynamo, which takes seconds

        candidates = global_batch.count.shape[0] - 1

        def per_anchor(s: RowStatistics, count: Tensor, instances: Tensor | None) -> tuple[Tensor, Tensor]:
            counts = Counts(count, instances, candidates)
            valid = loss.valid(counts)
            return loss.per_anchor(s, counts, valid, **own), valid

        value, _, anchors = gathered_losses(problem, per_anchor, loss.statistics(**own))
        divisor = get_divisor(anchors, reduction, loss.requirement)
        mean_of = len(global_batch.communicator.samples) if reduction == "mean" else 1
    else:
        weighted, count = problem.weights is not None, problem.count
        counts = Counts(
            count[0] if weighted else count, problem.instance_count, _candidates(problem),
            problem.mask is None, weighted,
        )  # fmt: skip
        valid = loss.valid(counts)
        if problem.backend == "reference" and weighted:
            value = torch.where(valid, dense_weighted(problem)[0], 0.0)
            divisor = get_divisor(valid.sum(), reduction, loss.requirement)
        elif problem.backend == "reference":
            value = loss.dense(*dense_sets(problem), **own)
            divisor = get_divisor(valid.sum(), reduction, loss.requirement)
        else:
            s = problem.statistics(**loss.statistics(**own))
            if weighted:
                s = s._replace(positive_sum=problem.positive_means()[0])
            divisor = get_divisor(valid.sum(), reduction, loss.requirement)
            if loss.fused_reduction:
                value, divisor = loss.per_anchor(s, counts, valid, divisor), None
            else:
                value = loss.per_anchor(s, counts, valid, **own)
    if divisor is not None:
        value = value.sum() / divisor
    if mean_of > 1:  # the mean over the processes is the mean over all their anchors
        value = value * mean_of
    value = value.to(problem.loss_dtype)
    return value.view(problem.shape) if reduction == "none" else value


def dense_weighted(problem: Problem) -> Tensor:
    """n - sum_j w_ij s_ij [L, M] of a problem with weights, for the reference backend."""
    assert problem.weights is not None
    s, positives, negatives, _ = dense_sets(problem)
    weights = dense_weights(problem.weights, problem.x, problem.candidates)
    return reference.log_sum_exp(s, positives | negatives) - (weights * s).sum(dim=2)


def _candidates(problem: Problem) -> int:
    """Returns the number of candidates of an anchor, without the anchor."""
    if problem.candidates is None:
        return problem.x.shape[0] - 1
    return problem.candidates.shape[0] - int(problem.pairing.self_index is not None)


class ContrastiveLoss(nn.Module):
    """A loss as a module. A subclass describes one loss; s, P_i, N_i and A_i as in
    :mod:`pysupcon.functional`. ``own`` below stands for the parameters that only this loss has."""

    function: ClassVar[Callable[..., Tensor]]
    """The same loss as a function; its docstring has the equation and the source"""
    own_parameters: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters that only this loss has; attributes of the module"""
    trainer_defaults: ClassVar[dict[str, dict[str, Any]]]
    """Name in the trainer's LossConfig -> default values of the config fields that are None. If the
    temperature is left out, it is 0.07; the other fields are accepted with this name only."""
    statistics: ClassVar[Callable[..., dict[str, Any]]]
    """(**own) -> arguments of :meth:`pysupcon.pairs.problem.Problem.statistics`"""
    per_anchor: ClassVar[Callable[..., Tensor]]
    """(RowStatistics, Counts, valid, **own) -> losses [M], 0 where not valid, linear in the sums"""
    dense: ClassVar[Callable[..., Tensor]]
    """(s, P, N, A, **own) -> losses [M] by the equation: backend="reference", used by the tests"""
    requirement: ClassVar[str] = "a positive"
    """What an anchor needs to have a loss"""
    needs_instances: ClassVar[bool] = False
    """Whether the loss needs A_i"""
    self_supervised: ClassVar[bool] = False
    """Whether the loss takes no labels"""
    multi_labels: ClassVar[tuple[str, ...]] = ("any",)
    """Values of ``multi_label`` with which the loss takes labels [B, C]"""
    fused_reduction: ClassVar[bool] = False
    """``per_anchor`` takes a fourth argument: the divisor of the summed loss; None: losses per anchor"""

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        contrast_mode: str = "all",
        reduction: str = "mean",
        normalize: bool = False,
        gather: GatherArgument = False,
        backend: str = "auto",
        learnable_temperature: bool = False,
        multi_label: str = "per_label",
        overlap_threshold: float = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(temperature, Tensor) and temperature.requires_grad:
            raise TypeError(
                "temperature must be a number, got a tensor with requires_grad=True; "
                "learnable_temperature=True makes it a parameter of the loss"
            )
        self._temperature = float(check_number("temperature", temperature, *TEMPERATURE_RANGE))
        check_choice("contrast_mode", contrast_mode, ("all", "one"))
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        check_choice("backend", backend, BACKENDS)
        if multi_label != "per_label" or overlap_threshold != 0.0:
            given = LabelOptions(multi_label, overlap_threshold, self.multi_labels, type(self).__name__)
            overlap_threshold = float(check_label_options(given))
        self.multi_label = multi_label
        self.overlap_threshold = overlap_threshold
        self.contrast_mode = contrast_mode
        self.reduction = reduction
        self.normalize = normalize
        self.backend = backend
        self.gather = gather
        self._gather = _resolve_gather(gather)
        self.log_temperature: nn.Parameter | None = None
        if learnable_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(self._temperature)))

    @staticmethod
    def valid(counts: Counts) -> Tensor:
        """Which anchors have a loss, bool [M]. Depends on the counts only."""
        return counts.positives > 0

    @classmethod
    def refused_keywords(cls) -> tuple[str, ...]:
        """Keywords of :class:`pysupcon.options.Options` that the function does not take."""
        many = () if "any" in cls.multi_labels else ("multi_label", "overlap_threshold")
        return (*many, "candidate_labels") if cls.self_supervised else many

    @property
    def temperature(self) -> float | Tensor:
        """The number, or with ``learnable_temperature`` a tensor of no dimensions."""
        return self._temperature if self.log_temperature is None else self.log_temperature.exp()

    @expand_signature
    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        **options: Unpack[RowOptions],
    ) -> Tensor:
        """The loss; arguments, shapes and errors as in :mod:`pysupcon.functional`."""
        if options and not options.keys() <= ROW_OPTIONS:
            unknown = min(options.keys() - ROW_OPTIONS)
            raise TypeError(f"{type(self).__name__}.forward() got an unexpected keyword argument {unknown!r}")
        if not self.self_supervised:
            return self.function(features, labels, mask, **self._options(), **options)
        if labels is not None or mask is not None or options.pop("candidate_labels", None) is not None:
            raise ValueError(
                f"{type(self).__name__} is self-supervised: labels, mask and candidate_labels must be None "
                "(instances say which rows are views of one sample); SupConLoss takes labels"
            )
        return self.function(features, **self._options(), **options)

    def _options(self) -> dict[str, Any]:
        """Arguments of the function that the module holds."""
        if self._gather is None and _among_processes():
            importlib.import_module("pysupcon.distributed").warn_without_gather(type(self).__name__)
        found: dict[str, Any] = {
            "temperature": self.temperature,
            "contrast_mode": self.contrast_mode,
            "reduction": self.reduction,
            "normalize": self.normalize,
            "backend": self.backend,
            "gather": self._gather,
        }
        if "any" in self.multi_labels:
            found["multi_label"], found["overlap_threshold"] = self.multi_label, self.overlap_threshold
        for name in self.own_parameters:
            found[name] = getattr(self, name)
        return found

    def extra_repr(self) -> str:
        with torch.no_grad():
            temperature = float(self.temperature)
        learnable = " (learnable)" if self.log_temperature is not None else ""
        own = {name: getattr(self, name) for name in self.own_parameters}
        return ", ".join([
            f"temperature={temperature:g}{learnable}",
            *(f"{k}={v:.15g}" if isinstance(v, float) else f"{k}={v!r}" for k, v in own.items()),
            f"contrast_mode={self.contrast_mode!r}, reduction={self.reduction!r}, normalize={self.normalize}",
            f"gather={self.gather!r}, backend={self.backend!r}",
            *([] if self.multi_label == "per_label" else [f"multi_label={self.multi_label!r}"]),
            *([f"overlap_threshold={self.overlap_threshold:g}"] if self.overlap_threshold else []),
        ])  # fmt: skip


def _among_processes() -> bool:
    if torch.compiler.is_compiling() or not torch.distributed.is_available():
        return False
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _resolve_gather(gather: GatherArgument) -> Gather | None:
    if gather is False:
        return None
    if gather is True or isinstance(gather, str):
        check_choice("gather", gather, (False, True, "ring"))
        resolved: Gather = importlib.import_module("pysupcon.distributed").resolve(gather)
        return resolved
    check_gather(gather)
    return gather
