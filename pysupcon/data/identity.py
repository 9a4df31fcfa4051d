"""What the samples of a data set are: their number, and SHA-256 of their names or pixels and of their labels.

The splits are drawn by a seeded permutation of the samples. If one sample more or less is found later, the
same seed draws other splits. The digests of two readings are equal if the samples are the same in the same
order. They do not depend on the machine or on the place of the folder.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pysupcon.data.samples import FileImages, Samples, Source
from pysupcon.data.unreadable import file_name

MAX_BYTES = 64 * 2**20
"""Bytes of a tensor that are hashed. Of a larger one, rows at equal distances are."""


@dataclass(frozen=True)
class Identity:
    """The samples of a data set, before ``data.ignore_index`` and the splits.

    Attributes:
        counts: number of samples by part: "train", and "val" and "test" if the data set has them.
        samples: SHA-256 of the names of the files, or of the pixels or features.
        labels: SHA-256 of the coarse and fine labels.
    """

    counts: dict[str, int]
    samples: str
    labels: str


def identify(source: Source, root: str | None, *, own: bool) -> Identity:
    """Describe the samples of a data set.

    Args:
        source: the data set.
        root: folder that file names are relative to, or None.
        own: the data set is the user's code: reading its items may be slow or random, so only their number
            and their labels count.
    """
    samples, labels = hashlib.sha256(), hashlib.sha256()
    counts: dict[str, int] = {}
    for name, part in (("train", source.train), ("val", source.val), ("test", source.test)):
        if part is None:
            continue
        counts[name] = len(part)
        for values in (part.coarse, part.fine):
            labels.update(f"{name} {list(values.shape)}\n".encode())
            labels.update(values.contiguous().numpy().astype("<i8").tobytes())
        samples.update(f"{name} {len(part)}\n".encode())
        if not own:
            _add(samples, part, Path(root or "."))
    return Identity(counts, samples.hexdigest(), labels.hexdigest())


def _add(digest: hashlib._Hash, part: Samples, root: Path) -> None:
    images = part.images
    if isinstance(images, FileImages):
        for path in images.paths:
            digest.update(file_name(path, root).encode("utf-8", "surrogateescape") + b"\0")
    elif isinstance(images, Tensor):
        digest.update(f"{list(images.shape)} {images.dtype}\n".encode())
        rows = max(1, MAX_BYTES // max(1, images[:1].numel() * images.element_size()))
        chosen = images
        if len(images) > rows:
            chosen = images[torch.linspace(0, len(images) - 1, rows, dtype=torch.float64).long()]
        digest.update(chosen.contiguous().numpy().tobytes())
