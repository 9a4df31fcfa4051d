"""Samples and data sets as the readers return them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from pysupcon.data.config import DOWNLOADABLE_DATASETS, DataConfig
from pysupcon.data.superclasses import coarse_labels_of
from pysupcon.errors import ConfigError, ImageError
from pysupcon.reading import check_regular, one_line

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Family = Literal["digits", "grey", "colour"]


class FileImages(Sequence[Tensor]):
    """Image files, read on access: ``images[i]`` is a uint8 RGB tensor [3, H, W] of the file's size.

    Raises:
        ImageError: on access; the file is missing, not a regular file, damaged, or larger than PIL's limit.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # slices are not supported
        from torchvision.datasets.folder import default_loader
        from torchvision.transforms.v2.functional import pil_to_tensor

        path = self.paths[index]
        try:
            check_regular(path)  # a pipe would block
            return pil_to_tensor(default_loader(str(path)))
        except Exception as error:  # PIL's decoders raise many kinds of errors for damaged files
            raise ImageError(f"the image {path} cannot be read: {one_line(error)}") from error


Images = Tensor | FileImages


@dataclass(frozen=True)
class Samples:
    """Images, uint8 [N, C, H, W] or files, with coarse and fine labels, int64 [N] each; if samples have
    several labels, both are int64 [N, L], 0 or 1."""

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
        if isinstance(self.images, FileImages):
            images: Images = FileImages([self.images.paths[int(i)] for i in indices])
        else:
            images = self.images[indices]
        return Samples(images, self.coarse[indices], self.fine[indices])


@dataclass(frozen=True)
class Source:
    """A published data set: all samples, or its official training, test and validation splits.

    Attributes:
        train: training samples, or all samples if ``test`` is None.
        test, val: official splits, or None.
        fine_names, coarse_names: names of the classes.
        family: decides on the augmentation.
        channels, image_size: shape of the images.
        mean, std: statistics of the pixels in [0, 1], per channel.
        max_per_class: training samples kept of each fine class after validation samples are held out, or
            None.
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
