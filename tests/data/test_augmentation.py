"""Views of batches equal torchvision's sample by sample and depend only on the draw."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from pysupcon.data import DataConfig
from pysupcon.data.augment import Augmentation, Normalize, ResizeCenterCrop
from pysupcon.data.colour import ColorJitter, RandomGrayscale, rgb_to_grayscale
from pysupcon.data.datamodule import DataModule, EvaluationDataset, MultiViewDataset, load_data
from pysupcon.data.geometry import RandomAffine, RandomCrop, RandomHorizontalFlip, RandomResizedCrop
from pysupcon.data.philox import philox_uniforms
from pysupcon.data.samples import LazyImages, Samples

BILINEAR = v2.InterpolationMode.BILINEAR


@pytest.fixture(scope="module")
def digits() -> DataModule:
    return load_data(DataConfig(dataset="digits", batch_size=64))


def pictures(count: int, channels: int, height: int, width: int) -> Tensor:
    """Smooth images with saturated pixels, for which bilinear weights matter."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(count, channels, 5, 5, generator=generator) * 400 - 70
    return (
        torch.nn.functional.interpolate(small, (height, width), mode="bicubic").clamp(0, 255).to(torch.uint8)
    )


def numbers_for(transform: object, count: int) -> Tensor:
    return philox_uniforms(1, range(count), transform.num_uniforms)  # type: ignore[attr-defined]


def furthest(mine: Tensor, theirs: Tensor) -> int:
    assert mine.dtype == theirs.dtype == torch.uint8
    assert mine.shape == theirs.shape
    return int((mine.int() - theirs.int()).abs().max())


# --- the same pixels as torchvision, with the same parameters


@pytest.mark.parametrize(("height", "width"), [(28, 28), (9, 14)])  # usual; odd, even and not square
@pytest.mark.parametrize("transform", [RandomAffine(10, translate=0.1), RandomAffine(15, shear=10)])
def test_affine(transform: RandomAffine, height: int, width: int) -> None:
    images = pictures(60, 3, height, width)
    numbers = numbers_for(transform, 60)
    angles, shears, shifts = (each.tolist() for each in transform.make_params(numbers, height, width))
    theirs = [
        F.affine(image, angle, [int(s) for s in shift], 1.0, [shear, 0.0], BILINEAR, fill=0)
        for image, angle, shear, shift in zip(images, angles, shears, shifts, strict=True)
    ]
    mine = transform(images, numbers)
    assert furthest(mine, torch.stack(theirs)) <= 1
    assert (mine != torch.stack(theirs)).double().mean() < 1e-3  # ties of rounding only
    assert furthest(mine, images) > 100


def test_crop_and_flip() -> None:
    images = pictures(60, 3, 12, 12)
    crop, flip = RandomCrop(3), RandomHorizontalFlip()
    numbers = numbers_for(crop, 60)
    top, left = (each.tolist() for each in crop.make_params(numbers))
    padded = F.pad(images, [3, 3, 3, 3])
    theirs = [F.crop(p, t, w, 12, 12) for p, t, w in zip(padded, top, left, strict=True)]
    assert torch.equal(crop(images, numbers), torch.stack(theirs))
    assert set(top) == set(left) == set(range(7))
    numbers = numbers_for(flip, 60)
    mirrored = torch.stack(
        [F.horizontal_flip(i) if n < 0.5 else i for i, n in zip(images, numbers, strict=True)]
    )
    assert torch.equal(flip(images, numbers), mirrored)
    assert 15 < int((numbers < 0.5).sum()) < 45


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (28, 28, 28),  # usual
        (10, 15, 32),  # made larger, not square
        (40, 30, 16),  # made smaller: torchvision itself
        (3, 30, 30),  # no attempt fits: the central window
    ],
)
def test_resized_crop(height: int, width: int, size: int) -> None:
    images = pictures(60, 3, height, width)
    transform = RandomResizedCrop(size, (0.2, 1.0))
    numbers = numbers_for(transform, 60)
    windows = torch.stack(transform.make_params(numbers, height, width), 1)
    theirs = [
        F.resized_crop(image, *window, [size, size], antialias=True)
        for image, window in zip(images, windows.tolist(), strict=True)
    ]
    mine = transform(images, numbers)
    assert furthest(mine, torch.stack(theirs)) <= 1  # torchvision computes with 16-bit weights
    top, left, tall, wide = windows.unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + tall <= height).all()
    assert (left + wide <= width).all()
    if height == 3:
        assert windows.unique(dim=0).tolist() == [[0, 13, 3, 4]]


