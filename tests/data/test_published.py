"""Published data sets, read from small files in their published formats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.data_files import write_cifar, write_grey_image, write_tiny_imagenet
from helpers.transfer_data_files import CLASSES, WRITERS

from pysupcon.data import DataConfig, superclasses, torchvision_datasets
from pysupcon.data.datamodule import DataModule, load_data
from pysupcon.data.imagenet_classes import IMAGENET100, TINY_IMAGENET
from pysupcon.errors import ConfigError


def read(name: str, root: Path, **fields: object) -> DataModule:
    config = DataConfig(dataset=name, root=str(root), batch_size=4, **fields)  # type: ignore[arg-type]
    config.check()
    return load_data(config)


# --- CIFAR


def test_cifar2_is_cats_and_dogs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write_cifar(tmp_path, monkeypatch, 10)
    data = read("cifar2", tmp_path)
    assert data.fine_names == data.coarse_names == ["cat", "dog"]
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 270, "val": 30, "test": 60}
    test = data.splits["test"]
    assert test.fine.tolist() == test.coarse.tolist() == [0, 1] * 30
    theirs = torch.from_numpy(pixels).view(-1, 3, 32, 32)
    rows = [row for row in range(300) if row % 10 in (3, 5)]
    assert torch.equal(test.images, theirs[rows])  # type: ignore[arg-type]


def test_cifar100_u_is_unbalanced_in_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch, 100, count=2000, test_count=200)
    monkeypatch.setattr(torchvision_datasets, "CIFAR100_U_SIZES", (20, 9, 4, 2, 2))
    data, whole = read("cifar100_u", tmp_path), read("cifar100", tmp_path)
    train = data.splits["train"]
    counts = train.fine.bincount(minlength=100)
    for coarse in range(20):
        members = train.fine[train.coarse == coarse].unique()
        # 18 of 20: two of each class are in the validation split
        assert counts[members].tolist() == [18, 9, 4, 2, 2]
    for split in ("val", "test"):
        assert torch.equal(data.splits[split].images, whole.splits[split].images)  # type: ignore[arg-type]
    kept = {tuple(image.flatten().tolist()) for image in train.images}
    assert len(kept) == len(train) == 20 * 35  # without replacement
    assert kept < {tuple(image.flatten().tolist()) for image in whole.splits["train"].images}
    other = read("cifar100_u", tmp_path, split_seed=1).splits["train"]
    assert kept != {tuple(image.flatten().tolist()) for image in other.images}


def test_cifar100_u_keeps_the_published_numbers() -> None:
    names = sorted(name for members in superclasses.CIFAR100.values() for name in members)
    kept = torchvision_datasets._cifar100_u_sizes(names, superclasses.CIFAR100)
    assert sum(kept) == 20 * 950
    flowers = {name: kept[names.index(name)] for name in superclasses.CIFAR100["flowers"]}
    assert flowers == {"orchid": 500, "poppy": 250, "rose": 100, "sunflower": 50, "tulip": 50}


# --- ImageNet's subsets


def test_tables_of_imagenet() -> None:
    assert len(TINY_IMAGENET) == 52
    wnids = [wnid for members in TINY_IMAGENET.values() for wnid in members]
    assert len(wnids) == len(set(wnids)) == 200
    assert len(IMAGENET100) == len(set(IMAGENET100)) == 100
    assert sorted(IMAGENET100) == IMAGENET100
    timm_data = pytest.importorskip("timm.data")
    info = timm_data.ImageNetInfo()
    known = {info.index_to_label_name(index): info.index_to_description(index) for index in range(1000)}
    assert set(wnids) | set(IMAGENET100) <= set(known)
    assert [known[wnid].split(",")[0] for wnid in TINY_IMAGENET["musical instruments"]] == [
        "drumstick", "oboe", "organ",
    ]  # fmt: skip


def test_tiny_imagenet(tmp_path: Path) -> None:
    wnids = write_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    data = read("tiny_imagenet", tmp_path)
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 200, "val": 200, "test": 200}
    assert data.image_size == 64
    assert data.fine_names[:2] == ["word 0", "word 1"]
    assert data.coarse_names == list(TINY_IMAGENET)
    test = data.splits["test"]
    assert test.fine.tolist() == list(reversed(range(200)))
    for split in ("train", "test"):
        part = data.splits[split]
        for row in (0, 7, 199):
            fine = int(part.fine[row])
            assert wnids[fine] in TINY_IMAGENET[data.coarse_names[int(part.coarse[row])]]
            assert part.images[row].float().mean().round() == pytest.approx(fine, abs=1)
    views, labels = next(iter(data.loader(data.batch_sampler(seed=0, steps=1))))
    assert (views.shape, labels.shape) == ((4, 2, 3, 64, 64), (4,))


def test_damaged_tiny_imagenet(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"does not hold tiny_imagenet: looked for wnids.txt in .* correct d"
    ):
        read("tiny_imagenet", tmp_path)
    wnids = write_tiny_imagenet(tmp_path)
    table = tmp_path / "val" / "val_annotations.txt"
    text = table.read_text()
    table.write_text(text + "val_0.JPEG\tn00000000\t0\n")
    with pytest.raises(
        ConfigError, match=r"val_annotations.txt, line 201, must start .*'val_0.JPEG.tn00000000"
    ):
        read("tiny_imagenet", tmp_path)
    table.write_text(text + f"val_999.JPEG\t{wnids[0]}\t0\n")
    with pytest.raises(ConfigError, match=r"names 201 images, 1 of which are missing.*val_999.JPEG"):
        read("tiny_imagenet", tmp_path)
    table.unlink()
    with pytest.raises(ConfigError, match=r"val_annotations.txt cannot be read"):
        read("tiny_imagenet", tmp_path)
    (tmp_path / "wnids.txt").write_text("\n".join(wnids[1:]))
    with pytest.raises(ConfigError, match=r"must list the 200 classes of Tiny ImageNet, got 199, 1 of them"):
        read("tiny_imagenet", tmp_path)


def test_imagenet100(tmp_path: Path) -> None:
    for i, wnid in enumerate([*IMAGENET100, "n01440764"]):  # another class of ImageNet beside the hundred
        for k in range(2):
            write_grey_image(tmp_path / "train" / wnid / f"{k}.JPEG", i)
        write_grey_image(tmp_path / "val" / wnid / "0.JPEG", i)
    data = read("imagenet100", tmp_path, image_size=8)
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 100, "val": 100, "test": 100}
    assert data.fine_names == data.coarse_names == IMAGENET100
    test = data.splits["test"]
    assert test.fine.tolist() == test.coarse.tolist() == list(range(100))
    assert int(test.images[40].float().mean().round()) == 40
    (tmp_path / "val" / IMAGENET100[3] / "0.JPEG").unlink()
    with pytest.raises(ConfigError, match=rf"does not hold imagenet100: .*all 100 classes.*{IMAGENET100[3]}"):
        read("imagenet100", tmp_path, image_size=8)


# --- the six sets for transfer: twelve training images, six test images, three classes


@pytest.mark.parametrize("name", WRITERS)
def test_sets_for_transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    WRITERS[name](tmp_path, monkeypatch)
    data = read(name, tmp_path, image_size=8)
    assert {split: len(part) for split, part in data.splits.items()} == {"train": 9, "val": 3, "test": 6}
    for part in data.splits.values():
        assert part.fine.unique().tolist() == [0, 1, 2]
        for row in range(len(part)):  # the image is that of its label
            assert part.images[row].float().mean().round() == pytest.approx(50 * int(part.fine[row]), abs=1)
    if name == "flowers102":
        assert data.fine_names[0] == "pink primrose"
    else:
        assert [each.lower() for each in data.fine_names] == CLASSES
    test = data.splits["test"]
    if name == "aircraft":
        assert data.coarse_names == ["Maker A", "Maker B"]
        assert torch.equal(test.coarse, test.fine // 2)
    elif name == "pets":
        assert data.coarse_names == ["Cat", "Dog"]
        assert torch.equal(test.coarse, test.fine // 2)
    else:
        assert data.coarse_names == data.fine_names
        assert torch.equal(test.coarse, test.fine)

    image = test.images.paths[1]  # type: ignore[union-attr]
    image.unlink()
    with pytest.raises(ConfigError, match=rf"lacks 1 of the 6 images of {name}, first .*{image.name}"):
        read(name, tmp_path, image_size=8)


@pytest.mark.parametrize("name", WRITERS)
def test_missing_sets_for_transfer(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"data.root '.*' does not hold {name}: looked for .*; correct"
    ) as found:
        read(name, tmp_path, image_size=8)
    assert ("--data.download true" in str(found.value)) == (name != "cars")
    with pytest.raises(ConfigError, match=rf"data.image_size must be given for {name}"):
        read(name, tmp_path)


def test_what_cannot_be_fetched_is_not_fetched(tmp_path: Path) -> None:
    for name in ("cars", "tiny_imagenet", "imagenet100"):
        with pytest.raises(ConfigError, match=rf"data.download must be false for {name}, got True"):
            read(name, tmp_path, image_size=8, download=True)
    with pytest.raises(ConfigError, match=r"data.test_fraction has no effect with data.dataset=dtd"):
        read("dtd", tmp_path, image_size=8, test_fraction=0.2)
