"""Counter-based random numbers: the numbers of a draw do not depend on other draws or on the process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_BLOCK = 4  # numbers per position of the Philox counter


def philox_uniforms(seed: int, draws: Sequence[int], count: int) -> Tensor:
    """``count`` uniform random numbers for every draw, determined by seed and draw.

    The generator is Philox (Salmon et al. 2011), in which every draw owns a range of the counter.

    Args:
        seed: seed of the stream; only its lowest 64 bits are used.
        draws: indices of the draws, at least 0; fastest for indices that lie close together, as in a batch.
        count: random numbers per draw.

    Returns:
        float64 [len(draws), count] in [0, 1).
    """
    if not len(draws) or not count:
        return torch.empty(len(draws), count, dtype=torch.float64)
    first, last = min(draws), max(draws)
    if last - first >= 16 * len(draws):  # far apart: avoids generating all in between
        return torch.cat([philox_uniforms(seed, [draw], count) for draw in draws])
    blocks = -(-count // _BLOCK)
    stream = np.random.Philox(key=seed % 2**64)
    stream.advance(first * blocks)
    raw = stream.random_raw((last - first + 1) * blocks * _BLOCK).reshape(-1, blocks * _BLOCK)
    selected = raw[np.asarray(draws, dtype=np.int64) - first, :count]
    return torch.from_numpy((selected >> np.uint64(11)) * 2.0**-53)  # a float64 has 53 bits of precision
