"""Atomic writes: a file or folder is either complete or absent, also after a crash."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pysupcon.errors import RunError
from pysupcon.reading import one_line


def write_file(path: Path, content: bytes) -> str:
    """Write a file and sync it to disk.

    Returns:
        The SHA-256 of ``content`` in hexadecimal.
    """
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def replace_file(path: Path, content: bytes) -> None:
    """Write a temporary file and rename it to ``path``: readers see either the old or the new content."""
    temporary = path.with_name("writing_" + path.name)
    try:
        write_file(temporary, content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def publish_folder(temporary: Path, final: Path) -> None:
    """Rename a folder whose files are synced to ``final``, and replace what has that name."""
    sync_folder(temporary)
    if os.path.lexists(final):
        replaced = final.with_name("replaced_" + final.name)
        if os.path.lexists(replaced):
            remove(replaced)
        os.replace(final, replaced)
        os.replace(temporary, final)
        remove(replaced)
    else:
        os.replace(temporary, final)
    sync_folder(final.parent)


def remove(path: Path) -> None:
    """Remove a folder with its content, a file, or a link without its target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def sync_folder(path: Path) -> None:
    """Sync the directory entries of a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def named_disk_errors(path: Path) -> Iterator[None]:
    """Raise an OSError of the block, e.g. that of a full disk, as a RunError that names ``path``.

    Raises:
        RunError: see above.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} could not be written: {one_line(error)}") from error


def check_new_or_empty(output: Path) -> None:
    """Check an output folder before work is spent on its content.

    Raises:
        RunError: ``output`` is a file or a folder with content, or not a valid name.
    """
    try:
        unusable = output.exists() and (not output.is_dir() or any(output.iterdir()))
    except OSError as error:  # e.g. a name of more than 255 characters
        raise RunError(f"--output {output} cannot be used: {one_line(error)}") from error
    if unusable:
        raise RunError(f"--output {output} must be a new or an empty folder; it is not empty")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``output`` if the block succeeds.

    Raises:
        RunError: ``output`` cannot be written.
    """
    temporary = output.with_name(f".writing_{output.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    except OSError as error:
        raise RunError(f"--output {output} could not be written: {one_line(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
