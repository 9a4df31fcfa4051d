"""What a trace of torch.compile calls while it is made, holding the result as a constant.

A module of its own because the decorator imports torch._dynamo, which takes seconds and which only a trace
has loaded anyway.
"""

from __future__ import annotations

import torch

from . import _trust

__all__ = ["settle"]


@torch.compiler.assume_constant_result
def settle(wish: str, device: torch.device, dtype: torch.dtype) -> str:
    """:func:`pysupcon._trust.settle`."""
    return _trust.settle(wish, device, dtype)
