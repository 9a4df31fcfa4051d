"""csrc/host_compiler.py: which C++ compilers are accepted, and the flags that they need for torch."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "csrc"))
import host_compiler

GCC = "PyTorch built with:\n  - GCC 13.3\n  - C++ Version: 202002\n  - CXX_FLAGS=-O2\n"
CLANG = "PyTorch built with:\n  - GCC 4.2\n  - C++ Version: 201703\n  - clang 14.0.3\n"


@pytest.mark.parametrize("clang", [18, 19, 22])
def test_a_new_clang_names_functions_as_the_gcc_of_torch(clang: int) -> None:
    assert host_compiler.mangling_flags(clang, GCC) == ["-fclang-abi-compat=17"]
    assert host_compiler.mangling_flags(clang, CLANG) == []


@pytest.mark.parametrize("clang", [None, 14, 17])
def test_other_compilers_do_so_already(clang: int | None) -> None:
    assert host_compiler.mangling_flags(clang, GCC) == []


def test_the_compiler_of_this_torch_is_known() -> None:
    config = torch.__config__.show()
    assert "GCC" in config or "clang" in config
    if "clang" not in config.lower():
        assert host_compiler.mangling_flags(19, config)


@pytest.mark.parametrize("version", [None, 14, 15, 16, 18, 19])
def test_versions_of_installed_compilers(version: int | None) -> None:
    program = "g++" if version is None else f"clang++-{version}"
    if shutil.which(program) is None:
        pytest.skip(f"needs {program}")
    assert host_compiler.clang_version(program) == version
    assert host_compiler.clang_version(f"{program} -O1") == version  # CXX may hold flags


def test_a_compiler_without_concepts(tmp_path: Path) -> None:
    old = tmp_path / "old c++"
    old.write_text("#!/bin/sh\necho 'error: no such file: concepts' >&2\nexit 1\n")
    old.chmod(0o755)
    with pytest.raises(ValueError, match=r"does not compile C\+\+20 with OpenMP: set CXX .*\n.*concepts"):
        host_compiler.check_compiler(f"'{old}' -v")
    with pytest.raises(ValueError, match=r"'no-such-compiler' was not found: .*PYSUPCON_EXTENSION=0"):
        host_compiler.check_compiler("no-such-compiler")
