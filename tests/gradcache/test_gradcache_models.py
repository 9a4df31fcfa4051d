"""GradCache of several models at once, and of models that keep state between forwards."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pysupcon
from pysupcon.gradcache import GradCache
from pysupcon.gradcache.replay import RandomState, devices_of

SAMPLES = 11
LABELS = torch.arange(SAMPLES) % 3


def _data(seed: int = 3, samples: int = SAMPLES, width: int = 6) -> Tensor:
    return torch.randn(samples, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _supcon(z: Tensor) -> Tensor:
    return pysupcon.functional.supcon(z, LABELS, temperature=0.3, normalize=True)


def _between(images: Tensor, texts: Tensor) -> Tensor:
    """A loss of images and texts, with one or several texts per image."""
    labels = torch.arange(len(texts)) % len(images)
    return pysupcon.functional.supcon(
        F.normalize(images, dim=-1),
        torch.arange(len(images)),
        candidates=F.normalize(texts, dim=-1),
        candidate_labels=labels,
        temperature=0.3,
    )


def _encoder(width: int = 6, *more: nn.Module) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(width, 16), nn.Tanh(), *more, nn.Linear(16, 8)).double()


def _gradients(*modules: nn.Module) -> list[Tensor]:
    found = [parameter.grad.clone() for module in modules for parameter in module.parameters()]
    for module in modules:
        module.zero_grad()
    return found


def _assert_close(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert all(gradient.abs().max() > 1e-4 for gradient in wanted), "nothing to compare"
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def _chunked(model: nn.Module, inputs: Tensor, size: int) -> Tensor:
    """The expected step of models whose forward depends on the chunk: the same chunks, in one graph."""
    return torch.cat([model(chunk.clone()) for chunk in inputs.split(size)])


@pytest.mark.parametrize(
    "chunk_size", [[4, 3], (1, 11), [100, 100], [100, 2], 4, np.int64(5), [np.int32(2), 7]]
)
@pytest.mark.parametrize("texts_per_image", [1, 3])
def test_two_towers(chunk_size: Any, texts_per_image: int) -> None:
    images, texts = _data(), _data(4, SAMPLES * texts_per_image, 5)
    image_encoder, text_encoder = _encoder(6), _encoder(5)
    wanted_loss = _between(image_encoder(images), text_encoder(texts))
    wanted_loss.backward()
    wanted = _gradients(image_encoder, text_encoder)
    lengths: dict[int, list[int]] = {6: [], 5: []}
    for encoder in (image_encoder, text_encoder):
        encoder.register_forward_pre_hook(lambda _, given: lengths[given[0].shape[1]].append(len(given[0])))
    loss = GradCache([image_encoder, text_encoder], chunk_size)((images, texts), _between)
    torch.testing.assert_close(loss, wanted_loss.detach(), rtol=1e-12, atol=0)
    _assert_close(_gradients(image_encoder, text_encoder), wanted)
    sizes = chunk_size if isinstance(chunk_size, (list, tuple)) else [chunk_size] * 2
    assert [max(lengths[6]), max(lengths[5])] == [min(sizes[0], len(images)), min(sizes[1], len(texts))]


def test_towers_with_their_own_forward_and_chunk_loss() -> None:
    images, texts = _data(), {"tokens": _data(4, SAMPLES, 5), "names": ["x"] * SAMPLES}
    image_encoder, text_encoder = _encoder(6), _encoder(5)

    def read(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        assert len(batch["names"]) == len(batch["tokens"])
        return {"text": model(batch["tokens"].sub_(1.0))}

    def loss(z: Tensor, outputs: dict[str, Tensor]) -> Tensor:
        return _between(z, outputs["text"])

    def own(outputs: Any, rows: slice) -> Tensor:
        return F.cross_entropy(outputs["text"], LABELS[rows], reduction="sum") / SAMPLES

    whole = read(text_encoder, {"tokens": texts["tokens"].clone(), "names": texts["names"]})
    (loss(image_encoder(images), whole) + own(whole, slice(None))).backward()
    wanted = _gradients(image_encoder, text_encoder)
    for sizes in ([4, 3], [100, 100]):
        GradCache([image_encoder, text_encoder], sizes, forward=[None, read])(
            [images, texts], loss, [None, own]
        )
        _assert_close(_gradients(image_encoder, text_encoder), wanted)


@pytest.mark.parametrize("sizes", [[4, 3], [100, 100]])
def test_one_encoder_for_both_sides(sizes: list[int]) -> None:
    """One encoder for queries and passages: dropout and buffers are replayed for both."""
    queries, passages = _data(), _data(4, 2 * SAMPLES)
    encoder = nn.Sequential(_encoder(6, nn.Dropout(0.4)), Drifting(8)).double()
    other = copy.deepcopy(encoder)
    torch.manual_seed(1)
    wanted_loss = _between(_chunked(other, queries, sizes[0]), _chunked(other, passages, sizes[1]))
    wanted_loss.backward()
    after = torch.get_rng_state()
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = GradCache([encoder, encoder], sizes)([queries, passages], _between)
    torch.testing.assert_close(loss, wanted_loss.detach(), rtol=1e-12, atol=0)
    _assert_close(_gradients(encoder), _gradients(other))
    assert torch.equal(torch.get_rng_state(), after)
    for got, wanted in zip(encoder.buffers(), other.buffers(), strict=True):
        assert torch.equal(got, wanted)


class Drifting(nn.Module):
    """A model whose forward depends on buffers that it changes, one through ``data`` without a version."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 8)
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("steps", None)

    def forward(self, images: Tensor) -> Tensor:
        self.gain.data.mul_(1.001)  # below the tolerance of the comparison of the passes
        self.shift.add_(0.01)
        if self.steps is None:
            self.steps = torch.full((), 2.0, dtype=images.dtype)
        else:
            self.steps = self.steps + 0.01
        return self.linear(images) * self.gain.clone() * self.steps + self.shift.clone()


