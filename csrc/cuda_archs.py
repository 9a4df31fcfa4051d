"""The GPU architectures to compile for, from PYSUPCON_CUDA_ARCHS, and nvcc's flags for them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence

VARIABLE = "PYSUPCON_CUDA_ARCHS"
ALL = ("80", "86", "89", "90a", "100", "120")
DEFAULT = ("80", "90")
OLDEST = 80
EXAMPLES = "80;90a, sm_90, 9.0+PTX, native or all"


def known_archs(nvcc: str) -> list[str]:
    """The architectures that this nvcc compiles for: "80", "90", ..."""
    done = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    return re.findall(r"compute_(\w+)", done.stdout)


def native_archs() -> list[str]:
    """Architectures of this machine's GPUs, from nvidia-smi.

    Raises:
        ValueError: nvidia-smi is missing, fails or prints no compute capability.
    """
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise ValueError(f"{VARIABLE}=native needs nvidia-smi and a GPU, but nvidia-smi failed") from None
    archs = [major + minor for major, minor in re.findall(r"^\s*(\d+)\.(\d)\s*$", done.stdout, re.MULTILINE)]
    if not archs:
        raise ValueError(f"{VARIABLE}=native: nvidia-smi printed no compute capability: {done.stdout!r}")
    return archs


def choose_archs(
    text: str, known: Sequence[str], native: Callable[[], list[str]] = native_archs
) -> list[str]:
    """Read PYSUPCON_CUDA_ARCHS.

    Args:
        text: "" for the default; "all"; or architectures as 90, 9.0, sm_90, compute_90 or native, separated
            by ";", "," or spaces. Upper and lower case mean the same. "+PTX" is accepted, but has no effect,
            because PTX of the newest is always added.
        known: what nvcc compiles for, see :func:`known_archs`.
        native: gives the architectures for the word native.

    Returns:
        The architectures in the order given, each once, such as "80" and "90a".

    Raises:
        ValueError: a word is no architecture, is too old, or nvcc does not know it.
    """
    if not text.strip():
        return list(DEFAULT)
    if text.strip().lower() == "all":
        if archs := [arch for arch in ALL if arch.rstrip("a") in known]:
            return archs
        raise ValueError(f"{VARIABLE}=all: nvcc knows none of {' '.join(ALL)}, only {' '.join(known)}")
    archs = []
    for word in re.split(r"[;,\s]+", text.strip(";, \t\n")):
        if word.lower() == "native":
            archs += native()
            continue
        match = re.fullmatch(r"(?:sm_|compute_)?(\d+)\.?(\d[af]?)(?:\+ptx)?", word.lower())
        if match is None:
            raise ValueError(f"{VARIABLE} must hold architectures such as {EXAMPLES}, got {word!r}")
        archs.append(match[1] + match[2])
    for arch in archs:
        number = arch.rstrip("af")
        if int(number) < OLDEST:
            raise ValueError(f"{VARIABLE} must hold architectures of at least {OLDEST}, got {arch!r}")
        if number not in known:
            raise ValueError(
                f"{VARIABLE} must hold architectures that nvcc knows ({' '.join(known)}), got {arch!r}"
            )
    return list(dict.fromkeys(archs))


def gencode(archs: Sequence[str]) -> list[str]:
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    # PTX of a target with a suffix ("90a") runs on that architecture only; newer ones need the plain form.
    newest = max(int(a.rstrip("af")) for a in archs)
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]