CHANGES = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]


@pytest.mark.parametrize("only", range(4))
def test_each_change_of_colour(only: int) -> None:
    images = pictures(40, 3, 16, 16)
    widths = [0.4 * (only == k) for k in range(3)] + [0.1 * (only == 3)]
    transform = ColorJitter(*widths)
    numbers = numbers_for(transform, 40)
    strengths = transform.make_params(numbers)[2][:, only].tolist()
    theirs = torch.stack([CHANGES[only](i, s) for i, s in zip(images, strengths, strict=True)])
    # the changes of no width are the identity, up to one rounding in the hue
    assert furthest(transform(images, numbers), theirs) <= (1 if only < 3 else 2)
    assert (transform(images, numbers) != theirs).double().mean() < 0.02
    assert furthest(theirs, images) > 20


def test_colour_jitter_in_its_order() -> None:
    images = pictures(100, 3, 16, 16)
    transform = ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)
    numbers = numbers_for(transform, 100)
    changed, orders, strengths = transform.make_params(numbers)
    theirs = images.clone()
    for row in changed.nonzero().flatten().tolist():
        for change in orders[row].tolist():
            theirs[row] = CHANGES[change](theirs[row], float(strengths[row, change]))
    mine = transform(images, numbers)
    assert furthest(mine, theirs) <= 4  # a difference of rounding goes through the later changes
    assert (mine != theirs).double().mean() < 0.02
    assert 65 < int(changed.sum()) < 95
    assert len(orders.unique(dim=0)) > 18  # of 24
    assert torch.equal(mine[~changed], images[~changed])


def test_greyscale() -> None:
    images = pictures(60, 3, 16, 16)
    transform = RandomGrayscale(0.2)
    numbers = numbers_for(transform, 60)
    mine = transform(images, numbers)
    chosen = numbers[:, 0] < 0.2
    assert furthest(mine[chosen], F.rgb_to_grayscale(images[chosen], 3)) <= 1
    assert torch.equal(mine[~chosen], images[~chosen])
    assert torch.equal(mine[chosen, 0], rgb_to_grayscale(images[chosen].float())[:, 0].to(torch.uint8))
    assert 4 < int(chosen.sum()) < 22


# --- the same distribution of parameters as torchvision


def test_parameters_are_distributed_as_torchvisions() -> None:
    torch.manual_seed(0)
    count = 2000
    image = torch.zeros(3, 20, 20, dtype=torch.uint8)
    theirs = v2.RandomResizedCrop(20, scale=(0.2, 1.0))
    found = [theirs.make_params([image]) for _ in range(count)]
    crop = RandomResizedCrop(20, (0.2, 1.0))
    mine = dict(
        zip(
            ("top", "left", "height", "width"),
            crop.make_params(numbers_for(crop, count), 20, 20),
            strict=True,
        )
    )
    samples = {name: (mine[name], [each[name] for each in found]) for name in mine}
    affine = RandomAffine(15, translate=0.2, shear=10)
    other = v2.RandomAffine(15, translate=(0.2, 0.2), shear=10)
    drawn = [other.make_params([image]) for _ in range(count)]
    angle, shear, shift = affine.make_params(numbers_for(affine, count), 20, 20)
    samples["angle"] = (angle, [each["angle"] for each in drawn])
    samples["shear"] = (shear, [each["shear"][0] for each in drawn])
    samples["shift"] = (shift[:, 1], [each["translate"][1] for each in drawn])
    jitter = ColorJitter(0.4, 0.4, 0.4, 0.1)
    third = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
    colours = [third.make_params([image]) for _ in range(count)]
    strengths = jitter.make_params(numbers_for(jitter, count))[2]
    for k, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        samples[name] = (strengths[:, k], [each[f"{name}_factor"] for each in colours])
    for name, (ours, given) in samples.items():
        a, b = np.sort(np.asarray(ours, dtype=float)), np.sort(np.asarray(given, dtype=float))
        values = np.concatenate([a, b])
        gap = np.abs(np.searchsorted(a, values, "right") - np.searchsorted(b, values, "right")).max() / count
        assert gap < 0.055, name  # Kolmogorov and Smirnov's distance; 0.055 is passed once in 200


