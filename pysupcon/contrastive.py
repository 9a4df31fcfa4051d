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

from pysupcon.options import (
    DEFAULTS,
    LABEL_OPTIONS,
    ROW_OPTIONS,
    GatherArgument,
    RowOptions,
    expand_signature,
    explain_arguments,
)
from pysupcon.pairs import reference
from pysupcon.pairs.arguments import warn_of_norms
from pysupcon.pairs.autograd import RowStatistics
from pysupcon.pairs.checks import (
    BACKENDS,
    TEMPERATURE_RANGE,
    check_choice,
    check_gather,
    check_labelling,
    check_number,
)
from pysupcon.pairs.global_batch import AnchorCounts
from pysupcon.pairs.many_labels import LabelOptions, check_label_options
from pysupcon.pairs.positive_means import dense_weights
from pysupcon.pairs.problem import Gather, Problem, prepare
from pysupcon.pairs.rows import get_divisor, get_positive_shift, weighted_divisor
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
    """candidates have weights other than 0 and 1"""
    mean_given: bool = False
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


def dense_sets(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """s, P, N, A and s + log weight [M, N] of the reference backend. The columns are the candidates, the
    memory, and the hard negatives of each anchor."""
    pairing, mask, memory = problem.pairing, problem.mask, problem.memory
    dense_mask = None
    if mask is not None:
        own, others = (torch.arange(len(side), device=side.device) for side in (mask.rows, mask.columns))
        dense_mask = mask.relation(own, others)[0]
    positives, negatives = reference.pair_sets(
        pairing.labels, pairing.candidate_labels, pairing.self_index, dense_mask
    )
    if not problem.batch_negatives:
        negatives = torch.zeros_like(negatives)
    same = positives
    if pairing.instances is not None:
        same = reference.pair_sets(pairing.instances, pairing.candidate_instances, pairing.self_index)[0]
        same = same if mask is not None else same & positives
    s = reference.similarity(problem.x, problem.candidates, problem.temperature)
    log_weights = pairing.log_weights if problem.candidates is None else pairing.candidate_log_weights
    parts = [(s, positives, negatives, same, log_weights)]
    if memory is not None:
        positives, negatives = reference.pair_sets(pairing.labels, memory.labels)
        same = positives
        if pairing.instances is not None and memory.instances is not None:
            same = reference.pair_sets(pairing.instances, memory.instances)[0] & positives
        s = reference.similarity(problem.x, memory.rows, problem.temperature)
        parts.append((s, positives, negatives, same, memory.log_weights))
    hard = problem.hard_negative_similarity()
    if hard is not None:
        none = torch.zeros_like(hard, dtype=torch.bool)
        parts.append((hard, none, ~none, none, None))
    weighted = [s if log is None else s + log.to(s.dtype) for s, *_, log in parts]
    columns = [torch.cat(column, dim=1) for column in zip(*(part[:4] for part in parts), strict=True)]
    sums = torch.cat(weighted, dim=1)
    if problem.positive_shift is not None:
        sums = torch.where(columns[1], sums + problem.positive_shift.to(sums.dtype)[:, None], sums)
    included = sums > -math.inf
    s, *sets = columns
    positives, negatives, same = (where & included for where in sets)
    return s, positives, negatives, same, sums


@named("pysupcon::loss")
def compute(
    loss: type[ContrastiveLoss], features: Tensor, labels: Tensor | None, mask: Tensor | None,
    options: Mapping[str, Any], temperature: float | Tensor, *,
    further: Mapping[str, Any] | None = None, **own: Any,
) -> Tensor:  # fmt: skip
    """The value of a loss. ``own``: the checked parameters that only this loss has. ``further``: those that
    the caller uses, and that processes must share too."""
    name = loss.function.__name__
    if not loss.statistics(**own).get("negatives") and options.get("hard_negatives") is not None:
        raise ValueError(f"{name} contrasts with positives only: hard_negatives must be None")
    problem, reduction = build_problem(
        name, features, labels, mask, options, temperature, loss.needs_instances, loss.refused_keywords(),
        loss, own if further is None else further,
    )  # fmt: skip
    global_batch, mean_of = problem.global_batch, 1
    if global_batch is not None:
        from pysupcon.pairs.gathered import gathered_losses  # imports torch._dynamo, which takes seconds

        # Not the batch itself: the step that is kept for the backward must not keep its ids alive.
        weighted, ignored = problem.weighted, problem.ignored is not None
        shifted = global_batch.positive_shift is not None

        def per_anchor(s: RowStatistics, sizes: AnchorCounts) -> tuple[Tensor, Tensor]:
            counts = Counts(*sizes, weighted=weighted)
            valid = loss.valid(counts)
            if shifted:
                s = s._replace(p=s.p + get_positive_shift(sizes.positives, s.p.dtype))
            losses = loss.per_anchor(s, counts, valid, **own)
            return torch.where(valid, losses, 0.0) if ignored else losses, valid

        value, anchors, total = gathered_losses(problem, per_anchor, loss.statistics(**own))
        divisor = get_divisor(anchors, reduction, loss.requirement)
        if total is not None and problem.anchor_weights is not None:
            value = value * problem.anchor_weights.to(value.dtype)
            divisor = weighted_divisor(total, reduction)
        mean_of = global_batch.processes if reduction == "mean" else 1
    else:
        mean_given, count = problem.positive_weights is not None, problem.count
        counts = Counts(
            count[0] if mean_given else count, problem.instance_count, problem.candidate_count,
            problem.mask is None, problem.weighted, mean_given,
        )  # fmt: skip
        valid, weights = loss.valid(counts), problem.anchor_weights
        if problem.backend == "reference" and mean_given:
            value = torch.where(valid, dense_weighted(problem)[0], 0.0)
            divisor = get_divisor(valid.sum(), reduction, loss.requirement)
        elif problem.backend == "reference":
            value = loss.dense(*dense_sets(problem), **own)
            divisor = get_divisor(valid.sum(), reduction, loss.requirement)
        else:
            s = problem.statistics(**loss.statistics(**own))
            if mean_given:
                s = s._replace(positive_sum=problem.positive_means()[0])
            divisor = get_divisor(valid.sum(), reduction, loss.requirement)
            if not loss.fused_reduction:
                value = loss.per_anchor(s, counts, valid, **own)
                if problem.ignored is not None:  # its softplus sum is over other ignored rows
                    value = torch.where(valid, value, 0.0)
            elif weights is None:
                value, divisor = loss.per_anchor(s, counts, valid, divisor), None
            else:
                value = loss.per_anchor(s, counts, valid)
        if weights is not None:
            weights = weights.to(value.dtype)
            value = value * weights
            divisor = weighted_divisor(torch.where(valid, weights, 0.0).sum(), reduction)
    if divisor is not None:
        value = value.sum() / divisor
    if mean_of > 1:  # the mean over the processes is the mean over all their anchors
        value = value * mean_of
    value = value.to(problem.loss_dtype)
    return value.view(problem.shape) if reduction == "none" else value


def dense_weighted(problem: Problem) -> Tensor:
    """n - sum_j w_ij s_ij [L, M] of a problem with ``positive_weights``, for the reference backend."""
    assert problem.positive_weights is not None
    s, positives, negatives, _, sums = dense_sets(problem)
    weights = dense_weights(problem.positive_weights, problem.x, problem.candidates)
    candidates = s[:, : weights.shape[2]]  # the further columns are hard negatives
    return reference.log_sum_exp(sums, positives | negatives) - (weights * candidates).sum(dim=2)


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
    """(s, P, N, A, t, **own) -> losses [M] by the equation, with t_ij = s_ij + log weight of candidate j in
    sums of exponentials. backend="reference", used by the tests"""
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
    _norms_checked = False

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
        batch_negatives: bool = True,
        class_balance: bool = False,
        ignore_index: int | None = None,
        unlabeled: str = "ignore",
        min_temperature: float | None = None,
        max_temperature: float | None = None,
        multi_label: str = "per_label",
        overlap_threshold: float = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(temperature, Tensor) and temperature.requires_grad:
            raise TypeError(
                "temperature must be a number, got a tensor with requires_grad=True; "
                "learnable_temperature=True makes it a parameter of the loss"
            )
        self.min_temperature = _check_limit("min_temperature", min_temperature, learnable_temperature)
        self.max_temperature = _check_limit("max_temperature", max_temperature, learnable_temperature)
        if (self.min_temperature or 0.0) > (self.max_temperature or math.inf):
            raise ValueError(
                f"min_temperature must be at most max_temperature, got {self.min_temperature:g} and "
                f"{self.max_temperature:g}"
            )
        self._temperature = self._check_temperature(temperature)
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
        check_labelling(class_balance, batch_negatives, ignore_index, unlabeled)
        if self.self_supervised and (class_balance or ignore_index is not None):
            raise ValueError(
                f"{type(self).__name__} is self-supervised: class_balance and ignore_index need a loss with "
                "labels, for example SupConLoss"
            )
        self.batch_negatives = batch_negatives
        self.class_balance = class_balance
        self.ignore_index = ignore_index
        self.unlabeled = unlabeled
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
        return (*many, *LABEL_OPTIONS) if cls.self_supervised else many

    @property
    def temperature(self) -> float | Tensor:
        """The number, or with ``learnable_temperature`` a tensor of no dimensions.

        A schedule assigns a number before each step: ``criterion.temperature = 0.1``. With torch.compile,
        assign outside of the compiled function; all values then share one graph. With
        ``learnable_temperature`` an assignment sets ``log_temperature`` in place; give its parameter to the
        optimizer without weight decay.
        """
        if self.log_temperature is None:
            return self._temperature
        logarithm: Tensor = self.log_temperature
        if self._limited:  # the gradient is that without limits
            logarithm = logarithm + (self._clamp(logarithm) - logarithm).detach()
        return logarithm.exp()

    @temperature.setter
    def temperature(self, value: float) -> None:
        number = self._check_temperature(value)
        if self.log_temperature is None:
            self._temperature = number
        else:
            with torch.no_grad():
                self.log_temperature.fill_(math.log(number))

    def _check_temperature(self, value: Any) -> float:
        low, high = TEMPERATURE_RANGE
        low = low if self.min_temperature is None else self.min_temperature
        high = high if self.max_temperature is None else self.max_temperature
        return float(check_number("temperature", value, low, high))

    @property
    def _limited(self) -> bool:
        return self.min_temperature is not None or self.max_temperature is not None

    def _clamp(self, logarithm: Tensor) -> Tensor:
        limits = (self.min_temperature, self.max_temperature)
        low, high = (None if limit is None else math.log(limit) for limit in limits)
        return logarithm.clamp(low, high)

    def _move_to_limits(self) -> None:
        """Moves a learnable temperature that an optimizer took past a limit back to it."""
        parameter = self.log_temperature
        if not (self._limited and isinstance(parameter, nn.Parameter)):
            return
        if torch.is_grad_enabled() and not torch.compiler.is_exporting():
            # A write to .data leaves the backward of an earlier call valid.
            parameter.data.copy_(self._clamp(parameter.data))

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
            return self._checked(
                self.function(features, labels, mask, **self._options(), **options), features
            )
        of_labels = [value for name, value in options.items() if name in LABEL_OPTIONS]
        if labels is not None or mask is not None or any(value is not None for value in of_labels):
            raise ValueError(
                f"{type(self).__name__} is self-supervised: labels, mask, candidate_labels and memory_labels "
                "must be None (instances say which rows are views of one sample); SupConLoss takes labels"
            )
        own = {name: value for name, value in options.items() if name not in LABEL_OPTIONS}
        return self._checked(self.function(features, **self._options(), **own), features)

    def _checked(self, loss: Tensor, features: Tensor) -> Tensor:
        """Returns the loss. The first eager call on a CPU warns if rows are far from unit length."""
        if not torch.compiler.is_compiling() and not self._norms_checked:
            self._norms_checked = True
            if not self.normalize:
                warn_of_norms(type(self).__name__, features)
        return loss

    def _options(self) -> dict[str, Any]:
        """Arguments of the function that the module holds."""
        if self._gather is None and _among_processes():
            importlib.import_module("pysupcon.distributed").warn_without_gather(type(self).__name__)
        self._move_to_limits()
        found: dict[str, Any] = {
            "temperature": self.temperature,
            "contrast_mode": self.contrast_mode,
            "reduction": self.reduction,
            "normalize": self.normalize,
            "backend": self.backend,
            "gather": self._gather,
            "batch_negatives": self.batch_negatives,
        }
        if not self.self_supervised:
            found |= {
                "class_balance": self.class_balance,
                "ignore_index": self.ignore_index,
                "unlabeled": self.unlabeled,
            }
        if self.multi_label != "per_label":
            found["multi_label"], found["overlap_threshold"] = self.multi_label, self.overlap_threshold
        for name in self.own_parameters:
            found[name] = getattr(self, name)
        return found

    def extra_repr(self) -> str:
        with torch.no_grad():
            temperature = float(self.temperature)
        learnable = " (learnable)" if self.log_temperature is not None else ""
        for name in ("min_temperature", "max_temperature"):
            if getattr(self, name) is not None:
                learnable += f", {name}={getattr(self, name):g}"
        own = {name: getattr(self, name) for name in self.own_parameters}
        changed = ("batch_negatives", "class_balance", "ignore_index", "unlabeled")
        own |= {name: getattr(self, name) for name in changed if getattr(self, name) != DEFAULTS[name]}
        return ", ".join([
            f"temperature={temperature:g}{learnable}",
            *(f"{k}={v:.15g}" if isinstance(v, float) else f"{k}={v!r}" for k, v in own.items()),
            f"contrast_mode={self.contrast_mode!r}, reduction={self.reduction!r}, normalize={self.normalize}",
            f"gather={self.gather!r}, backend={self.backend!r}",
            *([] if self.multi_label == "per_label" else [f"multi_label={self.multi_label!r}"]),
            *([f"overlap_threshold={self.overlap_threshold:g}"] if self.overlap_threshold else []),
        ])  # fmt: skip


def _check_limit(name: str, value: Any, learnable: bool) -> float | None:
    if value is None:
        return None
    if not learnable:
        raise ValueError(f"{name} needs learnable_temperature=True, got {value} without it")
    return float(check_number(name, value, *TEMPERATURE_RANGE))


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


explain_arguments(ContrastiveLoss.__init__, "ModuleOptions")
