"""Processes and threads of the loaders: the batches do not depend on them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pysupcon import user_code
from pysupcon.data import workers as module
from pysupcon.data.config import DataConfig
from pysupcon.data.datamodule import DataModule, load_data
from pysupcon.data.samples import FileImages
from pysupcon.data.workers import choose_workers
from pysupcon.errors import ConfigError

SEEN: list[int] = []
"""Threads of the calls of :func:`record_threads`"""


def record_threads(image: Tensor) -> Tensor:
    SEEN.append(torch.get_num_threads())
    return image


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    SEEN.clear()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of many sizes."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir()
        for index in range(24):
            pixels = random.integers(0, 256, (*random.integers(20, 60, 2), 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def data_of(root: Path, workers: int | None, **changes: Any) -> DataModule:
    fields: dict[str, Any] = {"labels": "fine", "image_size": 24, "batch_size": 10, **changes}
    return load_data(DataConfig("image_folder", str(root), workers=workers, **fields))


@pytest.mark.parametrize(("workers", "threads"), [(0, 1), (1, 2), (2, 2)])
def test_batches_and_resumption_do_not_depend_on_workers_and_threads(
    root: Path, workers: int, threads: int
) -> None:
    alone = data_of(root, 0)
    expected = list(alone.loader(alone.batch_sampler(seed=5, steps=7)))
    torch.set_num_threads(threads)
    data = data_of(root, workers)
    for start in (0, 4):  # 4: resumed with another number
        found = list(data.loader(data.batch_sampler(seed=5, steps=7, start=start)))
        assert len(found) == 7 - start
        for mine, theirs in zip(found, expected[start:], strict=True):
            assert all(torch.equal(one, two) for one, two in zip(mine, theirs, strict=True))


def test_images_that_are_read_one_by_one_use_one_thread(root: Path) -> None:
    user_code.allow()
    data = data_of(root, 0, augmentation=f"{__name__}:record_threads")
    next(iter(data.loader(data.batch_sampler(seed=0, steps=1))))
    assert set(SEEN) == {1}
    assert torch.get_num_threads() == 2
    dataset = data.evaluation_dataset("test")
    dataset.resize = record_threads  # type: ignore[assignment]
    SEEN.clear()
    with pytest.raises(RuntimeError, match="Sizes of tensors"):  # record_threads does not resize
        dataset.__getitems__([0, 1, 2])
    assert set(SEEN) == {1}
    assert torch.get_num_threads() == 2  # after an error too


def test_images_in_memory_keep_the_threads() -> None:
    user_code.allow()
    data = load_data(DataConfig("digits", batch_size=10, augmentation=f"{__name__}:record_threads"))
    next(iter(data.loader(data.batch_sampler(seed=0, steps=1))))
    assert set(SEEN) == {2}


def test_the_chosen_number(monkeypatch: pytest.MonkeyPatch) -> None:
    files, memory = FileImages([Path("x")] * 5000), torch.zeros(5000, 1, 2, 2, dtype=torch.uint8)
    free = SimpleNamespace(f_bavail=2**20, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _: free)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert choose_workers(None, files, 2**20) == module.MOST
    assert choose_workers(None, memory, 2**20) == 0
    assert [choose_workers(given, images, 2**40) for given in (0, 3) for images in (files, memory)] == [
        0,
        0,
        3,
        3,
    ]
    assert choose_workers(None, files.select(torch.arange(600)), 2**20) == 2
    assert choose_workers(None, files.select(torch.arange(20)), 2**20) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # four processes share the cores
    assert choose_workers(None, files, 2**20) == 3
    free.f_bavail = 16 * 2**20 // 4096
    assert choose_workers(None, files, 2 * 2**20) == 2
    assert choose_workers(None, files, 64 * 2**20) == 0
    free.f_bavail = 2**20
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert choose_workers(None, files, 2**20) == 0
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {"daemon": True})
    assert choose_workers(None, files, 2**20) == 0


def test_loaders_take_the_chosen_number(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(
        "pysupcon.data.datamodule.choose_workers", lambda workers, _, size: sizes.append(size) or 1
    )
    data = data_of(root, None, views=3)
    loader = data.loader(data.batch_sampler(seed=0, steps=2, world_size=2))
    assert loader.num_workers == 1
    assert len(list(loader)) == 2
    assert data.workers("test", 7, bytes_per_value=4) == 1
    assert sizes == [5 * 3 * 3 * 24 * 24, 7 * 4 * 3 * 24 * 24]


def test_the_field() -> None:
    DataConfig(workers=None).check()
    with pytest.raises(ConfigError, match=r"data.workers must be at least 0, got -1"):
        DataConfig(workers=-1).check()
