"""Initial weights from files, frozen layers, and sizes of images that a timm model does not take."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pysupcon.errors import ConfigError
from pysupcon.models import ModelConfig
from pysupcon.models.backbones import notes_of
from pysupcon.models.model import ContrastiveModel
from pysupcon.trainer import OptimizerConfig
from pysupcon.trainer.optim import build_optimizer


def build(channels: int = 1, size: int = 8, **arguments: object) -> ContrastiveModel:
    config = ModelConfig(**{"width": 4, **arguments})  # type: ignore[arg-type]
    config.check()
    config.resolve()
    return ContrastiveModel(config, channels=channels, image_size=size, classes=3)


def of(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}{name}": value.clone() for name, value in model.state_dict().items()}


def same(model: ContrastiveModel, weights: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, weights[name]) for name, value in model.backbone.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.encoder."])
def test_state_dicts_of_other_trainers(tmp_path: Path, prefix: str) -> None:
    backbone = build().backbone
    content = {**of(backbone, prefix), "head.weight": torch.zeros(2, 3)}
    for name, value in (("a.pt", content), ("b.pth", {"model": content, "epoch": 3})):
        torch.save(value, tmp_path / name)
        model = build(pretrained=str(tmp_path / name))
        assert same(model, of(backbone))
        assert notes_of(model) == ["model.pretrained: 1 weights of heads left out, e.g. head.weight"]


def test_the_folder_of_a_run(tmp_path: Path) -> None:
    trained = build(projection="mlp")
    save_file(of(trained), tmp_path / "model.safetensors")
    assert same(build(classifier=True, pretrained=str(tmp_path)), of(trained.backbone))
    two = build(encoders="two", decoder="plain", pretrained=str(tmp_path / "model.safetensors"))
    assert all(torch.equal(value, of(trained.backbone)[name]) for part in two.backbone.parts
               for name, value in part.state_dict().items())  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features.0.0.weight": None}, "of another backbone: missing: features.0.0.weight$"),
        ({"features.9.bias": torch.zeros(1)}, "of another backbone: unexpected: features.9.bias$"),
        (
            {"features.0.0.weight": torch.zeros(4, 3, 3, 3)},
            r"of another shape: features.0.0.weight \(\[4, 3, 3, 3\] instead of \[4, 1, 3, 3\]\)$",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    changed: dict[str, Tensor | None] = {**of(build().backbone), **change}
    path = tmp_path / "x.safetensors"
    save_file({name: value for name, value in changed.items() if value is not None}, path)
    with pytest.raises(ConfigError, match=message):
        build(pretrained=str(path))


def test_weights_of_another_network_are_named(tmp_path: Path) -> None:
    torch.save(of(nn.Sequential(nn.Linear(2, 2))), tmp_path / "x.pt")
    with pytest.raises(ConfigError, match=r"missing: features.0.0.weight, .* and \d+ more"):
        build(pretrained=str(tmp_path / "x.pt"))


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    (tmp_path / "text.pt").write_text("text")
    (tmp_path / "cut.safetensors").write_bytes(b"12345678")
    torch.save({"a": 1}, tmp_path / "empty.pt")
    for name, message in {
        "module.pt": "holds Python objects, not weights alone",
        "text.pt": "holds Python objects|cannot be read",
        "cut.safetensors": "cannot be read",
        "empty.pt": "must hold a state dict of tensors",
        "none.pt": "there is no file",
    }.items():
        with pytest.raises(ConfigError, match=f"model.pretrained=.*{name}.*({message})") as caught:
            build(pretrained=str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_timm_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []
    create = timm.create_model

    def noted(name: str, pretrained: bool = False, **arguments: object) -> nn.Module:
        asked.append((name, pretrained))
        return create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", noted)
    for pretrained in (True, "resnet10t.c3_in1k"):
        build(3, 32, backbone="resnet10t", width=None, pretrained=pretrained)
    assert asked == [("resnet10t", True), ("resnet10t.c3_in1k", True)]
    with pytest.raises(ConfigError, match="timm model of the architecture resnet10t, got 'resnet18'"):
        build(3, 32, backbone="resnet10t", width=None, pretrained="resnet18")


def frozen(model: ContrastiveModel) -> list[str]:
    return [name for name, value in model.backbone.named_parameters() if not value.requires_grad]


def test_the_first_stages_are_frozen() -> None:
    names = frozen(build(3, 32, backbone="resnet10t", width=None, frozen_layers=2))
    assert {name.partition(".")[0] for name in names} == {"conv1", "bn1", "layer1"}
    assert {name.split(".")[1] for name in frozen(build(frozen_layers=2))} == {"0", "2"}  # 1: pooling
    with pytest.raises(ConfigError, match="must be at most 5, the stages of the backbone, got 9"):
        build(frozen_layers=9)


def test_layers_by_name() -> None:
    assert frozen(build(frozen_layers=["features.0.1"])) == ["features.0.1.weight", "features.0.1.bias"]
    with pytest.raises(ConfigError, match=r"no parameter .* prefix layer1; its parts are features$"):
        build(frozen_layers=["layer1"])


def test_frozen_batch_norm_keeps_its_statistics() -> None:
    model = build(frozen_layers=["features.0"], classifier=True)
    for _ in range(2):
        model.eval()
        model.train()
    before = of(model.backbone)
    model(torch.randn(8, 1, 8, 8)).logits.sum().backward()
    changed = {name for name, value in model.backbone.state_dict().items() if not value.equal(before[name])}
    assert changed
    assert not any(name.startswith("features.0.") for name in changed)
    assert model.backbone.features[0][0].weight.grad is None
    whole = build(frozen_layers="backbone", classifier=True)
    assert not any(module.training for module in whole.backbone.modules() if isinstance(module, _BatchNorm))


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_the_rate_of_the_backbone(name: str) -> None:
    config = OptimizerConfig(name=name, backbone_scale=0.1)  # type: ignore[arg-type]
    config.resolve()
    model = build(classifier=True, frozen_layers=1)
    optimizer = build_optimizer(config, model)
    rates = {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}
    decays = {
        id(value): group["weight_decay"] for group in optimizer.param_groups for value in group["params"]
    }
    for key, value in model.named_parameters():
        if not value.requires_grad:
            assert id(value) not in rates
            continue
        assert rates[id(value)] == pytest.approx(1e-4 if key.startswith("backbone.") else 1e-3)
        assert (decays[id(value)] > 0) == (value.ndim > 1)
    assert optimizer.param_groups[0]["lr"] == 1e-3  # the log shows the rate of the first group


def test_images_of_another_size_name_the_remedy() -> None:
    message = (
        r"model.backbone=vit_tiny_patch16_224 does not take images of 32 x 32 pixels \(.*224.*\): pass "
        r"--model.timm_args '\{img_size: 32\}' or --data.image_size 224$"
    )
    with pytest.raises(ConfigError, match=message):
        build(3, 32, backbone="vit_tiny_patch16_224", width=None)
