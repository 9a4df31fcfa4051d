"""Writers of small data sets in their published file formats."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision.utils import save_image

from pysupcon.data import superclasses
from pysupcon.data.imagenet_classes import TINY_IMAGENET


def write_grey_image(path: Path, grey: int, size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(path)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_idx(path: Path, array: np.ndarray, *, compress: bool) -> None:
    raw = (
        struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
        + array.astype(np.uint8).tobytes()
    )
    if compress:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(raw))
    else:
        path.write_bytes(raw)


def write_mnist(folder: Path, *, compress: bool) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (200, 28, 28))
    labels = np.arange(200) % 10
    for part in ("train", "t10k"):
        write_idx(folder / f"{part}-images-idx3-ubyte", images, compress=compress)
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels, compress=compress)
    return images


def write_cifar(
    root: Path, monkeypatch: pytest.MonkeyPatch, classes: int, *, count: int = 300, test_count: int = 300
) -> np.ndarray:
    """Write the pickles of CIFAR-10 or CIFAR-100 with cyclic labels, patch torchvision's checksums, and
    return the test images."""
    kind = datasets.CIFAR10 if classes == 10 else datasets.CIFAR100
    folder = root / kind.base_folder
    folder.mkdir()
    random = np.random.default_rng(0)
    names = [name for members in getattr(superclasses, f"CIFAR{classes}").values() for name in members]
    key = "labels" if classes == 10 else "fine_labels"

    def write(name: str, content: dict[str, object]) -> str:
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return hashlib.md5(raw).hexdigest()

    for attribute, number in (("train_list", count), ("test_list", test_count)):
        pixels = random.integers(0, 256, (number, 3072), dtype=np.uint8)
        labels = [i % classes for i in range(number)]
        listed = [[name, write(name, {"data": pixels, key: labels})] for name, _ in getattr(kind, attribute)]
        monkeypatch.setattr(kind, attribute, listed)
    meta = dict(kind.meta)
    meta["md5"] = write(meta["filename"], {meta["key"]: sorted(names)})
    monkeypatch.setattr(kind, "meta", meta)
    return pixels


def write_image_folder(root: Path, classes: list[str], count: int) -> None:
    for index, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            save_image(torch.full((3, 10 + i, 12), index / 4), root / name / f"{i}.png")


def write_tiny_imagenet(root: Path) -> list[str]:
    wnids = sorted(wnid for members in TINY_IMAGENET.values() for wnid in members)
    write_text(root / "wnids.txt", "\n".join(reversed(wnids)) + "\n")
    write_text(root / "words.txt", "".join(f"{wnid}\tword {i}, other\n" for i, wnid in enumerate(wnids)))
    lines = []
    for i, wnid in enumerate(wnids):
        for k in range(2):
            write_grey_image(root / "train" / wnid / "images" / f"{wnid}_{k}.JPEG", i, (64, 64))
        write_grey_image(root / "val" / "images" / f"val_{i}.JPEG", i, (64, 64))
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    write_text(root / "val" / "val_annotations.txt", "".join(reversed(lines)))
    return wnids
