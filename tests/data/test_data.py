"""Readers of files in their published formats, labels, splits and batches."""

from __future__ import annotations

import gzip
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.data_files import write_cifar, write_image_folder, write_mnist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision import datasets

from pysupcon.data import DataConfig, superclasses
from pysupcon.data.datamodule import DataModule, load_data
from pysupcon.data.samplers import BalancedBatchSampler, Draw, PerClassBatchSampler, ShuffledBatchSampler
from pysupcon.data.splits import cap_per_class, stratified_split, stratified_subset
from pysupcon.errors import ConfigError


@pytest.fixture(scope="module")
def digits() -> DataModule:
    return load_data(DataConfig(dataset="digits", batch_size=64))


# --- readers


@pytest.mark.parametrize(
    ("name", "inside", "compress"),
    [
        ("mnist", "MNIST/raw", False),  # torchvision's layout
        ("mnist", ".", True),
        ("fashion_mnist", "FashionMNIST/raw", False),
        ("fashion_mnist", ".", True),  # the layout of Linux distributions
    ],
)
def test_idx_files(tmp_path: Path, name: str, inside: str, compress: bool) -> None:
    images = write_mnist(tmp_path / inside, compress=compress)
    data = load_data(DataConfig(dataset=name, root=str(tmp_path), batch_size=16))  # type: ignore[arg-type]
    test = data.splits["test"]
    assert isinstance(test.images, Tensor)
    assert torch.equal(test.images[:, 0], torch.from_numpy(images).to(torch.uint8))
    assert test.fine.tolist() == [i % 10 for i in range(200)]
    assert {split: len(samples) for split, samples in data.splits.items()} == {
        "train": 180,
        "val": 20,
        "test": 200,
    }
    names = [data.coarse_names[int(i)] for i in test.coarse[:10]]
    if name == "mnist":
        assert names == ["below five"] * 5 + ["five and above"] * 5
    else:
        assert [i for i in range(10) if names[i] == "shoes and bags"] == [5, 7, 8, 9]


def test_torchvision_reads_the_same_files(tmp_path: Path) -> None:
    write_mnist(tmp_path / "MNIST/raw", compress=False)
    theirs = datasets.MNIST(str(tmp_path), train=False)
    ours = load_data(DataConfig(dataset="mnist", root=str(tmp_path), batch_size=16)).splits["test"]
    assert isinstance(ours.images, Tensor)
    assert torch.equal(ours.images[:, 0], theirs.data)
    assert torch.equal(ours.fine, theirs.targets)


def test_damaged_idx_files(tmp_path: Path) -> None:
    config = DataConfig(dataset="mnist", root=str(tmp_path), batch_size=16)
    write_mnist(tmp_path, compress=False)
    file = tmp_path / "train-images-idx3-ubyte"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(
        ConfigError, match=r"train-images-idx3-ubyte is damaged: its header gives the shape \[200, 28, 28\]"
    ):
        load_data(config)
    file.write_bytes(b"\x00" * 16 + whole[16:])
    with pytest.raises(ConfigError, match="is not an idx file of bytes with 3 dimension"):
        load_data(config)
    file.unlink()
    file.with_name(file.name + ".gz").write_bytes(gzip.compress(whole)[:-100])
    with pytest.raises(ConfigError, match=r"train-images-idx3-ubyte.gz cannot be read"):
        load_data(config)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_missing_root(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"data.root '.*nowhere' does not hold {name}.*--data.download true"
    ):
        load_data(DataConfig(dataset=name, root=str(tmp_path / "nowhere")))  # type: ignore[arg-type]


