"""pysupcon: supervised contrastive losses that never store the N x N matrix.

``SupConLoss``, ``SINCERELoss``, ``ClassConditionalInfoNCELoss``, ``SpreadLoss``, ``DCLLoss``, ``InfoNCELoss``
and ``HierarchicalSupConLoss`` are modules, :mod:`pysupcon.functional` holds the same as functions,
:mod:`pysupcon.compat` the loss classes of other libraries with their own signatures. :class:`GradCache` runs
a large batch through an encoder in chunks. :class:`MemoryQueue` holds embeddings of earlier batches.
``backends()`` says which kernels this build has, and why others are missing; ``backends(check=True)`` asks
the CUDA kernels for known answers first.

>>> import torch, pysupcon
>>> embeddings = torch.eye(4).repeat_interleave(2, dim=0).requires_grad_()  # [N, D]: 4 classes, 2 rows each
>>> loss = pysupcon.SupConLoss(temperature=0.5)(embeddings, torch.arange(4).repeat_interleave(2))
>>> loss.backward()
>>> print(f"{loss.item():.4f}")
0.5944
"""

from __future__ import annotations

from pysupcon import functional
from pysupcon.gradcache import GradCache
from pysupcon.hierarchies import HierarchicalSupConLoss
from pysupcon.losses import (
    ClassConditionalInfoNCELoss,
    DCLLoss,
    InfoNCELoss,
    SINCERELoss,
    SpreadLoss,
    SupConLoss,
)
from pysupcon.memory import MemoryQueue
from pysupcon.pairs.backends import backends

__version__ = "0.1.0"

__all__ = [
    "ClassConditionalInfoNCELoss",
    "DCLLoss",
    "GradCache",
    "HierarchicalSupConLoss",
    "InfoNCELoss",
    "MemoryQueue",
    "SINCERELoss",
    "SpreadLoss",
    "SupConLoss",
    "backends",
    "functional",
]
