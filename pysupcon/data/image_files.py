"""The image files in class folders, their classes, and what is left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pysupcon.errors import ConfigError
from pysupcon.reading import one_line

ENDINGS = (
    ".jpg", ".jpeg", ".jfif", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm",
)  # fmt: skip
"""Endings of the images that are read; of an animated image the first one is read."""
_SYSTEM_FOLDERS = ("lost+found", "$recycle.bin", "@eadir", "system volume information")
_NOTES = (
    ".txt", ".md", ".html", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".db", ".ini", ".log",
)  # fmt: skip
"""Endings of files that nobody takes for images"""
_NO_CLASS = "images beside the class folders"


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or made by the operating system."""
    return name.startswith((".", "__")) or name.lower() in _SYSTEM_FOLDERS


def scan(root: Path, left_out: Counter[str]) -> tuple[list[str], list[Path], Tensor]:
    """Class names, image files and labels. Nested classes are called COARSE/FINE.

    Adds the kinds of the files that are left out to ``left_out``, for :func:`describe_left_out`.

    Raises:
        ConfigError: a folder cannot be read or has no image, or some classes are nested and others are not.
    """
    try:
        names = _class_names(root, left_out)
        found = [_images_in(root / name, left_out) for name in names]
    except OSError as error:
        reason = one_line(error)
        raise ConfigError(
            f"data.root {str(root)!r} is not an image folder (FOLDER/CLASS/*.png): {reason}"
        ) from error
    labels = torch.arange(len(names)).repeat_interleave(torch.tensor([len(paths) for paths in found]))
    return names, [path for paths in found for path in paths], labels


def describe_left_out(root: Path, left_out: Counter[str]) -> list[str]:
    """A line about the files that are left out, if there are some."""
    total = left_out.total()
    if not total:
        return []
    kinds = ", ".join(f"{kind} ({number})" for kind, number in (+left_out).most_common())
    were = "1 file was" if total == 1 else f"{total} files were"
    return [f"data.root {root}: {were} left out: {kinds}. Images are files with {', '.join(ENDINGS)}"]


def _class_names(root: Path, left_out: Counter[str]) -> list[str]:
    outer = _visible(root)
    names = [path.name for path in outer if path.is_dir()]
    if not names:
        raise FileNotFoundError(f"Couldn't find any class folder in {root}.")
    left_out[_NO_CLASS] += sum(_is_image(path.name) for path in outer if not path.is_dir())
    inner: list[str] = []
    nested: list[str] = []
    images: list[Path] = []
    others: Counter[str] = Counter()
    for name in names:
        inside = _visible(root / name)
        own = [path for path in inside if _is_image(path.name)]
        folders = [] if own else [f"{name}/{path.name}" for path in inside if path.is_dir()]
        inner += folders
        nested += [name] if folders else []
        images += own[:1]
        others.update(kind for path in inside if not path.is_dir() for kind in _foreign(path.name))
    if nested and images:
        image = images[0]
        raise ConfigError(
            f"data.root {str(root)!r} must have the images directly in every class folder (CLASS/*.png), or "
            f"in folders inside every one (COARSE/FINE/*.png): {nested[0]!r} has folders only, but there is "
            f"the image {image.relative_to(root)}. Move the images or the folders, or give the labels by "
            "data.table"
        )
    if len(nested) < len(names):
        return names
    left_out.update(others)
    return inner


def _images_in(folder: Path, left_out: Counter[str]) -> list[Path]:
    """The images in a class folder and the folders in it, in the order of torchvision's ``ImageFolder``."""
    found: list[Path] = []
    for place, files in sorted(_walk(folder)):
        for name in sorted(files):
            if is_hidden(name):
                continue
            if _is_image(name):
                found.append(Path(place, name))
            else:
                left_out.update(_foreign(name))
    if not found:
        raise FileNotFoundError(f"Found no image in {folder}; images are files with {', '.join(ENDINGS)}")
    return found


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    def fail(error: OSError) -> None:
        raise error  # os.walk would leave out the folder

    for place, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        folders[:] = [name for name in folders if not is_hidden(name)]
        yield place, files


def _visible(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if not is_hidden(path.name)]


def _is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def _foreign(name: str) -> list[str]:
    """The ending of a file that may be meant as an image and is not read."""
    ending = Path(name).suffix.lower()
    known = _is_image(name) or ending in _NOTES or name.lower() in ("readme", "license")
    return [] if known else [ending or "no ending"]