def test_missing_image_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.root .* is not an image folder"):
        load_data(DataConfig(dataset="image_folder", root=str(tmp_path), image_size=8, labels="fine"))


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int) -> None:
    pixels = write_cifar(tmp_path, monkeypatch, classes)
    name = f"cifar{classes}"
    data = load_data(DataConfig(dataset=name, root=str(tmp_path), batch_size=16))  # type: ignore[arg-type]
    test = data.splits["test"]
    assert isinstance(test.images, Tensor)
    assert torch.equal(test.images.flatten(1), torch.from_numpy(pixels))
    table = getattr(superclasses, name.upper())
    for i in range(classes):
        assert data.fine_names[int(test.fine[i])] in table[data.coarse_names[int(test.coarse[i])]]

    kind = datasets.CIFAR10 if classes == 10 else datasets.CIFAR100
    (tmp_path / kind.base_folder / kind.test_list[0][0]).write_bytes(b"cut")
    with pytest.raises(ConfigError, match=rf"data.root .* does not hold {name}"):
        load_data(data.config)


def test_image_folder(tmp_path: Path) -> None:
    write_image_folder(tmp_path, ["cat", "dog", "car"], 10)
    config = DataConfig(
        dataset="image_folder", root=str(tmp_path), image_size=8, batch_size=6,
        coarse_map={"cat": "animal", "dog": "animal", "car": "vehicle"},
    )  # fmt: skip
    config.check()
    data = load_data(config)
    assert {name: len(samples) for name, samples in data.splits.items()} == {"train": 21, "val": 3, "test": 6}
    assert (data.fine_names, data.coarse_names) == (["car", "cat", "dog"], ["vehicle", "animal"])
    image, coarse, fine = data.evaluation_dataset("test")[0]
    assert (image.shape, coarse, fine) == ((3, 8, 8), 0, 0)
    views, labels = next(iter(data.loader(data.batch_sampler(seed=0, steps=1))))
    assert (views.shape, labels.shape) == ((6, 2, 3, 8, 8), (6,))
    dataset = data.loader(data.batch_sampler(seed=0, steps=1)).dataset
    draws = [(3, 0), (3, 1), (8, 2), (15, 3), (3, 0)]  # files of four sizes
    together = dataset.__getitems__(draws)[0]  # type: ignore[attr-defined]
    assert all(torch.equal(dataset[draw][0], view) for draw, view in zip(draws, together, strict=True))

    config.coarse_map = {"cat": "animal", "bird": "animal"}
    with pytest.raises(ConfigError, match=r"data.coarse_map .* missing \['car', 'dog'\], unknown \['bird'\]"):
        load_data(config)


def test_image_folder_with_its_own_test_split(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "train", ["a", "b"], 10)
    write_image_folder(tmp_path / "test", ["a", "b"], 3)
    config = DataConfig(dataset="image_folder", root=str(tmp_path), image_size=8, batch_size=6, labels="fine")
    assert {name: len(samples) for name, samples in load_data(config).splits.items()} == {
        "train": 18, "val": 2, "test": 6,
    }  # fmt: skip
    config.test_fraction = 0.2
    with pytest.raises(ConfigError, match=r"data.test_fraction has no effect"):
        load_data(config)


# --- labels and splits


def test_coarse_labels() -> None:
    assert [len(members) for members in superclasses.CIFAR100.values()] == [5] * 20
    assert len(set(chain(*superclasses.CIFAR100.values()))) == 100
    assert set(chain(*superclasses.CIFAR10.values())) == {
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    }  # fmt: skip
    fine = torch.arange(10)
    assert (
        superclasses.coarse_labels_of(fine, [str(i) for i in range(10)], superclasses.DIGITS).tolist()
        == [0] * 5 + [1] * 5
    )


def test_splits_are_disjoint_stratified_and_reproducible(digits: DataModule) -> None:
    again = load_data(DataConfig(dataset="digits", batch_size=64))
    other = load_data(DataConfig(dataset="digits", batch_size=64, split_seed=1))
    assert sum(len(samples) for samples in digits.splits.values()) == 1797
    seen = [tuple(image.flatten().tolist()) for samples in digits.splits.values() for image in samples.images]
    assert len(set(seen)) == len(seen)
    for name, samples in digits.splits.items():
        assert torch.equal(samples.images, again.splits[name].images)  # type: ignore[arg-type]
        shares = samples.fine.bincount() / len(samples)
        assert shares.min() > 0.085
        assert shares.max() < 0.115
    assert not torch.equal(digits.splits["test"].images, other.splits["test"].images)  # type: ignore[arg-type]


