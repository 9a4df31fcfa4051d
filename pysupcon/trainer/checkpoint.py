"""Checkpoints of a training: one folder per checkpoint, published atomically and verified by checksums.

A checkpoint is written to a temporary folder, synced to disk and renamed. It holds model.safetensors,
ema.safetensors (if weights are averaged), training.pt (optimizer, scheduler, gradient scaler, loss with its
queue, key encoder, and "queues": those of the processes after the first one, if processes do not gather),
random.pt (random states of every process), config.yaml, and manifest.json. The manifest holds the step, the
number of processes, the position in the data, validation losses, versions, and the size and SHA-256 of every
file and of itself. Reading a checkpoint never runs code from its files: it uses safetensors, JSON, and
torch.load with weights_only.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pysupcon.config import Config, load_config, to_yaml
from pysupcon.errors import ConfigError, RunError
from pysupcon.reading import one_line
from pysupcon.trainer.config import ACCURACIES
from pysupcon.trainer.files import named_disk_errors, publish_folder, remove, replace_file, write_file
from pysupcon.trainer.manifest import FORMAT, MANIFEST, NAME, digest, read_listed_file, read_manifest, step_of
from pysupcon.trainer.run import CONFIG_FILE

FOLDER = "checkpoints"
WEIGHTS, EMA, TRAINING, RANDOM = "model.safetensors", "ema.safetensors", "training.pt", "random.pt"
LEFTOVER = re.compile(r"(writing|replaced)_.*")
FIXED_SECTIONS = ("seed", "data", "model", "loss", "optimizer")
"""Parts of the config that a resumed training must not change, except for FREE_FIELDS."""
FIXED_FIELDS = ("trainer.accumulation_steps",)
FREE_FIELDS = ("data.root", "data.download", "data.workers", "loss.backend", "loss.gather")
REPORTED_SECTIONS = ("trainer", "loss", "data")
"""Parts of the config whose changes are printed, except for UNREPORTED_FIELDS."""
UNREPORTED_FIELDS = (
    "trainer.threads", "trainer.compile", "trainer.trackers", "trainer.time_budget",
    "trainer.checkpoint_epochs", "trainer.checkpoint_steps", "trainer.keep_checkpoints",
    "trainer.profile_steps",
)  # fmt: skip


@dataclass
class Checkpoint:
    """Content of a checkpoint.

    Attributes:
        step: number of finished steps.
        weights, ema: state dicts of the model and of its averaged weights.
        training: states by name, made of tensors, numbers, strings, lists, tuples and dicts.
        random: random states, one entry per process.
        sampler: position in the data: seed, batch_size, epoch, batch (finished batches of the epoch).
        metrics: validation losses at this step.
        compiled: backend of torch.compile in this training, or "no".
        threads: CPU threads per process; None if the results do not depend on them, or in old checkpoints.
    """

    step: int
    weights: dict[str, Tensor]
    training: dict[str, Any]
    random: list[dict[str, Any]]
    ema: dict[str, Tensor] | None = None
    sampler: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    compiled: str = "no"
    threads: int | None = None


def save_checkpoint(
    run_dir: Path, checkpoint: Checkpoint, config: Config, *, keep: int, best_by: str | None = None
) -> Path:
    """Write a checkpoint, then delete all but the last ``keep`` and the best by ``best_by``.

    Checkpoints of later steps are deleted too: the training was resumed from before them.

    Args:
        run_dir: folder of the run.
        checkpoint: the content.
        config: config of the training.
        keep: number of checkpoints to keep.
        best_by: name of the metric that selects the best checkpoint, or None.

    Returns:
        The folder of the checkpoint.

    Raises:
        RunError: the checkpoint could not be written, e.g. because the disk is full; earlier checkpoints are
            unchanged.
    """
    folder = run_dir / FOLDER
    final = folder / f"step_{checkpoint.step:08d}"
    temporary = folder / f"writing_{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        temporary.mkdir()
        _write(temporary, checkpoint, config)
        publish_folder(temporary, final)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        earlier = checkpoints(run_dir)
        previous = (
            f"the previous one, {earlier[-1]}, is complete" if earlier else "there is no earlier checkpoint"
        )
        raise RunError(f"checkpoint {final} could not be written: {one_line(error)}; {previous}") from error
    kept = [path for path in checkpoints(run_dir) if step_of(path) <= checkpoint.step][-keep:]
    best = best_checkpoint(run_dir, best_by, checkpoint.step)
    for path in checkpoints(run_dir):
        if path not in kept and path != best:
            with suppress(OSError):
                remove(path)
    return final


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoint folders of a run, ordered by step, without reading them."""
    folder = run_dir / FOLDER
    if not folder.is_dir():
        return []
    named = (path for path in folder.iterdir() if NAME.fullmatch(path.name))
    return sorted((path for path in named if path.is_dir()), key=step_of)