# --- random numbers


def test_numbers_belong_to_their_draw() -> None:
    alone = torch.cat([philox_uniforms(3, [draw], 7) for draw in (5, 6, 90, 7)])
    assert torch.equal(philox_uniforms(3, [5, 6, 90, 7], 7), alone)  # far apart: one by one
    assert torch.equal(
        philox_uniforms(3, [5, 6, 20, 7], 7)[[0, 1, 3]], alone[[0, 1, 3]]
    )  # all that lies between
    assert not torch.equal(philox_uniforms(4, [5], 7), alone[:1])
    assert torch.equal(philox_uniforms(3 + 2**64, [5], 7), alone[:1])
    assert philox_uniforms(3, [], 7).shape == (0, 7)
    assert philox_uniforms(3, [1, 2], 0).shape == (2, 0)
    assert torch.equal(philox_uniforms(3, [2**40], 7), philox_uniforms(3, [2**40, 2**40 + 1], 7)[:1])
    many = philox_uniforms(0, range(4000), 5)
    assert many.dtype == torch.float64
    assert 0 <= float(many.min()) < 0.001
    assert 0.999 < float(many.max()) < 1
    assert torch.allclose(many.mean(0), torch.full((5,), 0.5, dtype=torch.float64), atol=0.02)
    correlations = torch.corrcoef(torch.cat([many[:-1].T, many[1:].T])) - torch.eye(10)
    assert correlations.abs().max() < 0.06  # neither within a draw nor from one to the next


def test_numbers_are_stable_across_versions() -> None:
    """A resumed run has the views of the uninterrupted one, also with later versions."""
    assert philox_uniforms(0, [0], 2)[0].tolist() == [0.011546754286331562, 0.24154919656271812]
    assert philox_uniforms(7, [123456789], 2)[0].tolist() == [0.882302869278809, 0.08636463132337013]


# --- views


@pytest.mark.parametrize("strength", ["none", "weak", "strong"])
@pytest.mark.parametrize("family", ["digits", "grey", "colour"])
def test_a_view_does_not_depend_on_its_batch(strength: str, family: str) -> None:
    images = pictures(150, 3 if family == "colour" else 1, 20, 20)
    augmentation = Augmentation(strength, family, 20)  # type: ignore[arg-type]
    numbers = philox_uniforms(0, range(150), 2 * augmentation.num_uniforms).view(
        150, 2, augmentation.num_uniforms
    )
    together = augmentation(images, numbers)
    assert together.shape == (150, 2, images.shape[1], 20, 20)
    for row in (0, 63, 64, 149):
        one = slice(row, row + 1)
        assert torch.equal(augmentation(images[one], numbers[one])[0], together[row])
    if strength == "none":
        assert torch.equal(together, images.unsqueeze(1).expand_as(together))
    else:
        assert not torch.equal(together[:, 0], together[:, 1])