@given(
    counts=st.lists(st.integers(2, 30), min_size=1, max_size=8),
    fraction=st.floats(0.01, 0.49),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=50, deadline=None)
def test_stratified_split(counts: list[int], fraction: float, seed: int) -> None:
    labels = torch.tensor([label for label, count in enumerate(counts) for _ in range(count)])
    first, second = stratified_split(labels, fraction, seed)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(len(labels)))
    for label, count in enumerate(counts):
        taken = int((labels[second] == label).sum())
        assert 1 <= taken <= count - 1
        assert abs(taken - fraction * count) <= 1


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=100, deadline=None)
def test_stratified_subset(counts: list[int], share: float, seed: int) -> None:
    labels = torch.tensor([label for label, count in enumerate(counts) for _ in range(count)])
    count = len(counts) + round(share * (len(labels) - len(counts)))
    kept = stratified_subset(labels, count, seed)
    assert len(kept) == count
    assert (kept.diff() > 0).all()
    assert torch.equal(kept, stratified_subset(labels, count, seed))
    for label, number in enumerate(counts):
        taken = int((labels[kept] == label).sum())
        assert 1 <= taken <= number
        if min(counts) * count >= len(labels):  # no class is too small for its share
            assert abs(taken - count * number / len(labels)) < 1
    for wrong in (len(counts) - 1, len(labels) + 1):
        with pytest.raises(ValueError, match=rf"count must be in .*, got {wrong}"):
            stratified_subset(labels, wrong, seed)


def test_cap_per_class() -> None:
    labels = torch.tensor([0, 1, 1, 0, 2, 1, 1, 2])
    kept = cap_per_class(labels, {0: 5, 1: 2, 2: 1}, 3)
    assert labels[kept].bincount().tolist() == [2, 2, 1]
    fewer = cap_per_class(labels, {0: 1, 1: 1, 2: 0}, 3)
    assert set(fewer.tolist()) < set(kept.tolist())
    drawn = {tuple(cap_per_class(labels, {0: 2, 1: 2, 2: 2}, seed).tolist()) for seed in range(40)}
    assert len(drawn) == 6  # every pair of the four samples of class 1


def test_rare_fine_classes_lose_training_images_only(digits: DataModule) -> None:
    config = DataConfig(dataset="digits", batch_size=64, train_fractions={"3": 0.1, "8": 0.001})
    config.check()
    rare = load_data(config)
    for split in ("val", "test"):
        assert torch.equal(rare.splits[split].images, digits.splits[split].images)  # type: ignore[arg-type]
    before, after = digits.splits["train"].fine.bincount(), rare.splits["train"].fine.bincount()
    expected = before.clone()
    expected[3], expected[8] = round(0.1 * int(before[3])), 1
    assert torch.equal(after, expected)
    assert torch.equal(load_data(config).splits["train"].images, rare.splits["train"].images)  # type: ignore[arg-type]
    config.split_seed = 0
    config.train_size = 300
    assert len(load_data(config).splits["train"].fine) == 300
    config.train_fractions = {"ten": 0.5}
    message = r"data.train_fractions must name fine classes .* got 'ten' \(there are 10, for instance 0, 1, "
    with pytest.raises(ConfigError, match=message):
        load_data(config)
    config.train_fractions = {"3": 0.0}
    with pytest.raises(ConfigError, match=r"data.train_fractions of '3' must lie in \(0, 1\], got 0.0"):
        config.check()
    config.train_fractions = yaml.safe_load("{3: 0.1, 8: 0.001}")  # names that YAML reads as numbers
    config.train_size = None
    config.resolve()
    assert torch.equal(load_data(config).splits["train"].fine, rare.splits["train"].fine)
    both = DataConfig(dataset="digits", batch_size=64, train_fractions={"3": 0.1}, train_on_val=True)
    with pytest.raises(ConfigError, match=r"data.train_fractions must be left out for data.train_on_val"):
        both.check()


