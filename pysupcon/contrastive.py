"""What all losses share: their arguments, how they are computed, and the base class of their modules.

A loss is one class of :mod:`pysupcon.losses`. It says which statistics of the pairs it needs and what it
makes of them per anchor. :func:`compute` does the rest.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack  # a dependency of torch; typing has it from Python 3.11 on

from pysupcon.pairs import reference
from pysupcon.pairs.autograd import RowStatistics
from pysupcon.pairs.checks import BACKENDS, TEMPERATURE_RANGE, check_choice, check_gather, check_number
from pysupcon.pairs.problem import Gather, Problem, prepare
from pysupcon.pairs.rows import get_divisor
from pysupcon.ranges import named

__all__ = ["ContrastiveLoss", "Counts", "compute", "dense_sets"]


class _Candidates(TypedDict, total=False):
    candidates: Tensor | None
    """[Nc, D] or [Bc, V, D]: rows to contrast with instead of the features (a queue, another tower). Features
    are then anchors only, and no pair is left out as an anchor with itself."""
    instances: Tensor | None
    """Integers [B] or [N]: rows of one number are views of one sample. For features [N, D] they are
    needed by cNCE, by spread, and by every loss without labels."""
    candidate_instances: Tensor | None
    """Integers [Bc]: the same for the candidates."""


class RowOptions(_Candidates, total=False):
    """Keywords of every module's forward."""

    candidate_labels: Tensor | None
    """Integers [Bc], with labels and candidates. Without labels candidate sample k is the positive of
    sample k."""


class _Computation(TypedDict, total=False):
    contrast_mode: str
    """"all" (default): every row is an anchor; "one": only view 0 of each sample is."""
    normalize: bool
    """L2-normalise rows first; default False. A row whose norm is below 1e-12 (float16: 2^-14, its smallest
    normal number) has no direction: the row and its gradient become zero. A row whose squared norm overflows
    (float64: in float64, otherwise in float32) counts as not finite."""
    backend: str
    """"auto" (default): the compiled kernel of the device, or tiled PyTorch where there is none (with one
    warning); "cpu", "cuda", "tiled", or "reference" (dense, for tests; differentiable twice). The first call
    with a dtype on a GPU checks the CUDA kernels. If they answer wrongly or cannot run, "auto" uses tiled
    PyTorch and "cuda" raises (``PYSUPCON_TRUST=1`` skips the check)."""
    gather: Gather | None
    """None (default), or an object that contrasts with the rows of other processes (:class:`Gather`; see
    :mod:`pysupcon.distributed` for what each process returns)."""


class StatisticsOptions(RowOptions, _Computation, total=False):
    """Keywords of :func:`pysupcon.functional.pair_statistics`."""


class SelfSupervisedOptions(_Candidates, _Computation, total=False):
    """Keywords of :func:`pysupcon.functional.info_nce`."""

    reduction: str
    """"mean" (default) over the anchors that have a loss; "sum"; or "none": one loss per anchor, [B, V] or
    [N] ([B] for contrast_mode="one"), 0 where an anchor has no loss."""


class Options(SelfSupervisedOptions, RowOptions, total=False):
    """Keywords of every function that takes labels."""


class SharedModuleOptions(TypedDict, total=False):
    """Keywords of every module but ``contrast_mode``."""

    reduction: str
    """As in :class:`Options`, and so are ``normalize`` and ``backend``."""
    normalize: bool
    gather: GatherArgument
    """False (default): each process contrasts with its own rows only. True or "ring": with the rows of every
    process (:mod:`pysupcon.distributed`). An object of the :class:`Gather` protocol is used as it is."""
    backend: str
    learnable_temperature: bool
    """True makes the logarithm of the temperature a parameter, ``log_temperature``, which starts from
    ``temperature``, so that the temperature stays positive. Default False."""


class ModuleOptions(SharedModuleOptions, total=False):
    """Keywords of every module."""

    contrast_mode: str
    """As in :class:`Options`."""


F = TypeVar("F", bound=Callable[..., Any])
GatherArgument = bool | Literal["ring"] | Gather
DEFAULTS: dict[str, Any] = {
    "candidates": None, "candidate_labels": None, "instances": None, "candidate_instances": None,
    "contrast_mode": "all", "normalize": False, "backend": "auto", "gather": None, "reduction": "mean",
}  # fmt: skip
"""Default values of :class:`Options`"""
_ROW_OPTIONS = RowOptions.__annotations__.keys()


def expand_signature(function: F) -> F:
    """Decorator: ``inspect.signature`` and ``help`` show the keywords of ``**options: Unpack[...]``.

    A call is not changed.
    """
    options = function.__annotations__["options"].removeprefix("Unpack[").removesuffix("]")
    keywords = function.__globals__[options].__annotations__  # in the order of the TypedDict
    of_module = {"gather": False, "learnable_temperature": False}
    defaults = {**DEFAULTS, **of_module} if "learnable_temperature" in keywords else DEFAULTS
    found = inspect.signature(function)
    parameters = [p for p in found.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    for name, annotation in keywords.items():
        text = getattr(annotation, "__forward_arg__", annotation)
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(name, kind, default=defaults[name], annotation=text))
    function.__signature__ = found.replace(parameters=parameters)  # type: ignore[attr-defined]
    return function


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


def build_problem(
    name: str, features: Tensor, labels: Any, mask: Any, options: Mapping[str, Any],
    temperature: float | Tensor, need_instances: bool, refused: str | None,
) -> tuple[Problem, str]:  # fmt: skip
    """The checked problem of one call of the function ``name``, and its reduction. ``refused``: a keyword
    that this function does not take."""
    given = {**DEFAULTS, **options}
    if len(given) != len(DEFAULTS) or refused in options:
        unknown = next(key for key in options if key not in DEFAULTS or key == refused)
        raise TypeError(f"{name}() got an unexpected keyword argument {unknown!r}")
    problem = prepare(
        features, labels, mask, temperature=temperature, need_instances=need_instances, **given
    )  # fmt: skip
    return problem, given["reduction"]


def dense_sets(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s, P, N and A [M, N] of the reference backend."""
    pairing, mask = problem.pairing, problem.mask
    dense_mask = None if mask is None else mask.mask[mask.rows[:, None], mask.columns[None, :]]
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
    options: Mapping[str, Any], temperature: float | Tensor, **own: Any,
) -> Tensor:  # fmt: skip
    """The value of a loss. ``own``: the checked parameters that only this loss has."""
    problem, reduction = build_problem(
        loss.function.__name__, features, labels, mask, options, temperature, loss.needs_instances,
        "candidate_labels" if loss.self_supervised else None,
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
        counts = Counts(problem.count, problem.instance_count, _candidates(problem), mask is None)
        valid = loss.valid(counts)
        if problem.backend == "reference":
            value = loss.dense(*dense_sets(problem), **own)
            divisor = get_divisor(valid.sum(), reduction, loss.requirement)
        else:
            s = problem.statistics(**loss.statistics(**own))
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
        if options and not options.keys() <= _ROW_OPTIONS:
            unknown = min(options.keys() - _ROW_OPTIONS)
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