class Noisy(nn.Module):
    """A model with its own generator, which is not a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.generator = torch.Generator().manual_seed(2)

    def forward(self, images: Tensor) -> Tensor:
        noise = torch.randn(images.shape, generator=self.generator, dtype=images.dtype)
        return self.linear(images + 0.01 * noise)


def _spectral() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)))


def _evaluated() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 8)
    ).eval()


def _normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16, momentum=None), nn.Tanh(), nn.Linear(16, 8))


@pytest.mark.parametrize("make", [Drifting, Noisy, _spectral, _evaluated, _normed])
@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_models_that_keep_state(make: Callable[[], nn.Module], chunk_size: int) -> None:
    if make is _normed and chunk_size == 1:
        pytest.skip("batch norm needs two samples")
    torch.manual_seed(0)
    model = make().double()
    other = copy.deepcopy(model)
    if make is Noisy:
        other.generator = torch.Generator().manual_seed(2)
    images, grad_cache = _data(samples=12)[:SAMPLES], GradCache(model, chunk_size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            loss = grad_cache(images, _supcon)
            wanted_loss = _supcon(_chunked(other, images, chunk_size))
            wanted_loss.backward()
            torch.testing.assert_close(loss, wanted_loss.detach(), rtol=1e-12, atol=0)
            for got, wanted in zip(_gradients(model), _gradients(other), strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
            for (name, got), (_, wanted) in zip(model.named_buffers(), other.named_buffers(), strict=True):
                assert torch.equal(got, wanted), name
    if make is Noisy:
        assert torch.equal(model.generator.get_state(), other.generator.get_state())


def test_a_compiled_model() -> None:
    model, images = _encoder(6), _data()
    _supcon(model(images)).backward()
    wanted = _gradients(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        GradCache(compiled, 4)(images, _supcon)
        _assert_close(_gradients(model), wanted)


def test_state_goes_on_after_a_failed_second_pass() -> None:
    """After an error (out of memory) the state is that after the first pass, so a step can be repeated."""
    model = nn.Sequential(_encoder(6, nn.Dropout(0.3)), Drifting(8)).double()
    other = copy.deepcopy(model)
    calls = 0

    def forward(module: nn.Module, images: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise torch.OutOfMemoryError("does not fit")
        return module(images)

    torch.manual_seed(1)
    with pytest.raises(torch.OutOfMemoryError):
        GradCache(model, 4, forward=forward)(_data(), _supcon)
    got = torch.get_rng_state()
    torch.manual_seed(1)
    with torch.no_grad():
        _chunked(other, _data(), 4)
    assert torch.equal(got, torch.get_rng_state())
    for one, two in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(one, two)


def test_random_numbers_of_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices of parameters, buffers and inputs, with a mock of the device modules."""
    model = nn.Linear(2, 2)
    model.register_buffer("elsewhere", torch.zeros(2, device="meta"))
    assert devices_of([model], [torch.zeros(2)]) == [torch.device("cpu"), torch.device("meta")]
    devices = [torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1), torch.device("meta")]
    states = {device: at for at, device in enumerate(devices) if device.type == "cuda"}
    kinds = []

    def module(device: torch.device) -> Any:
        kinds.append(device.type)
        return SimpleNamespace(
            get_rng_state=states.__getitem__,
            set_rng_state=lambda state, device: states.update({device: state}),
        )

    monkeypatch.setattr(torch, "get_device_module", module)
    before, random = dict(states), RandomState(devices, [])
    wanted = torch.rand(3)
    states.update(dict.fromkeys(states, 77))
    random.restore()
    assert states == before
    assert set(kinds) == {"cuda"}
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("sizes", [[4, 3], [100, 100]])
def test_towers_under_autocast(sizes: list[int]) -> None:
    """Both passes of both models run in the caller's autocast."""
    images, texts = _data().float(), _data(4, SAMPLES, 5).float()
    encoders = [_encoder(6).float(), _encoder(5).float()]
    seen: list[torch.dtype] = []

    def forward(model: nn.Module, inputs: Tensor) -> Tensor:
        assert torch.is_autocast_enabled("cpu")
        seen.append(model[0](inputs).dtype)
        return model(inputs)

    with torch.autocast("cpu", torch.bfloat16):
        wanted_loss = _between(
            _chunked(encoders[0], images, sizes[0]), _chunked(encoders[1], texts, sizes[1])
        )
    wanted_loss.backward()
    wanted = _gradients(*encoders)
    with torch.autocast("cpu", torch.bfloat16):
        loss = GradCache(encoders, sizes, forward=forward)([images, texts], _between)
        assert torch.is_autocast_enabled("cpu")
    assert set(seen) == {torch.bfloat16}
    torch.testing.assert_close(loss, wanted_loss.detach())
    for got, other in zip(_gradients(*encoders), wanted, strict=True):
        # A weight's gradient is a sum over chunks, each rounded to bfloat16 (2^-8), on both sides.
        torch.testing.assert_close(got, other, rtol=1e-2, atol=1e-2)