class Decoded(LazyImages):
    """Images in the memory order of decoded files."""

    def __init__(self, images: list[Tensor]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        return self.images[index].movedim(0, 2).contiguous().movedim(2, 0)

    def select(self, indices: Tensor) -> Decoded:
        return Decoded([self.images[int(i)] for i in indices])

    def joined(self, other: LazyImages) -> Decoded:
        raise NotImplementedError

    def keys(self) -> Iterator[bytes]:
        raise NotImplementedError


SIZES = [(40, 52), (40, 52), (30, 21), (16, 14), (16, 14), (9, 12), (24, 24), (61, 24)]


def files(strength: str, family: str) -> MultiViewDataset:
    """Images of different sizes, larger and smaller than the views of 24 x 24 pixels."""
    channels = 3 if family == "colour" else 1
    images = Decoded([pictures(1, channels, *size)[0] for size in SIZES])
    labels = torch.arange(len(SIZES))
    augmentation = Augmentation(strength, family, 24)  # type: ignore[arg-type]
    return MultiViewDataset(Samples(images, labels, labels), labels, augmentation, views=2, seed=0)


@pytest.mark.parametrize("strength", ["none", "weak", "strong"])
@pytest.mark.parametrize("family", ["grey", "colour"])
def test_views_of_files_do_not_depend_on_their_batch(strength: str, family: str) -> None:
    dataset = files(strength, family)
    draws = [(row, 10 + row) for row in range(len(SIZES))]
    for part in (draws, draws[::-1], draws[:2], draws[3:5]):  # two of one size: one batch from the start
        views, labels = dataset.__getitems__(part)
        assert views.shape == (len(part), 2, 3 if family == "colour" else 1, 24, 24)
        for draw, found, label in zip(part, views, labels.tolist(), strict=True):
            assert label == draw[0]
            assert torch.equal(found, dataset[draw][0])


def test_files_of_different_sizes_are_transformed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    jitter = ColorJitter.__call__

    def counted(self: ColorJitter, images: Tensor, uniforms: Tensor) -> Tensor:
        calls.append(len(images))
        return jitter(self, images, uniforms)

    monkeypatch.setattr(ColorJitter, "__call__", counted)
    files("strong", "colour").__getitems__([(row, row) for row in range(len(SIZES))])
    assert calls == [2 * len(SIZES)]


def test_large_images_are_read_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of photographs of one size could fill the memory."""
    events: list[str] = []
    read, fit = Decoded.__getitem__, Augmentation._fit

    def reading(self: Decoded, index: int) -> Tensor:
        events.append("read")
        return read(self, index)

    def fitting(self: Augmentation, images: Tensor, uniforms: Tensor) -> Tensor:
        events.append(f"resize {len(images)}")
        return fit(self, images, uniforms)

    monkeypatch.setattr(Decoded, "__getitem__", reading)
    monkeypatch.setattr(Augmentation, "_fit", fitting)
    dataset = files("strong", "colour")
    dataset.__getitems__([(0, 0), (1, 1), (1, 2)])  # of 40 x 52 pixels
    assert events == ["read", "read", "resize 1", "read", "resize 1", "resize 1"]
    events.clear()
    dataset.__getitems__([(3, 0), (4, 1)])  # smaller than the views
    assert events == ["read", "read", "resize 2"]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalising_leaves_its_argument_alone(dtype: torch.dtype) -> None:
    images = pictures(2, 3, 8, 8).to(dtype)
    before = images.clone()
    found = Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))(images)
    assert torch.equal(images, before)
    expected = F.normalize(before.double() / 255, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_views_are_a_function_of_the_draw(digits: DataModule) -> None:
    dataset = digits.loader(digits.batch_sampler(seed=0, steps=1)).dataset
    before = torch.get_rng_state()
    views = dataset[(7, 100)][0]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(views, dataset[(7, 100)][0])
    assert views.dtype == torch.uint8
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views, dataset[(7, 101)][0])
    batch, labels = dataset.__getitems__([(3, 99), (7, 100), (7, 101)])  # type: ignore[attr-defined]
    assert torch.equal(batch[1], views)
    assert labels.tolist() == [dataset[(3, 0)][1], dataset[(7, 0)][1], dataset[(7, 0)][1]]


def test_views_of_a_batch_are_independent(digits: DataModule) -> None:
    """The same image twice in a batch, as two draws, is augmented differently."""
    dataset = digits.loader(digits.batch_sampler(seed=3, steps=1)).dataset
    shown = {tuple(view.flatten().tolist()) for draw in range(50) for view in dataset[(0, draw)][0]}
    assert len(shown) > 90  # of 100


@pytest.mark.parametrize("augmentation", ["none", "strong"])
def test_loader_processes_change_nothing(augmentation: str) -> None:
    config = DataConfig(dataset="digits", batch_size=32, augmentation=augmentation)  # type: ignore[arg-type]
    data = load_data(config)
    alone = list(data.loader(data.batch_sampler(seed=0, steps=3)))
    config.workers = 2
    shared = list(data.loader(data.batch_sampler(seed=0, steps=3)))
    assert len(alone) == len(shared) == 3
    for mine, theirs in zip(alone, shared, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])


def test_views_without_augmentation_are_not_copied(digits: DataModule) -> None:
    data = load_data(DataConfig(dataset="digits", batch_size=16, augmentation="none", views=3))
    views, _ = next(iter(data.loader(data.batch_sampler(seed=0, steps=1))))
    assert views.shape == (16, 3, 1, 8, 8)
    assert views.stride(1) == 0


def test_a_batch_equals_its_items(digits: DataModule) -> None:
    whole = digits.evaluation_dataset("test")
    assert isinstance(whole, EvaluationDataset)
    batch = whole.__getitems__([4, 0, 9])
    for row, (image, coarse, fine) in zip((4, 0, 9), batch, strict=True):
        alone = whole[row]
        assert torch.equal(image, alone[0])
        assert (coarse, fine) == alone[1:] == (int(whole.coarse[row]), int(whole.fine[row]))


def views_of(strength: str, family: str, image: Tensor, count: int) -> Tensor:
    augmentation = Augmentation(strength, family, image.shape[-1])  # type: ignore[arg-type]
    numbers = philox_uniforms(0, range(count), augmentation.num_uniforms).unsqueeze(1)
    return augmentation(image.expand(count, -1, -1, -1), numbers)[:, 0]


@pytest.mark.parametrize("strength", ["weak", "strong"])
def test_digits_are_never_flipped(strength: str) -> None:
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    image[..., 6:22, 4:14] = 255  # left of the middle
    shown = views_of(strength, "digits", image, 100).double()
    left, right = shown[..., :14].sum((1, 2, 3)), shown[..., 14:].sum((1, 2, 3))
    flipped = (left < right).double().mean()
    assert flipped < 0.25  # strong crops may move it, flips would make it half
    other = views_of(strength, "grey", image, 100).double()
    assert 0.3 < (other[..., :14].sum((1, 2, 3)) < other[..., 14:].sum((1, 2, 3))).double().mean() < 0.7


def test_no_augmentation_gives_the_image() -> None:
    wide = torch.randint(0, 256, (2, 3, 20, 33), dtype=torch.uint8)
    nothing = torch.empty(2, 1, 0, dtype=torch.float64)
    assert torch.equal(Augmentation("none", "colour", 16)(wide, nothing)[:, 0], ResizeCenterCrop(16)(wide))
    assert ResizeCenterCrop(16)(wide).shape == (2, 3, 16, 16)
    assert ResizeCenterCrop(20)(wide[..., :20]).data_ptr() == wide.data_ptr()


def test_colour_views_vary_in_colour() -> None:
    image = torch.full((3, 32, 32), 100, dtype=torch.uint8)
    strong = views_of("strong", "colour", image, 20)
    assert len(set(strong.double().mean((1, 2, 3)).tolist())) > 5
    weak = views_of("weak", "colour", image, 20)
    assert weak[:, :, 8:24, 8:24].unique().tolist() == [100]