def best_checkpoint(run_dir: Path, best_by: str | None, up_to: int) -> Path | None:
    """Find the checkpoint with the lowest validation loss, or the highest accuracy.

    Args:
        run_dir: folder of the run.
        best_by: name of the loss or of the accuracy; None finds nothing.
        up_to: the last step to consider.

    Returns:
        The folder of the checkpoint, of the first of equal ones; None if no checkpoint has the metric.
    """
    best, lowest = None, math.inf
    for path in checkpoints(run_dir):
        if best_by is None or step_of(path) > up_to:
            continue
        try:
            value = read_manifest(path)["metrics"].get(best_by)
        except RunError:
            continue
        if value is None:
            continue
        value = -value if best_by in ACCURACIES else value
        if value < lowest:
            best, lowest = path, value
    return best


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and verify the checksum of every file.

    Raises:
        RunError: a file is missing, truncated, changed or unreadable; the message names it.
    """
    manifest = read_manifest(path)
    contents = {name: read_listed_file(path / name, entry) for name, entry in manifest["files"].items()}
    missing = [name for name in (WEIGHTS, TRAINING, RANDOM, CONFIG_FILE) if name not in contents]
    if missing:
        raise RunError(f"{path / MANIFEST} is malformed: it lists no {', '.join(missing)}")
    try:
        return Checkpoint(
            step=manifest["step"],
            weights=safetensors.torch.load(contents[WEIGHTS]),
            training=_unpack(contents[TRAINING], dict),
            random=_unpack(contents[RANDOM], list),
            ema=safetensors.torch.load(contents[EMA]) if EMA in contents else None,
            sampler=dict(manifest["sampler"]),
            metrics=dict(manifest["metrics"]),
            compiled=str(manifest.get("compiled", "no")),
            threads=manifest.get("threads"),
        )
    except Exception as error:  # safetensors, zipfile and pickle each raise errors of their own
        raise RunError(f"checkpoint {path} cannot be read: {one_line(error)}") from error


def find_checkpoint(run_dir: Path, which: str) -> tuple[Path, Checkpoint, list[str]] | None:
    """Find and read the checkpoint that ``resume_from_checkpoint`` names.

    Args:
        run_dir: folder of the run.
        which: a checkpoint's folder; "latest", the newest complete checkpoint of ``run_dir``; or "auto", the
            same, but None if the run has no checkpoint.

    Returns:
        The folder, the content, and for each newer checkpoint that was rejected the reason.

    Raises:
        RunError: there is no checkpoint, or none is complete.
    """
    if which not in ("latest", "auto"):
        path = Path(which)
        if not os.path.isfile(path / MANIFEST):  # Path.is_file raises an error for long names
            raise RunError(f"resume_from_checkpoint: {which} is no checkpoint: there is no {MANIFEST} in it")
        try:
            return path, read_checkpoint(path), []
        except RunError as error:
            raise RunError(f"{error}{_earlier_checkpoint_hint(path)}") from error
    rejected: list[str] = []
    for path in reversed(checkpoints(run_dir)):
        try:
            return path, read_checkpoint(path), rejected
        except RunError as error:
            rejected.append(str(error))
    if rejected:
        raise RunError(f"resume_from_checkpoint {which}: no checkpoint is complete: {'; '.join(rejected)}")
    if which == "latest":
        raise RunError(f"resume_from_checkpoint latest: {run_dir / FOLDER} holds no checkpoint")
    return None


def compare_configs(path: Path, config: Config) -> list[str]:
    """Compare the config of a resumed training with that of its checkpoint.

    Args:
        path: folder of the checkpoint.
        config: config of the resumed training.

    Returns:
        The changes to report, each as "field: before -> now".

    Raises:
        ConfigError: seed, data, model, loss, optimizer or accumulation differ; the message names the fields.
    """
    before = load_config(path / CONFIG_FILE)
    differing = [
        (name, old, new)
        for part in (*FIXED_SECTIONS, *REPORTED_SECTIONS)
        for name, old, new in _differences(part, getattr(before, part), getattr(config, part))
    ]
    refused = [
        name
        for name, _, _ in differing
        if name in FIXED_FIELDS or (name.partition(".")[0] in FIXED_SECTIONS and name not in FREE_FIELDS)
    ]
    if refused:
        raise ConfigError(
            f"{', '.join(dict.fromkeys(refused))} must be as in the checkpoint {path} to resume from it; "
            f"{path / CONFIG_FILE} holds the values"
        )
    changes = [f"{name}: {old} -> {new}" for name, old, new in differing if name not in UNREPORTED_FIELDS]
    return list(dict.fromkeys(changes))


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write weights as a safetensors file, atomically.

    Raises:
        RunError: the file could not be written.
    """
    with named_disk_errors(path):
        replace_file(path, pack_weights(weights))


