"""The losses. Each has a function, a module and its formulas.

Arguments, shapes and errors: :mod:`pysupcon.functional`.

In modules ``temperature``, ``base_temperature``, ``epsilon`` and ``alpha`` are numbers, of Python or NumPy,
or tensors of one element with requires_grad=False; the modules keep them as Python numbers. The other
keywords of modules: :class:`pysupcon.options.ModuleOptions`.

A new loss needs a function, a subclass of :class:`pysupcon.contrastive.ContrastiveLoss`, its name in
:data:`LossName` and its class in :data:`LOSSES_BY_NAME`.

>>> import torch, pysupcon
>>> loss = pysupcon.SpreadLoss(temperature=0.5, alpha=0.25)
>>> views = torch.eye(4).reshape(2, 2, 4)  # [B, V, D]: two views of two samples
>>> loss(views, torch.tensor([0, 1]))
tensor(0.8240)
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from pysupcon.contrastive import ContrastiveLoss, Counts, compute
from pysupcon.options import (
    ModuleOptions,
    Options,
    SelfSupervisedOptions,
    SharedModuleOptions,
    expand_signature,
)
from pysupcon.pairs.autograd import RowStatistics
from pysupcon.pairs.checks import (
    TEMPERATURE_RANGE,
    check_choice,
    check_epsilon,
    check_number,
    check_temperature,
)
from pysupcon.pairs.many_labels import MULTI_LABEL
from pysupcon.pairs.reference import log_sum_exp, mean_over
from pysupcon.pairs.rows import mean, positive_gap, supcon_rows

__all__ = [
    "ClassConditionalInfoNCELoss",
    "DCLLoss",
    "InfoNCELoss",
    "SINCERELoss",
    "SpreadLoss",
    "SupConLoss",
    "class_conditional_info_nce",
    "dcl",
    "info_nce",
    "sincere",
    "spread",
    "supcon",
]


@expand_signature
def supcon(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    base_temperature: float | Tensor | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Supervised contrastive loss, L_out (Khosla et al. 2020, arXiv 2004.11362, equation 2).

    -mean_{p in P_i} log( e^{s_ip} / sum_{j in P_i + N_i} e^{s_ij} ), times temperature / base_temperature
    where that is given. Without labels it is the multi-view NT-Xent loss.
    Arguments: module docstring of :mod:`pysupcon.functional`.
    """
    if base_temperature is not None:
        base_temperature = check_temperature("base_temperature", base_temperature)
    further = {"base_temperature": base_temperature}
    loss = compute(SupConLoss, features, labels, mask, options, temperature, further=further)
    if base_temperature is None:
        return loss
    temperature = check_temperature("temperature", temperature)
    if torch.compiler.is_compiling():  # dividing Python numbers would compile a new graph for every value
        temperature = loss.new_ones(()) * temperature
    factor = temperature / base_temperature
    return loss * (factor.to(loss) if isinstance(factor, Tensor) else factor)


class SupConLoss(ContrastiveLoss):
    """Supervised contrastive loss (Khosla et al. 2020, L_out); see :func:`pysupcon.functional.supcon`.

    ``base_temperature`` (None: no factor) multiplies the loss by temperature / base_temperature.
    """

    function = staticmethod(supcon)
    own_parameters = ("base_temperature",)
    trainer_defaults: ClassVar = {"supcon": {}}
    per_anchor = staticmethod(supcon_rows)  # fused: pairs/rows.py
    fused_reduction = True
    multi_labels = MULTI_LABEL

    @expand_signature
    def __init__(
        self,
        temperature: float = 0.07,
        contrast_mode: str = "all",
        base_temperature: float | None = None,
        **options: Unpack[SharedModuleOptions],
    ) -> None:
        super().__init__(temperature, contrast_mode=contrast_mode, **options)
        if base_temperature is not None:
            base_temperature = float(check_number("base_temperature", base_temperature, *TEMPERATURE_RANGE))
        self.base_temperature = base_temperature

    @staticmethod
    def statistics() -> dict[str, Any]:
        return {"negatives": True, "positives": True}

    @staticmethod
    def dense(s: Tensor, positives: Tensor, negatives: Tensor, same: Tensor, t: Tensor) -> Tensor:
        log_probability = s - log_sum_exp(t, positives | negatives)[:, None]
        return torch.where(positives.any(dim=1), -mean_over(positives, log_probability), 0.0)