def test_a_small_training_split_leaves_the_others_alone(digits: DataModule) -> None:
    config = DataConfig(dataset="digits", batch_size=64, train_size=200)
    config.check()
    small = load_data(config)
    for split in ("val", "test"):
        assert torch.equal(small.splits[split].images, digits.splits[split].images)  # type: ignore[arg-type]
    counts = small.splits["train"].fine.bincount()
    assert counts.sum() == 200
    assert counts.min() >= 19
    images = {tuple(image.flatten().tolist()) for image in digits.splits["train"].images}
    assert all(tuple(image.flatten().tolist()) in images for image in small.splits["train"].images)
    again, other = (
        load_data(DataConfig(dataset="digits", batch_size=64, train_size=200, split_seed=seed))
        for seed in (0, 1)
    )
    assert torch.equal(again.splits["train"].images, small.splits["train"].images)  # type: ignore[arg-type]
    assert not torch.equal(other.splits["train"].images, small.splits["train"].images)  # type: ignore[arg-type]
    config.train_size = 5
    with pytest.raises(
        ConfigError, match=r"data.train_size must lie between the 10 .* and the 1295 .*, got 5"
    ):
        load_data(config)
    config.train_size = 0
    with pytest.raises(ConfigError, match=r"data.train_size must be at least 2, got 0"):
        config.check()


def test_evaluation_dataset(digits: DataModule) -> None:
    train = digits.evaluation_dataset("train")
    images = torch.stack([train[i][0] for i in range(len(train))])
    assert images.shape == (1295, 1, 8, 8)
    assert images.dtype == torch.float32
    assert abs(float(images.mean())) < 0.05
    assert abs(float(images.std()) - 1) < 0.05
    assert [train[i][2] for i in range(50)] == train.fine[:50].tolist()
    assert [train[i][1] for i in range(50)] == (train.fine[:50] >= 5).long().tolist()


# --- batches


def samples_of(batches: list[list[Draw]]) -> list[list[int]]:
    return [[sample for sample, _ in batch] for batch in batches]


