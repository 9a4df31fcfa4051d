"""Image files that cannot be read: found before the training; an error, or left out of the data set."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from pysupcon.data.samples import FileImages, Samples, Source
from pysupcon.data.workers import available_cores
from pysupcon.errors import ConfigError

SHOWN = 3
"""Names of files or classes in a message"""
_BLOCK = 4096  # files that are queued at once: Ctrl-C waits for those that are being read only


def leave_out_unreadable(
    source: Source, root: str, known: Mapping[str, str] | None = None
) -> tuple[Source, dict[str, str]]:
    """Leave out the samples whose image file cannot be read.

    Args:
        source: samples with image files.
        root: folder that file names are relative to.
        known: names of the files to leave out; None: read every file once.

    Returns:
        The data set without these files; and the names that were left out, with the reasons.

    Raises:
        ConfigError: no file of a split can be read.
    """
    parts = {
        name: samples
        for name, samples in (("train", source.train), ("val", source.val), ("test", source.test))
        if samples is not None
    }
    found = dict(known) if known is not None else _find(list(parts.values()), Path(root))
    kept: dict[str, Samples] = {}
    for name, samples in parts.items():
        assert isinstance(samples.images, FileImages)
        names = [file_name(path, Path(root)) for path in samples.images.paths]
        rows = [row for row, file in enumerate(names) if file not in found]
        if not rows:
            raise ConfigError(
                f"data.root {root!r}: none of the {len(names)} image files of the {name} split can be read, "
                f"first {names[0]}: {found[names[0]]}"
            )
        kept[name] = samples if len(rows) == len(names) else samples.select(torch.tensor(rows))
    return replace(source, **kept), found  # type: ignore[arg-type]


def check_readable(splits: Mapping[str, Samples], root: str) -> None:
    """Read every image file of the splits once; samples without files are not read.

    Args:
        splits: samples by the name of their split.
        root: folder that file names are relative to.

    Raises:
        ConfigError: a file cannot be read; the message names the first one.
    """
    parts = [samples for samples in splits.values() if isinstance(samples.images, FileImages)]
    found = _find(parts, Path(root))
    if found:
        name, reason = next(iter(found.items()))
        raise ConfigError(
            f"data.root {root!r}: {len(found)} of the {sum(map(len, parts))} image files of the "
            f"{' and '.join(splits)} split cannot be read, first {name}: {reason}; repair the files, or "
            "leave them out with --data.on_error skip"
        )


def file_name(path: Path, root: Path) -> str:
    """The path relative to ``root``, or as it is outside of ``root``."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def describe_skipped(skipped: Mapping[str, str]) -> str:
    """A line about files that were left out: their number and the first names."""
    first = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:SHOWN])
    more = f"; and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
    return f"data.on_error=skip: {len(skipped)} image file(s) cannot be read and are left out ({first}{more})"


def _find(parts: list[Samples], root: Path) -> dict[str, str]:
    """Names and errors of the files that cannot be read, in the order of the samples."""
    found: dict[str, str] = {}
    executor = ThreadPoolExecutor(available_cores())
    files = sum(map(len, parts))
    bar = tqdm(total=files, desc="check", unit="file", leave=False, delay=1, disable=None)
    try:
        with bar:
            for samples in parts:
                images = samples.images
                assert isinstance(images, FileImages)
                for start in range(0, len(images), _BLOCK):
                    rows = range(start, min(start + _BLOCK, len(images)))
                    for row, reason in zip(rows, executor.map(images.find_error, rows), strict=True):
                        bar.update()
                        if reason is not None:
                            found[file_name(images.paths[row], root)] = reason
    finally:
        executor.shutdown(cancel_futures=True)
    return found
