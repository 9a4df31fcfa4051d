"""csrc/cuda_archs.py: the forms of PYSUPCON_CUDA_ARCHS, and what is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "csrc"))
import cuda_archs  # noqa: E402
import find_cuda  # noqa: E402

KNOWN = ["75", "80", "86", "87", "89", "90", "100", "103", "110", "120", "121"]


def of_this_machine() -> list[str]:
    return ["86", "90"]


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("", ["80", "90"]),
        (" ", ["80", "90"]),
        ("80", ["80"]),
        ("8.0", ["80"]),
        ("sm_80", ["80"]),
        ("SM_80", ["80"]),
        ("compute_80", ["80"]),
        ("9.0+PTX", ["90"]),
        ("90a", ["90a"]),
        ("9.0a", ["90a"]),
        ("sm_90A", ["90a"]),
        ("100", ["100"]),
        ("10.0f", ["100f"]),
        ("12.1", ["121"]),
        ("80;90a", ["80", "90a"]),
        ("8.0 8.6+PTX", ["80", "86"]),
        ("80, sm_86;;8.9 ;", ["80", "86", "89"]),
        ("90;80", ["90", "80"]),
        ("80;8.0;sm_80;90;90a", ["80", "90", "90a"]),
        ("all", ["80", "86", "89", "90a", "100", "120"]),
        ("All", ["80", "86", "89", "90a", "100", "120"]),
        ("native", ["86", "90"]),
        ("Native;80;90", ["86", "90", "80"]),
    ],
)
def test_forms(text: str, archs: list[str]) -> None:
    assert cuda_archs.choose_archs(text, KNOWN, of_this_machine) == archs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("75", "architectures of at least 80, got '75'"),
        ("80;7.5", "at least 80, got '75'"),
        ("sm_70+PTX", "at least 80, got '70'"),
        ("81", "architectures that nvcc knows (75 80 86 87 89 90 100 103 110 120 121), got '81'"),
        ("130a", "got '130a'"),
        ("9", "architectures such as 80;90a, sm_90, 9.0+PTX, native or all, got '9'"),
        ("Hopper", "got 'Hopper'"),
        ("80;all", "got 'all'"),
        ("90-real", "got '90-real'"),
        ("9.0.0", "got '9.0.0'"),
        ("90b", "got '90b'"),
        ("-gencode=x", "got '-gencode=x'"),
        (";", "got ''"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="^PYSUPCON_CUDA_ARCHS must hold .*" + re.escape(message)):
        cuda_archs.choose_archs(text, KNOWN, of_this_machine)


def test_an_old_nvcc_compiles_what_it_knows() -> None:
    assert cuda_archs.choose_archs("all", ["75", "80", "86", "87", "89", "90"]) == ["80", "86", "89", "90a"]
    with pytest.raises(ValueError, match=r"PYSUPCON_CUDA_ARCHS=all: nvcc knows none of 80 .*, only 70 75"):
        cuda_archs.choose_archs("all", ["70", "75"])


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_native(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, monkeypatch, "echo 9.0; echo 9.0; echo 12.0")
    assert cuda_archs.choose_archs("native", KNOWN) == ["90", "120"]
    smi(tmp_path, monkeypatch, "echo 7.5")
    with pytest.raises(ValueError, match="at least 80, got '75'"):
        cuda_archs.choose_archs("native", KNOWN)
    smi(tmp_path, monkeypatch, "echo '[N/A]'")
    with pytest.raises(ValueError, match=r"nvidia-smi printed no compute capability: '\[N/A\]\\n'"):
        cuda_archs.choose_archs("native", KNOWN)
    smi(tmp_path, monkeypatch, "exit 9")
    with pytest.raises(ValueError, match="=native needs nvidia-smi and a GPU, but nvidia-smi failed"):
        cuda_archs.choose_archs("native", KNOWN)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="=native needs nvidia-smi and a GPU, but nvidia-smi failed"):
        cuda_archs.choose_archs("native", KNOWN)


@pytest.mark.parametrize(
    ("archs", "ptx"), [(["80", "90"], "90"), (["90a", "80"], "90"), (["120", "100f"], "120")]
)
def test_flags_have_ptx_of_the_newest(archs: list[str], ptx: str) -> None:
    """Of the plain form: PTX of "90a" runs on sm_90 only."""
    *machine, last = cuda_archs.gencode(archs)
    assert machine == [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    assert last == f"-gencode=arch=compute_{ptx},code=compute_{ptx}"


def test_nvcc_lists_what_it_knows() -> None:
    toolkit, reason = find_cuda.find_cuda()
    if toolkit is None:
        pytest.skip(reason)
    assert {"80", "90"} <= set(cuda_archs.known_archs(toolkit.nvcc))


def test_setup_stops_with_the_message(tmp_path: Path) -> None:
    """Before anything is compiled, and without a traceback."""
    if find_cuda.find_cuda()[0] is None:
        pytest.skip("needs nvcc")
    environment = {**os.environ, "PYSUPCON_CUDA_ARCHS": "7.5"}
    environment.pop("PYSUPCON_CUDA", None)  # 0 leaves CUDA out, also of the check
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    message = "\npysupcon: PYSUPCON_CUDA_ARCHS must hold architectures of at least 80, got '75'"
    assert message in done.stderr
    assert "Traceback" not in done.stderr