def test_shuffled_batches_cover_an_epoch() -> None:
    labels = torch.zeros(50, dtype=torch.int64)
    first, second = (list(ShuffledBatchSampler(labels, 10, seed=seed, steps=10)) for seed in (0, 1))
    for epoch in (first[:5], first[5:]):
        assert sorted(chain(*samples_of(epoch))) == list(range(50))
    assert samples_of(first[:5]) != samples_of(first[5:])
    assert samples_of(first) != samples_of(second)
    assert [number for batch in first for _, number in batch] == list(range(100))


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    size=st.integers(2, 24),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_balanced_batches(counts: list[int], size: int, seed: int) -> None:
    labels = torch.tensor([label for label, count in enumerate(counts) for _ in range(count)])
    if size > len(labels):
        return
    classes = len(counts)
    waits = -(-classes // size)  # batches until every class has occurred
    batches = samples_of(list(BalancedBatchSampler(labels, size, seed=seed, steps=3 * waits)))
    for batch in batches:
        assert len(batch) == size
        drawn = Counter(int(labels[sample]) for sample in batch)
        numbers = [drawn[label] for label in range(classes)]
        assert max(numbers) - min(numbers) <= 1
        for label, count in enumerate(counts):
            repeats = drawn[label] - len({s for s in batch if labels[s] == label})
            assert repeats == max(drawn[label] - count, 0)
    for start in range(len(batches) - waits + 1):
        window = {int(labels[sample]) for sample in chain(*batches[start : start + waits])}
        assert window == set(range(classes))


@pytest.mark.parametrize("kind", [ShuffledBatchSampler, BalancedBatchSampler])
def test_two_processes_divide_one_global_batch(kind: type[ShuffledBatchSampler]) -> None:
    labels = torch.arange(60) % 4
    whole = list(kind(labels, 12, seed=5, steps=9))
    ranks = [list(kind(labels, 12, seed=5, steps=9, rank=rank, world_size=2)) for rank in (0, 1)]
    for batch, mine, theirs in zip(whole, *ranks, strict=True):
        assert len(mine) == len(theirs) == 6
        assert sorted(mine + theirs) == sorted(batch)
        if kind is BalancedBatchSampler:
            numbers = Counter(int(labels[sample]) for sample, _ in mine)
            assert max(numbers.values()) - min(numbers.values()) <= 1


@pytest.mark.parametrize("kind", [ShuffledBatchSampler, BalancedBatchSampler])
@pytest.mark.parametrize("start", [1, 4, 5, 7])
def test_a_later_start_draws_the_same_batches(kind: type[ShuffledBatchSampler], start: int) -> None:
    labels = torch.arange(50) % 3
    whole = list(kind(labels, 10, seed=2, steps=12))
    later = kind(labels, 10, seed=2, steps=12, start=start)
    assert list(later) == whole[start:]
    assert len(later) == 12 - start


def test_balanced_batches_draw_every_sample_in_time() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    drawn = set(chain(*samples_of(list(BalancedBatchSampler(labels, 20, seed=0, steps=50)))))
    assert drawn == set(range(100))


def test_impossible_batches() -> None:
    labels = torch.zeros(10, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"data.batch_size must be at most the 10 training samples, got 11"):
        ShuffledBatchSampler(labels, 11, seed=0, steps=1)
    with pytest.raises(ConfigError, match=r"data.batch_size must be a multiple of the 3 processes, got 10"):
        ShuffledBatchSampler(labels, 10, seed=0, steps=1, world_size=3)


@pytest.mark.parametrize(
    ("train", "validation"),
    [("train", "val"), ("train", "validation"), ("training", "valid"), ("Train", "Val")],
)
def test_train_and_val_folders(tmp_path: Path, train: str, validation: str) -> None:
    """ImageNet's and timm's layout: val is the test split. With test, it is the validation split."""
    for split, count in ((train, 10), (validation, 3)):
        write_image_folder(tmp_path / split, ["a", "b"], count)
    config = DataConfig(dataset="image_folder", root=str(tmp_path), image_size=8, batch_size=6)
    data = load_data(config)
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 18, "val": 2, "test": 6}
    write_image_folder(tmp_path / "test", ["a", "b"], 4)
    data = load_data(config)
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 20, "val": 6, "test": 8}
    assert data.class_names == ["a", "b"]


def test_names_of_splits_are_no_classes(tmp_path: Path) -> None:
    write_image_folder(tmp_path, ["train", "val", "cat"], 4)
    config = DataConfig(dataset="image_folder", root=str(tmp_path), image_size=8, batch_size=6)
    with pytest.raises(ConfigError, match="has folders called train, val, which are names of splits"):
        load_data(config)
    write_image_folder(tmp_path / "b" / "train", ["x", "y"], 4)
    write_image_folder(tmp_path / "b" / "val", ["x"], 4)
    write_image_folder(tmp_path / "c", ["train"], 4)
    with pytest.raises(ConfigError, match="has folders called train, which are names of splits"):
        load_data(replace(config, root=str(tmp_path / "c")))
    with pytest.raises(ConfigError, match=r"val has the classes \['x'\], train has \['x', 'y'\]"):
        load_data(replace(config, root=str(tmp_path / "b")))


def test_hidden_folders_and_files_are_left_out(tmp_path: Path) -> None:
    write_image_folder(tmp_path, ["cat", "dog", ".ipynb_checkpoints", "__MACOSX", "lost+found"], 10)
    (tmp_path / "cat" / "._0.png").write_bytes(b"no image")
    data = load_data(DataConfig(dataset="image_folder", root=str(tmp_path), image_size=8, batch_size=6))
    assert data.coarse_names == data.fine_names == ["cat", "dog"]
    assert sum(map(len, data.splits.values())) == 20


