"""Arguments of the model: backbone, projection head, classification head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pysupcon.errors import ConfigError, check

DEFAULT_WIDTH = 32
DEFAULT_PROJECTION = 128


@dataclass
class ModelConfig:
    """Backbone and heads."""

    backbone: str = "small_cnn"
    """small_cnn (8x8 to 32x32 images, trains on a CPU) or the name of any timm model, e.g. resnet18."""

    width: int | None = None
    """small_cnn only: channels of its first stage; the embedding has 4 * width dimensions. None means 32."""

    small_stem: bool = False
    """timm models with a 7x7 stem (ResNets): 3x3 convolution of stride 1 without pooling, for images of about
    32x32."""

    timm_args: dict[str, Any] = field(default_factory=dict)
    """timm only: further arguments of timm.create_model, e.g. {img_size: 32, patch_size: 4, drop_path_rate:
    0.05}."""

    projection: Literal["none", "linear", "mlp"] = "none"
    """Head between the embedding and the contrastive loss; the evaluators use the embedding before it."""

    projection_dim: int | None = None
    """Dimensions of the projection; needs a projection head. None means 128."""

    normalize: bool = True
    """Give the contrastive loss rows of unit length."""

    classifier: bool = False
    """Linear classification head on the embedding; its weight in the loss is loss.cross_entropy_weight."""

    def check(self) -> None:
        """Refuse values that cannot run.

        Raises:
            ConfigError: names the field.
        """
        small = self.backbone == "small_cnn"
        if small:
            check(not self.small_stem, "model.small_stem", "be false for small_cnn", self.small_stem)
            check(not self.timm_args, "model.timm_args", "be empty for small_cnn", self.timm_args)
        if self.width is not None:
            check(small, "model.width", f"be left out for the timm model {self.backbone}", self.width)
            check(self.width >= 1, "model.width", "be at least 1", self.width)
        if self.projection_dim is not None:
            if self.projection == "none":
                raise ConfigError(
                    "model.projection_dim has no effect with model.projection=none: leave it out"
                )
            check(self.projection_dim >= 1, "model.projection_dim", "be at least 1", self.projection_dim)

    def resolve(self) -> None:
        """Write the values that None stands for."""
        if self.backbone == "small_cnn" and self.width is None:
            self.width = DEFAULT_WIDTH
        if self.projection != "none" and self.projection_dim is None:
            self.projection_dim = DEFAULT_PROJECTION
