"""Checkpoints: a folder a step, written aside, synced, renamed when whole; checked byte for byte when read.

A folder holds model.safetensors, with an average of weights ema.safetensors, training.pt (optimiser,
scheduler, scaler, loss), random.pt (of every process), config.yaml, and manifest.json: step, processes, place
in the data, validation losses, versions, and size and SHA-256 of every file and of itself. Reading runs no
code that a file brings along: safetensors, JSON, and torch.load with weights_only.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import shutil
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pysupcon.config import Config, load_config, to_yaml
from pysupcon.errors import ConfigError, RunError
from pysupcon.trainer.config import GROUP_ACCURACIES
from pysupcon.trainer.files import publish_folder, replace_file, write_file
from pysupcon.trainer.run import CONFIG_FILE

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
WEIGHTS, EMA, TRAINING, RANDOM = "model.safetensors", "ema.safetensors", "training.pt", "random.pt"
FORMAT = 2
NAME = re.compile(r"step_(\d{8,})")
LEFTOVER = re.compile(r"(writing|replaced)_.*")
FIXED = ("seed", "data", "model", "loss", "optimizer")
HELD = ("trainer.accumulation_steps",)
FREE = ("data.root", "data.download", "data.workers", "loss.backend", "loss.gather")
TOLD = ("trainer", "loss", "data")
SILENT = (
    "trainer.threads", "trainer.trackers", "trainer.time_budget", "trainer.checkpoint_epochs",
    "trainer.checkpoint_steps", "trainer.keep_checkpoints", "trainer.profile_steps",
)  # fmt: skip


@dataclass
class Checkpoint:
    """What stands in a checkpoint.

    Attributes:
        step: steps done.
        weights, ema: state of the model, and of the average of its weights.
        training: states by name; tensors, numbers, strings, lists, tuples, dicts.
        random: random states, an entry a process.
        sampler: place in the data: seed, batch_size, epoch, batch (done within the epoch).
        metrics: validation losses at this step.
        compiled: the backend of torch.compile that trained it, or no.
    """

    step: int
    weights: dict[str, Tensor]
    training: dict[str, Any]
    random: list[dict[str, Any]]
    ema: dict[str, Tensor] | None = None
    sampler: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    compiled: str = "no"


def save_checkpoint(
    run_dir: Path, checkpoint: Checkpoint, config: Config, *, keep: int, best_by: str | None = None
) -> Path:
    """Write a checkpoint, then delete all but the last ``keep`` and the best by ``best_by``.

    Later checkpoints than this, of a course of the training that was left, go too.

    Raises:
        RunError: it could not be written, e.g. for want of space; what was there before is whole.
    """
    folder = run_dir / FOLDER
    final = folder / f"step_{checkpoint.step:08d}"
    aside = folder / f"writing_{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        aside.mkdir()
        _write(aside, checkpoint, config)
        publish_folder(aside, final)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        last = checkpoints(run_dir)
        before = f"the one before it, {last[-1]}, is whole" if last else "there is none before it"
        raise RunError(
            f"checkpoint {final} could not be written: {error.strerror or error}; {before}"
        ) from error
    kept = [path for path in checkpoints(run_dir) if step_of(path) <= checkpoint.step][-keep:]
    best = best_checkpoint(run_dir, best_by, checkpoint.step)
    for path in checkpoints(run_dir):
        if path not in kept and path != best:
            shutil.rmtree(path, ignore_errors=True)
    return final


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, by step; not looked into."""
    folder = run_dir / FOLDER
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if NAME.fullmatch(path.name)), key=step_of)


def best_checkpoint(run_dir: Path, best_by: str | None, up_to: int) -> Path | None:
    """The checkpoint of the least validation loss of that name, or of the greatest accuracy, among those of
    ``up_to`` steps at most; of equal ones the first."""
    best, least = None, math.inf
    for path in checkpoints(run_dir):
        if best_by is None or step_of(path) > up_to:
            continue
        try:
            value = read_manifest(path)["metrics"].get(best_by)
        except RunError:
            continue
        if value is None:
            continue
        value = -value if best_by in GROUP_ACCURACIES else value
        if value < least:
            best, least = path, value
    return best


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, every byte compared with what was written.

    Raises:
        RunError: something is missing, truncated, changed or unreadable; names the file.
    """
    manifest = read_manifest(path)
    contents = {name: _checked(path / name, entry) for name, entry in manifest["files"].items()}
    try:
        return Checkpoint(
            step=int(manifest["step"]),
            weights=safetensors.torch.load(contents[WEIGHTS]),
            training=_unpack(contents[TRAINING]),
            random=_unpack(contents[RANDOM]),
            ema=safetensors.torch.load(contents[EMA]) if EMA in contents else None,
            sampler=dict(manifest["sampler"]),
            metrics=dict(manifest["metrics"]),
            compiled=str(manifest.get("compiled", "no")),
        )
    except Exception as error:  # safetensors, zipfile and pickle each raise their own kinds
        raise RunError(f"checkpoint {path} cannot be read: {' '.join(str(error).split())}") from error


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, checked against its own checksum.

    Raises:
        RunError: it is missing or damaged; names the file.
    """
    file = path / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if manifest.get("format") != FORMAT:
            raise RunError(f"{file} has the format {manifest.get('format')}; this version reads {FORMAT}")
        if manifest.get("sha256") != _digest(manifest):
            raise RunError(f"{file} is damaged: its content does not have its checksum")
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{file} is missing or damaged: {error}") from error
    return manifest


