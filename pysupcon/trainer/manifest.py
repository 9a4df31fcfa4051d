"""The manifest of a checkpoint: step, versions, and the size and SHA-256 of every file and of itself."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from pysupcon.errors import RunError
from pysupcon.reading import parse_json, read_bytes

MANIFEST = "manifest.json"
FORMAT = 2
NAME = re.compile(r"step_(\d{8,})")
"""Name of a checkpoint's folder."""


def step_of(path: Path) -> int:
    """Return the step in a checkpoint folder's name; -1 if the name is not a checkpoint's."""
    found = NAME.fullmatch(path.name)
    return int(found[1]) if found else -1


def digest(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its field sha256."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint, verify its checksum and check its fields.

    Args:
        path: folder of the checkpoint.

    Raises:
        RunError: the manifest is missing, damaged or malformed; the message names the file.
    """
    file = path / MANIFEST
    try:
        manifest: Any = parse_json(read_bytes(file))
        if not isinstance(manifest, dict):
            raise RunError(f"{file} is missing or damaged: it holds a {type(manifest).__name__}")
        if manifest.get("format") != FORMAT:
            raise RunError(f"{file} has the format {manifest.get('format')}; this version reads {FORMAT}")
        if manifest.get("sha256") != digest(manifest):
            raise RunError(f"{file} is damaged: its content does not match its checksum")
    except ValueError as error:
        raise RunError(f"{file} is missing or damaged: {error}") from error
    fault = _find_fault(manifest, path)
    if fault is not None:
        raise RunError(f"{file} is malformed: {fault}")
    return manifest


def read_listed_file(file: Path, entry: dict[str, Any]) -> bytes:
    """Read a file of a checkpoint and verify its size and checksum.

    Args:
        file: the file.
        entry: its entry in the manifest.

    Raises:
        RunError: the file is missing, truncated, changed or unreadable; the message names it.
    """
    if not os.path.isfile(file):
        raise RunError(f"checkpoint file {file} is missing")
    try:
        content = read_bytes(file)
    except ValueError as error:
        raise RunError(f"checkpoint file {file} cannot be read: {error}") from error
    if len(content) != entry["bytes"]:
        raise RunError(
            f"checkpoint file {file} is truncated or damaged: {entry['bytes']} bytes were written, "
            f"{len(content)} are there"
        )
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise RunError(f"checkpoint file {file} is damaged: its content is not what was written")
    return content


def _find_fault(manifest: dict[str, Any], path: Path) -> str | None:
    """The first field of a manifest that has not the type or value that :mod:`checkpoint` writes."""
    step, files = manifest.get("step"), manifest.get("files")
    if type(step) is not int or step < 0:
        return f"step must be a number of steps, got {step!r:.60}"
    if step_of(path) not in (step, -1):
        return f"step is {step}, but the name of its folder is {path.name}"
    for name in ("sampler", "metrics"):
        numbers = manifest.get(name)
        if not isinstance(numbers, dict) or not all(type(n) in (int, float) for n in numbers.values()):
            return f"{name} must hold numbers by name, got {numbers!r:.60}"
    if not isinstance(files, dict):
        return f"files must hold an entry for each file, got {files!r:.60}"
    for name, entry in files.items():
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            return f"files must be names within the folder, got {name!r:.60}"
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            return f"files must hold bytes and sha256 of {name!r:.60}, got {entry!r:.60}"
    return None
