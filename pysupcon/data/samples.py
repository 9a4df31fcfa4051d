"""Samples and data sets as the readers return them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor
from typing_extensions import Self

from pysupcon.data.config import DOWNLOADABLE_DATASETS, DataConfig
from pysupcon.data.superclasses import coarse_labels_of
from pysupcon.errors import ConfigError, ImageError
from pysupcon.reading import check_regular, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Family = Literal["digits", "grey", "colour", "vectors"]


class LazyImages(Sequence[Tensor]):
    """Images that are read on access: ``images[i]`` is a uint8 tensor [C, H, W] of the image's own size."""

    @abstractmethod
    def select(self, indices: Tensor) -> Self:
        """The images at ``indices`` (int64 [M])."""

    @abstractmethod
    def joined(self, other: LazyImages) -> Self:
        """These images, then those of ``other``."""

    @abstractmethod
    def keys(self) -> Iterator[bytes]:
        """What identifies each image in the fingerprint of a split."""


def plain_image(image: Image, mode: Literal["L", "RGB"]) -> Image:
    """Convert a PIL image to 8-bit grey or RGB.

    Numbers of 16 bits (also where PIL stores them in 32) are divided by 257, floats in [0, 1] are multiplied
    by 255. Transparent pixels are composited on white.

    Raises:
        ValueError: a float is outside [0, 1], or a number does not fit 16 bits.
    """
    from PIL import Image as pil

    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        largest = 1 if image.mode == "F" else 65_535
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= largest):
            raise ValueError(
                f"its values of mode {image.mode} lie in [{low:g}, {high:g}], not [0, {largest}]"
            )
        image = pil.fromarray((values * (255 / largest)).round().astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = pil.new("RGBA", image.size, (255, 255, 255, 255))
        image = pil.alpha_composite(white, image)
    return image if image.mode == mode else image.convert(mode)  # convert would copy it


def read_image_file(path: Path, *, draft: bool = False) -> Image:
    """Read an image file as 8-bit RGB, rotated as its EXIF data say.

    Args:
        path: the file.
        draft: decode a JPEG file at an eighth of its size. All of its data are read nevertheless.

    Raises:
        Exception: PIL's decoders raise many kinds of errors for damaged files.
    """
    from PIL import Image as pil
    from PIL import ImageOps

    check_regular(path)  # a pipe would block
    with pil.open(path) as image:
        if draft:
            image.draft(None, (1, 1))
        image.load()  # the file is closed at the end
        ImageOps.exif_transpose(image, in_place=True)
        return plain_image(image, "RGB")


class FileImages(LazyImages):
    """Image files, read on access: ``images[i]`` is a uint8 RGB tensor [3, H, W] of the file's size.

    Raises:
        ImageError: on access; the file is missing, not a regular file, damaged, or larger than PIL's limit.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # slices are not supported
        from torchvision.transforms.v2.functional import pil_to_tensor

        path = self.paths[index]
        try:
            return pil_to_tensor(read_image_file(path))
        except Exception as error:
            raise ImageError(f"the image {path} cannot be read: {one_line(error)}") from error

    def find_error(self, index: int) -> str | None:
        """Why a file cannot be read, on one line; None if it can be. Threads may call this."""
        try:
            read_image_file(self.paths[index], draft=True)
        except Exception as error:
            return one_line(error)
        return None

    def select(self, indices: Tensor) -> FileImages:
        return FileImages([self.paths[int(i)] for i in indices])

    def joined(self, other: LazyImages) -> FileImages:
        assert isinstance(other, FileImages)
        return FileImages([*self.paths, *other.paths])

    def keys(self) -> Iterator[bytes]:
        return ("/".join(path.parts[-2:]).encode() + b"\n" for path in self.paths)


Images = Tensor | LazyImages


@dataclass(frozen=True)
class Samples:
    """Images, uint8 [N, C, H, W] or read on access, or vectors, float32 [N, D]; with coarse and fine labels,
    int64 [N] each; if samples have several labels, both are int64 [N, L], 0 or 1."""

    images: Images
    coarse: Tensor
    fine: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @property
    def strata(self) -> Tensor:
        """int64 [N], what splits are stratified by: the fine label, or nothing if samples have several."""
        return self.fine if self.fine.dim() == 1 else self.fine.new_zeros(len(self))

    def select(self, indices: Tensor) -> Samples:
        """The samples at ``indices`` (int64 [M])."""
        rows: Images = self.images
        rows = rows.select(indices) if isinstance(rows, LazyImages) else rows[indices]
        return Samples(rows, self.coarse[indices], self.fine[indices])


@dataclass(frozen=True)
class Source:
    """A published data set: all samples, or its official training, test and validation splits.

    Attributes:
        train: training samples, or all samples if ``test`` is None.
        test, val: official splits, or None.
        fine_names, coarse_names: names of the classes.
        family: decides on the augmentation.
        channels, image_size: shape of the images; for vectors D and 0.
        mean, std: statistics of the pixels in [0, 1], per channel; for vectors empty: those of the training
            split are used.
        labels_by_name: whether ``data.ignore_index`` is the value of a label, which is its name.
        max_per_class: training samples kept of each fine class after validation samples are held out, or
            None.
        notes: lines for the user about what was read and what was left out.
        feature_names: columns of the features of vectors, if they have names.
        label_columns: names of the columns of the coarse and the fine labels, if they have names.
    """

    train: Samples
    test: Samples | None
    fine_names: list[str]
    coarse_names: list[str]
    family: Family
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    val: Samples | None = None
    max_per_class: list[int] | None = None
    labels_by_name: bool = False
    notes: list[str] = field(default_factory=list)
    feature_names: list[str] = field(default_factory=list)
    label_columns: dict[str, str] = field(default_factory=dict)


def samples_from_images(
    images: Tensor, fine: Tensor, names: list[str], coarse: dict[str, list[str]]
) -> Samples:
    """Samples from images uint8 [N, C, H, W], fine labels [N] and the superclasses ``coarse``."""
    return Samples(images.contiguous(), coarse_labels_of(fine, names, coarse), fine)


def samples_from_files(
    paths: Sequence[Path], fine: Tensor, names: list[str], coarse: dict[str, list[str]]
) -> Samples:
    """Samples from image files, fine labels [N] and the superclasses ``coarse``."""
    return Samples(FileImages(paths), coarse_labels_of(fine, names, coarse), fine)


def identity_superclasses(names: list[str]) -> dict[str, list[str]]:
    """One superclass per fine class, for data sets without superclasses."""
    return {name: [name] for name in names}


def missing_data_error(config: DataConfig, looked_for: str) -> ConfigError:
    """The error for missing files."""
    remedy = "correct data.root"
    if config.dataset in DOWNLOADABLE_DATASETS:
        remedy += ", or download the data with --data.download true"
    return ConfigError(
        f"data.root {config.root!r} does not hold {config.dataset}: looked for {looked_for}; {remedy}"
    )
