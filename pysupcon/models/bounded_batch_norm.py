"""BatchNorm whose scale is bounded (Gouk et al. 2021, arXiv 1804.04368)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class BoundedBatchNorm(_BatchNorm):
    """BatchNorm whose scale |gamma| / sqrt(variance + eps) is at most ``bound`` in each channel.

    As a map of one image in eval mode, BatchNorm is this diagonal scale, with the running variance. In
    training mode it is bounded with the variance of the batch. A channel at the bound is only centred and
    scaled by a constant, and the gradient of its gamma is 0.
    """

    bound: float

    def bounded_weight(self, variance: Tensor) -> Tensor:
        """gamma [C], clamped for the variance [C] of each channel."""
        largest = self.bound * (variance + self.eps).sqrt()
        return torch.minimum(torch.maximum(self.weight, -largest), largest)

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        momentum = self.momentum or 0.0
        assert self.running_var is not None
        variance = self.running_var
        if self.training:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1 / float(self.num_batches_tracked)
            wide = input.to(torch.promote_types(input.dtype, torch.float32))
            variance = wide.var([0, *range(2, input.dim())], correction=0)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.bounded_weight(variance), self.bias,
            self.training, momentum, self.eps,
        )  # fmt: skip


class BoundedBatchNorm1d(BoundedBatchNorm, nn.BatchNorm1d):
    """:class:`BoundedBatchNorm` of [B, C] or [B, C, L]."""


class BoundedBatchNorm2d(BoundedBatchNorm, nn.BatchNorm2d):
    """:class:`BoundedBatchNorm` of [B, C, H, W]."""


class BoundedBatchNorm3d(BoundedBatchNorm, nn.BatchNorm3d):
    """:class:`BoundedBatchNorm` of [B, C, D, H, W]."""


_BATCH_NORMS: dict[type[nn.Module], type[BoundedBatchNorm]] = {
    nn.BatchNorm1d: BoundedBatchNorm1d,
    nn.BatchNorm2d: BoundedBatchNorm2d,
    nn.BatchNorm3d: BoundedBatchNorm3d,
}


def bound_batch_norm(layer: _BatchNorm, bound: float) -> bool:
    """Bound a BatchNorm layer in place. The names of its weights do not change.

    Args:
        layer: the layer.
        bound: largest scale of a channel, greater than 0.

    Returns:
        Whether it is bounded. Subclasses, which may compute something else, and layers without gamma or
        without running statistics are left as they are.
    """
    if type(layer) not in _BATCH_NORMS or not layer.affine or layer.running_var is None:
        return False
    layer.__class__ = _BATCH_NORMS[type(layer)]
    assert isinstance(layer, BoundedBatchNorm)
    layer.bound = bound
    return True
