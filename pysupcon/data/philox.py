"""Random numbers with a place of their own for every draw: whoever asks, and for whatever else, gets the
same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_BLOCK = 4  # numbers that Philox makes at one position of its counter


def philox_uniforms(seed: int, draws: Sequence[int], count: int) -> Tensor:
    """``count`` numbers for every draw, a function of (seed, draw) alone.

    They are read from the counter-based generator of Salmon et al. 2011 (Philox), whose stream has no state
    that would have to be wound forward: draw d owns a range of the counter.

    Args:
        seed: of the stream; only its lowest 64 bits count.
        draws: numbers of the draws, not negative; fastest where they lie close together, as in a batch.
        count: numbers of each draw.

    Returns:
        float64 [len(draws), count] in [0, 1).
    """
    if not len(draws) or not count:
        return torch.empty(len(draws), count, dtype=torch.float64)
    first, last = min(draws), max(draws)
    if last - first >= 16 * len(draws):  # one by one rather than all that lies between
        return torch.cat([philox_uniforms(seed, [draw], count) for draw in draws])
    blocks = -(-count // _BLOCK)
    stream = np.random.Philox(key=seed % 2**64)
    stream.advance(first * blocks)
    raw = stream.random_raw((last - first + 1) * blocks * _BLOCK).reshape(-1, blocks * _BLOCK)
    mine = raw[np.asarray(draws, dtype=np.int64) - first, :count]
    return torch.from_numpy((mine >> np.uint64(11)) * 2.0**-53)  # 53 bits fill a float64
