"""Backbones: images to one embedding per image."""

from __future__ import annotations

import difflib
import inspect
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from pysupcon.errors import ConfigError
from pysupcon.models.concatenation import Concatenation
from pysupcon.models.config import DEFAULT_LIPSCHITZ, DEFAULT_MLP_WIDTH, DEFAULT_WIDTH, ModelConfig
from pysupcon.models.initial import freeze, is_path, load_initial_weights
from pysupcon.models.spectral import apply_spectral_norm, unbounded_layers
from pysupcon.reading import one_line
from pysupcon.user_code import call_object, import_object, is_own, is_passed, is_reference


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


class MLP(nn.Module):
    """Two hidden layers with BatchNorm and ReLU, for feature vectors.

    Shape:
        vectors [B, dim] -> embedding [B, width].
    """

    def __init__(self, dim: int, width: int = DEFAULT_MLP_WIDTH) -> None:
        super().__init__()
        self.num_features = width
        self.layers = nn.Sequential(
            nn.Linear(dim, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True),
            nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, vectors: Tensor) -> Tensor:
        embedding: Tensor = self.layers(vectors)
        return embedding


def _conv_bn_relu(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def build_backbone(
    config: ModelConfig, channels: int, image_size: int, module: nn.Module | None = None
) -> tuple[nn.Module, int]:
    """Build the backbone of ``config``.

    Args:
        config: backbones.
        channels, image_size: shape of the images.
        module: the backbone, if ``config.backbone`` records an object passed to ``pysupcon.train.run``.

    Returns:
        The backbone and the number of dimensions of its embedding. With ``encoders="two"`` or
        ``concatenated`` it is a :class:`~pysupcon.models.concatenation.Concatenation`.

    Raises:
        ConfigError: timm does not know the model or its arguments, the model has no stem to replace, its
            initial weights do not fit, or it does not map the images to embeddings.
    """
    if config.concatenated:
        built = [build_backbone(part, channels, image_size) for part in config.part_configs()]
    elif config.encoders == "two":
        built = [_build_single(config, channels, image_size) for _ in range(2)]
    else:
        return _build_single(config, channels, image_size, module)
    parts, widths = zip(*built, strict=True)
    return Concatenation(parts, widths), sum(widths)


def _build_single(
    config: ModelConfig, channels: int, image_size: int, module: nn.Module | None = None
) -> tuple[nn.Module, int]:
    if is_passed(config.backbone):
        if module is None:
            raise ConfigError(
                f"model.backbone is a {config.backbone}, which the config cannot rebuild: pass the module "
                "again, pysupcon.train.run(..., model=MODULE) or pysupcon.trainer.run.load_run(RUN, "
                "model=MODULE)"
            )
        backbone, width = module, embedding_width(module, config.backbone, _shape(channels, image_size))
    else:
        backbone, width = _build_plain(config, channels, image_size)
    if isinstance(config.pretrained, str) and is_path(config.pretrained):
        left_out = load_initial_weights(backbone, config.pretrained)
        if left_out:
            note(backbone, f"model.pretrained: {len(left_out)} weights of heads left out, e.g. {left_out[0]}")
    freeze(backbone, config.frozen_layers)
    if config.spectral_norm:
        apply_spectral_norm(backbone, config.lipschitz or DEFAULT_LIPSCHITZ, _shape(channels, image_size))
        left = unbounded_layers(backbone)
        if left:
            kinds = ", ".join(f"{name} ({count})" for name, count in left.items())
            note(
                backbone,
                "model.spectral_norm: the encoder has no Lipschitz bound, because some of its layers are not "
                f"bounded: {kinds}. Convolutions, linear layers and BatchNorm are",
            )
    return backbone, width


def _build_plain(config: ModelConfig, channels: int, image_size: int) -> tuple[nn.Module, int]:
    vectors = image_size == 0
    if vectors != (config.backbone == "mlp") and not is_own(config.backbone):
        kind = "feature vectors" if vectors else "images"
        allowed = "mlp" if vectors else "small_cnn or a timm model"
        raise ConfigError(
            f"model.backbone must be {allowed}, or package.module:name, for data of {kind}, got "
            f"{config.backbone!r}"
        )
    if config.backbone == "mlp":
        mlp = MLP(channels, config.width or DEFAULT_MLP_WIDTH)
        return mlp, mlp.num_features
    if config.backbone == "small_cnn":
        small = SmallCNN(channels, image_size, config.width or DEFAULT_WIDTH)
        return small, small.num_features
    if is_reference(config.backbone):
        return _build_own(config, channels, image_size)
    import timm

    if not timm.is_model(config.backbone):
        similar = ", ".join(difflib.get_close_matches(config.backbone, timm.list_models(), 5))
        raise ConfigError(
            "model.backbone must be small_cnn, a timm model, mlp or package.module:name, got "
            f"{config.backbone!r}" + (f" (similar: {similar})" if similar else "")
        )
    name, arguments = config.backbone, dict[str, Any](config.timm_args)
    pretrained = config.pretrained
    if isinstance(pretrained, str) and not is_path(pretrained):
        if not timm.is_model(pretrained) or pretrained.partition(".")[0] != name.partition(".")[0]:
            raise ConfigError(
                f"model.pretrained must be true, a path or the name of a timm model of the architecture "
                f"{name}, got {pretrained!r}"
            )
        name, arguments["pretrained"] = pretrained, True
    elif pretrained is True:
        arguments["pretrained"] = True
    try:
        model = timm.create_model(name, num_classes=0, in_chans=channels, **arguments)
        width = int(model.num_features)  # type: ignore[arg-type]  # not an attribute with features_only
    except Exception as error:  # timm, the model and the reader of weights have no common error
        given = f"model.timm_args {config.timm_args}"
        if pretrained:
            given = f"model.pretrained={pretrained}" + (f" and {given}" if config.timm_args else "")
        raise ConfigError(f"{given} do not fit {config.backbone}: {one_line(error)}") from error
    if config.small_stem:
        _shrink_stem(model, config.backbone, channels)
    _check_timm(model, config.backbone, channels, image_size)
    return model, width


@torch.no_grad()
def _check_timm(model: nn.Module, name: str, channels: int, image_size: int) -> None:
    """Refuse images of a size that the model does not take."""
    training = model.training
    try:
        model.eval()(torch.zeros(1, channels, image_size, image_size))
    except Exception as error:  # an assertion of timm, or an error of torch
        remedies = []
        if "img_size" in inspect.signature(type(model).__init__).parameters:
            remedies.append(f"--model.timm_args '{{img_size: {image_size}}}'")
        size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
        if size:
            remedies.append(f"--data.image_size {size[-1]}")
        raise ConfigError(
            f"model.backbone={name} does not take images of {image_size} x {image_size} pixels "
            f"({one_line(error)})" + (f": pass {' or '.join(remedies)}" if remedies else "")
        ) from error
    model.train(training)


def _build_own(config: ModelConfig, channels: int, image_size: int) -> tuple[nn.Module, int]:
    """Call the user's function or class, and find the width of the embedding by one forward pass."""
    build = import_object(config.backbone, "model.backbone")
    if isinstance(build, nn.Module) or not callable(build):
        raise ConfigError(
            f"model.backbone={config.backbone} must be a function or class that builds a torch.nn.Module, "
            f"got an object of {type(build).__name__}"
        )
    module = call_object(
        build, config.backbone, config.backbone_args, "model.backbone", "model.backbone_args"
    )
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"model.backbone={config.backbone} must return a torch.nn.Module, got {type(module).__name__}"
        )
    return module, embedding_width(module, config.backbone, _shape(channels, image_size))


