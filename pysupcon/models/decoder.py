"""The decoders of a class-conditional autoencoder, from an embedding to the image or vector of features.

Reconstruction and cross-entropy in addition to a contrastive loss keep the differences between images of a
class. They break the permutation invariance of the contrastive loss within a class (Chen et al. 2022,
"Perfectly Balanced", arXiv 2204.07596, section 4.2).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pysupcon.errors import ConfigError
from pysupcon.models.config import DEFAULT_WIDTH, ModelConfig

LABEL_EMBEDDING_DIM = 16
"""Dimensions of the label embedding of a labelled decoder."""
MIN_START_SIDE, MAX_START_SIDE = 4, 7
"""Side of the first feature map of a decoder, in pixels."""


class ResizeBlock(nn.Module):
    """A basic ResNet block with upsampling: nearest-neighbour resizing precedes the second 3x3 convolution.

    Resizing avoids the checkerboard artefacts of transposed convolutions. GroupNorm does not depend on the
    batch, so the result is the same for chunks of a batch and for several processes.

    Shape:
        [B, in_channels, H, W] -> [B, out_channels, scale * H, scale * W].
    """

    def __init__(self, in_channels: int, out_channels: int, scale: int = 1) -> None:
        super().__init__()
        self.scale = scale
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1, bias=False)
        self.norm1 = _norm(in_channels)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = _norm(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), _norm(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(self._resize(out)))
        # A 1x1 convolution commutes with the resizing and costs a quarter before it.
        return F.relu(out + self._resize(self.shortcut(x)))

    def _resize(self, x: Tensor) -> Tensor:
        return x if self.scale == 1 else F.interpolate(x, scale_factor=float(self.scale), mode="nearest")


class Decoder(nn.Module):
    """Decodes an embedding to an image through blocks that double the side.

    Args:
        embedding_dim: dimensions E of the embedding.
        channels, image_size: shape of the image. The side must be 4 to 7 times a power of two.
        width: channels of the first feature map, halved with each doubling of the side.
        min_width: smallest number of channels.
        blocks: blocks per side; with more than one, also before the first doubling.
        classes: number of labels of a labelled decoder; None for a decoder without labels.

    Shape:
        embedding [B, E], labels int64 [B] (if ``classes``) -> images [B, channels, S, S].

    Raises:
        ConfigError: the side is not 4 to 7 times a power of two.
    """

    def __init__(
        self,
        embedding_dim: int,
        channels: int,
        image_size: int,
        *,
        width: int,
        min_width: int,
        blocks: int = 1,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        start, doublings = start_side(image_size)
        self.label: nn.Embedding | None = None
        if classes is not None:
            self.label = nn.Embedding(classes, LABEL_EMBEDDING_DIM)
            embedding_dim += LABEL_EMBEDDING_DIM
        self.start = (width, start, start)
        self.widen = nn.Linear(embedding_dim, math.prod(self.start))
        layers: list[nn.Module] = [ResizeBlock(width, width) for _ in range(blocks if blocks > 1 else 0)]
        for _ in range(doublings):
            out_channels = max(width // 2, min(width, min_width))
            layers.append(ResizeBlock(width, out_channels, scale=2))
            layers += [ResizeBlock(out_channels, out_channels) for _ in range(blocks - 1)]
            width = out_channels
        self.blocks = nn.Sequential(*layers)
        self.image = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, embedding: Tensor, labels: Tensor | None = None) -> Tensor:
        embedding = _with_labels(embedding, labels, self.label)
        maps: Tensor = F.relu(self.widen(embedding)).unflatten(1, self.start)
        images: Tensor = self.image(self.blocks(maps))
        return images


class VectorDecoder(nn.Module):
    """Decodes an embedding to a vector of features through one hidden layer of the embedding's width.

    Args:
        embedding_dim: dimensions E of the embedding.
        dim: dimensions D of the vector.
        classes: number of labels of a labelled decoder; None for a decoder without labels.

    Shape:
        embedding [B, E], labels int64 [B] (if ``classes``) -> vectors [B, D].
    """

    def __init__(self, embedding_dim: int, dim: int, *, classes: int | None = None) -> None:
        super().__init__()
        self.label: nn.Embedding | None = None
        inputs = embedding_dim
        if classes is not None:
            self.label = nn.Embedding(classes, LABEL_EMBEDDING_DIM)
            inputs += LABEL_EMBEDDING_DIM
        self.layers = nn.Sequential(
            nn.Linear(inputs, embedding_dim), nn.ReLU(inplace=True), nn.Linear(embedding_dim, dim)
        )

    def forward(self, embedding: Tensor, labels: Tensor | None = None) -> Tensor:
        vectors: Tensor = self.layers(_with_labels(embedding, labels, self.label))
        return vectors


def _with_labels(embedding: Tensor, labels: Tensor | None, label: nn.Embedding | None) -> Tensor:
    """The input of a decoder: with the embeddings of the labels, if it has any."""
    if label is None:
        return embedding
    if labels is None:
        raise ValueError("labels must be given to a labelled decoder (one per sample), got None")
    return torch.cat([embedding, label(labels).to(embedding.dtype)], dim=1)


def start_side(image_size: int) -> tuple[int, int]:
    """Side of the first feature map and number of doublings, e.g. (7, 2) for 28 = 7 * 2 * 2.

    Raises:
        ConfigError: the side is not 4 to 7 times a power of two.
    """
    side, doublings = image_size, 0
    while side > MAX_START_SIDE and side % 2 == 0:
        side, doublings = side // 2, doublings + 1
    if not MIN_START_SIDE <= side <= MAX_START_SIDE:
        raise ConfigError(
            f"model.decoder makes images whose side is 4, 5, 6 or 7 times a power of two (8, 28, 32, 64, "
            f"224, ...), got {image_size}: set data.image_size"
        )
    return side, doublings


def build_decoder(
    config: ModelConfig, embedding_dim: int, channels: int, image_size: int, classes: int
) -> Decoder | VectorDecoder | None:
    """The decoder of ``config``, or None.

    It mirrors a ResNet-18 for timm models, and costs half of the work of small_cnn for that backbone. Vectors
    (``image_size`` 0) have ``channels`` dimensions.
    """
    if config.decoder == "none":
        return None
    num_labels = classes if config.decoder == "labelled" else None
    if image_size == 0:
        return VectorDecoder(embedding_dim, channels, classes=num_labels)
    if config.backbone == "small_cnn":
        width = config.width or DEFAULT_WIDTH
        size = {"width": 2 * width, "min_width": 8, "blocks": 1}
    else:
        size = {"width": min(embedding_dim, 512), "min_width": 64, "blocks": 2}
    return Decoder(embedding_dim, channels, image_size, **size, classes=num_labels)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(channels, max(channels // 16, 1)), channels)
