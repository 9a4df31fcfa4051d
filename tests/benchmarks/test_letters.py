"""The reader of R's files, and the file of letters that it gives to ``data.dataset: arrays``."""

from __future__ import annotations

import lzma
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from benchmarks.papers import letters
from pysupcon.data import DataConfig
from pysupcon.data.datamodule import load_data

NULL = struct.pack(">i", 254)
FEATURES = 16


def text(value: str) -> bytes:
    return struct.pack(">ii", 0x40009, len(value)) + value.encode()


def texts(values: list[str]) -> bytes:
    return struct.pack(">ii", 16, len(values)) + b"".join(map(text, values))


class Writer:
    """Writes what ``save(frame)`` of R writes; a symbol's second use is a reference to the first."""

    def __init__(self) -> None:
        self.symbols: list[str] = []

    def symbol(self, name: str) -> bytes:
        if name in self.symbols:
            return struct.pack(">i", 255 | (self.symbols.index(name) + 1) << 8)
        self.symbols.append(name)
        return struct.pack(">i", 1) + text(name)

    def pairs(self, **values: bytes) -> bytes:
        parts = (struct.pack(">i", 2 | 1 << 10) + self.symbol(name) + values[name] for name in values)
        return b"".join(parts) + NULL

    def file(self, columns: dict[str, np.ndarray]) -> bytes:
        head = b"RDX2\nX\n" + struct.pack(">iii", 2, 0x20A02, 0x20300)
        frame = struct.pack(">i", 2 | 1 << 10) + self.symbol("Frame")
        frame += struct.pack(">ii", 19 | 1 << 8 | 1 << 9, len(columns))
        frame += b"".join(map(self.column, columns.values()))
        names, kind = texts(list(columns)), texts(["data.frame"])
        return lzma.compress(head + frame + self.pairs(**{"names": names, "class": kind}) + NULL)

    def column(self, values: np.ndarray) -> bytes:
        if values.dtype.kind == "f":
            return struct.pack(">ii", 14, len(values)) + values.astype(">f8").tobytes()
        levels, numbers = np.unique(values, return_inverse=True)
        content = struct.pack(">ii", 13 | 1 << 8 | 1 << 9, len(values))
        content += (numbers + 1).astype(">i4").tobytes()
        return content + self.pairs(**{"levels": texts(levels.tolist()), "class": texts(["factor"])})


def frame(count: int = letters.COUNT) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    names = np.array([chr(ord("A") + number) for number in generator.permutation(np.arange(count) % 26)])
    numbers = {f"x{i}": generator.integers(0, 16, count).astype(np.float64) for i in range(FEATURES)}
    return {"lettr": names, "group": names[::-1], **numbers}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("letters") / "frame.rda"
    path.write_bytes(Writer().file(frame()))
    return path


def test_columns_of_a_data_frame(stored: Path) -> None:
    found, wanted = letters.read_frame(stored), frame()
    assert list(found) == list(wanted)
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no archive", "LZMAError"),
        (lzma.compress(b"RDX3\nX\n" + bytes(40)), "must start with b'RDX2"),
        (lzma.compress(lzma.decompress(Writer().file(frame(26)))[:300]), "ends within an object"),
        (lzma.compress(b"RDX2\nX\n" + bytes(12) + struct.pack(">ii", 10, 1)), "object of type 10"),
    ],
)
def test_refuses_other_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.rda"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path} is no data frame of R: ") + f".*{message}"):
        letters.read_frame(path)


def test_the_file_is_read_as_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = frame()
    del columns["group"]
    source, output = tmp_path / "LetterRecognition.rda", tmp_path / "data" / "letters.npz"
    source.write_bytes(Writer().file(columns))
    letters.main([str(source), "--output", str(output)])
    assert capsys.readouterr().out == f"written to {output}\n"
    data = load_data(DataConfig(dataset="arrays", root=str(output), augmentation="none", batch_size=26))
    assert {name: len(part) for name, part in data.splits.items()}["test"] == 4_000
    assert len(data.splits["train"]) + len(data.splits["val"]) == 16_000
    test = data.splits["test"]
    assert [data.fine_names[int(f)] for f in test.fine] == columns["lettr"][16_000:].tolist()
    halves = {data.fine_names[int(f)]: int(c) for f, c in zip(test.fine, test.coarse, strict=True)}
    assert [data.coarse_names[halves[chr(65 + i)]] for i in range(26)] == ["A to M"] * 13 + ["N to Z"] * 13
    assert np.array_equal(np.asarray(test.images)[:, 3], columns["x3"][16_000:])


def test_refuses_another_data_frame(stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        letters.main([str(stored), "--output", str(tmp_path / "x.npz")])
    assert (
        "must hold 20000 letters (column lettr) with 16 features, got 20000 with 17"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "x.npz").exists()
