"""Describes the machine, the package versions and the commit; stored with every result.

python benchmarks/machine.py [cpu|cuda]      # prints JSON; without "gpu" if torch sees no CUDA device
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import pysupcon

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "pytorch-metric-learning", "pykeops", "inf-cl", "memeff", "triton", "numpy")


def describe(device: str) -> dict[str, Any]:
    """Processor or GPU, threads, instruction set, versions, commit, time."""
    found: dict[str, Any] = {
        "device": device,
        "processor": _processor(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory("MemTotal"),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": _versions(),
        "backends": pysupcon.backends(),
        "commit": _commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["arch"] = "{}{}".format(*torch.cuda.get_device_capability())
        found["gpu_memory_bytes"] = properties.total_memory
        found["cuda"] = torch.version.cuda
        found["driver"] = _driver()
    return found


def name(machine: dict[str, Any]) -> str:
    """The machine in one line, for the heading of a table."""
    if machine["device"] == "cuda":
        return f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}"
    isa = machine["backends"]["cpu"].get("isa", "no compiled kernel")
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return f"{machine['processor']}, {threads}, {isa}"


def available_memory(device: str) -> float:
    """Bytes of memory that a process can allocate now."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())
    available = _memory("MemAvailable")
    return float(available) if available is not None else float("inf")


def _memory(field: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts[key.strip()] = value.strip()
    model = facts.get("model name", platform.machine())
    family = facts.get("cpu family")
    return model if family is None else f"{model} (family {family}, model {facts.get('model', '?')})"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit() -> str | None:
    """Commit hash, with "+" if the measured code has uncommitted changes; None outside a checkout."""
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    changed = _output("git", "status", "--porcelain", "--", "pysupcon", "csrc", "benchmarks/*.py", "setup.py")
    return commit + ("+" if changed else "")


def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


if __name__ == "__main__":
    wanted = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    print(json.dumps(describe(wanted if torch.cuda.is_available() else "cpu")))
