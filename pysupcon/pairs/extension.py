"""Loads the compiled extension ``pysupcon._C``, if it was built for this Python and this torch.

A library that was compiled against another torch must not be loaded: usually it ends in an undefined symbol,
but it can also crash, or register its operators and then disagree with torch about the layout of tensors. So
csrc/bindings.cpp stores torch's version in an ELF note, which linkers put near the start of the file, and the
note is read before the library is loaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import struct
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

NAME = "pysupcon._C"
REBUILD = "`pip install --no-build-isolation .` in the source tree"
_NOTE = re.compile(rb"pysupcon:torch=([^\0]+)\0")
_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
"""Elf64_Ehdr, from elf.h"""
_START = 2**16
"""Bytes of the library that are searched for the note"""


def load() -> tuple[ModuleType | None, str | None, bool]:
    """Load the extension.

    Returns:
        The module and None; or None and the reason why it cannot be used. Then whether there is a library
        that cannot be used: the installation is broken, while without a library it may be intended.
    """
    library = _find()
    if library is None:
        others = _other_pythons()
        reason = f"was built for another Python ({others})" if others else "is not installed"
        return None, f"the compiled extension {NAME} {reason}; build it with {REBUILD}", bool(others)
    built = built_with(library)
    if built not in (None, torch.__version__):
        return None, _another_torch(str(built)), True
    if _is_truncated(library):
        reason = f"the compiled extension {library} is truncated: it is shorter than its header says"
        return None, f"{reason}; build it again with {REBUILD}", True
    try:
        module = importlib.import_module(NAME)
    except ImportError as error:
        known = f", built with torch {built}," if built else ""
        reason = f"the compiled extension {library}{known} could not be loaded by torch {torch.__version__}"
        return None, f"{reason} ({error}); build it again with {REBUILD}", True
    if module.torch_version != torch.__version__:  # a library without the note
        return None, _another_torch(module.torch_version), True
    return module, None, False


def built_with(library: Path) -> str | None:
    """Return the version of the torch that the library was compiled against, or None if it has no note."""
    try:
        with library.open("rb") as file:
            note = _NOTE.search(file.read(_START))
    except OSError:
        return None
    return note[1].decode("utf-8", "replace") if note else None


def _is_truncated(library: Path) -> bool:
    """Whether a 64-bit ELF file ends before its table of sections, which linkers put last. A full disk leaves
    such files, and Python would be killed while it loads one."""
    try:
        size = library.stat().st_size
        with library.open("rb") as file:
            header = file.read(_ELF_HEADER.size)
    except OSError:
        return False
    if len(header) < _ELF_HEADER.size or not header.startswith(b"\x7fELF\x02\x01"):
        return False  # of another system; importing it tells
    *_, sections, _, _, _, _, entry_size, entries, _ = _ELF_HEADER.unpack(header)
    return bool(size < sections + entry_size * entries)


def _another_torch(built: str) -> str:
    return (
        f"the compiled extension {NAME} was built with torch {built}, but this is torch {torch.__version__}; "
        f"build it again with {REBUILD}, or install torch {built.partition('+')[0]}"
    )


def _find() -> Path | None:
    spec = importlib.util.find_spec(NAME)
    return None if spec is None or spec.origin is None else Path(spec.origin)


def _other_pythons() -> str:
    """The libraries that this Python cannot load, and the suffix of those that it can; "" without any."""
    own = [f"_C{suffix}" for suffix in EXTENSION_SUFFIXES]
    libraries = sorted(Path(__file__).resolve().parents[1].glob("_C.*.so"))
    names = [path.name for path in libraries if path.name not in own]
    return f"{', '.join(names)}; this one loads {own[0]}" if names else ""
