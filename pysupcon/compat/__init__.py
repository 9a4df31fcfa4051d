"""Drop-in replacements for loss classes of other libraries, with their signatures and semantics.

``SupConLoss``
    for ``losses.SupConLoss`` of HobbitLong/SupContrast
``SINCERELoss``, ``MultiviewSINCERELoss``, ``InfoNCELoss``, ``EpsSupInfoNCELoss``,
    ``MultiviewEpsSupInfoNCELoss`` for the classes of ``revised_losses`` of tufts-ml/SupContrast
``MetricLearningSupConLoss``
    for ``pytorch_metric_learning.losses.SupConLoss``

Every class takes one more keyword, ``backend`` (see :mod:`pysupcon.functional`). Labels are tensors of any
real dtype on any device. ``temperature``, ``base_temperature`` and ``epsilon`` are numbers or tensors of one
element, in the ranges of :mod:`pysupcon.functional`; a temperature that is a parameter gets its gradient.

>>> import torch
>>> from pysupcon.compat import SupConLoss
>>> features = torch.eye(2)[:, None].expand(2, 2, 2)  # [bsz, n_views, D]
>>> SupConLoss(temperature=1.0, base_temperature=1.0)(features, torch.tensor([0, 1]))
tensor(0.5514)

Intended differences, all classes
    Memory and time. Sums are taken in float32 at least, also for half-precision input and under autocast, and
    the loss is float32 at least. Features that are not finite are an error on a CPU. A batch in which no
    anchor has a positive warns on a CPU. Second derivatives raise an error.
``SupConLoss``
    An anchor without a positive counts as 0 in the mean over all anchors, as in that repository now; older
    copies give NaN there, or add 1e-9 inside the logarithm. ``mask`` must hold zeros and ones (on a CPU it is
    checked), not weights.
``SINCERELoss`` and the other classes of tufts-ml/SupContrast
    An anchor without a positive is left out of the mean; in the original it makes the whole loss NaN.
    ``InfoNCELoss`` accepts embeddings on any device.
``MetricLearningSupConLoss``
    The package's wrappers and miners work; the docstring of the class lists them. Another ``distance`` or
    ``reducer`` than the default ones, embedding regularisers and records are refused with an error. The mean
    is over the anchors that have a positive; the original also leaves out anchors whose loss rounds to 0, so
    that in a converged batch its mean is over fewer anchors. ``ref_emb`` with the same object as ``labels``
    and ``ref_labels`` is refused, because the original then silently drops each row's own index: pass
    ``labels.clone()`` if the references are not the embeddings. A batch with a single positive and a single
    negative pair has a loss; in the original it is 0. No epsilon is added to the number of positives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pysupcon.compat.supcontrast import (
    EpsSupInfoNCELoss,
    InfoNCELoss,
    MultiviewEpsSupInfoNCELoss,
    MultiviewSINCERELoss,
    SINCERELoss,
    SupConLoss,
)

if TYPE_CHECKING:
    from pysupcon.compat.metric_learning import MetricLearningSupConLoss

__all__ = [
    "EpsSupInfoNCELoss",
    "InfoNCELoss",
    "MetricLearningSupConLoss",
    "MultiviewEpsSupInfoNCELoss",
    "MultiviewSINCERELoss",
    "SINCERELoss",
    "SupConLoss",
]


def __getattr__(name: str) -> Any:
    """Imports ``MetricLearningSupConLoss`` on first use, because it imports pytorch-metric-learning."""
    if name != "MetricLearningSupConLoss":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pysupcon.compat.metric_learning import MetricLearningSupConLoss

    return MetricLearningSupConLoss
