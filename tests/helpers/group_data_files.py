"""Writers of Waterbirds, CelebA and ISIC in their usual file layouts."""

from __future__ import annotations

import csv
from pathlib import Path

from PIL import Image


def _write_image(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (shade, 0, 255 - shade)).save(path)


def _write_csv(path: Path, rows: list[list[object]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def write_waterbirds(root: Path) -> None:
    """The layout of the archive waterbird_complete95_forest2water2."""
    rows: list[list[object]] = [["img_id", "img_filename", "y", "split", "place", "place_filename"]]
    for i in range(24):
        name = f"{i:03d}.Some_bird/Some_Bird_{i:04d}_{i}.jpg"
        _write_image(root / name, 10 * i)
        rows.append([i + 1, name, i % 2, (0, 0, 1, 2)[i // 2 % 4], i // 3 % 2, "/f/forest/00000.jpg"])
    _write_csv(root / "metadata.csv", rows)


def write_celeba_txt(root: Path) -> None:
    """The published layout: number of rows, attribute names, then rows of columns separated by blanks."""
    names = ["5_o_Clock_Shadow", "Blond_Hair", "Male", "Young"]
    lines = ["12", " ".join(names) + " "]
    parts = []
    for i in range(12):
        _write_image(root / "img_align_celeba" / f"{i + 1:06d}.jpg", 20 * i)
        values = [-1, 1 if i % 3 == 0 else -1, 1 if i % 2 else -1, 1]
        lines.append(f"{i + 1:06d}.jpg " + " ".join(f"{v:2d}" for v in values))
        parts.append(f"{i + 1:06d}.jpg {(0, 1, 2)[i // 4]}")
    (root / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    (root / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")


def write_celeba_csv(root: Path) -> None:
    """Kaggle's layout: CSV tables, and images in a nested folder of the same name."""
    attributes: list[list[object]] = [["image_id", "5_o_Clock_Shadow", "Blond_Hair", "Male", "Young"]]
    parts: list[list[object]] = [["image_id", "partition"]]
    for i in range(12):
        name = f"{i + 1:06d}.jpg"
        _write_image(root / "img_align_celeba" / "img_align_celeba" / name, 20 * i)
        attributes.append([name, -1, 1 if i % 3 == 0 else -1, 1 if i % 2 else -1, 1])
        parts.append([name, (0, 1, 2)[i // 4]])
    _write_csv(root / "list_attr_celeba.csv", attributes)
    _write_csv(root / "list_eval_partition.csv", [parts[0], *reversed(parts[1:])])


def write_isic(root: Path) -> None:
    """The layout of the ISIC archive with an additional column of patches and without a split column."""
    rows: list[list[object]] = [["isic_id", "attribution", "age_approx", "benign_malignant", "patch"]]
    for i in range(40):
        _write_image(root / "images" / f"ISIC_{i:07d}.jpg", 6 * i)
        rows.append([f"ISIC_{i:07d}", "A, B", 50, "malignant" if i % 4 == 0 else "benign", i % 2])
    _write_csv(root / "metadata.csv", rows)