@expand_signature
def sincere(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    epsilon: float = 0.0,
    **options: Unpack[Options],
) -> Tensor:
    """SINCERE (Feeney and Hughes 2023, arXiv 2309.14277), and with ``epsilon`` > 0 epsilon-SupInfoNCE
    (Barbano et al. 2022, arXiv 2211.05568).

    -mean_{p in P_i} log( e^{s_ip} / (e^{s_ip - epsilon} + sum_{j in N_i} e^{s_ij}) ). An anchor without a
    negative gives 0 (minus epsilon). Arguments: module docstring of :mod:`pysupcon.functional`.
    """
    epsilon = check_epsilon(epsilon)
    return compute(SINCERELoss, features, labels, mask, options, temperature, epsilon=epsilon)


class SINCERELoss(ContrastiveLoss):
    """SINCERE (Feeney and Hughes 2023), with ``epsilon`` epsilon-SupInfoNCE; see
    :func:`pysupcon.functional.sincere`."""

    function = staticmethod(sincere)
    own_parameters = ("epsilon",)
    trainer_defaults: ClassVar = {"sincere": {}, "eps_supinfonce": {"epsilon": 0.25}}

    @expand_signature
    def __init__(
        self, temperature: float = 0.07, epsilon: float = 0.0, **options: Unpack[ModuleOptions]
    ) -> None:
        super().__init__(temperature, **options)
        self.epsilon = float(check_epsilon(epsilon))

    @staticmethod
    def statistics(epsilon: float = 0.0) -> dict[str, Any]:
        return {"negatives": True, "epsilon": epsilon}

    @staticmethod
    def per_anchor(s: RowStatistics, counts: Counts, valid: Tensor, epsilon: float = 0.0) -> Tensor:
        loss = mean(s.softplus, counts.positives)
        if torch.compiler.is_compiling() or epsilon:  # testing epsilon would specialise the graph
            loss = torch.where(valid, loss - epsilon, 0.0)
        return loss

    @staticmethod
    def dense(
        s: Tensor, positives: Tensor, negatives: Tensor, same: Tensor, t: Tensor, epsilon: float = 0.0
    ) -> Tensor:
        negative = log_sum_exp(t, negatives)[:, None]
        t = torch.where(positives, t, 0.0)  # -inf twice has no gradient
        denominator = torch.logaddexp(t - epsilon, negative)
        return torch.where(positives.any(dim=1), mean_over(positives, denominator - s), 0.0)


@expand_signature
def class_conditional_info_nce(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    **options: Unpack[Options],
) -> Tensor:
    """Class-conditional InfoNCE, cNCE (Chen et al. 2022, arXiv 2204.07596): InfoNCE within the class.

    -mean_{a in A_i} log( e^{s_ia} / sum_{p in P_i} e^{s_ip} ). The loss needs to know which rows are
    views of one sample: V >= 2 or ``instances`` (rows of one instance must share a label). Anchors without
    another row of their sample are skipped. Arguments: module docstring of :mod:`pysupcon.functional`.
    """
    return compute(ClassConditionalInfoNCELoss, features, labels, mask, options, temperature)


class ClassConditionalInfoNCELoss(ContrastiveLoss):
    """Class-conditional InfoNCE, cNCE (Chen et al. 2022); see
    :func:`pysupcon.functional.class_conditional_info_nce`."""

    function = staticmethod(class_conditional_info_nce)
    trainer_defaults: ClassVar = {"cnce": {"temperature": 0.5}}
    needs_instances = True

    @staticmethod
    def valid(counts: Counts) -> Tensor:
        assert counts.instances is not None
        return (counts.instances > 0) & (counts.positives > 0)

    @staticmethod
    def statistics() -> dict[str, Any]:
        return {"positives": True}

    @staticmethod
    def per_anchor(s: RowStatistics, counts: Counts, valid: Tensor) -> Tensor:
        assert counts.instances is not None
        if counts.nested:
            return positive_gap(s, s.instance_sum, counts.instances, counts, valid)
        return torch.where(valid, s.p - mean(s.instance_sum, counts.instances), 0.0)

    @staticmethod
    def dense(s: Tensor, positives: Tensor, negatives: Tensor, same: Tensor, t: Tensor) -> Tensor:
        valid = same.any(dim=1) & positives.any(dim=1)
        log_probability = s - log_sum_exp(t, positives)[:, None]
        return torch.where(valid, -mean_over(same, log_probability), 0.0)


