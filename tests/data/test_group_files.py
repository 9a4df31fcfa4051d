"""Groups of the samples: true groups, batches of them, and groups files."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.group_training import coarse_labels, coloured_digits, write_groups_file  # noqa: F401
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pysupcon.data.datamodule import DataModule
from pysupcon.data.group_files import (
    Groups,
    fingerprint,
    index_groups,
    read_groups,
    true_groups,
    write_groups,
)
from pysupcon.data.samples import FileImages, Samples
from pysupcon.errors import ConfigError


def test_true_groups_are_pairs_numbered_over_all_splits() -> None:
    labels = {"train": torch.tensor([1, 0, 1]), "val": torch.tensor([0, 0]), "test": torch.tensor([1])}
    fine = {"train": torch.tensor([7, 2, 9]), "val": torch.tensor([2, 4]), "test": torch.tensor([7])}
    numbers = index_groups(labels, fine)
    assert {name: found.tolist() for name, found in numbers.items()} == {
        "train": [2, 0, 3], "val": [0, 1], "test": [2]
    }  # fmt: skip
    groups = true_groups(labels, numbers)
    assert (groups.train.tolist(), groups.val.tolist(), groups.parent.tolist()) == (
        [1, 0, 2],
        [0, -1],
        [0, 1, 1],
    )
    assert groups.counts.tolist() == [1, 1, 1]


def test_batches_hold_the_groups_equally_often_and_tell_them() -> None:
    data = coloured_digits(sampler="groups", groups="annotated", batch_size=40, views=1, augmentation="none")
    groups = data.groups
    assert groups is not None
    assert torch.equal(groups.train, data.splits["train"].fine)
    assert groups.counts.max() > 15 * groups.counts.min(), "the groups were to differ in size"
    batches = data.batch_sampler(seed=0, steps=6)
    for drawn, (views, labels, found) in zip(
        batches, data.loader(data.batch_sampler(seed=0, steps=6)), strict=True
    ):
        samples = torch.tensor([sample for sample, _ in drawn])
        assert torch.equal(found, groups.train[samples])
        assert torch.equal(labels, data.splits["train"].coarse[samples])
        assert len(views) == 40
        assert torch.bincount(found).tolist() == [10] * 4
    dataset = data.loader(batches).dataset
    assert int(dataset[5, 3][2]) == groups.train[5]
    assert len(dataset) == len(groups.train)
    assert len(next(iter(data.loader(data.validation_batch_sampler(seed=0), split="val")))) == 2


def test_a_groups_file_gives_back_what_was_written(groups_file: tuple[Path, DataModule]) -> None:
    path, data = groups_file
    found = coloured_digits(groups=str(path)).groups
    assert found is not None
    assert torch.bincount(found.train).sum() == len(data.splits["train"])
    assert torch.equal(found.train // 2, data.splits["train"].coarse)
    assert torch.equal(found.val, 2 * data.splits["val"].coarse)
    assert found.parent.tolist() == [0, 0, 1, 1]
    assert found.made_from == {"data": {"dataset": "coloured_digits"}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"split_seed": 1},
            "belongs to other train samples than this config's: it was made from data.dataset=",
        ),
        ({"spurious_rate": 0.9}, "belongs to other train samples than this config's"),
        (
            {"val_fraction": 0.2},
            r"holds groups of \d+ train samples, the train split has \d+: it was made from",
        ),
        ({"labels": "fine"}, "belongs to other train samples"),
    ],
)
def test_a_groups_file_of_other_samples_is_refused(
    groups_file: tuple[Path, DataModule], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _ = coloured_digits(groups=str(groups_file[0]), **fields).groups


def test_a_broken_groups_file_is_refused(groups_file: tuple[Path, DataModule], tmp_path: Path) -> None:
    path, data = groups_file
    labels = coarse_labels(data)

    def reading(other: Path) -> Any:
        return lambda: read_groups(other, data.splits, labels)

    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-9])
    foreign = tmp_path / "foreign.safetensors"
    save_file({"train": torch.zeros(3)}, foreign)
    old = tmp_path / "old.safetensors"
    save_file(load_file(path), old, {"format": "0"})
    gap = tmp_path / "gap.safetensors"
    groups = read_groups(path, data.splits, labels)
    write_groups(gap, replace(groups, train=groups.train.clamp(min=1)), data.splits, labels)
    for read, message in (
        (
            reading(tmp_path / "none"),
            "must be annotated or a file that `python -m pysupcon infer-groups` wrote",
        ),
        (reading(cut), "cut.safetensors is damaged or not a groups file"),
        (reading(foreign), "has the format None, this version reads 1"),
        (reading(old), "has the format 0, this version reads 1"),
        (reading(gap), r"must number the 4 groups of the training samples without gaps, got \[1, 2, 3\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            read()


def test_a_malformed_groups_file_is_refused(groups_file: tuple[Path, DataModule], tmp_path: Path) -> None:
    """One line that names the file, for files that are valid safetensors with the right fingerprints."""
    path, data = groups_file
    labels, tensors = coarse_labels(data), load_file(path)
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    bad = tmp_path / "bad.safetensors"
    changed: dict[str, Any]
    train, val = tensors["train"], tensors["val"]
    one_wrong = train.clone()
    one_wrong[0] = 3 - one_wrong[0]
    for changed, message in (
        ({"train": one_wrong}, "does not match its checksum"),
        ({"train": train.float()}, "train must be .N. int64, got .* torch.float32"),
        ({"train": train[:, None]}, "train must be .N. int64"),
        ({"val": torch.tensor(1)}, "val must be .N. int64"),
        ({"parent": tensors["parent"][:0]}, "parent must be .N. int64"),
        ({"made_from": "[" * 100_000}, "nested too deeply"),
        ({"made_from": "[]"}, "made_from must hold a mapping"),
        ({"made_from": '{"data": 3}'}, "made_from must hold a mapping"),
        ({"made_from": None}, "KeyError"),
    ):
        made_from = {"made_from": changed.pop("made_from", metadata["made_from"])}
        strings = {name: text for name, text in {**metadata, **made_from}.items() if text is not None}
        save_file({**tensors, **changed}, bad, strings)
        with pytest.raises(ConfigError, match=f"^data.groups {bad} is damaged.*{message}") as told:
            read_groups(bad, data.splits, labels)
        assert "\n" not in str(told.value)
    for changed, message in (  # with a right checksum
        ({"val": val - 2}, r"must give each val sample one of the 4 groups or -1, got \[-2, 0\]"),
        ({"val": val + 2**62}, "must give each val sample one of the 4 groups"),
        ({"train": train + 2**62}, "must number the 4 groups"),
        ({"parent": tensors["parent"] + 7}, r"must give each group one of the 2 classes, got \[7, 8\]"),
        ({"parent": tensors["parent"] - 1}, "must give each group one of the 2 classes"),
    ):
        write_groups(bad, Groups(**{**tensors, **changed}, made_from={}), data.splits, labels)
        with pytest.raises(ConfigError, match=f"^data.groups {bad} {message}"):
            read_groups(bad, data.splits, labels)
    with pytest.raises(ConfigError, match="there is no file"):
        read_groups(tmp_path / ("x" * 256), data.splits, labels)


def test_a_groups_file_without_checksum_is_read(groups_file: tuple[Path, DataModule], tmp_path: Path) -> None:
    """As earlier versions wrote it."""
    path, data = groups_file
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    del metadata["sha256"]
    save_file(load_file(path), tmp_path / "old.safetensors", metadata)
    found = read_groups(tmp_path / "old.safetensors", data.splits, coarse_labels(data))
    assert torch.equal(found.train, load_file(path)["train"])


def test_a_groups_file_is_replaced_as_a_whole(
    groups_file: tuple[Path, DataModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full: the file stays as it was."""
    path, data = groups_file
    kept = tmp_path / "groups.safetensors"
    kept.write_bytes(path.read_bytes())
    groups = read_groups(path, data.splits, coarse_labels(data))

    def write_half(file: Path, content: bytes) -> int:
        with file.open("wb") as opened:
            opened.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match="No space left"):
        write_groups(kept, groups, data.splits, coarse_labels(data))
    assert kept.read_bytes() == path.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["groups.safetensors"]


def test_the_fingerprint_is_of_images_and_classes_or_of_the_ends_of_paths() -> None:
    data = coloured_digits()
    samples, labels = data.splits["val"], data.splits["val"].coarse
    assert fingerprint(samples, labels) == fingerprint(coloured_digits().splits["val"], labels)
    assert fingerprint(samples, 1 - labels) != fingerprint(samples, labels)
    other = replace(samples, images=samples.images.flip(0))  # type: ignore[union-attr]
    assert fingerprint(other, labels) != fingerprint(samples, labels)

    def files(root: str, *names: str) -> Samples:
        return Samples(FileImages([Path(root) / name for name in names]), labels[:2], labels[:2])

    here = fingerprint(files("/a", "x/1.png", "x/2.png"), labels[:2])
    assert fingerprint(files("/b/c", "x/1.png", "x/2.png"), labels[:2]) == here
    assert fingerprint(files("/a", "x/1.png", "x/3.png"), labels[:2]) != here
