"""Data sets with groups: files in their published formats, and colour correlated with the class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.group_data_files import write_celeba_csv, write_celeba_txt, write_isic, write_waterbirds

from pysupcon.data.config import DataConfig
from pysupcon.data.datamodule import load_data
from pysupcon.data.group_datasets import read_group_table
from pysupcon.data.spurious import colourize, correlated_attribute
from pysupcon.errors import ConfigError


def test_waterbirds(tmp_path):
    write_waterbirds(tmp_path)
    table = read_group_table("waterbirds", tmp_path)
    assert len(table.paths) == 24
    assert table.classes.tolist() == [i % 2 for i in range(24)]
    assert table.attributes.tolist() == [i // 3 % 2 for i in range(24)]
    assert table.groups.tolist() == [2 * (i % 2) + i // 3 % 2 for i in range(24)]
    assert table.group_names[2] == "waterbird, on land"
    data = load_data(DataConfig("waterbirds", root=str(tmp_path), image_size=8, batch_size=4))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 12, "val": 6, "test": 6}
    image, coarse, fine = data.evaluation_dataset("val")[0]
    # The first validation image is number 4: class 0, on water; its shade is in the red channel.
    assert (coarse, fine) == (0, 1)
    assert image.shape == (3, 8, 8)
    shade = (image[0] * 0.229 + 0.485).mean().item() * 255
    assert shade == pytest.approx(40, abs=4)
    assert data.class_names == ["landbird", "waterbird"]


@pytest.mark.parametrize("write", [write_celeba_txt, write_celeba_csv])
def test_celeba_in_both_forms(tmp_path, write):
    write(tmp_path)
    table = read_group_table("celeba", tmp_path)
    assert table.classes.tolist() == [int(i % 3 == 0) for i in range(12)]
    assert table.attributes.tolist() == [i % 2 for i in range(12)]
    assert table.split.tolist() == [i // 4 for i in range(12)]
    assert [path.name for path in table.paths] == [f"{i + 1:06d}.jpg" for i in range(12)]
    assert table.group_names == ["not blond, female", "not blond, male", "blond, female", "blond, male"]
    data = load_data(DataConfig("celeba", root=str(tmp_path), image_size=8, batch_size=2))
    assert [len(data.splits[name]) for name in ("train", "val", "test")] == [4, 4, 4]


def test_isic_without_a_division_is_split_by_group(tmp_path):
    write_isic(tmp_path)
    table = read_group_table("isic", tmp_path)
    assert table.split is None
    assert table.classes.sum() == 10
    data = load_data(DataConfig("isic", root=str(tmp_path), image_size=8, batch_size=4))
    counts = {name: torch.bincount(split.fine, minlength=4).tolist() for name, split in data.splits.items()}
    # 20 benign with, 10 benign without, 10 malignant without a patch: a fifth of each is tested.
    assert counts["test"] == [2, 4, 2, 0]
    assert [sum(column) for column in zip(*counts.values(), strict=True)] == [10, 20, 10, 0]
    assert torch.equal(data.splits["val"].coarse, data.splits["val"].fine // 2)


def edited(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def repeated(path: Path, row: int) -> None:
    """Write a row once more at the end."""
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[row]]))


@pytest.mark.parametrize(
    ("dataset", "write", "breakage", "message"),
    [
        ("waterbirds", write_waterbirds, lambda r: (r / "metadata.csv").unlink(), "holds no metadata.csv"),
        (
            "waterbirds",
            write_waterbirds,
            lambda r: edited(r / "metadata.csv", "place,", "scene,"),
            r"metadata.csv must have a column place, it has img_id, img_filename, y, split, scene",
        ),
        (
            "waterbirds",
            write_waterbirds,
            lambda r: edited(r / "metadata.csv", "0001_1.jpg,1,", "0001_1.jpg,3,"),
            "metadata.csv, line 3, column y must be one of 0, 1, got '3'",
        ),
        (
            "waterbirds",
            write_waterbirds,
            lambda r: (r / "000.Some_bird" / "Some_Bird_0000_0.jpg").unlink(),
            "lacks 1 of the 24 images that its table names, first .*Some_Bird_0000_0.jpg",
        ),
        (
            "waterbirds",
            write_waterbirds,
            lambda r: edited(r / "metadata.csv", "/f/forest/00000.jpg", "a,b"),
            "line 2, must have 6 fields, got 7",
        ),
        (
            "waterbirds",
            write_waterbirds,
            lambda r: (r / "metadata.csv").write_text("img_filename,y,place,split\n"),
            "the table of waterbirds holds no image",
        ),
        (
            "celeba",
            write_celeba_txt,
            lambda r: edited(r / "list_attr_celeba.txt", "12\n", "13\n"),
            "must start with the number of its rows, 12, .* it starts with '13'",
        ),
        (
            "celeba",
            write_celeba_txt,
            lambda r: edited(r / "list_eval_partition.txt", "000003.jpg 0\n", ""),
            "has no split for 000003.jpg",
        ),
        (
            "isic",
            write_isic,
            lambda r: edited(r / "metadata.csv", "patch", "tape"),
            "must have a column patch or patches",
        ),
        (
            "isic",
            write_isic,
            lambda r: (r / "metadata.csv").write_bytes(b"\xff\xfe\x00"),
            "metadata.csv cannot be read",
        ),
        (
            "waterbirds",
            write_waterbirds,
            lambda r: repeated(r / "metadata.csv", 2),
            "metadata.csv, line 26, names the file of line 3 again: '",
        ),
        (
            "celeba",
            write_celeba_csv,
            lambda r: repeated(r / "list_attr_celeba.csv", 2),
            "list_attr_celeba.csv, line 14, names the file of line 3 again: '",
        ),
        (
            "isic",
            write_isic,
            lambda r: repeated(r / "metadata.csv", 2),
            "metadata.csv, line [0-9]+, names the image of line 3 again: '",
        ),
    ],
)
def test_broken_tables_are_named(tmp_path, dataset, write, breakage, message):
    write(tmp_path)
    breakage(tmp_path)
    with pytest.raises(ConfigError, match=message):
        read_group_table(dataset, tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            DataConfig("waterbirds"),
            r"data.root must be .* holds waterbirds, got None; pass --data.root FOLDER",
        ),
        (DataConfig("celeba", root="x"), "data.image_size must be given for celeba, got None"),
        (DataConfig("isic", root="x", image_size=8, download=True), "data.download must be false for isic"),
        (
            DataConfig("mnist5k", spurious_rate=0.5),
            "data.spurious_rate has no effect with data.dataset=mnist5k",
        ),
        (
            DataConfig("coloured_digits", spurious_rate=1.5),
            r"data.spurious_rate must lie in \[0, 1\], got 1.5",
        ),
        (
            DataConfig("coloured_digits", root="x"),
            "data.root has no effect with data.dataset=coloured_digits",
        ),
    ],
)
def test_impossible_configs_name_the_field(config, message):
    with pytest.raises(ConfigError, match=message):
        config.check()


def test_a_divided_table_refuses_a_test_fraction(tmp_path):
    write_waterbirds(tmp_path)
    config = DataConfig("waterbirds", root=str(tmp_path), image_size=8, batch_size=2, test_fraction=0.2)
    with pytest.raises(
        ConfigError, match=r"data\.test_fraction has no effect: the table of waterbirds has a split column"
    ):
        load_data(config)


# Colours


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.95, 1.0])
def test_attribute_equals_the_class_in_the_exact_share(rate):
    classes = torch.arange(403) % 3
    attribute = correlated_attribute(classes, 4, rate, seed=1)
    for label in range(3):
        mine = attribute[classes == label]
        assert (mine == label).sum() == round(rate * len(mine))
        others = torch.bincount(mine[mine != label], minlength=4)
        rest = others[torch.arange(4) != label]
        assert rest.max() - rest.min() <= 1
    again = correlated_attribute(classes, 4, rate, seed=1)
    assert torch.equal(again, attribute)
    if 0 < rate < 1:
        assert not torch.equal(correlated_attribute(classes, 4, rate, seed=2), attribute)


def test_colouring_keeps_the_shape_and_shows_the_attribute():
    images = torch.randint(256, (4, 1, 5, 5), dtype=torch.uint8)
    found = colourize(images, torch.tensor([0, 1, 0, 1]))
    assert found.shape == (4, 3, 5, 5)
    assert found.dtype == torch.uint8
    assert torch.equal(found[0, 0], images[0, 0])
    assert torch.equal(found[1, 1], images[1, 0])
    torch.testing.assert_close(found[1, 0].float(), 0.1 * images[1, 0].float(), atol=0.5001, rtol=0)
    with pytest.raises(
        ValueError, match=r"images must be uint8 of shape \[N, 1, H, W\], got torch.uint8 of shape"
    ):
        colourize(images.expand(-1, 3, -1, -1), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\], got 2"):
        correlated_attribute(torch.zeros(3, dtype=torch.int64), 2, 2.0, 0)
    with pytest.raises(ValueError, match=r"classes must lie in \[0, count\) with count >= 2, got count=1"):
        correlated_attribute(torch.zeros(3, dtype=torch.int64), 1, 0.5, 0)


def test_coloured_digits_are_the_digits_biased_in_training_only():
    plain = load_data(DataConfig("digits", test_fraction=0.2))
    data = load_data(DataConfig("coloured_digits", spurious_rate=0.9))
    for name, rate in (("train", 0.9), ("val", 0.5), ("test", 0.5)):
        split, grey = data.splits[name], plain.splits[name]
        # The images of the plain splits: the brightest channel is the grey value.
        assert torch.equal(split.images.amax(dim=1), grey.images[:, 0])
        assert torch.equal(split.coarse, grey.coarse)
        assert torch.equal(split.fine // 2, split.coarse)
        red = split.images[:, 0].flatten(1).sum(1) > split.images[:, 1].flatten(1).sum(1)
        assert torch.equal(split.fine % 2, (~red).long())
        for label in range(2):
            mine = split.coarse == label
            assert (split.fine[mine] % 2 == label).double().mean() == pytest.approx(
                rate, abs=1 / int(mine.sum())
            )
    assert data.fine_names == [
        "below five, red",
        "below five, green",
        "five and above, red",
        "five and above, green",
    ]
    assert data.channels == 3
    views, _ = next(iter(data.loader(data.batch_sampler(seed=0, steps=1))))
    assert views.shape[2:] == (3, 8, 8)


def test_the_rate_is_a_default_and_reaches_the_images():
    config = DataConfig("coloured_digits")
    config.resolve()
    assert config.spurious_rate == 0.95
    assert config.test_fraction == 0.2
    for rate in (None, 0.0, 1.0):
        train = load_data(DataConfig("coloured_digits", spurious_rate=rate)).splits["train"]
        agree = (train.fine % 2 == train.coarse).double().mean().item()
        assert agree == pytest.approx(0.95 if rate is None else rate, abs=0.002)
