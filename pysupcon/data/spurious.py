"""A synthetic spurious attribute: colour that agrees with the class at a given rate."""

from __future__ import annotations

import torch
from torch import Tensor

#: Colours red and green, as factors of the grey value in each channel.
COLOURS = ((1.0, 0.1, 0.1), (0.1, 1.0, 0.1))
COLOUR_NAMES = ["red", "green"]


def correlated_attribute(classes: Tensor, count: int, rate: float, seed: int) -> Tensor:
    """An attribute that equals the class for exactly the fraction ``rate`` of each class.

    The other samples of a class get the other attributes in equal numbers.

    Args:
        classes: int64 [N], in [0, count).
        count: number of attributes, at least 2.
        rate: in [0, 1], rounded to whole samples of a class. 1 / count makes class and attribute independent.
        seed: seed of the selection.

    Returns:
        int64 [N] in [0, count).
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}")
    if count < 2 or (len(classes) and (int(classes.min()) < 0 or int(classes.max()) >= count)):
        raise ValueError(f"classes must lie in [0, count) with count >= 2, got count={count}")
    generator = torch.Generator().manual_seed(seed)
    attribute = classes.clone()
    for label in classes.unique(sorted=True):
        members = (classes == label).nonzero().flatten()
        order = members[torch.randperm(len(members), generator=generator)]
        minority = order[round(rate * len(members)) :]
        attribute[minority] = (label + 1 + torch.arange(len(minority)) % (count - 1)) % count
    return attribute


def colourize(images: Tensor, attribute: Tensor, colours: tuple[tuple[float, ...], ...] = COLOURS) -> Tensor:
    """Colour grey images by their attribute.

    Args:
        images: uint8 [N, 1, H, W].
        attribute: int64 [N], indices into ``colours``.
        colours: factors of the grey value in each channel, in [0, 1].

    Returns:
        uint8 [N, 3, H, W].
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(
            f"images must be uint8 of shape [N, 1, H, W], got {images.dtype} of shape {list(images.shape)}"
        )
    factors = torch.tensor(colours)[attribute][:, :, None, None]
    return (images.float() * factors).round().to(torch.uint8)
