"""How rows are divided into tiles and chunks."""

from __future__ import annotations

from torch import Tensor

__all__ = ["Slice", "slices", "tile_slices"]

Slice = tuple[int, int]
_CPU_TILE = 512  # 1 MiB of float32: a tile and its temporaries stay near the cores
_DEVICE_TILE = 4096  # enough work per launch


def slices(count: int, size: int) -> list[Slice]:
    """Returns (start, stop) of each part of ``count`` rows."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def tile_slices(rows: Tensor) -> list[Slice]:
    """Divides rows [N, ...] into the sides of tiles."""
    return slices(rows.shape[0], _CPU_TILE if rows.device.type == "cpu" else _DEVICE_TILE)
