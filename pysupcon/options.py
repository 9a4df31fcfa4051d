"""The keywords that the losses share, each documented and given a default once.

Functions and modules take them as ``**options: Unpack[...]``, which mypy and editors check at every call.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, TypedDict, TypeVar

from torch import Tensor

from pysupcon.pairs.problem import Gather

__all__ = [
    "DEFAULTS",
    "LABEL_OPTIONS",
    "ROW_OPTIONS",
    "GatherArgument",
    "LevelOptions",
    "LevelRowOptions",
    "MetricsOptions",
    "ModuleOptions",
    "Options",
    "RowOptions",
    "SelfSupervisedOptions",
    "SharedModuleOptions",
    "StatisticsOptions",
    "expand_signature",
    "explain_arguments",
]


class _Candidates(TypedDict, total=False):
    candidates: Tensor | None
    """[Nc, D] or [Bc, V, D]: rows to contrast with instead of the features (a queue, another tower). Features
    are then anchors only, and no pair is left out as an anchor with itself."""
    instances: Tensor | None
    """Integers [B] or [N]: rows of one number are views of one sample. For features [N, D] they are
    needed by cNCE, by spread, and by every loss without labels."""
    candidate_instances: Tensor | None
    """Integers [Bc]: the same for the candidates."""
    memory: Any
    """[Nm, D]: rows to contrast with in addition to the batch (or to candidates), without gradient; or a
    :class:`pysupcon.MemoryQueue`, which brings labels, instances and weights."""
    memory_instances: Tensor | None
    """Integers [Nm], with instances. Without them, no row of the memory is a view of a batch sample."""
    memory_weights: Tensor | None
    """[Nm], at least 0: as candidate_weights; 0 leaves a row out (an empty slot)."""
    exclude_batch_from_memory: bool
    """True: the rows of the memory whose instance is in the batch are left out. For a memory that already
    holds the batch: its rows are candidates already, and an anchor is not its own positive. Default False."""
    hard_negatives: Tensor | None
    """[B, K, D]: K negatives of sample b only (of each of its views), with gradient."""


class _Weights(TypedDict, total=False):
    candidate_weights: Tensor | None
    """[B] or [B, V] ([Bc] or [Bc, Vc] with candidates), greater than 0: weight w_j of candidate j, which
    multiplies e^{s_ij} in every sum over candidates (logQ correction: 1 / sampling probability). Means of
    s_ij over positives are not weighted. No gradient."""
    anchor_weights: Tensor | None
    """[B] or [B, V], at least 0: multiply the losses of the anchors. reduction="mean" divides by the sum of
    the weights of the anchors that have a loss. No gradient."""


class _LabelledCandidates(_Candidates, total=False):
    candidate_labels: Tensor | None
    """Integers [Bc], or [Bc, C], as ``labels``; with labels and candidates. Without labels candidate sample k
    is the positive of sample k."""
    memory_labels: Tensor | None
    """Integers [Nm], required with labels and memory. A loss without labels takes the rows of the memory as
    negatives."""


class RowOptions(_LabelledCandidates, _Weights, total=False):
    """Keywords of every module's forward."""


class _Rows(TypedDict, total=False):
    contrast_mode: str
    """"all" (default): every row is an anchor; "one": only view 0 of each sample is."""
    normalize: bool
    """L2-normalise all rows first (features, candidates, memory, hard_negatives); default False. A row whose
    norm is below 1e-12 (float16: 2^-14, its smallest normal number) has no direction: the row and its
    gradient become zero. A row whose squared norm overflows (float64: in float64, otherwise in float32)
    counts as not finite."""
    batch_negatives: bool
    """False: the rows of the batch (or the candidates) are positives only, and the negatives are rows of the
    memory and hard_negatives. InfoNCE with keys as candidates and a queue as memory is then MoCo (He et al.
    2020); an anchor whose queue is still empty has the loss 0. cNCE has no negatives at all. Default True."""


class _Computation(_Rows, total=False):
    backend: str
    """"auto" (default): the compiled kernel of the device, or tiled PyTorch where there is none (with one
    warning); "cpu", "cuda", "tiled", or "reference" (dense, for tests; differentiable twice). The first call
    with a dtype on a GPU checks the CUDA kernels. If they answer wrongly or cannot run, "auto" uses tiled
    PyTorch and "cuda" raises (``PYSUPCON_TRUST=1`` skips the check)."""
    gather: Gather | None
    """None (default), or an object that contrasts with the rows of other processes (:class:`Gather`; see
    :mod:`pysupcon.distributed` for what each process returns)."""


