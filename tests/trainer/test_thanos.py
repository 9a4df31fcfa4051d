"""Thanos and its baselines: cross pairing, decoder, two encoders, bounded layers, objective."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pysupcon.config import parse_args
from pysupcon.errors import ConfigError, Interrupted
from pysupcon.gradcache import GradCache
from pysupcon.models import ModelConfig
from pysupcon.models.decoder import Decoder, start_side
from pysupcon.models.model import ContrastiveModel, ModelOutput
from pysupcon.models.spectral import SpectralNorm, power_iteration, unparametrized_state_dict
from pysupcon.trainer import LossConfig, loop
from pysupcon.trainer.objective import Objective
from pysupcon.trainer.run import load_run

VIT: dict[str, Any] = {
    "backbone": "vit_tiny_patch16_224",
    "timm_args": {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2},
}
LABELS = torch.tensor([0, 0, 0, 1, 1, 2])


def build(channels: int = 1, size: int = 8, **arguments: Any) -> ContrastiveModel:
    config = ModelConfig(**arguments)
    config.check()
    torch.manual_seed(0)
    return ContrastiveModel(config, channels=channels, image_size=size, classes=3)


def objective(**arguments: Any) -> Objective:
    config = LossConfig(**arguments)
    config.check()
    config.resolve()
    return Objective(config, 2)


# --- the loss


def dense_cross(z: Tensor, labels: Tensor, tau: float, per_anchor: Callable[..., Tensor]) -> Tensor:
    """Mean over anchors, rows of view 1, of a loss over candidates, rows of view 0; z is [B, 2, D]."""
    losses = []
    for i in range(len(z)):
        s = torch.stack([z[i, 1] @ z[j, 0] / tau for j in range(len(z))])
        losses.append(per_anchor(s, labels == labels[i], i))
    return torch.stack(losses).mean()


def supcon(s: Tensor, same: Tensor, _: int) -> Tensor:
    return -(s[same] - s.logsumexp(0)).mean()


def sincere(s: Tensor, same: Tensor, _: int) -> Tensor:
    return -torch.stack([p - torch.cat([p[None], s[~same]]).logsumexp(0) for p in s[same]]).mean()


def cnce(s: Tensor, same: Tensor, own: int) -> Tensor:
    return s[same].logsumexp(0) - s[own]


def infonce(s: Tensor, _: Tensor, own: int) -> Tensor:
    return s.logsumexp(0) - s[own]


def mixed(base: Callable[..., Tensor], alpha: float) -> Callable[..., Tensor]:
    return lambda *given: (1 - alpha) * base(*given) + alpha * cnce(*given)


@pytest.mark.parametrize(
    ("arguments", "definition"),
    [
        ({"name": "supcon"}, supcon),
        ({"name": "sincere"}, sincere),
        ({"name": "cnce"}, cnce),
        ({"name": "infonce"}, infonce),
        ({"name": "spread", "alpha": 0.3}, mixed(supcon, 0.3)),
        ({"name": "spread", "alpha": 0.3, "base": "sincere"}, mixed(sincere, 0.3)),
        ({"name": "spread", "alpha": 0.0, "base": "sincere"}, sincere),
        ({"name": "spread", "alpha": 1.0, "base": "sincere"}, cnce),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_cross_pairing_is_its_equation(arguments: dict[str, Any], definition: Callable[..., Tensor]) -> None:
    """Anchors of view 1, candidates of view 0, the own view among the positives; value and gradient."""
    z = nn.functional.normalize(torch.randn(6, 2, 5, dtype=torch.float64), dim=2).requires_grad_()
    loss = objective(**arguments, pairing="cross", temperature=0.4)
    rows = z.flatten(0, 1)
    value = loss(ModelOutput(rows, rows, None), LABELS)["contrastive"]
    expected = dense_cross(z, LABELS, 0.4, definition)
    assert torch.allclose(value, expected, rtol=1e-12)
    grads = [torch.autograd.grad(each, z)[0] for each in (value, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("base", ["supcon", "sincere"])
def test_the_ends_of_alpha(alpha: float, base: str) -> None:
    """alpha 0 and 1 give the pure losses, also if a class has one sample (no 0 * inf)."""
    rows = nn.functional.normalize(torch.randn(12, 5, dtype=torch.float64), dim=1).requires_grad_()
    outputs = ModelOutput(rows, rows, None)
    pure = {"name": "cnce"} if alpha else {"name": base}
    values = [
        objective(**each, temperature=0.5)(outputs, LABELS)["loss"]
        for each in ({"name": "spread", "alpha": alpha, "base": base}, pure)
    ]
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, rows)[0] for value in values), rtol=1e-9, atol=1e-12
    )


def test_infonce_added_to_supcon() -> None:
    """Each loss has its weight; both share one learnable temperature."""
    rows = nn.functional.normalize(torch.randn(12, 5), dim=1)
    outputs = ModelOutput(rows, rows, None)
    both = objective(weight=0.5, infonce_weight=0.25, temperature=0.3, learnable_temperature=True)
    parts = both(outputs, LABELS)
    alone = [objective(name=name, temperature=0.3)(outputs, LABELS)["loss"] for name in ("supcon", "infonce")]
    parts["loss"].backward()
    parts = {name: part.detach() for name, part in parts.items()}
    assert float(parts["contrastive"]) == pytest.approx(float(alone[0]), rel=1e-5)
    assert float(parts["infonce"]) == pytest.approx(float(alone[1]), rel=1e-5)
    assert float(parts["loss"]) == pytest.approx(0.5 * float(alone[0]) + 0.25 * float(alone[1]), rel=1e-5)
    (parameter,) = both.parameters()
    together = parameter.grad
    parameter.grad = None
    (0.5 * both(outputs, LABELS)["contrastive"]).backward()
    assert together is not None
    assert parameter.grad is not None
    assert abs(together - parameter.grad) > 1e-3
    other = objective(infonce_weight=1.0, learnable_temperature=True)
    other.load_state_dict(both.state_dict())
    assert other.temperature == pytest.approx(0.3)


def test_objective_without_a_contrastive_loss() -> None:
    rows, logits, error = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4)
    loss = objective(name="none", cross_entropy_weight=0.5, reconstruction_weight=2.0)
    parts = loss(ModelOutput(rows, rows, logits, error, logits.flip(1)), torch.tensor([0, 1]))
    assert list(parts) == ["loss", "cross_entropy", "second_cross_entropy", "reconstruction"]
    targets = torch.tensor([0, 0, 1, 1])
    entropies = [nn.functional.cross_entropy(each, targets) for each in (logits, logits.flip(1))]
    assert torch.allclose(parts["loss"], 0.5 * sum(entropies) + 2 * error.mean())
    with pytest.raises(ValueError, match=r"loss.name is none: there is no temperature"):
        _ = loss.temperature


# --- the decoder


@pytest.mark.parametrize(
    ("side", "start", "doublings"),
    [(8, 4, 1), (28, 7, 2), (32, 4, 3), (64, 4, 4), (96, 6, 4), (224, 7, 5), (5, 5, 0)],
)
def test_sides_of_the_decoder(side: int, start: int, doublings: int) -> None:
    assert start_side(side) == (start, doublings)


@pytest.mark.parametrize("side", [3, 30, 9, 100, 2])
def test_refused_sides(side: int) -> None:
    message = rf"side is 4, 5, 6 or 7 times a power of two .*, got {side}: set data.image_size"
    with pytest.raises(ConfigError, match=message):
        start_side(side)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32), (3, 64)])
def test_reconstruction(channels: int, size: int) -> None:
    """The squared error of the decoded embedding; every weight gets a gradient."""
    model = build(channels, size, width=4, decoder="labelled")
    images, labels = torch.randn(3, channels, size, size), torch.tensor([0, 1, 2])
    outputs = model(images, labels)
    made = model.reconstruct(images, labels)
    assert made.shape == images.shape
    assert torch.allclose(outputs.reconstruction_error, ((made - images) ** 2).flatten(1).mean(1), rtol=1e-5)
    outputs.reconstruction_error.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_labelled_decoder_sees_the_label() -> None:
    images = torch.randn(3, 1, 8, 8)
    one, other = torch.tensor([0, 1, 2]), torch.tensor([0, 2, 2])
    model = build(width=4, decoder="labelled").eval()
    same = model.reconstruct(images, one) == model.reconstruct(images, other)
    assert same.flatten(1).all(1).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="labels must be given to a labelled decoder"):
        model(images)
    plain = build(width=4, decoder="plain").eval()
    assert torch.equal(plain.reconstruct(images, one), plain.reconstruct(images))
    with pytest.raises(ValueError, match="reconstruct needs a model with a decoder"):
        build(width=4).reconstruct(images)


def test_the_decoder_is_as_wide_as_its_backbone() -> None:
    small, big = build(width=4, decoder="plain"), build(3, 32, backbone="resnet18", decoder="plain")
    assert sum(p.numel() for p in small.decoder.parameters()) < 5e4
    widths = [layer.out_channels for layer in big.decoder.modules() if isinstance(layer, nn.Conv2d)]
    assert (max(widths), widths[-1]) == (512, 3)
    kinds = {type(layer) for layer in big.decoder.modules()}
    assert nn.ConvTranspose2d not in kinds
    assert nn.BatchNorm2d not in kinds


@pytest.mark.parametrize("encoders", ["one", "two"])
@pytest.mark.parametrize("decoder", ["plain", "labelled"])
def test_vectors_are_reconstructed(encoders: Any, decoder: Any) -> None:
    """The decoder of vectors overfits a few of them; the error is that of its vectors."""
    config = ModelConfig(backbone="mlp", width=32, encoders=encoders, decoder=decoder)
    config.check()
    torch.manual_seed(0)
    model = ContrastiveModel(config, channels=5, image_size=0, classes=3)
    vectors, labels = torch.randn(12, 5), torch.arange(12) % 3
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(150):
        error = model(vectors, labels).reconstruction_error
        assert error.shape == (12,)
        optimizer.zero_grad()
        error.mean().backward()
        optimizer.step()
    assert error.mean() < 0.05
    model.eval()
    reconstructed = model.reconstruct(vectors, labels)
    expected = (reconstructed - vectors).square().mean(dim=1)
    assert torch.allclose(model(vectors, labels).reconstruction_error, expected)
    changed = model.reconstruct(vectors, (labels + 1) % 3)
    assert torch.equal(changed, reconstructed) == (decoder == "plain")


def test_the_decoder_learns() -> None:
    """The decoder overfits a few images."""
    torch.manual_seed(0)
    decoder = Decoder(6, 1, 8, width=16, min_width=8)
    images, codes = torch.randn(4, 1, 8, 8), torch.randn(4, 6)
    optimizer = torch.optim.AdamW(decoder.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        error = (decoder(codes) - images).square().mean()
        error.backward()
        optimizer.step()
    assert error < 0.1 * images.square().mean()


@pytest.mark.parametrize("decoder", ["none", "plain", "labelled"])
def test_only_the_decoder_sees_permutations_within_a_class(decoder: str) -> None:
    """L_spread does not change if the points of a class are permuted, but the error of a trained decoder
    grows."""
    model = build(width=8, decoder=decoder)
    images, permuted = torch.randn(6, 1, 8, 8), torch.tensor([1, 2, 0, 4, 3, 5])
    rows = model(images, LABELS).projection.detach().repeat_interleave(2, dim=0)  # two views, equal
    loss = objective(name="spread")
    values = [
        float(loss(ModelOutput(each, each, None), LABELS)["loss"])
        for each in (rows, rows.unflatten(0, (6, 2))[permuted].flatten(0, 1))
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    if model.decoder is not None:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            model(images, LABELS).reconstruction_error.mean().backward()
            optimizer.step()
        with torch.no_grad():
            points = model.backbone(images)
            made = [model.decoder(each, LABELS) for each in (points, points[permuted])]
        errors = [float((each - images).square().mean()) for each in made]
        assert errors[1] > 1.5 * errors[0]


# --- two encoders


def test_two_encoders() -> None:
    """Each loss trains its own backbone; the embedding concatenates both, each of unit length."""
    model = build(width=4, encoders="two", decoder="plain", classifier=True, projection="linear")
    images = torch.randn(5, 1, 8, 8)
    model.eval()
    outputs = model(images)
    assert torch.equal(outputs.embedding, model.backbone(images))
    assert outputs.embedding.shape == (5, model.embedding_dim) == (5, 32)
    first, second = model.backbone.parts
    halves = [nn.functional.normalize(part(images), dim=1) for part in (first, second)]
    assert torch.allclose(outputs.embedding, torch.cat(halves, 1))
    assert torch.allclose(outputs.logits, model.classifier(first(images)))
    assert torch.allclose(outputs.second_logits, model.second_classifier(second(images)))
    for value, own, other in (
        (outputs.projection[:, 0].sum() + outputs.logits.sum(), first, second),
        (outputs.reconstruction_error.sum() + outputs.second_logits.sum(), second, first),
    ):
        model.zero_grad()
        value.backward(retain_graph=True)
        assert all(p.grad is not None for p in own.parameters())
        assert all(p.grad is None for p in other.parameters())


def test_one_head_on_the_features_of_both_encoders() -> None:
    """It takes the features as they are, and its cross-entropy trains both backbones."""
    given = {"width": 4, "encoders": "two", "decoder": "plain", "classifier": True}
    model = build(**given, joint_classifier=True).eval()
    images = torch.randn(5, 1, 8, 8)
    outputs = model(images)
    assert outputs.second_logits is None
    first, second = model.backbone.parts
    both = torch.cat([first(images), second(images)], dim=1)
    assert torch.allclose(outputs.logits, model.classifier(both))
    assert not torch.allclose(outputs.logits, model.classifier(outputs.embedding))
    outputs.logits.sum().backward()
    assert all(p.grad is not None for part in (first, second) for p in part.parameters())
    with pytest.raises(ConfigError, match=r"model.joint_classifier needs model.classifier=true and .*two"):
        ModelConfig(classifier=True, joint_classifier=True).check()


def test_the_joint_head_is_no_head_of_the_embedding(tmp_path: Path) -> None:
    """It has the width of the embedding, whose parts are scaled to unit length, which its input is not."""
    from pysupcon.evaluation.features import run_features

    arguments = (
        "--data.dataset digits --data.augmentation none --data.batch_size 128 --model.width 4 "
        "--model.encoders two --model.decoder plain --model.classifier true --model.joint_classifier true "
        "--loss.cross_entropy_weight 1 --loss.reconstruction_weight 1 --trainer.max_steps 2 "
        "--trainer.threads 1 --trainer.cpu true --trainer.best_by accuracy --evaluate false"
    )
    run = load_run(loop.train(parse_args([*arguments.split(), "--output_dir", str(tmp_path / "run")])[0]))
    head = run.model.classifier
    assert head is not None
    assert head.in_features == run.model.embedding_dim == 32
    assert run_features(run, run.config.evaluation, torch.device("cpu")).head is None


# --- bounded layers


def singular_values(model: nn.Module) -> list[float]:
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    return [float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) for layer in layers]


def test_layers_are_bounded() -> None:
    """The largest singular value of each layer is bounded, also after the weights change; the classification
    head is free. tests/models/test_lipschitz.py has the convolutional network."""
    model = build(**VIT, spectral_norm=True, lipschitz=0.5, classifier=True, projection="mlp")
    assert not isinstance(getattr(model.classifier, "parametrizations", None), nn.ModuleDict)
    assert singular_values(model.projection) == pytest.approx([0.5] * 2, 0.2)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for _ in range(300):
        power_iteration(model)
    assert singular_values(model.backbone) == pytest.approx(
        [0.5] * len(singular_values(model.backbone)), 1e-3
    )
    model.train()
    before = singular_values(model.backbone)
    model(torch.randn(3, 1, 8, 8))
    assert singular_values(model.backbone) == before, "a forward moves nothing"


def test_the_gradient_of_a_bounded_weight() -> None:
    norm = SpectralNorm(torch.randn(3, 4), bound=2.0).double()
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, weight)
    norm.iterate(weight, 500)
    assert torch.allclose(norm(weight), 2 * weight / torch.linalg.matrix_norm(weight, 2))
    again = copy.deepcopy(norm)
    again.u.mul_(0.7)  # as an average over steps would leave it
    assert torch.allclose(again(weight), norm(weight))


def test_the_input_of_the_loss_is_as_bounded_as_the_embedding() -> None:
    """Small embeddings are not blown up to unit length; long ones are shortened."""
    model = build(width=4, spectral_norm=True).eval()
    images = torch.randn(4, 1, 8, 8)
    for factor in (1e-3, 1e3):
        outputs = model(images * factor)
        lengths = outputs.embedding.norm(dim=1)
        assert bool((lengths < 1).all()) == (factor < 1)
        expected = outputs.embedding / lengths.clamp(min=1)[:, None]
        torch.testing.assert_close(outputs.projection, expected)
        torch.testing.assert_close(model.project(images * factor), expected)


def test_a_bounded_model_is_copied_and_saved() -> None:
    model = build(width=4, spectral_norm=True).eval()
    images = torch.randn(4, 1, 8, 8)
    expected = model(images).embedding
    other = build(width=4, spectral_norm=True).eval()
    for parameter in other.parameters():
        nn.init.uniform_(parameter)
    other.load_state_dict(model.state_dict())
    plain = build(width=4).eval()
    plain.load_state_dict(unparametrized_state_dict(model))
    for each in (copy.deepcopy(model), other, plain):
        torch.testing.assert_close(each(images).embedding, expected, rtol=1e-6, atol=1e-7)
    assert "parametrizations" in "".join(model.state_dict())


@pytest.mark.parametrize(
    "arguments",
    [
        {"decoder": "labelled", "classifier": True},
        {"decoder": "plain", "encoders": "two", "classifier": True, "projection": "mlp", "projection_dim": 4},
        {"spectral_norm": True, "classifier": True},
    ],
    ids=["labelled", "two", "bounded"],
)
def test_the_gradient_in_chunks(arguments: dict[str, Any]) -> None:
    """The gradient with GradCache equals that of the whole batch."""
    model = build(**VIT, **arguments).train()
    weights = {"name": "spread", "pairing": "cross", "cross_entropy_weight": 0.7}
    weights |= {"reconstruction_weight": 0.3} if "decoder" in arguments else {}
    loss = objective(**weights)
    views = torch.randn(6, 2, 1, 8, 8)

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> ModelOutput:
        outputs: ModelOutput = model(batch[0].flatten(0, 1), batch[1].repeat_interleave(2))
        return outputs

    power_iteration(model)  # once a step: in it every forward sees the same weights
    vectors = [part.u.clone() for part in model.modules() if isinstance(part, SpectralNorm)]
    assert bool(vectors) == ("spectral_norm" in arguments)
    losses, grads = [], []
    for chunk_size in (6, 4):
        model.zero_grad()
        cache = GradCache(model, chunk_size, forward=forward)
        losses.append(float(cache((views, LABELS), lambda outputs: loss(outputs, LABELS)["loss"])))
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    after = [part.u for part in model.modules() if isinstance(part, SpectralNorm)]
    assert all(torch.equal(one, other) for one, other in zip(vectors, after, strict=True))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert grads[0].keys() == grads[1].keys() == dict(model.named_parameters()).keys()
    scale = max(float(grad.abs().max()) for grad in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=2e-6 * scale)


# --- all parts together


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """Bitwise, with all options: two bounded encoders, decoder with labels, averaged weights, chunks."""
    fixed = (
        "--data.dataset digits --data.augmentation weak --data.batch_size 256 --model.width 4 "
        "--trainer.epochs 1 --trainer.threads 1 --trainer.cpu true --evaluate false --trainer.chunk_size 100 "
        "--loss.name spread --loss.pairing cross --loss.infonce_weight 0.5 --loss.reconstruction_weight 1 "
        "--model.encoders two --model.decoder labelled --model.spectral_norm true --model.classifier true "
        "--loss.cross_entropy_weight 1 --trainer.ema_decay 0.5 --trainer.final_weights ema"
    )

    def train(name: str, *more: str) -> Path:
        return loop.train(parse_args([*fixed.split(), "--output_dir", str(tmp_path / name), *more])[0])

    train("whole")
    with pytest.raises(Interrupted):
        train("stopped", "--trainer.time_budget", "1e-9")
    train("stopped", "--resume_from_checkpoint", "latest")
    runs = [load_run(tmp_path / name) for name in ("whole", "stopped")]
    weights = [run.model.state_dict() for run in runs]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    times = ("images_per_second", "peak_memory_mib")
    logs = [[{k: v for k, v in line.items() if k not in times} for line in run.log()] for run in runs]
    assert len(logs[0]) == 5
    assert logs[0] == logs[1]
