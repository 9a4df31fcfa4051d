"""Lipschitz constants of encoders, against singular values of whole Jacobians."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pysupcon.models import ModelConfig
from pysupcon.models.backbones import build_backbone, notes_of
from pysupcon.models.bounded_batch_norm import BoundedBatchNorm
from pysupcon.models.lipschitz import certified_bound, convolution_norm, local_constants
from pysupcon.models.spectral import (
    ConvolutionMap,
    SpectralNorm,
    apply_spectral_norm,
    power_iteration,
    unbounded_layers,
    unparametrized_state_dict,
    within_unit_ball,
)

CONVOLUTIONS = [
    nn.Conv2d(2, 3, 3, padding=1),  # as in small_cnn
    nn.Conv2d(2, 3, 3, stride=2, padding=1),  # 7 pixels: the transposed one fits without output padding
    nn.Conv2d(2, 3, 2, stride=2),  # the last row and column are not read
    nn.Conv2d(4, 4, 3, padding=1, groups=2),
    nn.Conv2d(4, 4, 3, groups=4, padding="same"),
    nn.Conv2d(2, 3, 3, dilation=2, padding=2),
    nn.Conv2d(2, 3, (3, 1), padding=(1, 0), stride=(1, 2)),
    nn.Conv2d(1, 2, 5, padding=4, stride=3),
]


def as_matrix(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Jacobian [outputs, inputs] of one image."""
    jacobian = torch.autograd.functional.jacobian(lambda y: layer(y[None])[0].flatten(), x)
    return jacobian.flatten(1)


def largest(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("size", [(7, 7), (8, 6)])
def test_the_map_of_a_convolution(layer: nn.Conv2d, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double()
    layer.bias = None
    nn.init.normal_(layer.weight)
    x = torch.randn(layer.in_channels, *size, dtype=torch.float64)
    layer_map = ConvolutionMap(layer, size)
    y = layer_map.apply(layer.weight, x)
    other = torch.randn_like(y)
    transposed = layer_map.adjoint(layer.weight, other)
    assert transposed.shape == x.shape
    torch.testing.assert_close((y * other).sum(), (x * transposed).sum())
    exact = largest(as_matrix(layer, x))
    norm = SpectralNorm(layer.weight, 1.5, layer_map, y.shape)
    norm.iterate(layer.weight, 1000)
    torch.testing.assert_close(norm(layer.weight), layer.weight * (1.5 / exact), rtol=1e-3, atol=0)
    bound = convolution_norm(layer, size)
    assert exact <= bound * (1 + 1e-9)
    if layer.stride == (1, 1) and layer.padding != (4, 4):
        assert bound < 1.4 * exact, "the torus is a little larger than the image"


def network(kind: str) -> nn.Module:
    if kind == "small_cnn":
        return build_backbone(ModelConfig(width=2), 1, 8)[0]
    if kind == "bounded":
        return build_backbone(ModelConfig(width=2, spectral_norm=True, lipschitz=1.5), 1, 8)[0]
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3), nn.LeakyReLU(1.5),
        nn.MaxPool2d(3, 2, padding=1), nn.AvgPool2d(2, 1), nn.Flatten(), nn.Linear(3, 5), nn.Tanh(),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["small_cnn", "bounded", "sequential"])
def test_constants_against_whole_jacobians(kind: str) -> None:
    torch.manual_seed(1)
    module = network(kind).double()
    images = torch.randn(6, 1, 8, 8, dtype=torch.float64)
    module.train()
    for _ in range(20):
        module(torch.randn(32, 1, 8, 8, dtype=torch.float64))
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    module.eval()
    bound = certified_bound(module, (1, 8, 8))
    assert bound is not None

    def on_the_sphere(x: Tensor) -> Tensor:
        return nn.functional.normalize(module(x), dim=1)

    for encode, unit in ((module, False), (on_the_sphere, True)):
        exact = torch.tensor([largest(as_matrix(encode, image)) for image in images])
        found = local_constants(module, images, unit=unit, iterations=2000)
        torch.testing.assert_close(found.float(), exact, rtol=2e-3, atol=1e-6)
        assert float(found.max()) > 0
        lengths = module(images).norm(dim=1)
        assert bool((found <= (bound / lengths if unit else bound)).all())


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.MaxPool2d(2), (1, 6, 6)),
        (nn.MaxPool2d(3, 2, padding=1), (1, 6, 6)),
        (nn.AvgPool2d(2), (1, 6, 6)),
        (nn.AvgPool2d(3, 1), (1, 6, 6)),
        (nn.AdaptiveAvgPool2d(1), (2, 5, 4)),
        (nn.LeakyReLU(-2.0), (4,)),
    ],
    ids=str,
)
def test_the_constant_of_a_layer_is_reached_or_a_bound(layer: nn.Module, size: tuple[int, ...]) -> None:
    bound = certified_bound(nn.Sequential(layer), size)
    assert bound is not None
    torch.manual_seed(0)
    images = torch.zeros(1, *size)
    images[..., 2 % size[-1]] = 1.0  # a pixel may be the largest of several windows
    found = max(largest(as_matrix(layer, x)) for x in [*torch.randn(20, *size), images[0]])
    assert found <= bound * (1 + 1e-6)
    assert found >= 0.7 * bound


def test_an_unknown_structure_has_no_bound() -> None:
    assert certified_bound(nn.Sequential(nn.Flatten(), nn.LayerNorm(4)), (1, 2, 2)) is None
    assert certified_bound(nn.ModuleList([nn.Linear(2, 2)]), (2,)) is None
    assert certified_bound(build_backbone(ModelConfig(backbone="resnet10t"), 1, 32)[0], (1, 32, 32)) is None
    assert (
        certified_bound(nn.Sequential(nn.AvgPool2d(2, padding=1, count_include_pad=False)), (1, 4, 4)) is None
    )


