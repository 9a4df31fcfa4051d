"""The C++ compiler of the build: whether it works, and whether it names functions as torch's compiler did."""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
from pathlib import Path

ADVICE = "set CXX to a C++20 compiler, or PYSUPCON_EXTENSION=0 to install without the compiled kernels"
NEW_MANGLING = 18
"""The first clang that puts the constraints of a template into the names of its functions. g++ does not."""


def check_compiler(cxx: str) -> None:
    """Check, before anything is compiled, that a compiler exists and compiles C++20 with OpenMP.

    Raises:
        ValueError: it does not; the message holds the compiler's own and says what to do.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <concepts>\nint main() { return std::integral<int> ? 0 : 1; }\n")
        command = [*shlex.split(cxx), "-std=c++20", "-fopenmp", str(source), "-o", str(source) + ".out"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError:
            raise ValueError(f"the C++ compiler {cxx!r} was not found: {ADVICE}") from None
    if done.returncode:
        raise ValueError(
            f"the C++ compiler {cxx!r} does not compile C++20 with OpenMP: {ADVICE}\n{done.stderr}"
        )


def clang_version(cxx: str) -> int | None:
    """The major version of clang; None for other compilers, and for Apple's clang, which counts otherwise."""
    command = [*shlex.split(cxx), "-dM", "-E", "-x", "c++", "/dev/null"]
    macros = subprocess.run(command, capture_output=True, text=True).stdout
    found = re.search(r"^#define __clang_major__ (\d+)", macros, re.MULTILINE)
    return int(found[1]) if found and "__apple_build_version__" not in macros else None


def mangling_flags(clang: int | None, torch_config: str) -> list[str]:
    """Flags with which the names of torch's functions are those in torch's libraries.

    Without them the import of an extension that clang 18 or newer compiled against a torch of g++ ends in an
    undefined symbol, such as that of ``at::TensorBase::const_data_ptr<int64_t, 0>``.

    Args:
        clang: see :func:`clang_version`.
        torch_config: ``torch.__config__.show()``, which names torch's compiler; clang's has "GCC 4.2", too.
    """
    compilers = re.findall(r"^\s*- (GCC|clang)\b", torch_config, re.MULTILINE | re.IGNORECASE)
    by_gcc = [name.lower() for name in compilers] == ["gcc"]
    return ["-fclang-abi-compat=17"] if by_gcc and clang is not None and clang >= NEW_MANGLING else []