class _Unlabelled(TypedDict, total=False):
    ignore_index: int | None
    """Label of rows that are neither anchors nor candidates; their gradient is 0. Default None."""
    unlabeled: str
    """"ignore" (default), or "instance": rows of the label ignore_index are positives of the other views of
    their sample only, and negatives of all other samples (semi-supervised). Features [N, D] then need
    instances; otherwise such a row has no positive."""


class MetricsOptions(_LabelledCandidates, _Rows, _Unlabelled, total=False):
    """Keywords of :func:`pysupcon.functional.contrastive_metrics`."""


class _Labelling(_Unlabelled, total=False):
    class_balance: bool
    """True: each class counts with the mean of e^s over its candidates instead of the sum (Zhu et al. 2022,
    Balanced Contrastive Learning, arXiv 2207.09052): the weight of a candidate is divided by the number of
    candidates of its class, without the anchor itself. Default False."""


class _ManyLabels(TypedDict, total=False):
    multi_label: str
    """What labels [B, C] mean (bool or 0/1, C >= 2, one column per label, any number of them per sample).
    "per_label" (default, SupCon only): the loss of an anchor is the mean of one SupCon term for each of its
    labels that another row has (MulSupCon, Zhang and Wu 2024, arXiv 2402.01613); as fast as SupCon.
    "any": rows that share a label are positives; every loss; tiled backend. "jaccard" (SupCon only):
    positives are weighted by |Y_i and Y_j| / |Y_i or Y_j|, the overlap of their labels. A row without a label
    is a negative of every row. Labels [B] need no ``multi_label``. ``gather``, ``memory``, ``ignore_index``,
    ``class_balance`` and ``batch_negatives=False`` need labels [B]."""
    overlap_threshold: float
    """For "any" and "jaccard": rows whose overlap is not above this number are not positives. From 0
    (default) to less than 1."""


class StatisticsOptions(RowOptions, _Computation, _Labelling, _ManyLabels, total=False):
    """Keywords of :func:`pysupcon.functional.pair_statistics`."""


class SelfSupervisedOptions(_Candidates, _Weights, _Computation, total=False):
    """Keywords of :func:`pysupcon.functional.info_nce`."""

    reduction: str
    """"mean" (default) over the anchors that have a loss; "sum"; or "none": one loss per anchor, [B, V] or
    [N] ([B] for contrast_mode="one"), 0 where an anchor has no loss."""


class Options(SelfSupervisedOptions, RowOptions, _Labelling, _ManyLabels, total=False):
    """Keywords of every function that takes labels."""


class LevelRowOptions(_Candidates, total=False):
    """Keywords of the forward of a loss of several label levels."""

    candidate_labels: Sequence[Tensor] | None
    """One tensor of integers [Bc] per level, with candidates."""


class LevelOptions(SelfSupervisedOptions, LevelRowOptions, total=False):
    """Keywords of :func:`pysupcon.functional.hierarchical_supcon`."""


class SharedModuleOptions(_ManyLabels, total=False):
    """Keywords of every module but ``contrast_mode``."""

    reduction: str
    """As in :class:`Options`, and so are ``normalize`` and ``backend``."""
    normalize: bool
    gather: GatherArgument
    """False (default): each process contrasts with its own rows only. True or "ring": with the rows of every
    process (:mod:`pysupcon.distributed`). An object of the :class:`Gather` protocol is used as it is."""
    backend: str
    batch_negatives: bool
    """As in :class:`Options`, and so are ``class_balance``, ``ignore_index`` and ``unlabeled``."""
    class_balance: bool
    ignore_index: int | None
    unlabeled: str
    learnable_temperature: bool
    """True makes the logarithm of the temperature a parameter, ``log_temperature``, which starts from
    ``temperature``, so that the temperature stays positive. Default False."""
    min_temperature: float | None
    """With ``learnable_temperature``: lower limit of the temperature; None (default): none. If an optimizer
    step took the parameter past a limit, the next forward moves it back to the limit, as CLIP does after each
    step. The gradient at a limit is that without limits: the temperature leaves the limit as soon as the
    gradient points inward."""
    max_temperature: float | None
    """Upper limit, likewise; CLIP's limit 100 of the logit scale is ``min_temperature=0.01``."""


class ModuleOptions(SharedModuleOptions, total=False):
    """Keywords of every module."""

    contrast_mode: str
    """As in :class:`Options`."""


