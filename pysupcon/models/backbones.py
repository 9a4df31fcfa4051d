"""Backbones: images to one embedding per image."""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor, nn

from pysupcon.errors import ConfigError
from pysupcon.models.concatenation import Concatenation
from pysupcon.models.config import DEFAULT_LIPSCHITZ, DEFAULT_WIDTH, ModelConfig
from pysupcon.models.spectral import apply_spectral_norm
from pysupcon.reading import one_line


class SmallCNN(nn.Module):
    """Five 3x3 convolutions at three resolutions, then global average pooling.

    Shape:
        images [B, channels, H, W], H and W at least 4 -> embedding [B, 4 * width].
    """

    def __init__(self, channels: int, image_size: int, width: int = 32) -> None:
        super().__init__()
        self.num_features = 4 * width
        layers = [_conv_bn_relu(channels, width)]
        side = image_size
        for in_channels, out_channels in ((width, 2 * width), (2 * width, 4 * width)):
            if side >= 8:  # 8x8 images end with a 4x4 map
                layers.append(nn.MaxPool2d(2))
                side //= 2
            layers += [_conv_bn_relu(in_channels, out_channels), _conv_bn_relu(out_channels, out_channels)]
        self.features = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images).mean(dim=(2, 3))


def _conv_bn_relu(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def build_backbone(config: ModelConfig, channels: int, image_size: int) -> tuple[nn.Module, int]:
    """Build the backbone of ``config``.

    Returns:
        The backbone and the number of dimensions of its embedding. With ``encoders="two"`` or
        ``concatenated`` it is a :class:`~pysupcon.models.concatenation.Concatenation`.

    Raises:
        ConfigError: timm does not know the model or its arguments, or the model has no stem to replace.
    """
    if config.concatenated:
        built = [build_backbone(part, channels, image_size) for part in config.part_configs()]
    elif config.encoders == "two":
        built = [_build_single(config, channels, image_size) for _ in range(2)]
    else:
        return _build_single(config, channels, image_size)
    parts, widths = zip(*built, strict=True)
    return Concatenation(parts, widths), sum(widths)


def _build_single(config: ModelConfig, channels: int, image_size: int) -> tuple[nn.Module, int]:
    backbone, width = _build_plain(config, channels, image_size)
    if config.spectral_norm:
        apply_spectral_norm(backbone, config.lipschitz or DEFAULT_LIPSCHITZ)
    return backbone, width


def _build_plain(config: ModelConfig, channels: int, image_size: int) -> tuple[nn.Module, int]:
    if config.backbone == "small_cnn":
        small = SmallCNN(channels, image_size, config.width or DEFAULT_WIDTH)
        return small, small.num_features
    import timm

    if not timm.is_model(config.backbone):
        similar = ", ".join(difflib.get_close_matches(config.backbone, timm.list_models(), 5))
        raise ConfigError(
            f"model.backbone must be small_cnn or a timm model, got {config.backbone!r}"
            + (f" (similar: {similar})" if similar else "")
        )
    arguments: dict[str, Any] = dict(config.timm_args)
    try:
        model = timm.create_model(config.backbone, num_classes=0, in_chans=channels, **arguments)
        width = int(model.num_features)  # type: ignore[arg-type]  # not an attribute with features_only
    except Exception as error:  # timm, the model and the reader of weights have no common error
        raise ConfigError(
            f"model.timm_args {config.timm_args} do not fit {config.backbone}: {one_line(error)}"
        ) from error
    if config.small_stem:
        _shrink_stem(model, config.backbone, channels)
    return model, width


def _shrink_stem(model: nn.Module, name: str, channels: int) -> None:
    stem, pool = getattr(model, "conv1", None), getattr(model, "maxpool", None)
    if not isinstance(stem, nn.Conv2d) or pool is None:
        raise ConfigError(
            f"model.small_stem needs a backbone with conv1 and maxpool (a ResNet), got {name!r}"
        )
    model.conv1 = nn.Conv2d(channels, stem.out_channels, 3, padding=1, bias=stem.bias is not None)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
