"""The state from which a model embedded a chunk, so that a second pass over the chunk repeats the first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pysupcon.gradcache.chunks import tensors

_Autocast = dict[str, torch.dtype]
"""Device types on which autocast is on, and its dtype."""
_Key = tuple[nn.Module, str]


class Random:
    """State of torch's random numbers: the devices' own, and generators that are attributes of a module."""

    def __init__(self, devices: Sequence[torch.device], models: Iterable[nn.Module]) -> None:
        self.cpu = torch.get_rng_state()
        self.others = [
            (device, torch.get_device_module(device).get_rng_state(device))
            for device in devices
            if device.type not in ("cpu", "meta")
        ]
        self.generators = [
            (value, value.get_state())
            for model in models
            for module in model.modules()
            for value in vars(module).values()
            if isinstance(value, torch.Generator)
        ]

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.others:
            torch.get_device_module(device).set_rng_state(state, device)
        for generator, state in self.generators:
            generator.set_state(state)


class Buffers:
    """Buffers of models; those that did not change since ``before`` share its copies.

    Args:
        models: whose buffers.
        before: an earlier state.
        uncounted: buffers that change without counting a version (by ``buffer.data``): always copied and
            restored. The set may still grow.
        running: also running statistics of normalisation, which do not enter a forward in training; and every
            buffer is restored.
    """

    def __init__(
        self,
        models: Iterable[nn.Module],
        before: Buffers | None,
        uncounted: set[_Key],
        *,
        running: bool = False,
    ) -> None:
        self.running, self.uncounted = running, uncounted
        self.copies: dict[_Key, tuple[Tensor | None, int, Tensor | None]] = {}
        for model in models:
            self.record(model, before)

    def record(self, model: nn.Module, before: Buffers | None = None) -> None:
        """The state of one model, now."""
        for module in model.modules():
            if isinstance(module, _NormBase) and module.training and not self.running:
                continue
            for name, buffer in module._buffers.items():
                key = module, name
                if buffer is None:
                    self.copies[key] = None, 0, None
                    continue
                known = None if before is None or key in self.uncounted else before.copies.get(key)
                if known is None or known[0] is not buffer or known[1] != buffer._version:
                    known = buffer, buffer._version, buffer.detach().clone()
                self.copies[key] = known

    def changed_uncounted(self) -> set[_Key]:
        """Buffers whose values differ although their version does not."""
        return {
            (module, name)
            for (module, name), (buffer, version, values) in self.copies.items()
            if buffer is not None
            and values is not None
            and module._buffers[name] is buffer
            and buffer._version == version
            and not torch.equal(buffer, values)
        }

    @torch.no_grad()
    def restore(self) -> None:
        for (module, name), (buffer, version, values) in self.copies.items():
            if module._buffers[name] is not buffer:
                module._buffers[name] = buffer
            if buffer is None or values is None:
                continue
            # Batch norm moves its statistics without counting a version.
            if self.running or (module, name) in self.uncounted or buffer._version != version:
                buffer.copy_(values)


def devices_of(models: Iterable[nn.Module], inputs: Any) -> list[torch.device]:
    held = (tensor for model in models for tensor in (*model.parameters(), *model.buffers()))
    return sorted({tensor.device for tensor in (*held, *tensors(inputs))}, key=str)


def ambient_autocast(devices: Iterable[torch.device]) -> _Autocast:
    """The caller's."""
    kinds = sorted({"cpu", *(device.type for device in devices)} - {"meta"})
    return {kind: torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}


def autocast(ambient: _Autocast, *, enabled: bool = True) -> AbstractContextManager[Any]:
    """The caller's autocast, without its cache: a pass with a graph must not meet weights cast without."""
    stack = ExitStack()
    for kind, dtype in ambient.items():
        stack.enter_context(torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False))
    return stack
