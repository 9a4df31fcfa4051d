"""Augmented views of image batches, uint8 to uint8, for each family of images."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from pysupcon.data.colour import ColorJitter, RandomGrayscale
from pysupcon.data.geometry import RandomAffine, RandomCrop, RandomHorizontalFlip, RandomResizedCrop
from pysupcon.data.own import to_pixels
from pysupcon.data.samples import Family
from pysupcon.errors import ConfigError, ImageError
from pysupcon.reading import one_line
from pysupcon.user_code import PlainValue, call_object, import_object

_CHUNK_PIXELS = 2**17
"""Pixels of the views that are augmented at once: the data between two transforms stay in the cache."""


class BatchTransform(Protocol):
    """A random transform of a batch, see :mod:`pysupcon.data.geometry`."""

    @property
    def num_uniforms(self) -> int: ...

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor: ...


class ResizeCenterCrop:
    """Resizes the shorter side of uint8 images [..., C, H, W] to ``size`` and crops the centre square."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.resize = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])

    def __call__(self, images: Tensor) -> Tensor:
        return images if images.shape[-2:] == (self.size, self.size) else self.resize(images)


class Augmentation:
    """Random views of images.

    Args:
        strength: "none", "weak" or "strong"; see ``DataConfig.augmentation``.
        family: "digits" are not flipped; "grey" images are flipped; "colour" images are flipped and
            jittered in colour (Khosla et al. 2020, appendix; Chen et al. 2022).
        size: side of the views, in pixels.

    Attributes:
        num_uniforms: number of uniform random numbers per view.
    """

    def __init__(self, strength: Literal["none", "weak", "strong"], family: Family, size: int) -> None:
        self.size = size
        # RandomResizedCrop resizes by itself.
        self.resize = None if strength == "strong" else ResizeCenterCrop(size)
        self.transforms: list[BatchTransform] = []
        if strength == "weak" and family == "digits":
            self.transforms = [RandomAffine(10, translate=0.1)]
        elif strength == "weak":
            self.transforms = [RandomCrop(max(size // 8, 1)), RandomHorizontalFlip()]
        elif strength == "strong" and family == "digits":
            # A digit fills its image, so a crop below half of the area would cut it.
            self.transforms = [RandomAffine(15, shear=10), RandomResizedCrop(size, (0.5, 1.0))]
        elif strength == "strong":
            self.transforms = [RandomResizedCrop(size, (0.2, 1.0)), RandomHorizontalFlip()]
            if family == "colour":
                self.transforms += [ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), RandomGrayscale(0.2)]
        self.num_uniforms = sum(transform.num_uniforms for transform in self.transforms)
        # Number of transforms up to the one that gives the views their size.
        self._fitting = 0
        if self.resize is None:
            kinds = [isinstance(transform, RandomResizedCrop) for transform in self.transforms]
            self._fitting = kinds.index(True) + 1

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """V views of every image.

        Args:
            images: uint8 [n, C, H, W].
            uniforms: float64 [n, V, num_uniforms] in [0, 1). A view depends only on its image and uniforms.

        Returns:
            uint8 [n, V, C, size, size]. Without a random transform all views of an image share memory.
        """
        if not self.transforms:
            return self._fit(images, uniforms)
        views = uniforms.shape[1]
        result = images.new_empty(len(images), views, images.shape[1], self.size, self.size)
        for part in _chunks(result):
            result[part] = self._transform(self._fit(images[part], uniforms[part]), uniforms[part])
        return result

    def of_batches(self, batches: Iterable[Tensor], uniforms: Tensor) -> Tensor:
        """The same for images of different sizes.

        Only the resizing works on these batches. The transforms after it work on many images at once, which
        is faster for small images.

        Args:
            batches: uint8 [n, C, H, W] each, n in all; the next one is requested when one has been resized.
            uniforms: float64 [n, V, num_uniforms] in [0, 1).
        """
        parts: list[Tensor] = []
        start = 0
        for images in batches:
            end = start + len(images)
            parts.append(self._fit(images, uniforms[start:end]))
            start = end
        fitted = parts[0] if len(parts) == 1 else torch.cat(parts)
        if len(self.transforms) == self._fitting:
            return fitted
        result = torch.empty_like(fitted, memory_format=torch.contiguous_format)
        for part in _chunks(result):
            result[part] = self._transform(fitted[part], uniforms[part])
        return result

    def _fit(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Every image for every view, in the size of the views: [n, V, C, size, size]."""
        views = uniforms.shape[1]
        if self.resize is not None:
            images = self.resize(images)
        result = images.unsqueeze(1).expand(-1, views, -1, -1, -1)
        return self._apply(result, uniforms, 0, self._fitting) if self._fitting else result

    def _transform(self, views: Tensor, uniforms: Tensor) -> Tensor:
        """What :meth:`_fit` has not done."""
        return self._apply(views, uniforms, self._fitting, len(self.transforms))

    def _apply(self, views: Tensor, uniforms: Tensor, first: int, end: int) -> Tensor:
        """The transforms from ``first`` to ``end``, of views [n, V, C, H, W]."""
        if first == end:
            return views
        result, numbers = views.flatten(0, 1), uniforms.flatten(0, 1)
        start = sum(transform.num_uniforms for transform in self.transforms[:first])
        for transform in self.transforms[first:end]:
            stop = start + transform.num_uniforms
            result = transform(result, numbers[:, start:stop])
            start = stop
        return result.unflatten(0, views.shape[:2])


def _chunks(views: Tensor) -> Iterator[slice]:
    """Parts of views [n, V, C, size, size] that are transformed at once."""
    pixels = views.shape[1] * views.shape[-2] * views.shape[-1]  # of a sample
    size = max(_CHUNK_PIXELS // pixels, 1)
    return (slice(start, start + size) for start in range(0, len(views), size))


class OwnAugmentation:
    """A transform of the user, applied to every view.

    Each view seeds the random generators of torch, NumPy and Python, and the states before are restored. A
    view thus depends only on its sample and its draw, if the transform uses one of these generators.

    Args:
        reference: ``package.module:name``: a class, which is called with ``arguments``, or a function.
        arguments: arguments of the class, or further arguments of the function.
        size: side of the views, in pixels; 0 for vectors.

    Attributes:
        num_uniforms: number of uniform random numbers per view.

    Raises:
        ConfigError: there is no such transform, or it does not take the arguments.
    """

    num_uniforms = 1

    def __init__(self, reference: str, arguments: dict[str, PlainValue], size: int) -> None:
        self.reference, self.size = reference, size
        self.resize = ResizeCenterCrop(size) if size else None
        found = import_object(reference, "data.augmentation")
        self.arguments: dict[str, Any] = {}
        if isinstance(found, type):
            found = call_object(found, reference, arguments, "data.augmentation", "data.augmentation_args")
        else:
            self.arguments = dict(arguments)
        if not callable(found):
            raise ConfigError(f"data.augmentation={reference} must be a class or a function")
        self.transform: Callable[..., Any] = found

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """V views of every image; see :class:`Augmentation`. Vectors are float32 [n, D]."""
        states = random.getstate(), np.random.get_state()  # noqa: NPY002  # the transform may use it
        try:
            with torch.random.fork_rng(devices=[]):
                rows = [
                    torch.stack([self._view(image, float(uniform)) for uniform in seeds[:, 0]])
                    for image, seeds in zip(images, uniforms, strict=True)
                ]
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
        return torch.stack(rows)

    def _view(self, image: Tensor, uniform: float) -> Tensor:
        seed = int(uniform * 2**53)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            view = self.transform(image.clone(), **self.arguments)
            if self.resize is not None:
                return self.resize(to_pixels(view, image.shape[0]))
            if not isinstance(view, Tensor) or view.shape != image.shape:
                raise ValueError(f"it must return a vector like its argument, got {type(view).__name__}")
            return view.to(torch.float32)
        except Exception as error:  # code of the user
            raise ImageError(f"data.augmentation={self.reference} failed: {one_line(error)}") from error


class Normalize:
    """Converts uint8 images [..., C, H, W] to float32 with about zero mean and unit variance per channel."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        if self.mean.device != images.device:  # on the first call only
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        # In place: large temporary tensors cost more than the arithmetic.
        scaled = images.to(torch.float32, copy=True).div_(255)
        if scaled.shape[-3] != self.mean.shape[-3]:  # grey images for an encoder of colours
            return (scaled - self.mean) / self.std
        return scaled.sub_(self.mean).div_(self.std)
