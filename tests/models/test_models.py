"""Models: shapes, heads, timm backbones."""

from __future__ import annotations

import pytest
import torch

from pysupcon.errors import ConfigError
from pysupcon.models import ModelConfig
from pysupcon.models.model import ContrastiveModel


def build(channels: int = 1, size: int = 8, **arguments: object) -> ContrastiveModel:
    config = ModelConfig(**arguments)  # type: ignore[arg-type]
    config.check()
    torch.manual_seed(0)
    return ContrastiveModel(config, channels=channels, image_size=size, classes=3)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32)])
def test_small_cnn(channels: int, size: int) -> None:
    model = build(channels, size, width=4, projection="mlp", projection_dim=5, classifier=True)
    images = torch.randn(6, channels, size, size)
    outputs = model(images)
    assert outputs.embedding.shape == (6, 16)
    assert outputs.projection.shape == (6, 5)
    assert outputs.logits.shape == (6, 3)
    assert torch.allclose(outputs.projection.norm(dim=1), torch.ones(6))
    (outputs.projection[:, 0].sum() + outputs.logits.square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.classifier.parameters())
    assert all(p.grad is not None for p in model.parameters())


def test_backbone_alone_gives_the_embedding() -> None:
    model = build(width=4, projection="linear").eval()
    images = torch.randn(5, 1, 8, 8)
    assert torch.equal(model.backbone(images), model(images).embedding)


def test_without_heads() -> None:
    outputs = build(width=4, normalize=False)(torch.randn(4, 1, 8, 8))
    assert outputs.logits is None
    assert torch.equal(outputs.projection, outputs.embedding)


def test_projection_is_of_unit_length_under_autocast() -> None:
    model = build(width=4, projection="mlp")
    with torch.autocast("cpu", torch.bfloat16):
        projection = model(torch.randn(4, 1, 8, 8)).projection
    assert projection.dtype == torch.float32
    assert torch.allclose(projection.norm(dim=1), torch.ones(4), atol=1e-6)


def test_timm_backbone_with_a_small_stem() -> None:
    big, small = (build(3, 32, backbone="resnet18", small_stem=stem) for stem in (False, True))
    images = torch.randn(2, 3, 32, 32)
    assert big(images).embedding.shape == small(images).embedding.shape == (2, 512)
    assert big.backbone.forward_features(images).shape[-1] == 1
    assert small.backbone.forward_features(images).shape[-1] == 4


def test_timm_arguments() -> None:
    arguments = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2}
    model = build(1, 8, backbone="vit_tiny_patch16_224", timm_args=arguments)
    assert model(torch.randn(2, 1, 8, 8)).embedding.shape == (2, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"backbone": "resnet19"},
            "model.backbone must be small_cnn, a timm model.* or .*, got 'resnet19'.*resnet18",
        ),
        (
            {"backbone": "vit_tiny_patch16_224", "small_stem": True},
            "model.small_stem needs a backbone with conv1",
        ),
        (
            {"backbone": "resnet18", "timm_args": {"wide": 2}},
            "model.timm_args {'wide': 2} do not fit resnet18",
        ),
        (
            {"backbone": "resnet18", "timm_args": {"features_only": True}},
            "model.timm_args {'features_only': True} do not fit resnet18",
        ),
    ],
)
def test_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(3, 32, **arguments)