def pack_weights(weights: dict[str, Tensor]) -> bytes:
    """Serialise a state dict in the safetensors format; shared memory is copied."""
    return safetensors.torch.save(
        {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
    )


def _write(folder: Path, checkpoint: Checkpoint, config: Config) -> None:
    contents = {
        WEIGHTS: pack_weights(checkpoint.weights),
        TRAINING: _pack(checkpoint.training),
        RANDOM: _pack(checkpoint.random),
        CONFIG_FILE: to_yaml(config).encode(),
    }
    if checkpoint.ema is not None:
        contents[EMA] = pack_weights(checkpoint.ema)
    files = {
        name: {"bytes": len(content), "sha256": write_file(folder / name, content)}
        for name, content in contents.items()
    }
    manifest = {
        "format": FORMAT,
        "step": checkpoint.step,
        "processes": len(checkpoint.random),
        "sampler": checkpoint.sampler,
        "metrics": checkpoint.metrics,
        "compiled": checkpoint.compiled,
        "threads": checkpoint.threads,
        "versions": {name: metadata.version(name) for name in ("torch", "accelerate", "timm")},
        "files": files,
    }
    manifest["sha256"] = digest(manifest)
    write_file(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def _pack(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _unpack(content: bytes, kind: type) -> Any:
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(state, kind) or not state:
        raise ValueError(f"a {kind.__name__} with content was expected, got {state!r:.60}")
    return state


def _remove_leftovers(folder: Path) -> None:
    for path in folder.iterdir():
        if LEFTOVER.fullmatch(path.name):
            with suppress(OSError):
                remove(path)


def _earlier_checkpoint_hint(path: Path) -> str:
    for other in reversed(checkpoints(path.parent.parent)):
        if step_of(other) < step_of(path):
            return f"; an earlier checkpoint exists: --resume_from_checkpoint {other}"
    return ""


def _differences(part: str, before: Any, now: Any) -> list[tuple[str, Any, Any]]:
    if part == "seed":
        return [("seed", before, now)] if before != now else []
    return [
        (f"{part}.{name}", getattr(before, name), value)
        for name, value in vars(now).items()
        if getattr(before, name) != value
    ]
