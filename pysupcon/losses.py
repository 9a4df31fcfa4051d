"""The losses as modules. Arguments, shapes and errors: :mod:`pysupcon.functional`.

``gather=False``: each process contrasts its own rows only. ``gather=True`` or ``"ring"`` contrasts with the
rows of every process (:mod:`pysupcon.distributed`); an object of the :class:`pysupcon.functional.Gather`
protocol is used as it is.

``temperature``, ``base_temperature``, ``epsilon`` and ``alpha`` are numbers, of Python or NumPy, or tensors
of one element that want no gradient; the modules keep them as Python numbers.

``learnable_temperature=True`` makes the logarithm of the temperature a parameter, ``log_temperature``, which
starts from ``temperature``; it cannot become negative.
"""

from __future__ import annotations

import importlib
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pysupcon import functional
from pysupcon.pairs.checks import (
    BACKENDS,
    TEMPERATURE_RANGE,
    check_choice,
    check_epsilon,
    check_gather,
    check_number,
)

__all__ = ["ClassConditionalInfoNCELoss", "InfoNCELoss", "SINCERELoss", "SpreadLoss", "SupConLoss"]

GatherArgument = bool | Literal["ring"] | functional.Gather


class _Loss(nn.Module):
    """What all losses share."""

    def __init__(
        self,
        temperature: float,
        contrast_mode: str,
        *,
        reduction: str,
        normalize: bool,
        gather: GatherArgument,
        backend: str,
        learnable_temperature: bool,
    ) -> None:
        super().__init__()
        if isinstance(temperature, Tensor) and temperature.requires_grad:
            raise TypeError(
                "temperature must be a number, got a tensor that wants a gradient; "
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

    @property
    def temperature(self) -> float | Tensor:
        """The number, or with ``learnable_temperature`` a tensor of no dimensions."""
        return self._temperature if self.log_temperature is None else self.log_temperature.exp()

    def _common(self) -> dict[str, Any]:
        if self._gather is None and _among_processes():
            importlib.import_module("pysupcon.distributed").warn_without_gather(type(self).__name__)
        return {
            "temperature": self.temperature,
            "contrast_mode": self.contrast_mode,
            "reduction": self.reduction,
            "normalize": self.normalize,
            "backend": self.backend,
            "gather": self._gather,
        }

    def _own_repr(self) -> str:
        return ""

    def extra_repr(self) -> str:
        with torch.no_grad():
            temperature = float(self.temperature)
        learnable = " (learnable)" if self.log_temperature is not None else ""
        return (
            f"temperature={temperature:g}{learnable}, "
            f"{self._own_repr()}contrast_mode={self.contrast_mode!r}, "
            f"reduction={self.reduction!r}, normalize={self.normalize}, gather={self.gather!r}, "
            f"backend={self.backend!r}"
        )


def _among_processes() -> bool:
    if torch.compiler.is_compiling() or not torch.distributed.is_available():
        return False
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _resolve_gather(gather: GatherArgument) -> functional.Gather | None:
    if gather is False:
        return None
    if gather is True or isinstance(gather, str):
        check_choice("gather", gather, (False, True, "ring"))
        distributed = importlib.import_module("pysupcon.distributed")
        resolved: functional.Gather = distributed.resolve(gather)
        return resolved
    check_gather(gather)
    return gather


class SupConLoss(_Loss):
    """Supervised contrastive loss (Khosla et al. 2020, L_out); see :func:`pysupcon.functional.supcon`.

    ``base_temperature`` (None: no factor) multiplies the loss by temperature / base_temperature.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        contrast_mode: str = "all",
        base_temperature: float | None = None,
        *,
        reduction: str = "mean",
        normalize: bool = False,
        gather: GatherArgument = False,
        backend: str = "auto",
        learnable_temperature: bool = False,
    ) -> None:
        super().__init__(
            temperature, contrast_mode, reduction=reduction, normalize=normalize, gather=gather,
            backend=backend, learnable_temperature=learnable_temperature,
        )  # fmt: skip
        if base_temperature is not None:
            base_temperature = float(check_number("base_temperature", base_temperature, *TEMPERATURE_RANGE))
        self.base_temperature = base_temperature

    def _own_repr(self) -> str:
        return f"base_temperature={self.base_temperature}, "

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        candidates: Tensor | None = None,
        candidate_labels: Tensor | None = None,
        instances: Tensor | None = None,
        candidate_instances: Tensor | None = None,
    ) -> Tensor:
        return functional.supcon(
            features, labels, mask, candidates=candidates, candidate_labels=candidate_labels,
            instances=instances, candidate_instances=candidate_instances,
            base_temperature=self.base_temperature, **self._common(),
        )  # fmt: skip


class SINCERELoss(_Loss):
    """SINCERE (Feeney and Hughes 2023), with ``epsilon`` epsilon-SupInfoNCE; see
    :func:`pysupcon.functional.sincere`."""

    def __init__(
        self,
        temperature: float = 0.07,
        epsilon: float = 0.0,
        *,
        contrast_mode: str = "all",
        reduction: str = "mean",
        normalize: bool = False,
        gather: GatherArgument = False,
        backend: str = "auto",
        learnable_temperature: bool = False,
    ) -> None:
        super().__init__(
            temperature, contrast_mode, reduction=reduction, normalize=normalize, gather=gather,
            backend=backend, learnable_temperature=learnable_temperature,
        )  # fmt: skip
        self.epsilon = float(check_epsilon(epsilon))

    def _own_repr(self) -> str:
        return f"epsilon={self.epsilon:g}, "

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        candidates: Tensor | None = None,
        candidate_labels: Tensor | None = None,
        instances: Tensor | None = None,
        candidate_instances: Tensor | None = None,
    ) -> Tensor:
        return functional.sincere(
            features, labels, mask, candidates=candidates, candidate_labels=candidate_labels,
            instances=instances, candidate_instances=candidate_instances, epsilon=self.epsilon,
            **self._common(),
        )  # fmt: skip


class ClassConditionalInfoNCELoss(_Loss):
    """Class-conditional InfoNCE, cNCE (Chen et al. 2022); see
    :func:`pysupcon.functional.class_conditional_info_nce`."""

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
        super().__init__(
            temperature, contrast_mode, reduction=reduction, normalize=normalize, gather=gather,
            backend=backend, learnable_temperature=learnable_temperature,
        )  # fmt: skip

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        candidates: Tensor | None = None,
        candidate_labels: Tensor | None = None,
        instances: Tensor | None = None,
        candidate_instances: Tensor | None = None,
    ) -> Tensor:
        return functional.class_conditional_info_nce(
            features, labels, mask, candidates=candidates, candidate_labels=candidate_labels,
            instances=instances, candidate_instances=candidate_instances, **self._common(),
        )  # fmt: skip


class SpreadLoss(_Loss):
    """L_spread (Chen et al. 2022): (1 - alpha) * base + alpha * cNCE; see
    :func:`pysupcon.functional.spread`."""

    def __init__(
        self,
        temperature: float = 0.5,
        alpha: float = 0.5,
        base: str = "supcon",
        *,
        contrast_mode: str = "all",
        reduction: str = "mean",
        normalize: bool = False,
        gather: GatherArgument = False,
        backend: str = "auto",
        learnable_temperature: bool = False,
    ) -> None:
        super().__init__(
            temperature, contrast_mode, reduction=reduction, normalize=normalize, gather=gather,
            backend=backend, learnable_temperature=learnable_temperature,
        )  # fmt: skip
        check_choice("base", base, ("supcon", "sincere"))
        self.alpha = float(check_number("alpha", alpha, 0.0, 1.0))
        self.base = base

    def _own_repr(self) -> str:
        return f"alpha={self.alpha:g}, base={self.base!r}, "

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        candidates: Tensor | None = None,
        candidate_labels: Tensor | None = None,
        instances: Tensor | None = None,
        candidate_instances: Tensor | None = None,
    ) -> Tensor:
        return functional.spread(
            features, labels, mask, candidates=candidates, candidate_labels=candidate_labels,
            instances=instances, candidate_instances=candidate_instances, alpha=self.alpha, base=self.base,
            **self._common(),
        )  # fmt: skip


class InfoNCELoss(_Loss):
    """InfoNCE / NT-Xent (Chen et al. 2020); see :func:`pysupcon.functional.info_nce`.

    ``labels`` and ``mask`` stand in the signature so that the losses can take one another's place; they must
    be None.
    """

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
        super().__init__(
            temperature, contrast_mode, reduction=reduction, normalize=normalize, gather=gather,
            backend=backend, learnable_temperature=learnable_temperature,
        )  # fmt: skip

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        candidates: Tensor | None = None,
        candidate_labels: Tensor | None = None,
        instances: Tensor | None = None,
        candidate_instances: Tensor | None = None,
    ) -> Tensor:
        if labels is not None or mask is not None or candidate_labels is not None:
            raise ValueError(
                "InfoNCELoss is self-supervised: labels, mask and candidate_labels must be None "
                "(instances say which rows are views of one sample); SupConLoss takes labels"
            )
        return functional.info_nce(
            features, candidates=candidates, instances=instances, candidate_instances=candidate_instances,
            **self._common(),
        )  # fmt: skip