def find_checkpoint(run_dir: Path, which: str) -> tuple[Path, Checkpoint, list[str]] | None:
    """The checkpoint that ``resume_from_checkpoint`` means.

    Args:
        run_dir: of the run.
        which: a checkpoint's folder; latest, the newest whole one of ``run_dir``; or auto: that, or None if
            there is no checkpoint at all.

    Returns:
        Its folder, its content, and what was wrong with newer ones, a sentence each.

    Raises:
        RunError: there is none, or none is whole.
    """
    if which not in ("latest", "auto"):
        path = Path(which)
        if not (path / MANIFEST).is_file():
            raise RunError(f"resume_from_checkpoint: {which} is no checkpoint: there is no {MANIFEST} in it")
        try:
            return path, read_checkpoint(path), []
        except RunError as error:
            raise RunError(f"{error}{_instead(path)}") from error
    refused: list[str] = []
    for path in reversed(checkpoints(run_dir)):
        try:
            return path, read_checkpoint(path), refused
        except RunError as error:
            refused.append(str(error))
    if refused:
        raise RunError(f"resume_from_checkpoint {which}: no checkpoint is whole: {'; '.join(refused)}")
    if which == "latest":
        raise RunError(f"resume_from_checkpoint latest: {run_dir / FOLDER} holds no checkpoint")
    return None


def compare_configs(path: Path, config: Config) -> list[str]:
    """What a resumed run does otherwise than the checkpoint's did: "field: before -> now".

    Raises:
        ConfigError: another seed, data, model, loss or optimiser, or other steps; names the fields.
    """
    before = load_config(path / CONFIG_FILE)
    differing = [
        (name, old, new)
        for part in (*FIXED, *TOLD)
        for name, old, new in _differences(part, getattr(before, part), getattr(config, part))
    ]
    names = [name for name, _, _ in differing]
    wrong = [name for name in names if (name.partition(".")[0] in FIXED and name not in FREE) or name in HELD]
    if wrong:
        raise ConfigError(
            f"{', '.join(dict.fromkeys(wrong))} must be as in the checkpoint {path} to resume from it; "
            f"its values stand in {path / CONFIG_FILE}"
        )
    told = [f"{name}: {old} -> {new}" for name, old, new in differing if name not in SILENT]
    return list(dict.fromkeys(told))


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write weights as safetensors, aside first.

    Raises:
        RunError: they could not be written.
    """
    try:
        replace_file(path, pack_weights(weights))
    except OSError as error:
        raise RunError(f"{path} could not be written: {error.strerror or error}") from error


def pack_weights(weights: dict[str, Tensor]) -> bytes:
    """A safetensors file of a state dict; tensors that share memory are written one by one."""
    return safetensors.torch.save(
        {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
    )


def step_of(path: Path) -> int:
    """Steps done, by a checkpoint's name; -1 if it is none."""
    found = NAME.fullmatch(path.name)
    return int(found[1]) if found else -1


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
        "versions": {name: metadata.version(name) for name in ("torch", "accelerate", "timm")},
        "files": files,
    }
    manifest["sha256"] = _digest(manifest)
    write_file(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def _digest(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _checked(file: Path, entry: dict[str, Any]) -> bytes:
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise RunError(f"checkpoint file {file} is missing") from error
    except OSError as error:
        raise RunError(f"checkpoint file {file} cannot be read: {error}") from error
    if len(content) != entry["bytes"]:
        raise RunError(
            f"checkpoint file {file} is truncated or damaged: {entry['bytes']} bytes were written, "
            f"{len(content)} are there"
        )
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise RunError(f"checkpoint file {file} is damaged: its content is not what was written")
    return content


def _pack(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _unpack(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.iterdir():
        if LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _instead(path: Path) -> str:
    for other in reversed(checkpoints(path.parent.parent)):
        if step_of(other) < step_of(path):
            return f"; an earlier checkpoint is there: --resume_from_checkpoint {other}"
    return ""


def _differences(part: str, before: Any, now: Any) -> list[tuple[str, Any, Any]]:
    if part == "seed":
        return [("seed", before, now)] if before != now else []
    return [
        (f"{part}.{name}", getattr(before, name), value)
        for name, value in vars(now).items()
        if getattr(before, name) != value
    ]
