"""A compiled extension that was built for another torch or another Python: what a user sees.

Each test imports a copy of the package with a library of its own, in a process of its own.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
LOADED = "LOADED"
# A library whose code runs when it is loaded. {note} is an ELF note as that of csrc/bindings.cpp.
SOURCE = """
#include <cstdio>
asm(".pushsection .note.pysupcon,\\"a\\",@note\\n.balign 4\\n.long 2f-1f\\n.long 4f-3f\\n.long 1\\n"
    "1: .asciz \\"pysupcon\\"\\n2: .balign 4\\n3: .asciz \\"{note}\\"\\n4: .balign 4\\n.popsection");
extern "C" void no_such_function();
__attribute__((constructor)) static void loaded() {{ puts("LOADED"); fflush(stdout); }}
extern "C" __attribute__((visibility("default"))) void *PyInit__C() {{ {call} return nullptr; }}
"""
PROGRAM = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import pysupcon, torch
    print("AT IMPORT", *[f"{warning.filename}: {warning.message}" for warning in caught])
    caught.clear()
    x, labels = torch.nn.functional.normalize(torch.randn(8, 4), dim=1), torch.arange(8) % 2
    auto = pysupcon.SupConLoss()(x, labels)
    print("AT THE LOSS", *[warning.message for warning in caught])
torch.testing.assert_close(auto, pysupcon.SupConLoss(backend="reference")(x, labels))
try:
    pysupcon.SupConLoss(backend="cpu")(x, labels)
except RuntimeError as error:
    print("ERROR", error)
print("DETAIL", pysupcon.backends()["cuda"]["detail"])
"""


def compile_library(file: Path, note: str, call: str = "") -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    source = file.with_suffix(".cpp")
    source.write_text(SOURCE.format(note=note, call=call))
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(file)], check=True)
    source.unlink()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package without its extension."""
    copy = tmp_path / "site" / "pysupcon"
    shutil.copytree(ROOT / "pysupcon", copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


def use(package: Path) -> dict[str, str]:
    """The lines that PROGRAM prints, and LOADED if the library was loaded."""
    # -S: the finder of an editable installation would offer another library.
    paths = [str(package.parent), *(path for path in sys.path if path.endswith("site-packages"))]
    program = package.parent / "program.py"
    program.write_text(f"import sys\nsys.path[:0] = {paths!r}\n{PROGRAM}")
    command = [sys.executable, "-S", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=package.parent)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        for word in ("AT IMPORT", "AT THE LOSS", "ERROR", "DETAIL", LOADED):
            if line.startswith(word):
                found[word] = line.removeprefix(word).strip()
    return found


def check(found: dict[str, str], *words: str) -> None:
    """One warning at import, which shows the user's line; an error of backend="cpu"; backends()."""
    assert "program.py: " in found["AT IMPORT"]
    assert found["AT IMPORT"].endswith("use the slower backend='tiled' (pure PyTorch)")
    assert found["AT THE LOSS"] == ""
    assert found["ERROR"].startswith("backend='cpu' is not compiled: the compiled extension")
    for word in (*words, "`pip install --no-build-isolation .` in the source tree"):
        for place in ("AT IMPORT", "ERROR", "DETAIL"):
            assert word in found[place], place


def test_built_with_another_torch(package: Path) -> None:
    """Both versions are named, and the library is not even loaded."""
    compile_library(package / f"_C{SUFFIX}", "pysupcon:torch=2.3.9+cu99", "no_such_function();")
    found = use(package)
    text = f"was built with torch 2.3.9+cu99, but this is torch {torch.__version__}; build it again with"
    check(found, text, "or install torch 2.3.9")
    assert LOADED not in found


def test_an_undefined_symbol(package: Path) -> None:
    """The same version of torch, compiled otherwise: the linker's message is the reason."""
    note = f"pysupcon:torch={torch.__version__}"
    compile_library(package / f"_C{SUFFIX}", note, "no_such_function();")
    check(use(package), f"built with torch {torch.__version__}, could not be loaded", "no_such_function")


def test_a_library_without_a_note(package: Path) -> None:
    (package / f"_C{SUFFIX}").write_bytes(b"no library")
    check(use(package), f"_C{SUFFIX} could not be loaded by torch {torch.__version__}", "file too short")


@pytest.mark.parametrize("kept", [100, 0.5, 0.99])
def test_a_truncated_library_is_not_loaded(package: Path, kept: float) -> None:
    """A full disk leaves such files. Python would be killed by SIGBUS."""
    library = package / f"_C{SUFFIX}"
    compile_library(library, f"pysupcon:torch={torch.__version__}", "")
    content = library.read_bytes()
    library.write_bytes(content[: kept if kept > 1 else int(kept * len(content))])
    check(use(package), f"_C{SUFFIX} is truncated: it is shorter than its header says")


def test_built_for_another_python(package: Path) -> None:
    name = "_C.cpython-39-x86_64-linux-gnu.so"
    (package / name).write_bytes(b"no library")
    check(use(package), f"was built for another Python ({name}; this one loads _C{SUFFIX})")


def test_no_library(package: Path) -> None:
    """It may be intended (PYSUPCON_EXTENSION=0): the first loss warns, not the import."""
    found = use(package)
    reason = (
        "the compiled extension pysupcon._C is not installed; build it with "
        "`pip install --no-build-isolation .` in the source tree"
    )
    assert found["AT IMPORT"] == ""
    assert f"no compiled kernel for cpu tensors ({reason}); falling back" in found["AT THE LOSS"]
    assert found["ERROR"] == f"backend='cpu' is not compiled: {reason}"
