"""Memory of the CPU kernels that is not a tensor: the scratch of each thread, and values per row.

Sizes follow csrc/cpu: ``choose_block``, ``SideWeights`` and ``Partners`` in driver.cpp and partners.h,
``lay_out`` in kernels.cpp. Only pages that the kernels write to count, as in resident memory.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pysupcon.losses import LOSSES_BY_NAME

_LARGEST_BLOCK, _SMALLEST_BLOCK, _UNIT = 256, 64, 32
_TILE_STRIDE = _LARGEST_BLOCK + 16
_CACHE = 176 * 1024
_WORK_OF_ONE = 1 << 17
_LANES = {"avx512": 16, "avx2": 8, "generic": 4}
"""32-bit numbers in a vector."""
_LOG2E = 1.4426950408889634


def needed_statistics(loss: str) -> dict[str, object]:
    """Return what a loss with the options of the trainer needs: negatives, positives, epsilon."""
    description = LOSSES_BY_NAME[loss]
    defaults = description.trainer_defaults[loss]
    own = {name: defaults[name] for name in description.own_parameters if name in defaults}
    return dict(description.statistics(**own))


def block_rows(n: int, dim: int, itemsize: int) -> int:
    """Return the rows in a block of a problem with N rows."""
    wide = 2 if itemsize == 8 else 1
    cache = _CACHE // wide // (3 * max(dim, 32) + _TILE_STRIDE) // _UNIT * _UNIT
    small = math.ceil(n // 8 / _UNIT) * _UNIT
    return min(max(min(cache, small), _SMALLEST_BLOCK), _LARGEST_BLOCK)


def thread_bytes(n: int, dim: int, itemsize: int, fixed: bool, isa: str) -> int:
    """Return the scratch of one thread.

    It holds two blocks of rows, a transposed one, the weights of a pair of blocks, and without a fixed
    reference the similarities too.
    """
    size = 8 if itemsize == 8 else 4
    vector = 4 * _LANES.get(isa, 4)
    padded = block_rows(n, dim, itemsize)
    width = math.ceil(dim / (2 * vector // size)) * (2 * vector // size)
    weights = (1 if fixed else 2) * padded * _TILE_STRIDE
    sums = 4 * (vector + size) * padded
    return size * (3 * padded * width + weights + 18 * padded) + sums


def worker_count(n: int, dim: int, itemsize: int, pairs: float, threads: int) -> int:
    """Return the number of threads that share a pass over ``pairs`` pairs of rows."""
    blocks = math.ceil(n / block_rows(n, dim, itemsize))
    each = 4 if blocks >= 256 else 2 if blocks >= 64 else 1
    width = max(math.ceil(blocks / each) // 2, 1)
    return max(min(threads, width, int(pairs * dim / _WORK_OF_ONE)), 1)


class Problem(NamedTuple):
    """A loss on rows of unit length, as the CPU kernels see it."""

    loss: str
    dim: int
    classes: int
    itemsize: int
    """Bytes of a number of a row."""
    temperature: float
    threads: int
    isa: str

    @property
    def fixed(self) -> bool:
        """Whether the kernels form all exponentials relative to one number: similarities allow it."""
        limit = 900 if self.itemsize == 8 else 100
        return 2 * math.ceil(_LOG2E / self.temperature * (1 + 1e-4)) <= limit

    def values_bytes(self, n: int) -> int:
        """Return the values per row that a pass holds besides tensors."""
        needed = needed_statistics(self.loss)
        instances = LOSSES_BY_NAME[self.loss].needs_instances
        arrays = 0
        if needed.get("negatives"):
            arrays += 1 if self.fixed else 2
        if needed.get("positives"):
            arrays += (2 if self.fixed else 3) + instances
        if "epsilon" in needed:  # a pass of its own
            arrays = max(arrays, 2)
        return n * (2 * arrays * (8 if self.itemsize == 8 else 4) + 4 * (1 + instances))

    def scratch_bytes(self, n: int) -> int:
        """Return the scratch of all threads, which they keep after the pass."""
        share = 1 if needed_statistics(self.loss).get("negatives") else min(self.classes, n)
        workers = worker_count(n, self.dim, self.itemsize, n * n / 2 / share, self.threads)
        return workers * thread_bytes(n, self.dim, self.itemsize, self.fixed, self.isa)
