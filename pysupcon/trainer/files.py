"""Files and folders that are whole or not there, whatever happens in between."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pysupcon.errors import RunError


def write_file(path: Path, content: bytes) -> str:
    """Write a file and have it on the disk on return.

    Returns:
        The SHA-256 of ``content``, hexadecimal.
    """
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file aside and rename it: a reader finds the old content or the new one."""
    aside = path.with_name("writing_" + path.name)
    try:
        write_file(aside, content)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def publish_folder(aside: Path, final: Path) -> None:
    """Rename a folder whose files are on the disk to ``final``; a folder of that name gives way."""
    sync_folder(aside)
    if final.exists():
        former = final.with_name("replaced_" + final.name)
        shutil.rmtree(former, ignore_errors=True)
        os.replace(final, former)
        os.replace(aside, final)
        shutil.rmtree(former)
    else:
        os.replace(aside, final)
    sync_folder(final.parent)


def sync_folder(path: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_vacant(output: Path) -> None:
    """Refuse a folder that holds something, before work is put into what shall be written there.

    Raises:
        RunError: it does.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(f"--output {output} must be a new or an empty folder; it holds something")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``output`` if nothing goes wrong.

    Raises:
        RunError: ``output`` cannot be written.
    """
    aside = output.with_name(f".writing_{output.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        if output.exists():
            output.rmdir()
        aside.rename(output)
    except OSError as error:
        raise RunError(f"--output {output} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
