"""pysupcon: supervised contrastive losses that never write the N x N matrix down.

``SupConLoss``, ``SINCERELoss``, ``ClassConditionalInfoNCELoss``, ``SpreadLoss``, ``DCLLoss`` and
``InfoNCELoss`` are modules, :mod:`pysupcon.functional` holds the same as functions, :mod:`pysupcon.compat`
the loss classes of other libraries with their own signatures. :class:`GradCache` runs a large batch through
an encoder in chunks. ``backends()`` says which kernels this build has, and why others are missing;
``backends(check=True)`` asks the CUDA kernels for known answers first.
"""

from __future__ import annotations

from pysupcon import functional
from pysupcon.gradcache import GradCache
from pysupcon.losses import (
    ClassConditionalInfoNCELoss,
    DCLLoss,
    InfoNCELoss,
    SINCERELoss,
    SpreadLoss,
    SupConLoss,
)
from pysupcon.pairs.ops import backends

__all__ = [
    "ClassConditionalInfoNCELoss",
    "DCLLoss",
    "GradCache",
    "InfoNCELoss",
    "SINCERELoss",
    "SpreadLoss",
    "SupConLoss",
    "backends",
    "functional",
]
