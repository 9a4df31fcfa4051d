"""Writes the letter recognition data (Frey and Slate 1991) as a file for ``data.dataset: arrays``.

    dpkg-deb -x r-cran-mlbench_*.deb FOLDER  # of `apt-get download r-cran-mlbench`
    python benchmarks/papers/letters.py FOLDER/usr/lib/R/site-library/mlbench/data/LetterRecognition.rda

20,000 letters in distorted fonts, described by 16 numbers each. Fine classes are the 26 letters, coarse ones
the halves of the alphabet. As usual with these data, the first 16,000 are for training, the last 4,000 for
testing. The file of R is read here, without R: compressed, serialised in R's version 2, big-endian
("R Internals", section 1.8).
"""

from __future__ import annotations

import argparse
import lzma
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "runs" / "data" / "letters.npz"
COUNT, TRAINING = 20_000, 16_000
HALVES = ("A to M", "N to Z")
_MAGIC = b"RDX2\nX\n"
_NULL, _REFERENCE = 254, 255
_SYMBOL, _PAIRS, _STRING, _INTEGERS, _REALS, _STRINGS, _LIST = 1, 2, 9, 13, 14, 16, 19
_ATTRIBUTES, _TAG = 1 << 9, 1 << 10


class Value(NamedTuple):
    """An object of R.

    Attributes:
        data: an array, a list, a text, a dict (of a pairlist), or None.
        attributes: values by name.
    """

    data: Any
    attributes: dict[str, Value]


class Reader:
    """Reads the objects that data frames of numbers and factors consist of.

    Args:
        content: the decompressed file.

    Raises:
        ValueError: it is another format, is cut, or holds another kind of object.
    """

    def __init__(self, content: bytes) -> None:
        if not content.startswith(_MAGIC):
            raise ValueError(f"the file must start with {_MAGIC!r}, got {content[: len(_MAGIC)]!r}")
        self.content, self.place = content, len(_MAGIC)
        self.symbols: list[str] = []
        self._numbers(">i4", 3)  # versions of the format and of R

    def _numbers(self, kind: str, count: int) -> np.ndarray:
        size = np.dtype(kind).itemsize * count
        if count < 0 or self.place + size > len(self.content):
            raise ValueError(f"the file ends within an object of {count} values")
        found = np.frombuffer(self.content, kind, count, self.place)
        self.place += size
        return found

    def _integer(self) -> int:
        return int(self._numbers(">i4", 1)[0])

    def read(self) -> Value:
        """The next object."""
        flags = self._integer()
        kind = flags & 0xFF
        if kind == _NULL:
            return Value(None, {})
        if kind == _REFERENCE:
            return Value(self.symbols[(flags >> 8) - 1], {})
        if kind == _SYMBOL:
            self.symbols.append(self.read().data)
            return Value(self.symbols[-1], {})
        if kind == _PAIRS:
            return self._pairs(flags)
        data: Any
        count = self._integer()
        if kind == _STRING:
            return Value(self._numbers("u1", max(count, 0)).tobytes().decode("latin-1"), {})  # -1: NA
        if kind in (_INTEGERS, _REALS):
            data = self._numbers(">i4" if kind == _INTEGERS else ">f8", count)
        elif kind in (_STRINGS, _LIST):
            data = [self.read() for _ in range(count)]
        else:
            raise ValueError(f"the file holds an object of type {kind}, which this reader does not know")
        return Value(data, self.read().data if flags & _ATTRIBUTES else {})

    def _pairs(self, flags: int) -> Value:
        pairs: dict[str, Value] = {}
        while flags & 0xFF == _PAIRS:
            if flags & _ATTRIBUTES:
                self.read()
            name = self.read().data if flags & _TAG else ""
            pairs[name] = self.read()
            flags = self._integer()
        if flags & 0xFF != _NULL:
            raise ValueError(f"a list of pairs ends with an object of type {flags & 0xFF}")
        return Value(pairs, {})


def read_frame(path: Path) -> dict[str, np.ndarray]:
    """Columns of the only data frame in a file .rda (xz); factors become arrays of text.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        reader = Reader(lzma.decompress(path.read_bytes()))
        (frame,) = reader.read().data.values()
        names = [name.data for name in frame.attributes["names"].data]
        return dict(zip(names, map(_column, frame.data), strict=True))
    except (lzma.LZMAError, struct.error, KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no data frame of R: {type(error).__name__}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no data frame of R: {error}") from error


def _column(value: Value) -> np.ndarray:
    if "levels" not in value.attributes:
        return np.asarray(value.data)
    levels = np.array([level.data for level in value.attributes["levels"].data])
    numbers: np.ndarray = levels[value.data - 1]
    return numbers


def convert(source: Path, output: Path) -> None:
    """Write the features, labels and splits of LetterRecognition.rda.

    Raises:
        ValueError: the file holds other data.
    """
    frame = read_frame(source)
    letters = frame.pop("lettr", np.array([]))
    if len(letters) != COUNT or len(frame) != 16:
        raise ValueError(
            f"{source} must hold {COUNT} letters (column lettr) with 16 features, got {len(letters)} with "
            f"{len(frame)}"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        output,
        features=np.stack(list(frame.values()), axis=1).astype(np.float32),
        coarse=np.where(letters <= "M", *HALVES),
        fine=letters,
        split=np.where(np.arange(COUNT) < TRAINING, "train", "test"),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("source", type=Path, help="LetterRecognition.rda of R's package mlbench")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file to write (default: %(default)s)")
    parsed = parser.parse_args(arguments)
    try:
        convert(parsed.source, parsed.output)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"written to {parsed.output}")


if __name__ == "__main__":
    main()