def test_attention_has_local_constants() -> None:
    arguments = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    torch.manual_seed(0)
    vit = build_backbone(ModelConfig(backbone="vit_tiny_patch16_224", timm_args=arguments), 1, 8)[0].eval()
    images = torch.randn(3, 1, 8, 8)
    exact = torch.tensor([largest(as_matrix(vit, image)) for image in images])
    torch.testing.assert_close(local_constants(vit, images, unit=False), exact, rtol=1e-2, atol=0)


# --- the bounds of training


def test_every_layer_of_small_cnn_is_bounded() -> None:
    """Each layer's exact constant in eval mode is at most c, whatever the weights; without the bounds it is
    far above."""
    torch.manual_seed(0)
    plain, _ = build_backbone(ModelConfig(width=3), 1, 8)
    bounded, _ = build_backbone(ModelConfig(width=3, spectral_norm=True, lipschitz=0.8), 1, 8)
    constants = []
    for module in (plain, bounded):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        module.train()
        for _ in range(30):
            module(0.1 * torch.randn(16, 1, 8, 8))
        for _ in range(500):
            power_iteration(module)
        before = copy.deepcopy(unparametrized_state_dict(module)["features.0.0.weight"])
        module(torch.randn(16, 1, 8, 8))
        after = unparametrized_state_dict(module)["features.0.0.weight"]
        assert torch.equal(before, after), "a forward moves no weight"
        bound = certified_bound(module, (1, 8, 8))
        assert bound is not None
        constants.append(bound)
    assert constants[0] > 100
    # five convolutions and BatchNorms, and the mean of 4x4 pixels; the torus is larger than the image
    assert 0.5 * 0.8**10 / 4 <= constants[1] <= 1.2**5 * 0.8**10 / 4


@pytest.mark.parametrize("shape", [(7, 3), (7, 3, 5), (7, 3, 4, 4)], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_is_bounded_in_both_modes(shape: tuple[int, ...], momentum: float | None) -> None:
    torch.manual_seed(0)
    cls = [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d][len(shape) - 2]
    plain = cls(3, momentum=momentum).double()
    with torch.no_grad():
        plain.weight.copy_(torch.tensor([3.0, -3.0, 0.3]))
    bounded = nn.Sequential(copy.deepcopy(plain))
    apply_spectral_norm(bounded, 0.5, shape[1:])
    layer = bounded[0]
    assert isinstance(layer, BoundedBatchNorm)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True) * 2
    y = bounded(x)
    plain(x)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(layer, name), getattr(plain, name))
    dims = [0, *range(2, x.dim())]
    scales = (y.std(dims) / x.std(dims)).detach()
    torch.testing.assert_close(scales[:2], torch.full_like(scales[:2], 0.5))
    assert 0 < float(scales[2]) < 0.3, "below the bound it is BatchNorm"
    # A large batch of the same distribution: both modes then agree.
    for _ in range(200 if momentum else 1):
        bounded(torch.randn(2000, *shape[1:], dtype=torch.float64))
    z = torch.randn(2000, *shape[1:], dtype=torch.float64)
    trained, evaluated = bounded(z), bounded.eval()(z)
    if momentum:
        torch.testing.assert_close(trained, evaluated, rtol=0, atol=0.05)
    x = torch.randn(4, *shape[1:], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(bounded.train(), x)


def test_the_plain_module_computes_the_same_function() -> None:
    torch.manual_seed(0)
    bounded, _ = build_backbone(ModelConfig(width=3, spectral_norm=True, lipschitz=0.7), 1, 8)
    for _ in range(3):
        bounded(torch.randn(16, 1, 8, 8))
    images = torch.randn(4, 1, 8, 8)
    expected = bounded.eval()(images)
    plain, _ = build_backbone(ModelConfig(width=3), 1, 8)
    plain.load_state_dict(unparametrized_state_dict(bounded))
    assert torch.equal(plain.eval()(images), expected)
    assert certified_bound(plain, (1, 8, 8)) == pytest.approx(certified_bound(bounded, (1, 8, 8)), rel=1e-6)


class Odd(nn.Module):
    """Layers that are not bounded."""

    def __init__(self) -> None:
        super().__init__()
        self.circular = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")
        self.even = nn.Conv2d(2, 2, 2, padding="same")
        self.norm = nn.GroupNorm(1, 2, affine=False)
        self.batch_norm = nn.BatchNorm2d(2, track_running_stats=False)
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.batch_norm(self.norm(self.even(self.circular(x))))
        return self.linear(x.mean(dim=(2, 3)))


def test_layers_without_a_bound_are_named() -> None:
    odd = Odd()
    apply_spectral_norm(odd, 1.0, (1, 6, 6))
    assert unbounded_layers(odd) == {"Conv2d": 2, "GroupNorm": 1, "BatchNorm2d": 1}

    def notes(**arguments: Any) -> list[str]:
        return notes_of(build_backbone(ModelConfig(spectral_norm=True, **arguments), 1, 32)[0])

    assert notes() == notes(backbone="resnet10t") == []
    vit = {"img_size": 32, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2}
    (line,) = notes(backbone="vit_tiny_patch16_224", timm_args=vit)
    assert "the encoder has no Lipschitz bound" in line
    assert "Attention (2)" in line
    assert "LayerNorm (5)" in line


def test_short_rows_stay_short() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], requires_grad=True)
    found = within_unit_ball(rows)
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    found.sum().backward()
    assert rows.grad is not None
    assert bool(rows.grad.isfinite().all())
    assert within_unit_ball(rows.bfloat16()).dtype == torch.float32
