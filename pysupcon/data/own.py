"""Data sets of the user: any map-style dataset of images, or of feature vectors, and labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysupcon.data.config import DataConfig
from pysupcon.data.labels import Labels, LabelValue, plain_label, split_source
from pysupcon.data.samples import IMAGENET_MEAN, IMAGENET_STD, LazyImages, Source
from pysupcon.data.tables import SPLIT_NAMES
from pysupcon.data.vectors import as_vectors
from pysupcon.errors import ConfigError, ImageError
from pysupcon.reading import one_line
from pysupcon.user_code import call_object, import_object

ITEM = (
    "an item must be (image, label), (image, coarse label, fine label), or a dict of image (or img, "
    "features) and label (or coarse, fine); an image is a PIL image, a uint8 array [H, W] or [H, W, C], or a "
    "tensor [C, H, W] of uint8 or of floats in [0, 1]; a vector of features is a float array or tensor [D]; "
    "a label is an int or str"
)
_IMAGE_KEYS = ("image", "img", "features")
_LABEL_KEYS = {
    "label": ("label", "labels", "target"),
    "coarse": ("coarse", "coarse_label", "coarse_labels"),
    "fine": ("fine", "fine_label", "fine_labels"),
}
GREY_MEAN, GREY_STD = (0.5,), (0.25,)


class ItemImages(LazyImages):
    """The images of a map-style dataset, read on access: uint8 [C, H, W].

    Args:
        parts: the datasets of the splits.
        places: part and index of every image.
        channels: 1 or 3; PIL images are converted.

    Raises:
        ImageError: on access; an item cannot be read, or its image is of another form.
    """

    def __init__(self, parts: Sequence[Any], places: Sequence[tuple[int, int]], channels: int) -> None:
        self.parts, self.places, self.channels = parts, list(places), channels

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # slices are not supported
        part, item = self.places[index]
        try:
            return to_pixels(_image(self.parts[part][item]), self.channels)
        except Exception as error:  # code of the user
            raise ImageError(f"item {item} of the data set cannot be read: {one_line(error)}") from error

    def select(self, indices: Tensor) -> ItemImages:
        return ItemImages(self.parts, [self.places[int(i)] for i in indices], self.channels)

    def joined(self, other: LazyImages) -> ItemImages:
        assert isinstance(other, ItemImages)
        return ItemImages(self.parts, [*self.places, *other.places], self.channels)

    def keys(self) -> Iterator[bytes]:
        return (f"{part}:{item}\n".encode() for part, item in self.places)


def to_pixels(image: Any, channels: int | None = None) -> Tensor:
    """Convert an image to uint8 [C, H, W].

    Args:
        image: a PIL image, a uint8 array [H, W] or [H, W, C], or a tensor [H, W] or [C, H, W] of uint8 or of
            floats in [0, 1].
        channels: 1 or 3, which a PIL image is converted to; other images must have them. None keeps 1 for
            grey PIL images and converts all others to 3.

    Raises:
        ValueError: it is something else; the message says what.
    """
    if hasattr(image, "convert") and hasattr(image, "getbands"):
        from torchvision.transforms.v2.functional import pil_to_tensor

        from pysupcon.data.samples import plain_image

        wanted = channels or (1 if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;") else 3)
        return pil_to_tensor(plain_image(image, "L" if wanted == 1 else "RGB"))
    if isinstance(image, np.ndarray):
        tensor = torch.from_numpy(np.ascontiguousarray(image))
        tensor = tensor.movedim(-1, 0) if tensor.ndim == 3 else tensor
    elif isinstance(image, Tensor):
        tensor = image.detach().as_subclass(Tensor)
    else:
        raise ValueError(f"the image is of type {type(image).__name__}")
    tensor = tensor.unsqueeze(0) if tensor.ndim == 2 else tensor
    if tensor.ndim != 3 or min(tensor.shape) < 1 or tensor.shape[0] not in (1, 3):
        raise ValueError(
            f"the image has the shape {list(image.shape)}; it must have one or three channels "
            "(arrays [H, W, C], tensors [C, H, W])"
        )
    if channels is not None and tensor.shape[0] != channels:
        raise ValueError(f"the image has {tensor.shape[0]} channels, the first one has {channels}")
    if tensor.is_floating_point():
        low, high = tensor.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"the image has floats from {low:.3g} to {high:.3g}, outside [0, 1]")
        return (tensor * 255).round().to(torch.uint8)
    if tensor.dtype != torch.uint8:
        raise ValueError(f"the image is of {tensor.dtype}; it must be uint8 or float")
    return tensor.contiguous()


def own_dataset(config: DataConfig, dataset: object = None) -> Source:
    """Read the data set that ``config.dataset`` names as ``package.module:name``, or ``dataset``.

    A function or class is called with ``data.dataset_args``, and with ``data.root`` if it has a parameter
    ``root``. It gives a map-style dataset, or a mapping of train, val (or validation) and test to such
    datasets.

    Raises:
        ConfigError: it is no such object; the message shows what an item must be, and what came.
    """
    field = f"data.dataset={config.dataset}"
    if dataset is None:
        dataset = _call(config)
    elif config.dataset_args:
        raise ConfigError("data.dataset_args has no effect with a passed data set: leave it out")
    parts: dict[str, Any] = {"train": dataset}
    if isinstance(dataset, Mapping):
        unknown = [name for name in dataset if name not in SPLIT_NAMES]
        if unknown or "train" not in dataset:
            raise ConfigError(
                f"{field}: a mapping must have train and may have val and test, got "
                f"{', '.join(map(str, dataset))}"
            )
        parts = dict(dataset)
    if len({SPLIT_NAMES[name] for name in parts}) < len(parts):
        raise ConfigError(f"{field}: a mapping must name each split once, got {', '.join(parts)}")
    sets = list(parts.values())
    for part in sets:
        if not hasattr(part, "__len__") or not hasattr(part, "__getitem__"):
            raise ConfigError(
                f"{field} must give a map-style dataset, with __len__ and __getitem__, got "
                f"{type(part).__name__}"
            )
    empty = [name for name, part in parts.items() if len(part) == 0]
    if empty:
        raise ConfigError(f"{field}: the {empty[0]} split has no item")
    if "test" in parts and config.test_fraction is not None:
        raise ConfigError("data.test_fraction has no effect: the data set has a test split; leave it out")
    first = _first_item(sets[0], field)
    levels = [_levels(part, field) for part in sets]
    if len({tuple(level) for level in levels}) > 1:
        raise ConfigError(f"{field}: the splits must have the same kinds of labels")
    joined = {name: [value for level in levels for value in level[name]] for name in levels[0]}
    names = getattr(sets[0], "classes", None) or _feature_names(sets[0])
    labels = Labels(joined.get("coarse", joined.get("label")), joined.get("fine"), names)
    split = torch.cat([torch.full((len(part),), SPLIT_NAMES[name]) for name, part in parts.items()])
    image = _image(first)
    if _is_vector(image):
        rows = [_image(part[index]) for part in sets for index in range(len(part))]
        vectors = as_vectors(rows, field)
        return split_source(
            vectors, labels, split, field, family="vectors", channels=vectors.shape[1], image_size=0,
            mean=(), std=(),
        )  # fmt: skip
    try:
        pixels = to_pixels(image)
    except ValueError as error:
        raise ConfigError(f"{field}: the first item is not usable: {error}; {ITEM}") from error
    channels, *sides = pixels.shape
    places = [(number, index) for number, part in enumerate(sets) for index in range(len(part))]
    images = ItemImages(sets, places, channels)
    grey = channels == 1
    return split_source(
        images, labels, split, field, family="grey" if grey else "colour", channels=channels,
        image_size=config.image_size or min(sides), mean=GREY_MEAN if grey else IMAGENET_MEAN,
        std=GREY_STD if grey else IMAGENET_STD,
    )  # fmt: skip


def _call(config: DataConfig) -> object:
    found = import_object(config.dataset, "data.dataset")
    if not callable(found):
        if config.dataset_args:
            raise ConfigError(f"data.dataset_args has no effect: {config.dataset} cannot be called")
        return found
    arguments: dict[str, Any] = dict(config.dataset_args)
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):
        parameters = {}  # type: ignore[assignment]
    if config.root is not None:
        if "root" not in parameters:
            raise ConfigError(
                f"data.root has no effect: {config.dataset} has no parameter root; leave it out"
            )
        arguments.setdefault("root", config.root)
    return call_object(found, config.dataset, arguments, "data.dataset", "data.dataset_args")


def _first_item(dataset: Any, field: str) -> Any:
    try:
        item = dataset[0]
    except Exception as error:  # code of the user
        raise ConfigError(
            f"{field}: the first item cannot be read: {type(error).__name__}: {one_line(error)}"
        ) from error
    usable = isinstance(item, (tuple, list)) and len(item) in (2, 3)
    if isinstance(item, Mapping):
        usable = any(key in item for key in _IMAGE_KEYS) and any(
            key in item for keys in _LABEL_KEYS.values() for key in keys
        )
    if not usable:
        raise ConfigError(f"{field}: {ITEM}; the first item is {_describe(item)}")
    return item


def _image(item: Any) -> Any:
    if isinstance(item, Mapping):
        return next(item[key] for key in _IMAGE_KEYS if key in item)
    return item[0]


def _is_vector(image: Any) -> bool:
    return (isinstance(image, (np.ndarray, Tensor)) and image.ndim == 1) or (
        isinstance(image, (list, tuple)) and bool(image) and isinstance(image[0], float)
    )


def _levels(dataset: Any, field: str) -> dict[str, list[LabelValue]]:
    """The labels of all items by kind, without reading images where the dataset has a list of labels."""
    first = dataset[0]
    count = len(dataset)
    if isinstance(first, Mapping):
        keys = {
            kind: next((key for key in names if key in first), None) for kind, names in _LABEL_KEYS.items()
        }
        if keys["coarse"] or keys["fine"]:
            keys["label"] = None
        columns = {kind: _column(dataset, key, count, field) for kind, key in keys.items() if key is not None}
    elif len(first) == 2:
        listed = next(
            (getattr(dataset, name) for name in ("targets", "labels") if hasattr(dataset, name)), None
        )
        if listed is None or not hasattr(listed, "__len__") or len(listed) != count:
            listed = _of_items(dataset, count, field, lambda item: item[1])
        columns = {"label": list(listed)}
    else:
        pairs = _of_items(dataset, count, field, lambda item: (item[1], item[2]))
        columns = {"coarse": [coarse for coarse, _ in pairs], "fine": [fine for _, fine in pairs]}
    return {
        kind: [
            plain_label(value, f"{field}: the {kind} label of item {index}")
            for index, value in enumerate(values)
        ]
        for kind, values in columns.items()
    }


def _column(dataset: Any, key: str, count: int, field: str) -> list[Any]:
    if key in getattr(dataset, "column_names", ()):  # datasets.Dataset reads a column without the images
        return list(dataset[key])
    return _of_items(dataset, count, field, lambda item: item[key])


def _of_items(dataset: Any, count: int, field: str, take: Callable[[Any], Any]) -> list[Any]:
    """``take(item)`` of every item.

    Raises:
        ConfigError: an item is of another form than the first; the message has its index.
    """
    taken = []
    for index in range(count):
        item = dataset[index]
        try:
            taken.append(take(item))
        except (TypeError, LookupError) as error:
            raise ConfigError(f"{field}: {ITEM}; item {index} is {_describe(item)}") from error
    return taken


def _feature_names(dataset: Any) -> list[str] | None:
    """The class names of a Hugging Face dataset."""
    features = getattr(dataset, "features", None)
    if not isinstance(features, Mapping):
        return None
    for key in (*_LABEL_KEYS["fine"], *_LABEL_KEYS["label"]):
        names = getattr(features.get(key), "names", None)
        if names:
            return list(names)
    return None


def _describe(item: Any) -> str:
    if isinstance(item, Mapping):
        return "a dict of " + ", ".join(f"{key}: {_describe(value)}" for key, value in item.items())
    if isinstance(item, (tuple, list)) and len(item) < 8:
        return f"a {type(item).__name__} of ({', '.join(_describe(value) for value in item)})"
    shape = getattr(item, "shape", None)
    return type(item).__name__ + (f" {list(shape)}" if shape is not None else "")
