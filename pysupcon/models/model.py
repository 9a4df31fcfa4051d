"""The trained model: backbone, projection head, classification head."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from pysupcon.models.backbones import build_backbone
from pysupcon.models.config import DEFAULT_PROJECTION, ModelConfig


class Outputs(NamedTuple):
    """What one forward gives, for B images.

    Attributes:
        embedding: features of the backbone, [B, E]; what the evaluators judge.
        projection: what the contrastive loss sees, [B, D]; of unit length unless ``normalize`` is false.
        logits: of the classification head, [B, classes]; None without one.
    """

    embedding: Tensor
    projection: Tensor
    logits: Tensor | None


class ContrastiveModel(nn.Module):
    """``model(images) -> Outputs``; ``model.backbone(images)`` alone gives the embedding.

    Args:
        config: backbone and heads.
        channels: of the images.
        image_size: side of the images, pixels.
        classes: of the labels that are trained on; used by the classification head only.
    """

    def __init__(self, config: ModelConfig, *, channels: int, image_size: int, classes: int) -> None:
        super().__init__()
        self.backbone, self.embedding_dim = build_backbone(config, channels, image_size)
        self.projection = _projection(config, self.embedding_dim)
        self.classifier = nn.Linear(self.embedding_dim, classes) if config.classifier else None
        self.normalize = config.normalize

    def forward(self, images: Tensor) -> Outputs:
        embedding = self.backbone(images)
        projection = self.projection(embedding)
        if self.normalize:
            # fp32: under autocast a 16-bit norm would leave rows up to 1e-3 away from unit length
            projection = F.normalize(projection.float(), dim=1)
        logits = self.classifier(embedding) if self.classifier is not None else None
        return Outputs(embedding, projection, logits)


def _projection(config: ModelConfig, width: int) -> nn.Module:
    outgoing = config.projection_dim or DEFAULT_PROJECTION
    if config.projection == "linear":
        return nn.Linear(width, outgoing)
    if config.projection == "mlp":
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, outgoing))
    return nn.Identity()
