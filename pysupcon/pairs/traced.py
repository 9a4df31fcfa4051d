"""What a trace of torch.compile calls while it is made, holding the result as a constant.

A module of its own because the decorator imports torch._dynamo, which takes seconds and which only a trace
has loaded anyway.
"""

from __future__ import annotations

import torch

from pysupcon.pairs import trust

__all__ = ["told_obstacle"]


@torch.compiler.assume_constant_result
def told_obstacle(device: torch.device, dtype: torch.dtype, tell: bool) -> str | None:
    """:func:`pysupcon.pairs.trust.told_obstacle`."""
    return trust.told_obstacle(device, dtype, tell)
