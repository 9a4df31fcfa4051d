"""Runs the CPU kernels and the operators under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in ("driver", "select", "kernels")]
DRIVER = ROOT / "tests" / "kernels" / "cpu_sanitizers" / "drive.cpp"
THREADS = ROOT / "tests" / "kernels" / "cpu_sanitizers" / "threads.cpp"
FUZZ = ROOT / "tests" / "kernels" / "cpu_sanitizers" / "fuzz.py"
NAMESPACE = "pysupcon_sanitized"
FLAGS = [
    "-std=c++20", "-O1", "-g1", "-fPIC", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
    "-DPYSUPCON_ISA=generic", "-I", str(ROOT / "csrc"), "-Wno-psabi",
]  # fmt: skip


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("g++") is None or platform.system() != "Linux",
        reason="needs g++ and its sanitizers on Linux",
    ),
]


def compiled(folder: Path, sources: list[Path], flags: list[str]) -> list[str]:
    def one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        subprocess.run(["g++", *FLAGS, *flags, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, sources))


def build(
    folder: Path, sources: list[Path], sanitizers: str = "address,undefined", headers: Path = ROOT / "csrc"
) -> Path:
    chosen = ["-fno-sanitize=all", f"-fsanitize={sanitizers}", "-iquote", str(headers)]
    objects, program = compiled(folder, sources, chosen), folder / "drive"
    subprocess.run(["g++", *FLAGS, *chosen, *objects, "-o", str(program)], check=True)
    return program


def build_operators(folder: Path, unchecked: bool) -> Path:
    """A library of the operators in another namespace. ``unchecked``: without the check of the order."""
    renamed = {"library.cpp": "TORCH_LIBRARY(pysupcon,", "cpu_glue.cpp": "TORCH_LIBRARY_IMPL(pysupcon,"}
    for name, registration in renamed.items():
        text = (ROOT / "csrc" / name).read_text()
        assert text.count(registration) == 1
        text = text.replace(registration, registration.replace("pysupcon", NAMESPACE))
        if unchecked and name == "cpu_glue.cpp":
            assert "check_order(" in text
            text = text.replace("check_order(", "static_cast<void>(")
        (folder / name).write_text(text)
    signals = folder / "signals.cpp"  # instead of bindings.cpp, which needs Python
    signals.write_text('#include "signals.h"\nvoid pysupcon::raise_pending_signal() {}\n')
    glue = [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}", "-fvisibility=hidden"]
    glue += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    objects = compiled(folder, SOURCES, []) + compiled(
        folder, [*map(folder.joinpath, renamed), signals], glue
    )
    library = folder / "operators.so"
    link = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", "-shared", *FLAGS, *objects, *link, "-o", str(library)], check=True)
    return library


def fuzz(library: Path, calls: int, seed: int) -> subprocess.CompletedProcess[str]:
    # Preload the sanitizers and libstdc++: the sanitizers look up __cxa_throw when they start.
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        for name in names
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(done.stdout.strip() for done in found),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python does not free everything at exit
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, str(FUZZ), str(library), NAMESPACE, str(calls), str(seed)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("bug", [False, True])
def test_address_and_undefined_behaviour_sanitizers_are_silent(bug: bool, tmp_path: Path) -> None:
    """They report a former bug: references were read where none were stored."""
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
        assert done.stdout == "576 cases\n"


@pytest.mark.parametrize("unchecked", [False, True])
def test_operators_access_no_invalid_memory(unchecked: bool, tmp_path: Path) -> None:
    """10,000 calls. Without the check of the order, the sanitizer soon reports an invalid read."""
    done = fuzz(build_operators(tmp_path, unchecked), 10_000, seed=0)
    if unchecked:
        assert "AddressSanitizer" in done.stderr
        return
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stderr.count("runtime error"), done.stderr[-3000:]
    print(done.stdout)
    counts = re.match(r"10000 calls: (\d+) accepted .*, (\d+) refused", done.stdout)
    assert counts is not None
    assert min(map(int, counts.groups())) > 2000


def run_with_threads(program: Path, mode: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program, mode], capture_output=True, text=True, env=environment, check=False)


def test_threads_share_a_pass_without_races(tmp_path: Path) -> None:
    program = build(tmp_path, [*SOURCES, THREADS], "thread")
    expected = {"results": "24 cases", "stop": "a signal", "nested": "the same", "partners": "300 5 10 383 0"}
    for mode, output in expected.items():
        done = run_with_threads(program, mode)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout == f"{output}\n"


def test_the_thread_sanitizer_reports_groups_that_do_not_wait(tmp_path: Path) -> None:
    """Two groups that add to the same rows run at the same time."""
    right, wrong = "return finished_[a] == task.before_a && finished_[b] == task.before_b;", "return true;"
    folder = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc" / "cpu", folder / "cpu")
    header = folder / "cpu" / "threads.h"
    text = header.read_text()
    assert text.count(right) == 1
    header.write_text(text.replace(right, wrong))
    sources = [folder / "cpu" / source.name for source in SOURCES]
    done = run_with_threads(build(tmp_path, [*sources, THREADS], "thread", folder), "results")
    assert done.returncode != 0
    assert "data race" in done.stderr