def _shape(channels: int, image_size: int) -> tuple[int, ...]:
    """Shape of the model's input without the batch: [C, S, S], or [D] for vectors."""
    return (channels, image_size, image_size) if image_size else (channels,)


def embedding_width(module: nn.Module, name: str, shape: tuple[int, ...]) -> int:
    """Find the number of dimensions D of the user's backbone by a pass over two zero images.

    Parameters without influence on the embedding are frozen: DistributedDataParallel would wait for their
    gradients.

    Args:
        module: maps [B, *shape] to [B, D].
        name: its name, for messages.
        shape: shape of an image.

    Raises:
        ConfigError: the module fails, or returns something else; the message shows what.
    """
    if not isinstance(module, nn.Module):
        kind = "the class " + module.__name__ if isinstance(module, type) else type(module).__name__
        raise ConfigError(f"model.backbone must be a torch.nn.Module, got {kind}")
    training = module.training
    images = torch.zeros(2, *shape)
    contract = f"model.backbone={name} must map images {list(images.shape)} to embeddings [2, D]"
    try:
        found = module.eval()(images)
    except Exception as error:  # code of the user
        raise ConfigError(f"{contract}, but raised {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(found, Tensor):
        raise ConfigError(f"{contract}, got {type(found).__name__}")
    if found.ndim != 2 or len(found) != 2 or not found.is_floating_point():
        raise ConfigError(f"{contract}, got {found.dtype} of shape {list(found.shape)}")
    if not found.requires_grad and torch.is_grad_enabled():
        trained = [value for value in module.parameters() if value.requires_grad]
        if trained and not _has_gradient_in_training(module, images):
            module.requires_grad_(False)
            note(module, "model.backbone: its embeddings are detached from its parameters: it is not trained")
    if found.requires_grad:
        named = [(key, value) for key, value in module.named_parameters() if value.requires_grad]
        grads = torch.autograd.grad(found.sum(), [value for _, value in named], allow_unused=True)
        unused = [key for (key, _), grad in zip(named, grads, strict=True) if grad is None]
        for key in unused:
            module.get_parameter(key).requires_grad_(False)
        if unused:
            note(module, f"model.backbone: {len(unused)} parameters do not affect the embedding: {unused[0]}")
    module.train(training)
    return found.shape[1]


def _has_gradient_in_training(module: nn.Module, images: Tensor) -> bool:
    """Whether the embeddings depend on the parameters in training mode: a module may detach them only in eval
    mode. A copy is tried, because BatchNorm changes its statistics."""
    try:
        with torch.random.fork_rng(devices=[]):
            return bool(deepcopy(module).train()(images).requires_grad)
    except Exception:  # code of the user; the training will show its error
        return True


def note(module: nn.Module, text: str) -> None:
    """Attach a line that the training prints at its start."""
    module.__dict__.setdefault("pysupcon_notes", []).append(text)


def notes_of(model: nn.Module) -> list[str]:
    """Return the lines of :func:`note` of all parts of ``model``."""
    return [line for module in model.modules() for line in module.__dict__.get("pysupcon_notes", [])]


def _shrink_stem(model: nn.Module, name: str, channels: int) -> None:
    stem, pool = getattr(model, "conv1", None), getattr(model, "maxpool", None)
    if not isinstance(stem, nn.Conv2d) or pool is None:
        raise ConfigError(
            f"model.small_stem needs a backbone with conv1 and maxpool (a ResNet), got {name!r}"
        )
    model.conv1 = nn.Conv2d(channels, stem.out_channels, 3, padding=1, bias=stem.bias is not None)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
