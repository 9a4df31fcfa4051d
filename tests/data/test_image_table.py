"""A folder of images with a table of labels: any number of labels per image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.data_files import write_grey_image, write_text

from pysupcon.config import parse_args
from pysupcon.data.config import DataConfig
from pysupcon.data.datamodule import load_data
from pysupcon.errors import ConfigError


def _write(root: Path, rows: list[str], header: str = "file,cat,dog,night") -> DataConfig:
    for row in rows:
        name = row.split(",")[0]
        if name.endswith(".png"):
            grey = int(name.split("/")[-1].removesuffix(".png"))
            write_grey_image(root / name, grey, (8 + grey % 3, 8))
    write_text(root / "labels.csv", "\n".join([header, *rows]) + "\n")
    return DataConfig(
        "image_table", root=str(root), image_size=8, sampler="shuffled", batch_size=5, test_fraction=0.25,
        augmentation="none",
    )  # fmt: skip


ROWS = [f"images/{i}.png,{i % 2},{int(i % 3 == 0)},{int(i > 10)}" for i in range(24)]


def test_labels_follow_their_images(tmp_path: Path) -> None:
    data = load_data(_write(tmp_path, ROWS))
    assert data.class_names == ["cat", "dog", "night"]
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 16, "val": 2, "test": 6}
    for seed in (0, 1):
        views, labels = next(iter(data.loader(data.batch_sampler(seed=seed, steps=1))))
        assert views.shape == (5, 2, 3, 8, 8)
        assert labels.shape == (5, 3)
        assert labels.dtype == torch.int64
        for image, row in zip(views[:, 0], labels, strict=True):
            i = int(image[0, 0, 0])
            assert row.tolist() == [i % 2, int(i % 3 == 0), int(i > 10)]
    views, labels = next(iter(data.loader(data.validation_batch_sampler(seed=0), split="val")))
    assert labels.shape == (2, 3)


def test_split_column_and_a_table_elsewhere(tmp_path: Path) -> None:
    splits = ["train"] * 16 + ["val"] * 3 + ["test"] * 5
    rows = [f"{row},{split}" for row, split in zip(ROWS, splits, strict=True)]
    config = _write(tmp_path, rows, "file,cat,dog,night,split")
    data = load_data(replace(config, test_fraction=None))
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 16, "val": 3, "test": 5}
    with pytest.raises(ConfigError, match=r"data.test_fraction has no effect: .*labels.csv has test images"):
        load_data(config)
    moved = tmp_path / "elsewhere.csv"
    (tmp_path / "labels.csv").rename(moved)
    again = load_data(replace(config, test_fraction=None, table=str(moved)))
    assert torch.equal(again.splits["test"].fine, data.splits["test"].fine)
    smaller = load_data(replace(config, test_fraction=None, table="elsewhere.csv", train_size=7))
    assert len(smaller.splits["train"]) == 7


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (
            ["1.png,0,1", "2.png,0,2"],
            "file,a,b",
            r"labels.csv, line 3, column b must be one of 0, 1, got '2'",
        ),
        (["1.png,0,"], "file,a,b", r"labels.csv, line 2, column b must be one of 0, 1, got ''"),
        (["1.png,0,1", "2.png,0"], "file,a,b", r"labels.csv, line 3, must have 3 fields, got 2"),
        (
            ["1.png,0,1", "1.png,0,1"],
            "file,a,b",
            r"line 3, names the file of line 2 again: '1",
        ),
        ([",0,1"], "file,a,b", r"line 2, must name a file in its column file, which is empty"),
        (["1.png,0,1"], "file,a,a", r"must name each column once, it has 'a' more than once"),
        (
            ["1.png,0"],
            "file,a",
            r"two or more columns of labels, it has file, a$",
        ),
        ([], "file,a,b", r"labels.csv holds no image"),
        (["1.png,0,1", "none.jpg,1,0"], "file,a,b", r"lacks 1 of the 2 images .*, first .*none.jpg"),
        (["1.png,0,1,test"], "file,a,b,split", r"labels.csv has no train image in its column split"),
        (
            ["1.png,0,1,x"],
            "file,a,b,split",
            r"line 2, column split must be one of 0, 1, 2, train, .*, got 'x'",
        ),
    ],
)
def test_a_bad_table(tmp_path: Path, rows: list[str], header: str, message: str) -> None:
    config = _write(tmp_path, rows, header)
    with pytest.raises(ConfigError, match=message) as caught:
        load_data(config)
    assert "\n" not in str(caught.value)


def test_what_needs_one_label_per_sample_is_refused(tmp_path: Path) -> None:
    config = _write(tmp_path, ROWS)
    with pytest.raises(
        ConfigError, match=r"the evaluators need one label per sample, but data.dataset=image_"
    ):
        load_data(config).evaluation_dataset("test")
    with pytest.raises(ConfigError, match=r"data.root: .*/absent.csv cannot be read: .*No such file"):
        load_data(replace(config, table="absent.csv"))
    table = "--data.dataset image_table --data.root . --data.image_size 8 "
    shuffled = table + "--data.sampler shuffled "
    for args, message in (
        (table, r"data.sampler must be shuffled for data.dataset=image_table, .*, got balanced"),
        (shuffled + "--data.ignore_index 1", r"data.ignore_index needs one label per sample"),
        (shuffled + "--data.groups annotated", r"data.groups needs one label per sample"),
        ("--data.table x.csv", r"data.table has no effect with data.dataset=mnist5k"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_args(args.split())


def test_ignored_columns(tmp_path: Path) -> None:
    rows = [f"{row},http://x/{i}" for i, row in enumerate(ROWS)]
    config = replace(_write(tmp_path, rows, "file,cat,dog,night,url"), columns={"ignore": ["url", "night"]})
    assert load_data(config).class_names == ["cat", "dog"]
    with pytest.raises(
        ConfigError, match=r"labels.csv has no 'x', which data.columns names as ignore: it has"
    ):
        load_data(replace(config, columns={"ignore": "x"}))
    given = (
        "--data.dataset image_table --data.root . --data.image_size 8 --data.sampler shuffled --data.columns"
    )
    with pytest.raises(ConfigError, match=r"data.columns must have the keys ignore, got 'label'"):
        parse_args([*given.split(), "{label: cat}"])
