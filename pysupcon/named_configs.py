"""The example configs of the package by name: ``--config mnist_coarse_spread``.

A wheel holds a copy of the folder ``configs/`` of the source tree, ``pysupcon/configs/``. In a source tree
and an editable installation, the folder itself is read.
"""

from __future__ import annotations

import difflib
import os
import stat
from pathlib import Path, PurePosixPath

PACKAGE = Path(__file__).resolve().parent
SUFFIX = ".yaml"
PARTS = "parts/"
"""Start of the names of configs that others extend"""
_CUTOFF = 0.6
_SHOWN = 5


def folder() -> Path | None:
    """Return the folder of the example configs, or None if this installation has none."""
    installed, source = PACKAGE / "configs", PACKAGE.parent / "configs"
    if installed.is_dir():
        return installed
    # Other packages may have installed a folder of this name beside pysupcon.
    return source if source.is_dir() and (PACKAGE.parent / "setup.py").is_file() else None


def names() -> list[str]:
    """Return the names of the example configs: paths within their folder, without ``.yaml``, sorted."""
    top = folder()
    if top is None:
        return []
    return sorted(path.relative_to(top).with_suffix("").as_posix() for path in top.rglob("*" + SUFFIX))


def find(given: str | Path, beside: Path = Path()) -> Path:
    """Return the file of a config.

    Args:
        given: a file; or the name of an example config if there is no such file:
            ``coarse/mnist_coarse_thanos``, or its last part, with or without ``.yaml``, or its path in the
            source tree, ``configs/coarse/mnist_coarse_thanos.yaml``.
        beside: the folder of a relative path; default: the working directory.

    Raises:
        ValueError: there is no such file, and the name is that of no example config, or of several. The
            message is one line with similar names, without ``given``.
    """
    path, top = beside / given, folder()
    if top is None or _is_file(path):
        return path
    name, known = _as_name(given), names()
    matching = [each for each in known if each == name]
    known = [each for each in known if not each.startswith(PARTS)]  # they are no whole configs
    matching = matching or [each for each in known if each.rpartition("/")[2] == name]
    if len(matching) == 1:
        return top / (matching[0] + SUFFIX)
    if matching:
        raise ValueError(f"several example configs have this name: pass {' or '.join(matching)}")
    missing = "it is a folder, and there is" if path.is_dir() else "there is no such file and"
    raise ValueError(f"{missing} no example config of this name; {_hint(name, known, top)}")


def _is_file(path: Path) -> bool:
    """Whether something can be opened here, also a pipe. A loop of links is left to the one that opens it."""
    try:
        return not stat.S_ISDIR(os.stat(path).st_mode)
    except OSError:
        return os.path.islink(path)


def _as_name(given: str | Path) -> str:
    name = PurePosixPath(Path(given).as_posix())
    name = name.with_suffix("") if name.suffix in (SUFFIX, ".yml") else name
    return name.as_posix().removeprefix("configs/")


def _hint(name: str, known: list[str], top: Path) -> str:
    """The most similar names, compared as a whole or by their last parts."""
    last = name.rpartition("/")[2]
    score = {
        each: max(
            difflib.SequenceMatcher(None, *pair).ratio()
            for pair in ((name, each), (last, each.rpartition("/")[2]))
        )
        for each in known
    }
    similar = sorted((each for each in known if score[each] >= _CUTOFF), key=lambda each: -score[each])
    if similar:
        return f"similar names: {', '.join(similar[:_SHOWN])}"
    return f"the example configs are in {top}"