def test_nested_class_folders(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "animal", ["cat", "dog"], 10)
    write_image_folder(tmp_path / "vehicle", ["car"], 10)
    data = load_data(DataConfig(dataset="image_folder", root=str(tmp_path), image_size=8, batch_size=6))
    assert data.coarse_names == ["animal", "vehicle"]
    assert data.fine_names == ["animal/cat", "animal/dog", "vehicle/car"]
    assert torch.equal(data.splits["train"].coarse, (data.splits["train"].fine == 2).long())


def test_labels_of_samplers_may_be_lists_and_arrays() -> None:
    labels = torch.arange(40) % 5
    samplers = {
        ShuffledBatchSampler: {},
        BalancedBatchSampler: {},
        PerClassBatchSampler: {"samples_per_class": 2},
    }
    for sampler, options in samplers.items():
        expected = list(sampler(labels, 10, seed=0, steps=3, **options))
        for form in (labels.tolist(), labels.numpy()):
            assert list(sampler(form, 10, seed=0, steps=3, **options)) == expected
    for kind in (np.uint16, np.int8, bool):
        expected = list(BalancedBatchSampler((labels > 2).int(), 10, seed=0, steps=3))
        form = (labels > 2).numpy().astype(kind)
        assert list(BalancedBatchSampler(form, 10, seed=0, steps=3)) == expected


@pytest.mark.parametrize("kind", [ShuffledBatchSampler, BalancedBatchSampler, PerClassBatchSampler])
@pytest.mark.parametrize(
    ("labels", "got"),
    [
        (["a", "b"] * 20, r"list of 40, the first one 'a'"),
        (np.array(["a", "b"] * 20), r"ndarray of <U1 of shape \[40\]"),
        ([0.0, 1.0] * 20, r"list of 40, the first one 0.0"),
        (torch.arange(40) / 2, r"Tensor of float32 of shape \[40\]"),
        (torch.tensor([0.0, float("nan")] * 20), r"Tensor of float32 of shape \[40\] with 20 NaN"),
        (np.array([0.0, np.nan] * 20), r"ndarray of float64 of shape \[40\] with 20 NaN"),
        ([0, float("nan")] * 20, r"list of 40, the first one 0 with 20 NaN"),
        (torch.zeros(40, 2, dtype=torch.int64), r"Tensor of int64 of shape \[40, 2\]"),
        ([[0], [1]] * 20, r"list of 40, the first one \[0\]"),
        ([0, "a"] * 20, r"list of 40, the first one 0"),
        ([0, None] * 20, r"list of 40, the first one 0"),
        (torch.tensor(3), r"Tensor of int64 of shape \[\]"),
        (None, "NoneType"),
        (torch.zeros(40, dtype=torch.complex64), r"Tensor of complex64 of shape \[40\]"),
    ],
)
def test_labels_that_are_no_integers(kind: Any, labels: Any, got: str) -> None:
    options = {"samples_per_class": 2} if kind is PerClassBatchSampler else {}
    with pytest.raises(TypeError, match=rf"^labels must be integers \[N\], one per sample, got {got}$"):
        kind(labels, 10, seed=0, steps=3, **options)


@pytest.mark.parametrize("dataset", ["digits", "coloured_digits"])
def test_the_validation_images_are_trained_on_upon_request(dataset: str) -> None:
    plain, all_of_them = (
        load_data(DataConfig(dataset=dataset, train_on_val=given)).splits for given in (False, True)
    )
    for name in ("val", "test"):
        assert torch.equal(plain[name].images, all_of_them[name].images)
    for field in ("images", "coarse", "fine"):
        parts = [getattr(plain[name], field) for name in ("train", "val")]
        assert torch.equal(torch.cat(parts), getattr(all_of_them["train"], field))
