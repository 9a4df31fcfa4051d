"""data.json in the folder of a run: what the data of the training were, compared with what is read later."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from pysupcon.data.datamodule import DataModule
from pysupcon.data.identity import Identity
from pysupcon.data.samples import FileImages
from pysupcon.errors import RunError
from pysupcon.reading import read_json

DATA_FILE = "data.json"
_KEYS = ("samples_sha256", "labels_sha256")


def pack_identity(identity: Identity) -> bytes:
    """The content of the file that :func:`read_identity` reads."""
    found = asdict(identity)
    record = {
        "counts": found["counts"],
        "samples_sha256": found["samples"],
        "labels_sha256": found["labels"],
    }
    return (json.dumps(record, indent=1) + "\n").encode()


def read_identity(run_dir: Path) -> Identity | None:
    """Read the record of a run; None if the run has none, because an earlier version trained it.

    Raises:
        RunError: the file is malformed; the message names it.
    """
    path = run_dir / DATA_FILE
    if not os.path.lexists(path):
        return None
    try:
        found = read_json(path)
    except ValueError as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    counts = found.get("counts") if isinstance(found, dict) else None
    if (
        not isinstance(counts, dict)
        or "train" not in counts
        or not all(type(count) is int for count in counts.values())
        or not all(isinstance(found.get(key), str) for key in _KEYS)
    ):
        raise RunError(f"{path} must hold counts, {' and '.join(_KEYS)}, got {found!r:.60}")
    return Identity(counts, found["samples_sha256"], found["labels_sha256"])


def check_same_samples(data: DataModule, run_dir: Path) -> bool:
    """Check that the data are those of the training in ``run_dir``.

    Returns:
        Whether the run has a record to compare with.

    Raises:
        RunError: the samples, their order or their labels differ, or the record is malformed.
    """
    was, now = read_identity(run_dir), data.identity
    if was is None:
        return False
    if was == now:
        return True
    if was.counts != now.counts:
        difference = f"the training found {_describe(was)}, now there are {_describe(now)}"
    else:
        files = isinstance(data.training.images, FileImages)
        of_samples = "file names or their order" if files else "features or pixels"
        kinds = [of_samples] * (was.samples != now.samples)
        kinds += ["labels"] * (was.labels != now.labels)
        difference = f"there are {_describe(now)} as before, but the {' and the '.join(kinds)} differ"
    if {"val", "test"} <= now.counts.keys() & was.counts.keys():  # no split is drawn
        effect = "results would be those of other data"
        remedy = f", or delete {run_dir / DATA_FILE} to accept the new data"
    else:
        mixed = "validation" if "test" in now.counts.keys() & was.counts.keys() else "test"
        effect, remedy = f"the splits would mix training and {mixed} samples", ""
    where = f"data.root {data.config.root}" if data.config.root else f"data.dataset={data.config.dataset}"
    raise RunError(
        f"{where} is not as it was in the training of {run_dir}: {difference}; {effect}: restore the data"
        f"{remedy}"
    )


def _describe(identity: Identity) -> str:
    total = sum(identity.counts.values())
    parts = ", ".join(f"{name} {count}" for name, count in identity.counts.items())
    return f"{total} samples" + (f" ({parts})" if len(identity.counts) > 1 else "")
