"""``data.dataset: image_folder`` with ``data.table``: a CSV file of images and one label of each kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.data_files import write_grey_image, write_text

from pysupcon import train as entry
from pysupcon.config import parse_args
from pysupcon.data.config import DataConfig
from pysupcon.data.datamodule import DataModule, load_data
from pysupcon.errors import ConfigError

COUNT = 48
SPECIES = ("cat", "dog", "cod")
KIND = {"cat": "mammal", "dog": "mammal", "cod": "fish"}


def write(root: Path, values: dict[str, Any], **changes: Any) -> DataConfig:
    """Image i is i.png and has the grey value i; ``values`` map a column to a function of i."""
    lines = [",".join(["file", *values])]
    for index in range(COUNT):
        write_grey_image(root / f"some/{index}.png", index, (8 + index % 3, 8))
        lines.append(",".join([f"some/{index}.png", *(str(value(index)) for value in values.values())]))
    write_text(root / "labels.csv", "\n".join(lines) + "\n")
    fields = {"image_size": 8, "batch_size": 6, "augmentation": "none", "table": "labels.csv", **changes}
    return DataConfig("image_folder", root=str(root), **fields)


def species(index: int) -> str:
    return SPECIES[index % 3]


def numbers_of(data: DataModule, split: str) -> list[int]:
    return [int(image[0, 0, 0]) for image in data.splits[split].images]


def label_names(data: DataModule) -> dict[int, tuple[str, str]]:
    """Names of the coarse and the fine label by the number of the image."""
    return {
        number: (data.coarse_names[coarse], data.fine_names[fine])
        for split, samples in data.splits.items()
        for number, coarse, fine in zip(
            numbers_of(data, split), samples.coarse.tolist(), samples.fine.tolist(), strict=True
        )
    }


@pytest.mark.parametrize("name", ["label", "fine"])
def test_one_label(tmp_path: Path, name: str) -> None:
    data = load_data(write(tmp_path, {name: species}))
    assert label_names(data) == {index: (species(index),) * 2 for index in range(COUNT)}
    assert {split: len(samples) for split, samples in data.splits.items()} == {
        "train": 36,
        "val": 3,
        "test": 9,
    }
    views, labels = next(iter(data.loader(data.batch_sampler(seed=0, steps=1))))
    assert views.shape == (6, 2, 3, 8, 8)
    assert labels.unique(return_counts=True)[1].tolist() == [2, 2, 2]


@pytest.mark.parametrize("name", ["label", "fine"])
def test_coarse_and_fine(tmp_path: Path, name: str) -> None:
    data = load_data(write(tmp_path, {"coarse": lambda i: KIND[species(i)], name: species}))
    assert label_names(data) == {index: (KIND[species(index)], species(index)) for index in range(COUNT)}


def test_a_coarse_map(tmp_path: Path) -> None:
    config = write(tmp_path, {"label": species}, coarse_map=KIND)
    assert label_names(load_data(config)) == {
        index: (KIND[species(index)], species(index)) for index in range(COUNT)
    }
    with pytest.raises(ConfigError, match=r"coarse_map must map every class .* missing \['cod'\]"):
        load_data(replace(config, coarse_map={"cat": "a", "dog": "a", "x": "b"}))
    config = write(tmp_path, {"label": species, "group": species}, coarse_map=KIND)
    with pytest.raises(ConfigError, match=r"data.coarse_map has no effect: .*labels.csv has a column of"):
        load_data(config)


def test_numbers_splits_and_other_names(tmp_path: Path) -> None:
    columns = {"Class": lambda i: 7 - i % 2, "part": lambda i: ("train", "Val", "2", "0")[i % 4]}
    names = {"label": "Class", "split": "part"}
    data = load_data(write(tmp_path, columns, columns=names))
    assert data.fine_names == ["6", "7"]
    assert numbers_of(data, "train") == [i for i in range(COUNT) if i % 4 in (0, 3)]
    assert numbers_of(data, "val") == [i for i in range(COUNT) if i % 4 == 1]
    with pytest.raises(ConfigError, match=r"data.test_fraction has no effect: .*labels.csv has test rows"):
        load_data(write(tmp_path, columns, columns=names, test_fraction=0.2))
    moved = tmp_path / "elsewhere.csv"
    (tmp_path / "labels.csv").rename(moved)
    again = load_data(write(tmp_path, columns, columns=names, table=str(moved)))
    assert numbers_of(again, "train") == numbers_of(data, "train")


def test_unknown_labels(tmp_path: Path) -> None:
    config = write(
        tmp_path, {"label": lambda i: -1 if i < 12 else i % 2}, ignore_index=-1, sampler="shuffled"
    )
    data = load_data(config)
    assert data.class_names == ["0", "1"]
    assert data.unlabelled is not None
    assert len(data.unlabelled) == 12


def place(index: int) -> str:
    return ("land", "water")[(index % 3 == 0) ^ (index % 7 == 0)]


def test_groups(tmp_path: Path) -> None:
    config = write(
        tmp_path, {"label": lambda i: KIND[species(i)], "group": place}, groups="annotated", sampler="groups",
        batch_size=8,
    )  # fmt: skip
    data = load_data(config)
    assert label_names(data) == {
        index: (KIND[species(index)], f"{KIND[species(index)]}, {place(index)}") for index in range(COUNT)
    }
    assert data.groups is not None
    assert len(data.groups.parent) == 4
    _, labels, groups = next(iter(data.loader(data.batch_sampler(seed=0, steps=1))))
    assert groups.unique(return_counts=True)[1].tolist() == [2, 2, 2, 2]
    assert torch.equal(data.groups.parent[groups], labels)


def test_group_dro_and_the_worst_group(tmp_path: Path) -> None:
    write(tmp_path, {"label": lambda i: KIND[species(i)], "group": place})
    finished = entry.run(
        data={
            "dataset": "image_folder", "root": str(tmp_path), "table": "labels.csv", "image_size": 8,
            "batch_size": 8, "groups": "annotated", "sampler": "groups",
        },
        model={"width": 2, "classifier": True}, loss={"cross_entropy_weight": 1, "group_dro": {}},
        trainer={"max_steps": 3, "cpu": True, "threads": 1, "best_by": "worst_group"},
        evaluation={"evaluators": ["worst_group"], "progress": False}, output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    assert any("worst" in name for name in finished.metrics)
    assert "group_dro" in finished.run.log()[0]


@pytest.mark.parametrize(
    ("table", "columns", "message"),
    [
        (
            "file,label,lable\n0.png,a,b",
            {},
            r"must have a column file, and label or fine; coarse, group, split are optional, and a column "
            r"without a role is refused, got 'lable': name its role, \{ROLE: lable\}, or leave it out, "
            r"--data.columns '\{ignore: \[lable\]\}'$",
        ),
        (
            "file,kind,url,1:a,no\n0.png,a,b,c,d",
            {"label": "kind", "ignore": ["url"]},
            r"got '1:a', 'no': .*, --data.columns '\{label: kind, ignore: \[url, \"1:a\", \"no\"\]\}'$",
        ),
        ("label\na", {}, r"must have a column file, and label or fine, it has label"),
        ("file,coarse\n0.png,a", {}, r"must have a column file, and label or fine, it has file, coarse"),
        ("file,label,label\n0.png,a,b", {}, r"must name each column once, it has 'label' more than once"),
        ("file,label\n", {}, r"holds no image"),
        ("file,label\n0.png,", {}, r"labels.csv, line 2, column label must not be empty"),
        ("file,label\n0.png,a\n0.png,b", {}, r"line 3, names the file of line 2 again: '0.png'$"),
        ("file,label\n0.png", {}, r"line 2, must have 2 fields, got 1"),
        ("file,label\n0.png,a\n9.png,b", {}, r"lacks 1 of the 2 images that its table names, first .*9.png"),
        ("file,label,fine\n0.png,a,b", {}, r"must have label, or coarse and fine, not both"),
        ("file,fine,group\n0.png,a,b", {}, r"must have fine labels or groups, not both"),
        ("file,label,split\n0.png,a,x", {}, r"line 2, column split must be one of 0, 1, 2, .*, got 'x'"),
        ("file,label,split\n0.png,a,val", {}, r"has no training sample"),
        (
            "file,label\n0.png,a",
            {"label": "kind"},
            r"no column 'kind', which data.columns names as label: it",
        ),
        ("file,label\n0.png,a", {"ignore": ["url"]}, r"has no 'url', which data.columns names as ignore: it"),
        ("file,label\n0.png,a", {"ignore": ["label"]}, r"must have a column file, and fine, it has file"),
        (
            "name,kind\n0.png,a",
            {},
            r"must have a column file, and label or fine, it has name, kind; name the",
        ),
        (None, {}, r"labels.csv cannot be read: .*No such file"),
    ],
)
def test_a_bad_table(tmp_path: Path, table: str | None, columns: dict[str, Any], message: str) -> None:
    write_grey_image(tmp_path / "0.png", 1)
    if table is not None:
        write_text(tmp_path / "labels.csv", table)
    config = DataConfig("image_folder", str(tmp_path), image_size=8, table="labels.csv", columns=columns)
    with pytest.raises(ConfigError, match=message) as caught:
        load_data(config)
    assert "\n" not in str(caught.value)


def test_fields(tmp_path: Path) -> None:
    given = "--data.dataset image_folder --data.root . --data.image_size 8 "
    for args, message in (
        (
            given + "--data.columns " + '{"label":"x"}',
            r"data.columns has no effect with .*_folder without data.table",
        ),
        (
            given + "--data.table t.csv --data.columns " + '{"features":"x"}',
            r"data.columns must have the keys file, .*, ignore, got 'features'",
        ),
        ("--data.dataset digits --data.table t.csv", r"data.table has no effect with data.dataset=digits"),
        (
            "--data.dataset arrays --data.root x.npz --data.columns " + '{"file":"x"}',
            r"must have the keys features",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_args(args.split())
    args = given + "--data.table t.csv --data.columns " + '{"file":"path","label":"kind"}'
    config = parse_args(args.split())[0]
    assert config.data.columns == {"file": "path", "label": "kind"}
    args = given + "--data.table t.csv --data.columns"
    config = parse_args([*args.split(), "{label: kind, ignore: [id, image url]}"])[0]
    assert config.data.columns == {"label": "kind", "ignore": ["id", "image url"]}
    for columns, message in (
        ("{label: [a, b]}", r"data.columns must name one column as label, got \['a', 'b'\]"),
        ("{label: a, ignore: a}", r"data.columns must name 'a' as label or as ignore, not as both"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_args([*args.split(), columns])


def test_ignored_columns_and_the_index_of_pandas(tmp_path: Path) -> None:
    more = {"url": lambda i: f"http://x/{i}", "author": lambda i: "me", "fine": species}
    config = write(
        tmp_path, {"label": lambda i: i % 2, **more}, columns={"ignore": ["url", "author", "fine"]}
    )
    data = load_data(config)
    assert data.fine_names == ["0", "1"]
    assert not data.notes
    assert data.label_columns == {"coarse": "label", "fine": "label"}
    path = tmp_path / "labels.csv"
    head, *rows = path.read_text(encoding="utf-8").splitlines()
    numbered = [f"{number},{row}" for number, row in enumerate(rows)]
    for name in ("", "Unnamed: 0"):
        write_text(path, "\n".join([f"{name},{head}", *numbered]))
        again = load_data(config)
        assert torch.equal(again.splits["train"].fine, data.splits["train"].fine)
        (note,) = again.notes
        assert "labels.csv: the first column, " in note
        assert note.endswith("numbers the rows, like the index of a pandas DataFrame: it is left out")
    write_text(path, "\n".join([f",{head}", *(f"7,{row}" for row in rows)]))
    with pytest.raises(ConfigError, match="a column without a role is refused, got ''"):
        load_data(config)
