"""Glyphs: letters and typefaces belong to their images, and every drawing is another one."""

from __future__ import annotations

import torch
from torch import Tensor

from pysupcon.data import DataConfig
from pysupcon.data.datamodule import load_data
from pysupcon.data.glyphs import IMAGES_PER_CLASS, TYPEFACES, glyphs


def images_by_class() -> Tensor:
    """[26 letters, 10 typefaces, 20 images, 784] in [0, 1]."""
    images = glyphs().train.images
    assert isinstance(images, Tensor)
    return images.view(26, len(TYPEFACES), IMAGES_PER_CLASS, -1).float() / 255


def test_classes_and_splits() -> None:
    data = load_data(DataConfig(dataset="glyphs", batch_size=52, augmentation="none"))
    assert data.coarse_names == [chr(ord("A") + i) for i in range(26)]
    for name, count in (("train", 14), ("val", 2), ("test", 4)):
        part = data.splits[name]
        assert part.fine.bincount().tolist() == [count] * 260
        names = [
            (data.fine_names[int(f)], data.coarse_names[int(c)])
            for f, c in zip(part.fine, part.coarse, strict=True)
        ]
        assert all(fine.partition(", ")[0] == letter for fine, letter in names)
        assert {fine.partition(", ")[2] for fine, _ in names} == set(TYPEFACES)


def test_images_show_their_letter_in_their_typeface() -> None:
    """Classes are those of the fonts: bold has more ink, and the nearest image is of the same letter."""
    images = images_by_class()
    ink = images.mean(dim=(2, 3))
    place = TYPEFACES.index
    assert bool((ink[:, place("DejaVuSans-Bold")] > ink[:, place("DejaVuSans")]).all())
    assert bool((ink[:, place("DejaVuSerif-Bold")] > ink[:, place("DejaVuSerif")]).all())
    shown, asked = (images[:, :, start::2].flatten(0, 2) for start in (0, 1))
    nearest = (asked @ torch.nn.functional.normalize(shown, dim=1).T).argmax(dim=1) // (IMAGES_PER_CLASS // 2)
    nearest = nearest.view(26, len(TYPEFACES), -1)
    letters, typefaces = nearest // len(TYPEFACES), nearest % len(TYPEFACES)
    assert (letters == torch.arange(26).view(-1, 1, 1)).double().mean() > 0.75
    assert (typefaces == torch.arange(len(TYPEFACES)).view(1, -1, 1)).double().mean() > 0.35


def test_drawings_differ_but_are_the_same_each_time() -> None:
    first = images_by_class()
    assert len(first.flatten(0, 2).unique(dim=0)) == first.shape[:3].numel()
    glyphs.cache_clear()
    assert torch.equal(images_by_class(), first)
