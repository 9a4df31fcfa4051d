"""Backbones of the user: package.module:name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pysupcon.errors import ConfigError
from pysupcon.models import ModelConfig
from pysupcon.models.backbones import embedding_width, notes_of
from pysupcon.models.model import ContrastiveModel

SOURCE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=6, unused=False):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.extra = nn.Linear(4, 4) if unused else None

    def forward(self, images):
        maps = self.norm(self.conv(images))
        return maps.view(len(maps), -1)[:, :12]


def build(depth):
    layers = [nn.Flatten(), nn.LazyLinear(5)]
    return nn.Sequential(*layers, *(nn.Linear(5, 5) for _ in range(depth - 1)))


def image_maps():
    return nn.Conv2d(3, 4, 3)


def pooled():
    return nn.AdaptiveAvgPool2d(1)


def broken():
    return nn.Linear(7, 7)


def number():
    return 3


class Pairs(nn.Module):
    def forward(self, images):
        return images, images


class Detached(nn.Linear):
    def __init__(self):
        super().__init__(3, 4)

    def forward(self, images):
        return super().forward(images.mean(dim=(2, 3))).detach()


class DetachedInEval(Detached):
    def forward(self, images):
        rows = nn.Linear.forward(self, images.mean(dim=(2, 3)))
        return rows if self.training else rows.detach()


def type_error():
    return len(3)


def raises():
    raise ValueError("no weights")


module = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
constant = 3
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_backbones.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))


def build(name: str, **arguments: object) -> ContrastiveModel:
    config = ModelConfig(backbone=f"own_backbones:{name}", **arguments)  # type: ignore[arg-type]
    config.check()
    config.resolve()
    return ContrastiveModel(config, channels=3, image_size=8, classes=3)


def test_a_class_and_a_function() -> None:
    images = torch.randn(4, 3, 8, 8)
    assert build("Net", backbone_args={"width": 2})(images).embedding.shape == (4, 12)
    assert build("build", backbone_args={"depth": 2}, classifier=True)(images).logits.shape == (4, 3)


def test_with_the_other_parts_of_a_model() -> None:
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4) % 3
    model = build("Net", encoders="two", decoder="labelled", spectral_norm=True, projection="mlp")
    outputs = model(images, labels)
    assert outputs.embedding.shape == (4, 24)
    assert outputs.reconstruction_error is not None
    assert outputs.reconstruction_error.shape == (4,)


def test_a_detached_backbone_is_frozen_and_named() -> None:
    model = build("Detached", projection="linear")
    assert notes_of(model) == [
        "model.backbone: its embeddings are detached from its parameters: it is not trained"
    ]
    trained = {name.split(".")[0] for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {"projection"}
    with torch.no_grad():  # as for the evaluation of a run
        assert notes_of(build("Detached")) == []


def test_a_backbone_that_detaches_in_eval_mode_is_trained() -> None:
    model = build("DetachedInEval", projection="linear")
    assert notes_of(model) == []
    assert all(value.requires_grad for value in model.parameters())


def test_a_class_in_place_of_a_module() -> None:
    with pytest.raises(ConfigError, match=r"model.backbone must be a torch.nn.Module, got the class Linear$"):
        embedding_width(nn.Linear, "passed", (3, 8, 8))  # type: ignore[arg-type]


def test_unused_parameters_are_frozen_and_named() -> None:
    model = build("Net", backbone_args={"unused": True})
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
    assert frozen == ["backbone.extra.weight", "backbone.extra.bias"]
    assert notes_of(model) == ["model.backbone: 2 parameters do not affect the embedding: extra.weight"]
    assert model.training
    assert model.backbone.norm.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("image_maps", {}, r"embeddings \[2, D\], got torch.float32 of shape \[2, 4, 6, 6\]"),
        ("pooled", {}, r"must map images \[2, 3, 8, 8\] to embeddings .*shape \[2, 3, 1, 1\]"),
        ("Pairs", {}, r"own_backbones:Pairs must map .*, got tuple"),
        ("broken", {}, r"must map .*, but raised RuntimeError: mat1"),
        ("number", {}, "must return a torch.nn.Module, got int"),
        ("build", {"width": 3}, "model.backbone_args {'width': 3} do not fit own_backbones:build"),
        ("missing", {}, "model.backbone=own_backbones:missing cannot be imported"),
        (
            "raises",
            {},
            r"model.backbone=own_backbones:raises failed: ValueError: no weights \(.*backbones.py, line",
        ),
        ("type_error", {}, r"own_backbones:type_error failed: TypeError: object of type 'int' has no len"),
        ("module", {}, "own_backbones:module must be a function or class .*, got an object of Sequential"),
        ("constant", {}, "own_backbones:constant must be a function or class .*, got an object of int"),
    ],
)
def test_refusals_show_what_came(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(name, backbone_args=arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"backbone": "resnet18", "backbone_args": {"a": 1}},
            "model.backbone_args must be empty for resnet18",
        ),
        ({"backbone": "a.b:c", "width": 3}, "model.width must be left out for a.b:c, got 3"),
        ({"backbone": "a.b:c", "timm_args": {"a": 1}}, "model.timm_args must be empty for a.b:c"),
        ({"backbone": "a.b:c", "small_stem": True}, "model.small_stem must be false for a.b:c"),
        ({"backbone": "a.b:c", "pretrained": True}, "model.pretrained must be a file or a folder for a.b:c"),
        ({"pretrained": True}, "model.pretrained must be a file or a folder for small_cnn"),
        ({"frozen_layers": -1}, "model.frozen_layers must be at least 0, got -1"),
        ({"frozen_layers": 1, "spectral_norm": True}, "model.frozen_layers does not work with"),
        ({"frozen_layers": "backbone"}, "model.frozen_layers=backbone needs a head that is trained"),
        (
            {"backbone": "resnet18", "pretrained": True, "timm_args": {"checkpoint_path": "x"}},
            "model.pretrained and model.timm_args checkpoint_path both name initial weights",
        ),
    ],
)
def test_fields_that_do_not_fit(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**arguments).check()  # type: ignore[arg-type]