F = TypeVar("F", bound=Callable[..., Any])
GatherArgument = bool | Literal["ring"] | Gather
DEFAULTS: dict[str, Any] = {
    "candidates": None, "candidate_labels": None, "instances": None, "candidate_instances": None,
    "candidate_weights": None, "anchor_weights": None, "memory": None, "memory_labels": None,
    "memory_instances": None, "memory_weights": None, "exclude_batch_from_memory": False,
    "hard_negatives": None, "batch_negatives": True, "class_balance": False, "ignore_index": None,
    "unlabeled": "ignore",
    "contrast_mode": "all", "normalize": False, "backend": "auto", "gather": None, "reduction": "mean",
    "multi_label": "per_label", "overlap_threshold": 0,
}  # fmt: skip
"""Default values of :class:`Options`. None is a float, because torch.compile makes a float an input of the
graph."""
ROW_OPTIONS = RowOptions.__annotations__.keys()
"""Names of the keywords of :class:`RowOptions`"""
LABEL_OPTIONS = "candidate_labels", "memory_labels", *_Labelling.__annotations__
"""Those that a self-supervised loss does not take"""


_SHARED_PARAMETERS = {
    "features": "[B, V, D] (V views of B samples) or [N, D]; float64, float32, bfloat16 or float16.",
    "labels": "integers [B] or [N], or bool or 0/1 [B, C]; None: the positives of a row are the other rows "
    "of its sample. InfoNCELoss: None. HierarchicalSupConLoss: one tensor per level, finest first.",
    "mask": "bool [B, B] (or samples of features x samples of candidates) instead of labels: the positives.",
    "temperature": "divides the similarities; from 1e-12 to 1e12.",
    "base_temperature": "multiplies the loss by temperature / base_temperature; None: no factor.",
    "epsilon": "margin, from -1e4 to 1e4; greater than 0: epsilon-SupInfoNCE.",
    "alpha": "weight of class-conditional InfoNCE, from 0 to 1; the base has 1 - alpha.",
    "base": '"supcon" or "sincere": the loss that is mixed with class-conditional InfoNCE.',
    "symmetric": "True: the mean over both directions, features and candidates, as in CLIP.",
    "level_weights": "one number per level of labels, finest level first.",
    "constrained": "True: the loss of a level is at least that of the finer level before it.",
    "contrast_mode": '"all": every row is an anchor; "one": only view 0 of each sample is.',
}
"""What ``help`` shows about parameters that are not keywords of the TypedDicts above"""


@lru_cache(maxsize=1)
def _definitions() -> dict[str, tuple[list[str], dict[str, str]]]:
    """The TypedDicts of this module: names of the bases, and the text below each keyword."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[__name__]))
    except OSError:  # installed without the source
        return {}
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            texts = {}
            for field, below in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                    texts[ast.unparse(field.target)] = " ".join(ast.literal_eval(below.value).split())
            found[node.name] = ([ast.unparse(base) for base in node.bases], texts)
    return found


def _explain(options: str, name: str) -> str | None:
    """Returns the text of a keyword in the TypedDict ``options`` or one of its bases."""
    bases, texts = _definitions().get(options, ([], {}))
    if name in texts and not texts[name].startswith("As in :class:"):
        return texts[name]
    return next(filter(None, (_explain(base, name) for base in bases)), None)


def explain_arguments(function: F, options: str) -> F:
    """Adds to a docstring the arguments that it does not explain, for ``help``.

    Args:
        function: its ``__signature__``, or else its own signature, names the arguments.
        options: the TypedDict that explains them.
    """
    if sys.flags.optimize >= 2:
        return function
    before, _, after = inspect.cleandoc(function.__doc__ or "Creates the loss.").partition("\n\nArgs:\n")
    own, blank, rest = after.partition("\n\n")
    lines = own.splitlines()
    for name in inspect.signature(function).parameters:
        text = _explain(options, name) or _explain("Options", name) or _SHARED_PARAMETERS.get(name)
        if text is not None and not any(line.startswith(f"    {name}:") for line in lines):
            wrap: dict[str, Any] = {"width": 100, "initial_indent": "    ", "subsequent_indent": " " * 8}
            lines += textwrap.wrap(f"{name}: {text}", break_on_hyphens=False, **wrap)
    function.__doc__ = "\n".join([before, "", "Args:", *lines]) + blank + rest
    return function


def expand_signature(function: F) -> F:
    """Decorator: ``inspect.signature`` and ``help`` show and explain the keywords of ``**options``.

    A call is not changed.
    """
    options = function.__annotations__["options"].removeprefix("Unpack[").removesuffix("]")
    keywords = function.__globals__[options].__annotations__  # in the order of the TypedDict
    limits = {"min_temperature": None, "max_temperature": None}
    of_module = {"gather": False, "learnable_temperature": False, **limits}
    defaults = {**DEFAULTS, **of_module} if "learnable_temperature" in keywords else DEFAULTS
    found = inspect.signature(function)
    parameters = [p for p in found.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    for name, annotation in keywords.items():
        text = getattr(annotation, "__forward_arg__", annotation)
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(name, kind, default=defaults[name], annotation=text))
    function.__signature__ = found.replace(parameters=parameters)  # type: ignore[attr-defined]
    return explain_arguments(function, options)