@expand_signature
def spread(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.5,
    alpha: float = 0.5,
    base: str = "supcon",
    **options: Unpack[Options],
) -> Tensor:
    """L_spread (Chen et al. 2022, arXiv 2204.07596): (1 - alpha) * base + alpha * class-conditional InfoNCE,
    per anchor.

    ``base`` is "supcon" or "sincere" (the form of the paper's own code). ``alpha`` in [0, 1] weighs cNCE; the
    earlier paper "The Details Matter" writes alpha on the other term. The mean is over the anchors that have
    a positive; for an anchor without another view the cNCE term is 0. The loss takes as long as its base.
    Arguments: module docstring of :mod:`pysupcon.functional`.
    """
    own: dict[str, Any] = {"alpha": check_number("alpha", alpha, 0.0, 1.0), "base": base}
    check_choice("base", base, tuple(_BASES))
    return compute(SpreadLoss, features, labels, mask, options, temperature, **own)


class SpreadLoss(ContrastiveLoss):
    """L_spread (Chen et al. 2022): (1 - alpha) * base + alpha * cNCE; see
    :func:`pysupcon.functional.spread`."""

    function = staticmethod(spread)
    own_parameters = ("alpha", "base")
    trainer_defaults: ClassVar = {"spread": {"temperature": 0.5, "alpha": 0.5, "base": "supcon"}}
    needs_instances = True

    @expand_signature
    def __init__(
        self,
        temperature: float = 0.5,
        alpha: float = 0.5,
        base: str = "supcon",
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__(temperature, **options)
        check_choice("base", base, tuple(_BASES))
        self.alpha = float(check_number("alpha", alpha, 0.0, 1.0))
        self.base = base

    @staticmethod
    def statistics(alpha: float = 0.5, base: str = "supcon") -> dict[str, Any]:
        return {**ClassConditionalInfoNCELoss.statistics(), **_BASES[base].statistics()}

    @staticmethod
    def per_anchor(s: RowStatistics, counts: Counts, valid: Tensor, alpha: float, base: str) -> Tensor:
        first = _BASES[base].per_anchor(s, counts, valid)
        cnce = ClassConditionalInfoNCELoss
        return (1 - alpha) * first + alpha * cnce.per_anchor(s, counts, cnce.valid(counts))

    @staticmethod
    def dense(s: Tensor, *sets: Tensor, alpha: float, base: str) -> Tensor:
        first, second = _BASES[base].dense(s, *sets), ClassConditionalInfoNCELoss.dense(s, *sets)
        return (1 - alpha) * first + alpha * second


_BASES: dict[str, type[ContrastiveLoss]] = {"supcon": SupConLoss, "sincere": SINCERELoss}


@expand_signature
def dcl(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    **options: Unpack[Options],
) -> Tensor:
    """Decoupled contrastive loss, DCL (Yeh et al. 2022, arXiv 2110.06848): no positive is in the
    denominator.

    -mean_{p in P_i} log( e^{s_ip} / sum_{j in N_i} e^{s_ij} ), which may be below 0. Anchors without a
    negative, whose denominator is empty, are skipped like anchors without a positive.
    Arguments: module docstring of :mod:`pysupcon.functional`.
    """
    return compute(DCLLoss, features, labels, mask, options, temperature)


class DCLLoss(ContrastiveLoss):
    """Decoupled contrastive loss, DCL (Yeh et al. 2022); see :func:`pysupcon.functional.dcl`."""

    function = staticmethod(dcl)
    trainer_defaults: ClassVar = {"dcl": {}}
    requirement = "a positive and a negative"

    @staticmethod
    def valid(counts: Counts) -> Tensor:
        return (counts.positives > 0) & (counts.positives < counts.candidates)

    @staticmethod
    def statistics() -> dict[str, Any]:
        return {"negatives": True, "positives": True}

    @staticmethod
    def per_anchor(s: RowStatistics, counts: Counts, valid: Tensor) -> Tensor:
        return torch.where(valid, s.n, 0.0) - torch.where(valid, mean(s.positive_sum, counts.positives), 0.0)

    @staticmethod
    def dense(s: Tensor, positives: Tensor, negatives: Tensor, same: Tensor, t: Tensor) -> Tensor:
        valid = positives.any(dim=1) & negatives.any(dim=1)
        return torch.where(valid, log_sum_exp(t, negatives) - mean_over(positives, s), 0.0)


@expand_signature
def info_nce(
    features: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    symmetric: bool = False,
    **options: Unpack[SelfSupervisedOptions],
) -> Tensor:
    """InfoNCE / NT-Xent (van den Oord et al. 2018, arXiv 1807.03748; Chen et al. 2020, arXiv 2002.05709).

    The positives of a row are the other rows of its sample. With V > 2 views the loss is their mean, as in
    :func:`supcon` without labels. ``symmetric=True`` gives the loss of CLIP (Radford et al. 2021, arXiv
    2103.00020): the mean of the loss of ``features`` against ``candidates`` and of the loss of ``candidates``
    against ``features``. It needs ``candidates`` and ``reduction`` "mean" or "sum", and takes no memory, hard
    negatives or weights.
    Arguments: module docstring of :mod:`pysupcon.functional`.

    >>> images, texts = torch.eye(3), torch.eye(3)[[1, 1, 2]]
    >>> info_nce(images, candidates=texts, temperature=1.0, symmetric=True)
    tensor(0.8611)
    """
    check_choice("symmetric", symmetric, (False, True))
    further = {"symmetric": symmetric}
    of_one_side = ("memory", "hard_negatives", "candidate_weights", "anchor_weights")
    for name in of_one_side if symmetric else ():
        if options.get(name) is not None:
            raise ValueError(
                f"symmetric=True contrasts both ways, and {name} belongs to one: it must be None"
            )
    loss = compute(InfoNCELoss, features, None, None, options, temperature, further=further)
    if not symmetric:
        return loss
    # These checks follow the first direction, in which all processes of a gathered loss compare arguments.
    candidates = options.get("candidates")
    if candidates is None:
        raise ValueError("symmetric=True contrasts features and candidates with each other: give candidates")
    if options.get("reduction") == "none":
        raise ValueError('symmetric=True needs reduction="mean" or "sum", got \'none\'')
    swapped = {
        **options,
        "candidates": features,
        "instances": options.get("candidate_instances"),
        "candidate_instances": options.get("instances"),
    }
    other = compute(InfoNCELoss, candidates, None, None, swapped, temperature, further=further)
    return (loss + other) / 2


class InfoNCELoss(ContrastiveLoss):
    """InfoNCE / NT-Xent (Chen et al. 2020), with ``symmetric`` the loss of CLIP; see
    :func:`pysupcon.functional.info_nce`.

    ``labels``, ``mask`` and ``candidate_labels`` must be None. They are in the signature so that one loss can
    replace another.
    """

    function = staticmethod(info_nce)
    own_parameters = ("symmetric",)
    trainer_defaults: ClassVar = {"infonce": {}}
    self_supervised = fused_reduction = True
    multi_labels = ()
    statistics = staticmethod(SupConLoss.statistics)
    per_anchor = staticmethod(SupConLoss.per_anchor)
    dense = staticmethod(SupConLoss.dense)

    @expand_signature
    def __init__(
        self, temperature: float = 0.07, *, symmetric: bool = False, **options: Unpack[ModuleOptions]
    ) -> None:
        super().__init__(temperature, **options)
        check_choice("symmetric", symmetric, (False, True))
        self.symmetric = symmetric


LossName = Literal["supcon", "sincere", "eps_supinfonce", "cnce", "spread", "dcl", "infonce"]
"""What the trainer can choose"""
LOSSES_BY_NAME: dict[str, type[ContrastiveLoss]] = {
    name: loss
    for loss in (SupConLoss, SINCERELoss, ClassConditionalInfoNCELoss, SpreadLoss, DCLLoss, InfoNCELoss)
    for name in loss.trainer_defaults
}
"""The class of every :data:`LossName`"""
