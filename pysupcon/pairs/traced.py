"""The device check that torch.compile calls during a trace, with the result as a constant of the graph.

A separate module because the decorator imports torch._dynamo, which takes seconds and which only a trace has
imported already.
"""

from __future__ import annotations

import torch

from pysupcon.pairs import kernel_check

__all__ = ["check_device"]


@torch.compiler.assume_constant_result
def check_device(device: torch.device, dtype: torch.dtype, warn: bool) -> str | None:
    """Calls :func:`pysupcon.pairs.kernel_check.check_device`."""
    return kernel_check.check_device(device, dtype, warn)
