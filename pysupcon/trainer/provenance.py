"""environment.json in the folder of a run: how the training was started, one entry for each start."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pysupcon.reading import parse_json, read_bytes
from pysupcon.trainer.files import replace_file

FILE = "environment.json"
PACKAGES = ("pysupcon", "accelerate", "timm", "numpy")


def record_start(run_dir: Path, *, step: int, processes: int, device: torch.device) -> None:
    """Append an entry to environment.json. A file that cannot be read is replaced.

    Args:
        run_dir: folder of the run.
        step: number of finished steps; greater than 0 if the training is resumed.
        processes: number of processes.
        device: device of the main process.

    Raises:
        OSError: the file cannot be written.
    """
    path = run_dir / FILE
    entries: Any = []
    if step > 0 and path.is_file():
        try:
            entries = parse_json(read_bytes(path))
        except ValueError:
            entries = []
    entry = {
        "step": step,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join([sys.executable, *sys.argv]),
        "folder": os.getcwd(),
        "git": git_state(Path.cwd()),
        "versions": {"python": platform.python_version(), **_versions(), "torch": torch.__version__},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": processes,
    }
    entries = [*entries, entry] if isinstance(entries, list) else [entry]
    replace_file(path, (json.dumps(entries, indent=1) + "\n").encode())


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit of the Git repository of ``folder``, and whether tracked files differ from it.

    Returns:
        {"commit": hexadecimal, "changed": bool}; None without a repository, a commit or Git.
    """
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": None if changes is None else changes != ""}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # e.g. a checkout on PYTHONPATH
            continue
    return found
