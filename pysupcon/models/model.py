"""The model: backbones, projection head, classification heads and decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pysupcon.errors import ConfigError
from pysupcon.models.backbones import build_backbone
from pysupcon.models.concatenation import Concatenation, concatenate_unit_features
from pysupcon.models.config import DEFAULT_LIPSCHITZ, DEFAULT_PROJECTION_DIM, ModelConfig
from pysupcon.models.decoder import build_decoder
from pysupcon.models.initial import keep_statistics
from pysupcon.models.spectral import apply_spectral_norm, within_unit_ball
from pysupcon.pairs.normalize import unit_rows
from pysupcon.user_code import is_own


class ModelOutput(NamedTuple):
    """Outputs for B images.

    Attributes:
        embedding: features of the backbone, [B, E], used by the evaluators.
        projection: input of the contrastive loss, [B, D]; of unit length unless ``normalize`` is false, or,
            with ``spectral_norm``, at most of unit length.
        logits: logits of the classification head, [B, classes]; None without one.
        reconstruction_error: mean squared error of the decoder's image, over channels and pixels, or of its
            vector, [B]; None without a decoder.
        second_logits: logits of the second backbone's classification head, [B, classes]; None without one.
    """

    embedding: Tensor
    projection: Tensor
    logits: Tensor | None
    reconstruction_error: Tensor | None = None
    second_logits: Tensor | None = None


class ContrastiveModel(nn.Module):
    """``model(images, labels)`` gives a :class:`ModelOutput`; ``model.backbone(images)`` the embedding alone.

    With ``encoders="two"``, projection and ``classifier`` use the first backbone, decoder and
    ``second_classifier`` the second; with ``joint_classifier`` one head takes the features of both. The
    embedding is the concatenation of both (Chen et al. 2022, "Perfectly Balanced").

    Args:
        config: backbones, heads and decoder.
        channels: channels of the images.
        image_size: side of the images, in pixels.
        classes: number of training labels, for classification heads and a labelled decoder.
        module: the backbone, if ``config.backbone`` records an object passed to ``pysupcon.train.run``.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        channels: int,
        image_size: int,
        classes: int,
        module: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.embedding_dim = build_backbone(config, channels, image_size, module)
        self.two_encoders = config.encoders == "two"
        widths = [self.embedding_dim]
        if self.two_encoders:
            assert isinstance(self.backbone, Concatenation)
            widths = self.backbone.widths
        self.projection = _projection(config, widths[0])
        self.projection_dim = config.projection_dim or DEFAULT_PROJECTION_DIM
        if config.projection == "none":
            self.projection_dim = widths[0]
        self.joint_classifier = config.joint_classifier
        of_head = sum(widths) if config.joint_classifier else widths[0]
        self.classifier = nn.Linear(of_head, classes) if config.classifier else None
        second = config.classifier and self.two_encoders and not config.joint_classifier
        self.second_classifier = nn.Linear(widths[1], classes) if second else None
        self.decoder = build_decoder(config, widths[-1], channels, image_size, classes)
        self._scale: Callable[[Tensor], Tensor] = _same
        if config.normalize:
            self._scale = within_unit_ball if config.spectral_norm else unit_rows
        self.frozen_layers = config.frozen_layers
        self.train()

    def train(self, mode: bool = True) -> ContrastiveModel:
        """Set the training mode, except of frozen BatchNorm layers, which use their statistics."""
        super().train(mode)
        if mode and self.frozen_layers:
            for backbone in self.backbone.parts if self.two_encoders else [self.backbone]:  # type: ignore[union-attr]
                keep_statistics(backbone, self.frozen_layers)
        return self

    def forward(self, images: Tensor, labels: Tensor | None = None) -> ModelOutput:
        """Apply the model.

        Args:
            images: [B, C, S, S].
            labels: int64 [B], required by a labelled decoder only.
        """
        features = self.backbone.forward_each(images) if self.two_encoders else [self.backbone(images)]  # type: ignore[operator]
        first, last = features[0], features[-1]
        projection = self.projection(first)
        of_head = torch.cat(features, dim=1) if self.joint_classifier else first
        return ModelOutput(
            concatenate_unit_features(features) if self.two_encoders else first,
            self._scale(projection),
            self.classifier(of_head) if self.classifier is not None else None,
            self._reconstruction_error(last, images, labels) if self.decoder is not None else None,
            self.second_classifier(last) if self.second_classifier is not None else None,
        )

    @property
    def has_head(self) -> bool:
        """Whether there is a projection head between the embedding and the contrastive loss."""
        return not isinstance(self.projection, nn.Identity)

    def project(self, images: Tensor) -> Tensor:
        """The input of the contrastive loss alone: [B, D] for images [B, C, S, S]."""
        projection = self.head_output(images)
        return self._scale(projection)

    def head_output(self, images: Tensor) -> Tensor:
        """The output of the projection head, not normalised: [B, D] for images [B, C, S, S]."""
        features = self.backbone.forward_each(images)[0] if self.two_encoders else self.backbone(images)  # type: ignore[operator]
        projection: Tensor = self.projection(features)
        return projection

    def encoder_of(self, features: Literal["embedding", "projection"]) -> Callable[[Tensor], Tensor]:
        """What maps images to the features that are evaluated: ``backbone`` or :meth:`head_output`.

        Raises:
            ConfigError: "projection", and there is no projection head.
        """
        if features == "embedding":
            return self.backbone
        if not self.has_head:
            raise ConfigError(
                "features=projection needs a model with a projection head (model.projection linear or mlp), "
                "but this model has none: the contrastive loss takes the embedding itself, so evaluate "
                "features=embedding"
            )
        return self.head_output

    def reconstruct(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Decode the embeddings of images [B, C, S, S] to images of the same shape.

        Raises:
            ValueError: there is no decoder, or it needs labels.
        """
        if self.decoder is None:
            raise ValueError("reconstruct needs a model with a decoder (model.decoder)")
        features = self.backbone.forward_each(images)[-1] if self.two_encoders else self.backbone(images)  # type: ignore[operator]
        reconstructed: Tensor = self.decoder(features, labels)
        return reconstructed

    def _reconstruction_error(self, features: Tensor, images: Tensor, labels: Tensor | None) -> Tensor:
        assert self.decoder is not None
        reconstructed = self.decoder(features, labels).to(images.dtype)  # the error has the images' precision
        error: Tensor = (reconstructed - images).square().mean(dim=tuple(range(1, images.ndim)))
        return error


def memory_format(config: ModelConfig) -> torch.memory_format:
    """Return the memory format of weights and images in a training: channels last, but contiguous for the
    user's own backbone, whose code may call ``view``, and for vectors."""
    plain = is_own(config.backbone) or config.backbone == "mlp"
    return torch.contiguous_format if plain else torch.channels_last


def _projection(config: ModelConfig, width: int) -> nn.Module:
    out_channels = config.projection_dim or DEFAULT_PROJECTION_DIM
    head: nn.Module = nn.Identity()
    if config.projection == "linear":
        head = nn.Linear(width, out_channels)
    if config.projection == "mlp":
        head = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, out_channels))
    if config.spectral_norm:  # a free scale in the head would undo the bounds of the backbone
        apply_spectral_norm(head, config.lipschitz or DEFAULT_LIPSCHITZ, [width])
    return head


def _same(rows: Tensor) -> Tensor:
    return rows
