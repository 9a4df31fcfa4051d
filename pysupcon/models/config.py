"""Arguments of the model: backbones, projection head, classification head and decoder."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Literal

from pysupcon.errors import ConfigError, check
from pysupcon.user_code import PlainValue, is_own, is_passed, is_reference

_INITIAL_WEIGHTS = ("pretrained", "checkpoint_path", "cache_dir")
_PRETRAINED_CONFIGS = ("pretrained_cfg", "pretrained_cfg_overlay")
_WEIGHT_SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load")
"""Entries of timm's ``PretrainedCfg`` that name weights."""

DEFAULT_WIDTH = 32
DEFAULT_MLP_WIDTH = 256
DEFAULT_PROJECTION_DIM = 128
DEFAULT_LIPSCHITZ = 1.0


@dataclass
class ModelConfig:
    """Backbone, heads and decoder."""

    backbone: str = "small_cnn"
    """small_cnn (for 8x8 to 32x32 images, trainable on a CPU), mlp (for feature vectors), the name of a timm
    model, e.g. resnet18, or package.module:name, a function or class of your own that returns a module. It
    maps images [B, C, S, S], or vectors [B, E], to embeddings [B, D]."""

    backbone_args: dict[str, PlainValue] = field(default_factory=dict)
    """package.module:name only: its keyword arguments."""

    pretrained: bool | str = False
    """Initial weights of the backbone. true: timm's weights of the backbone; the name of a timm model of the
    same architecture with a tag, e.g. resnet18.a1_in1k; a file (.safetensors, or a state dict of torch.save);
    or the folder of a run, a checkpoint or an export. Weights of heads in a file are left out. Only the start
    of a training reads them."""

    frozen_layers: int | list[str] | Literal["backbone"] = 0
    """Part of the backbone that is not trained: the number of its first stages (of timm's layer groups, whose
    first is the stem; of the direct submodules of other backbones), a list of prefixes of parameter names,
    e.g. [conv1, bn1, layer1], or backbone: all of it. Frozen BatchNorm layers use their statistics and keep
    them."""

    width: int | None = None
    """small_cnn: channels of the first stage; the embedding has 4 * width dimensions; None means 32. mlp:
    width of both layers and of the embedding; None means 256."""

    small_stem: bool = False
    """For timm models with a 7x7 stem (ResNets): replace the stem by a 3x3 convolution of stride 1 without
    pooling, for images of about 32x32."""

    timm_args: dict[str, PlainValue] = field(default_factory=dict)
    """timm only: additional arguments of timm.create_model, e.g. {img_size: 32, patch_size: 4,
    drop_path_rate: 0.05}. Initial weights that they name (pretrained, checkpoint_path, pretrained_cfg) are
    read by a training only: the model of a finished run is built without them."""

    projection: Literal["none", "linear", "mlp"] = "none"
    """Head between the embedding and the contrastive loss. The evaluators use the embedding, or the
    output of the head with evaluation.features=projection."""

    projection_dim: int | None = None
    """Dimensions of the projection. Requires a projection head. None means 128."""

    normalize: bool = True
    """Normalise the input of the contrastive loss to unit length."""

    classifier: bool = False
    """Linear classification head on the embedding; its weight in the loss is loss.cross_entropy_weight."""

    joint_classifier: bool = False
    """encoders=two only: one classification head on the concatenated features of both backbones, which are
    not normalised for it, instead of one head on each."""

    decoder: Literal["none", "plain", "labelled"] = "none"
    """Reconstructs the image from the embedding with resize convolutions, or the vector of features with one
    hidden layer. loss.reconstruction_weight weighs its squared error. labelled: the decoder also gets the
    training label. The side of the images must be 4, 5, 6 or 7 times a power of two."""

    encoders: Literal["one", "two"] = "one"
    """two: two backbones of the same architecture, the first trained by the contrastive loss, the second by
    reconstruction, each with a classification head if model.classifier (one for both with
    model.joint_classifier). The embedding is the concatenation of both, each of unit length."""

    spectral_norm: bool = False
    """Bound the Lipschitz constant of every convolution, linear layer and BatchNorm of the backbone and the
    projection head by lipschitz: weights are divided by their largest singular value, as maps of images of
    their size (one power iteration per step), and the scale of BatchNorm is clamped. The input of the loss is
    then divided by its length only if that is above 1, because small embeddings on the unit sphere would undo
    the bound. LayerNorm, GroupNorm and attention are not bounded; the start of the training says so. See
    evaluation.lipschitz."""

    lipschitz: float | None = None
    """Largest Lipschitz constant of a layer. Requires spectral_norm. None means 1, with which small_cnn
    hardly learns, because each ReLU shortens the differences of images; 1.5 to 2 train it."""

    momentum: float = 0.0
    """MoCo: a key encoder, whose weights are an exponential moving average of the trained weights with this
    momentum, e.g. 0.99, encodes the second view. The rows of the first view are contrasted with these keys
    and with loss.queue earlier ones. Evaluation uses the trained encoder. 0: no key encoder."""

    concatenated: list[dict] = field(default_factory=list)
    """Written by `python -m pysupcon concatenate`: how each of the concatenated frozen backbones was trained
    (model, loss, optimizer, epochs). Such a run can be evaluated but not trained."""

    def check(self) -> None:
        """Check the values.

        Raises:
            ConfigError: a field is invalid; names the field.
        """
        if self.concatenated:
            self._check_concatenated()
            return
        small = self.backbone in ("small_cnn", "mlp")
        own = is_own(self.backbone)
        if is_passed(self.backbone) and self.encoders == "two":
            raise ConfigError(
                "model.encoders=two builds two backbones: name a function as package.module:name in "
                "model.backbone instead of passing a module"
            )
        if small or own:
            check(not self.small_stem, "model.small_stem", f"be false for {self.backbone}", self.small_stem)
            check(not self.timm_args, "model.timm_args", f"be empty for {self.backbone}", self.timm_args)
        if not is_reference(self.backbone):
            contract = f"be empty for {self.backbone}: it is for package.module:name"
            check(not self.backbone_args, "model.backbone_args", contract, self.backbone_args)
        self._check_initial_weights(small or own)
        self._check_frozen()
        if self.width is not None:
            kind = "" if own else "the timm model "
            check(small, "model.width", f"be left out for {kind}{self.backbone}", self.width)
            check(self.width >= 1, "model.width", "be at least 1", self.width)
        if self.projection_dim is not None:
            if self.projection == "none":
                raise ConfigError(
                    "model.projection_dim has no effect with model.projection=none: leave it out"
                )
            check(self.projection_dim >= 1, "model.projection_dim", "be at least 1", self.projection_dim)
        if self.lipschitz is not None:
            if not self.spectral_norm:
                raise ConfigError(
                    "model.lipschitz has no effect with model.spectral_norm=false: leave it out"
                )
            check(self.lipschitz > 0, "model.lipschitz", "be greater than 0", self.lipschitz)
        check(0 <= self.momentum < 1, "model.momentum", "lie in [0, 1)", self.momentum)
        if self.joint_classifier and not (self.classifier and self.encoders == "two"):
            raise ConfigError(
                f"model.joint_classifier needs model.classifier=true and model.encoders=two, got "
                f"{str(self.classifier).lower()} and {self.encoders}"
            )
        if self.encoders == "two" and self.decoder == "none":
            raise ConfigError(
                "model.encoders=two needs model.decoder, which trains the second backbone; got none"
            )

    def resolve(self) -> None:
        """Replace None by the default values."""
        if self.concatenated:
            return
        if self.backbone == "small_cnn" and self.width is None:
            self.width = DEFAULT_WIDTH
        if self.backbone == "mlp" and self.width is None:
            self.width = DEFAULT_MLP_WIDTH
        if self.projection != "none" and self.projection_dim is None:
            self.projection_dim = DEFAULT_PROJECTION_DIM
        if self.spectral_norm and self.lipschitz is None:
            self.lipschitz = DEFAULT_LIPSCHITZ

    def without_initial_weights(self) -> ModelConfig:
        """Config of the same model for weights that are loaded afterwards.

        timm then opens no file and no URL: neither ``pretrained``, nor ``checkpoint_path``, nor a source in
        ``pretrained_cfg`` or ``pretrained_cfg_overlay``, whose other entries may shape the model.
        """
        arguments: dict[str, PlainValue] = {}
        for name, value in self.timm_args.items():
            if name not in _INITIAL_WEIGHTS:
                if name in _PRETRAINED_CONFIGS and isinstance(value, dict):
                    value = {key: entry for key, entry in value.items() if key not in _WEIGHT_SOURCES}
                arguments[name] = value
        return replace(self, pretrained=False, timm_args=arguments)

    def part_configs(self) -> list[ModelConfig]:
        """Configs of the backbones in ``concatenated``, without initial weights, and without spectral norm,
        which their weights include.

        Raises:
            ConfigError: an entry does not describe a trained model.
        """
        configs = []
        for number, entry in enumerate(self.concatenated):
            try:
                part = ModelConfig(**{**entry["model"], "spectral_norm": False, "lipschitz": None})
                part.check()
            except (KeyError, TypeError, ConfigError) as error:
                raise ConfigError(
                    f"model.concatenated[{number}] must describe a trained model: {error!r}"
                ) from error
            part.resolve()
            configs.append(part.without_initial_weights())
        return configs

    def _check_initial_weights(self, without_timm: bool) -> None:
        if self.pretrained is False:
            return
        if without_timm:
            contract = f"be a file or a folder for {self.backbone}, which is not a timm model"
            check(self.pretrained is not True, "model.pretrained", contract, self.pretrained)
        check(self.pretrained != "", "model.pretrained", "be true, a path or the name of a timm model", "")
        given = [name for name in _INITIAL_WEIGHTS[:2] if self.timm_args.get(name)]
        if given:
            raise ConfigError(
                f"model.pretrained and model.timm_args {given[0]} both name initial weights: leave one out"
            )

    def _check_frozen(self) -> None:
        frozen = self.frozen_layers
        if isinstance(frozen, int):
            check(frozen >= 0, "model.frozen_layers", "be at least 0", frozen)
        if not frozen:
            return
        if self.spectral_norm:
            raise ConfigError(
                "model.frozen_layers does not work with model.spectral_norm, which scales the weights in "
                "each step: leave one out"
            )
        heads = self.projection != "none" or self.classifier or self.decoder != "none"
        if frozen == "backbone" and not heads:
            raise ConfigError(
                "model.frozen_layers=backbone needs a head that is trained: pass --model.projection mlp or "
                "--model.classifier true"
            )

    def _check_concatenated(self) -> None:
        plain = ModelConfig()
        for entry in fields(self):
            if entry.name != "concatenated" and getattr(self, entry.name) != getattr(plain, entry.name):
                raise ConfigError(
                    f"model.{entry.name} has no effect with model.concatenated, which describes the "
                    "backbones: leave it out"
                )
        self.part_configs()
