"""Writers of the six transfer data sets in their published formats.

Each data set has twelve training images and six test images in three classes. The grey value of an image is
50 times its label.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from helpers.data_files import write_grey_image, write_text

CLASSES = ["first kind", "second kind", "third kind"]


def write_aircraft(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "fgvc-aircraft-2013b" / "data"
    makers = ["Maker A", "Maker B"]
    write_text(folder / "variants.txt", "\n".join(CLASSES) + "\n")
    write_text(folder / "manufacturers.txt", "\n".join(makers) + "\n")
    number = 0
    for split, count in (("trainval", 12), ("test", 6)):
        rows = [(f"{number + i:07d}", i % 3) for i in range(count)]
        number += count
        write_text(folder / f"images_variant_{split}.txt", "".join(f"{n} {CLASSES[k]}\n" for n, k in rows))
        write_text(
            folder / f"images_manufacturer_{split}.txt", "".join(f"{n} {makers[k // 2]}\n" for n, k in rows)
        )
        for name, label in rows:
            write_grey_image(folder / "images" / f"{name}.jpg", 50 * label)


def write_cars(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array(CLASSES, dtype=object)})
    for table, images, count in (
        ("devkit/cars_train_annos.mat", "cars_train", 12),
        ("cars_test_annos_withlabels.mat", "cars_test", 6),
    ):
        rows = np.array(
            [(i % 3 + 1, f"{i:05d}.jpg") for i in range(count)], dtype=[("class", object), ("fname", object)]
        )
        savemat(folder / table, {"annotations": rows})
        for i in range(count):
            write_grey_image(folder / images / f"{i:05d}.jpg", 50 * (i % 3))


def write_dtd(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "dtd" / "dtd"
    number = 0
    for split, count in (("train", 6), ("val", 6), ("test", 6)):
        names = [f"{CLASSES[i % 3]}/{CLASSES[i % 3]}_{number + i:04d}.jpg" for i in range(count)]
        number += count
        write_text(folder / "labels" / f"{split}1.txt", "\n".join(names) + "\n")
        for i, name in enumerate(names):
            write_grey_image(folder / "images" / name, 50 * (i % 3))


def write_flowers102(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    folder = root / "flowers-102"
    for number in range(1, 19):
        write_grey_image(folder / "jpg" / f"image_{number:05d}.jpg", 50 * ((number - 1) % 3))
    savemat(folder / "imagelabels.mat", {"labels": [i % 3 + 1 for i in range(18)]})
    savemat(
        folder / "setid.mat",
        {"trnid": list(range(1, 7)), "valid": list(range(7, 13)), "tstid": list(range(13, 19))},
    )
    sums = {
        key: (name, hashlib.md5((folder / name).read_bytes()).hexdigest())
        for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat"))
    }
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", sums)


def write_food101(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "food-101"
    for split, count in (("train", 4), ("test", 2)):
        names = {kind: [f"{kind}/{split}{i}" for i in range(count)] for kind in CLASSES}
        write_text(folder / "meta" / f"{split}.json", json.dumps(names))
        for label, kind in enumerate(CLASSES):
            for name in names[kind]:
                write_grey_image(folder / "images" / f"{name}.jpg", 50 * label)


def write_pets(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "oxford-iiit-pet"
    breeds = ["first_kind", "second_kind", "third_kind"]
    for split, count in (("trainval", 12), ("test", 6)):
        rows = [(f"{breeds[i % 3]}_{split}{i}", i % 3) for i in range(count)]
        lines = [f"{name} {label + 1} {2 if label == 2 else 1} 1\n" for name, label in rows]
        write_text(folder / "annotations" / f"{split}.txt", "".join(lines))
        for name, label in rows:
            write_grey_image(folder / "images" / f"{name}.jpg", 50 * label)


WRITERS: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "aircraft": write_aircraft,
    "cars": write_cars,
    "dtd": write_dtd,
    "flowers102": write_flowers102,
    "food101": write_food101,
    "pets": write_pets,
}
