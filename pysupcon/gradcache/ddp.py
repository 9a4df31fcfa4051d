"""DistributedDataParallel around chunks: when it synchronises gradients, and when it broadcasts buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pysupcon.gradcache.replay import Buffers

__all__ = ["broadcast_buffers", "has_static_graph", "no_sync", "wrappers_of"]


def wrappers_of(model: nn.Module) -> list[nn.Module]:
    """Returns the outermost modules that have a ``no_sync``, such as DistributedDataParallel."""
    if hasattr(model, "no_sync"):
        return [model]
    return list(dict.fromkeys(wrapper for child in model.children() for wrapper in wrappers_of(child)))


def has_static_graph(wrapper: nn.Module) -> bool:
    """Whether a wrapper was created with ``static_graph=True``."""
    return getattr(wrapper, "static_graph", False) is True


def no_sync(wrappers: Iterator[nn.Module]) -> ExitStack:
    """Returns a context in which these wrappers do not synchronise gradients."""
    stack = ExitStack()
    for wrapper in wrappers:
        stack.enter_context(wrapper.no_sync())  # type: ignore[operator]
    return stack


def broadcast_buffers(wrapper: nn.Module, buffers: Buffers) -> None:
    """Broadcasts the buffers of a wrapper and records them again.

    DistributedDataParallel broadcasts in its next forward, which is after ``buffers`` were recorded.

    Args:
        wrapper: any module; those that DistributedDataParallel does not wrap are ignored.
        buffers: recorded before the first chunk.
    """
    wrapper = getattr(wrapper, "_orig_mod", wrapper)
    if not isinstance(wrapper, DistributedDataParallel):
        return
    if not (wrapper.broadcast_buffers and wrapper.require_forward_param_sync):
        return
    for prefix, module in wrapper.module.named_modules():
        for name, buffer in module._buffers.items():
            ignored = (f"{prefix}.{name}" if prefix else name) in wrapper.parameters_to_ignore
            if buffer is not None and (module, name) in buffers.copies and not ignored:
                values = buffer.detach().contiguous()
                dist.broadcast(values, group=wrapper.process_group, group_src=0)
                if values.data_ptr() != buffer.data_ptr():
                    buffer.detach().copy_(values)
    buffers.record(wrapper.module)
