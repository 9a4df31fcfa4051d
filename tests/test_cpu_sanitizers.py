"""The CPU kernels on exactly allocated memory, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in ("driver", "select", "kernels")]
DRIVER = ROOT / "tests" / "cpu_sanitizers" / "drive.cpp"
FLAGS = [
    "-std=c++20", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
    "-DPYSUPCON_ISA=generic", "-I", str(ROOT / "csrc"), "-Wno-psabi",
]  # fmt: skip


def build(folder: Path, sources: list[Path]) -> Path:
    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run(["g++", *FLAGS, "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    program = folder / "drive"
    subprocess.run(["g++", *FLAGS, *map(str, objects), "-o", str(program)], check=True)
    return program


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None or platform.system() != "Linux",
    reason="needs g++ and its sanitizers on Linux",
)
@pytest.mark.parametrize("bug", [False, True])
def test_address_and_undefined_behaviour_sanitizers_are_silent(bug: bool, tmp_path: Path) -> None:
    """With a bug that was there once, references that are read where none are stored, they are not."""
    sources = [*SOURCES, DRIVER]
    if bug:
        text = SOURCES[0].read_text()
        guarded = "memory_(count ? new char[count * (wide_ ? 8 : 4)] : nullptr)"
        assert guarded in text
        sources[0] = tmp_path / "driver.cpp"
        sources[0].write_text(text.replace(guarded, "memory_(new char[count * (wide_ ? 8 : 4)])"))
    done = subprocess.run([build(tmp_path, sources)], capture_output=True, text=True, check=False)
    if bug:
        assert "heap-buffer-overflow" in done.stderr
    else:
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout == "288 cases\n"
