"""Checkpoints: a folder a step, written aside and renamed when whole, checked before it is read."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save

from pysupcon.config import Config, load_config, to_yaml
from pysupcon.errors import ConfigError, RunError
from pysupcon.trainer.run import CONFIG_FILE

if TYPE_CHECKING:
    from accelerate import Accelerator

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
NAME = re.compile(r"step_(\d{8,})")
FIXED = ("seed", "data", "model", "loss", "optimizer")


def save_checkpoint(accelerator: Accelerator, run_dir: Path, step: int, config: Config, keep: int) -> Path:
    """Write weights, optimiser, scheduler, scaler, random states of ``step`` steps; keep the last ``keep``.

    The position in the data needs no state of its own: a batch is a function of the seed and the step.
    Called by every process.
    """
    final = run_dir / FOLDER / f"step_{step:08d}"
    aside = run_dir / FOLDER / f"writing_{step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (aside / CONFIG_FILE).write_text(to_yaml(config), encoding="utf-8")
        files = {path.name: path.stat().st_size for path in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)  # of the same step, before a resumption from an earlier one
        os.replace(aside, final)
        for old in _checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def find_checkpoint(run_dir: Path, which: str) -> Path:
    """The folder that ``resume_from_checkpoint`` means: ``latest`` of ``run_dir``, or a path.

    Raises:
        RunError: there is none.
    """
    if which != "latest":
        if not (Path(which) / MANIFEST).is_file():
            raise RunError(f"resume_from_checkpoint: {which} is no checkpoint: there is no {MANIFEST} in it")
        return Path(which)
    found = _checkpoints(run_dir)
    if not found:
        raise RunError(f"resume_from_checkpoint latest: {run_dir / FOLDER} holds no checkpoint")
    return found[-1]


def verify_checkpoint(path: Path) -> int:
    """Compare a checkpoint's files with what was written.

    Returns:
        The number of steps done.

    Raises:
        RunError: a file is missing or has another size; names it, and the newest whole checkpoint before it.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        step, files = int(manifest["step"]), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path / MANIFEST} is missing or damaged: {error}{_instead(path)}") from error
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            raise RunError(f"checkpoint file {file} is missing{_instead(path)}")
        if file.stat().st_size != size:
            raise RunError(
                f"checkpoint file {file} is truncated or damaged: {size} bytes were written, "
                f"{file.stat().st_size} are there{_instead(path)}"
            )
    return step


def check_same_run(path: Path, config: Config) -> None:
    """Refuse to go on from a checkpoint under another seed, data, model, loss or optimiser.

    Raises:
        ConfigError: names the fields that differ.
    """
    before, now = load_config(path / CONFIG_FILE), config
    differing = [
        name if part == "seed" else f"{part}.{name}"
        for part in FIXED
        for name in _differences(part, getattr(before, part), getattr(now, part))
    ]
    if differing:
        raise ConfigError(
            f"{', '.join(differing)} must be as in the checkpoint {path} to resume from it; "
            f"its values stand in {path / CONFIG_FILE}"
        )


def load_checkpoint(accelerator: Accelerator, path: Path) -> None:
    """Restore a verified checkpoint into the prepared objects. Called by every process.

    Raises:
        RunError: a file's content is damaged.
    """
    from accelerate.utils import load

    random_states = path / f"random_states_{accelerator.process_index}.pkl"
    try:
        if random_states.exists():  # not for a process more than there were
            load(random_states)  # accelerate passes over one that it cannot read
        accelerator.load_state(str(path))
    except Exception as error:  # safetensors, zipfile and pickle each raise their own kinds
        raise RunError(f"checkpoint {path} cannot be read: {' '.join(str(error).split())}") from error


def save_weights(model: torch.nn.Module, path: Path) -> None:
    """Write the weights as safetensors, aside first."""
    aside = path.with_name("writing_" + path.name)
    aside.write_bytes(save({name: value.cpu().contiguous() for name, value in model.state_dict().items()}))
    os.replace(aside, path)


def _checkpoints(run_dir: Path) -> list[Path]:
    folder = run_dir / FOLDER
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if NAME.fullmatch(path.name)), key=_step_of)


def _step_of(path: Path) -> int:
    found = NAME.fullmatch(path.name)
    return int(found[1]) if found else -1


def _instead(path: Path) -> str:
    for other in reversed(_checkpoints(path.parent.parent)):
        if _step_of(other) < _step_of(path):
            return f"; an earlier checkpoint is there: --resume_from_checkpoint {other}"
    return ""


def _differences(part: str, before: Any, now: Any) -> list[str]:
    if part == "seed":
        return ["seed"] if before != now else []
    return [name for name in vars(now) if getattr(before, name) != getattr(now, name)]
