"""State of the first pass over a chunk, which the second pass restores: random numbers, buffers, autocast."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pysupcon.gradcache.chunks import tensors

AutocastState = dict[str, torch.dtype]
"""Device types with autocast, and its dtype."""
_Key = tuple[nn.Module, str]


class RandomState:
    """State of torch's random generators: one per device, and those that are attributes of a module.

    Args:
        devices: whose generators to record, besides the CPU.
        models: whose modules may have generators.
    """

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
    """Copies of the buffers of models.

    Args:
        models: whose buffers to copy.
        before: an earlier state, whose copies of unchanged buffers are shared.
        uncounted: buffers that change without a new version (through ``buffer.data``). They are always copied
            and restored. The set may grow later.
        running: also copy the running statistics of normalisation, which do not affect a forward in training,
            and restore every buffer.
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
        """Copies the buffers of one model."""
        for module in model.modules():
            if isinstance(module, _NormBase) and module.training and not self.running:
                continue
            for name, buffer in module._buffers.items():
                key = module, name
                if buffer is None:
                    self.copies[key] = None, 0, None
                    continue
                copied = None if before is None or key in self.uncounted else before.copies.get(key)
                if copied is None or copied[0] is not buffer or copied[1] != buffer._version:
                    copied = buffer, buffer._version, buffer.detach().clone()
                self.copies[key] = copied

    def changed_uncounted(self) -> set[_Key]:
        """Returns the buffers whose values changed although their version did not."""
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
            # Batch norm updates its statistics without a new version.
            if self.running or (module, name) in self.uncounted or buffer._version != version:
                buffer.copy_(values)


def devices_of(models: Iterable[nn.Module], inputs: Any) -> list[torch.device]:
    """Returns all devices of the parameters, buffers and inputs."""
    state = (tensor for model in models for tensor in (*model.parameters(), *model.buffers()))
    return sorted({tensor.device for tensor in (*state, *tensors(inputs))}, key=str)


def ambient_autocast(devices: Iterable[torch.device]) -> AutocastState:
    """Returns the autocast state of the caller."""
    kinds = sorted({"cpu", *(device.type for device in devices)} - {"meta"})
    return {kind: torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}


def autocast(ambient: AutocastState, *, enabled: bool = True) -> AbstractContextManager[Any]:
    """Returns a context with the caller's autocast but without its cache.

    The cache may contain weights that were cast without a graph, which a pass with a graph must not use.
    """
    stack = ExitStack()
    for kind, dtype in ambient.items():
        stack.enter_context(torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False))
    return stack