def _in_place(outputs: Tensor, rows: slice) -> Tensor:
    return outputs.relu_().sum()


MODELS = [_encoder(6), _encoder(5)]
INPUTS = [_data(), _data(4, SAMPLES, 5)]


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            lambda: GradCache([], 4),
            ValueError,
            "model must hold at least one torch.nn.Module, got an empty list",
        ),
        (lambda: GradCache([*MODELS, 3], 4), TypeError, r"model\[2\] must be a torch.nn.Module, got int"),
        (
            lambda: GradCache(MODELS, [4]),
            ValueError,
            "chunk_size must have one entry per model, got 1 for 2 models",
        ),
        (
            lambda: GradCache(MODELS, [4, 0]),
            ValueError,
            r"chunk_size\[1\] must be an integer of at least 1, got 0",
        ),
        (
            lambda: GradCache(MODELS, [True, 4]),
            ValueError,
            r"chunk_size\[0\] must be an integer of at least 1",
        ),
        (lambda: GradCache(MODELS, -1), ValueError, "chunk_size must be an integer of at least 1, got -1"),
        (
            lambda: GradCache(nn.ModuleList(MODELS), [4, 4]),
            ValueError,
            r"one entry per model, but model is one module \(ModuleList\): give a list of modules",
        ),
        (
            lambda: GradCache(MODELS, 4, forward=[None]),
            ValueError,
            "forward must have one entry per model, got 1 for 2 models",
        ),
        (
            lambda: GradCache(MODELS, 4)(INPUTS[0], _between),
            ValueError,
            r"inputs must be a list with one entry per model \(2\), got Tensor",
        ),
        (
            lambda: GradCache(MODELS, 4)([*INPUTS, INPUTS[0]], _between),
            ValueError,
            "inputs must have one entry per model, got 3 for 2 models",
        ),
        (
            lambda: GradCache(MODELS, 4)(INPUTS, _between, _in_place),
            ValueError,
            r"chunk_loss must be a list with one function, or None, per model \(2\), got function",
        ),
        (
            lambda: GradCache(MODELS, 4)(INPUTS, _between, [_in_place]),
            ValueError,
            "chunk_loss must have one entry per model, got 1 for 2 models",
        ),
        (
            lambda: GradCache(MODELS[0], 4)(INPUTS[0], _supcon, _in_place),
            RuntimeError,
            "chunk_loss changed the model's outputs in place",
        ),
        (
            lambda: torch.no_grad()(GradCache(MODELS[0], 4))(INPUTS[0], _supcon, lambda z, rows: z.sum()),
            RuntimeError,
            r"call it outside torch.no_grad\(\)",
        ),
    ],
)
def test_errors(call: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()


def test_a_tower_that_the_loss_does_not_use() -> None:
    encoders = [_encoder(6), _encoder(5)]
    GradCache(encoders, [4, 4])(INPUTS, lambda images, texts: _supcon(images))
    assert all(parameter.grad is None for parameter in encoders[1].parameters())
    got = _gradients(encoders[0])
    _supcon(encoders[0](INPUTS[0])).backward()
    _assert_close(got, _gradients(encoders[0]))
