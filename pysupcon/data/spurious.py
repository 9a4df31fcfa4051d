"""A spurious attribute for images that have none: colour, which goes with the class at a chosen rate."""

from __future__ import annotations

import torch
from torch import Tensor

#: One colour for each class: red, green, share of the grey value in each channel.
COLOURS = ((1.0, 0.1, 0.1), (0.1, 1.0, 0.1))
COLOUR_NAMES = ["red", "green"]


def correlated_attribute(classes: Tensor, count: int, rate: float, seed: int) -> Tensor:
    """An attribute for every sample that equals its class in the share ``rate`` of each class, exactly.

    The other samples of a class take the other attributes in turn, so each is as frequent as can be.

    Args:
        classes: int64 [N], in [0, count).
        count: of the attributes, 2 or more.
        rate: in [0, 1]; 1 / count makes class and attribute independent. Rounded to whole samples of a class.
        seed: the same seed, classes, count and rate give the same attributes.

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
        strange = order[round(rate * len(members)) :]
        attribute[strange] = (label + 1 + torch.arange(len(strange)) % (count - 1)) % count
    return attribute


def colourize(images: Tensor, attribute: Tensor, colours: tuple[tuple[float, ...], ...] = COLOURS) -> Tensor:
    """Grey images in the colour of their attribute.

    Args:
        images: uint8 [N, 1, H, W].
        attribute: int64 [N], indices into ``colours``.
        colours: share of the grey value in each channel, in [0, 1].

    Returns:
        uint8 [N, 3, H, W].
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(
            f"images must be uint8 of shape [N, 1, H, W], got {images.dtype} of shape {list(images.shape)}"
        )
    shares = torch.tensor(colours)[attribute][:, :, None, None]
    return (images.float() * shares).round().to(torch.uint8)
