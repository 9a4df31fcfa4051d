"""PerClassBatches: partners, small classes, epochs, processes; the trainer's sampler of that form."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from pysupcon.data import DataConfig, PerClassBatches
from pysupcon.data.datamodule import load_data
from pysupcon.data.samplers import PerClassBatchSampler
from pysupcon.errors import ConfigError


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    samples_per_class=st.integers(2, 5),
    processes=st.integers(1, 3),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_every_sample_has_a_partner(
    counts: list[int], samples_per_class: int, processes: int, data: st.DataObject
) -> None:
    labels = [name for name, count in zip("abcdefg", counts, strict=False) for _ in range(count)]
    classes = data.draw(st.integers(1, len(counts)))
    sizes = Counter(labels)
    samplers = [
        PerClassBatches(
            labels, classes, samples_per_class, batches=12, num_processes=processes, process_index=index
        )
        for index in range(processes)
    ]
    per_process = [list(sampler) for sampler in samplers]
    assert {len(batches) for batches in per_process} == {len(samplers[0])} == {12 // processes}
    for batch in chain(*per_process):
        drawn = Counter(labels[sample] for sample in batch)
        assert set(drawn.values()) == {samples_per_class}
        assert len(drawn) == classes
        assert [labels[sample] for sample in batch[::samples_per_class]] == list(drawn)  # neighbours
        for label in drawn:
            own = Counter(sample for sample in batch if labels[sample] == label)
            assert len(own) == min(sizes[label], samples_per_class)
            assert max(own.values()) - min(own.values()) <= 1


def test_classes_and_samples_are_drawn_without_replacement() -> None:
    """7 classes of 6 samples; 4 classes of 4 samples a batch: neither number divides the other."""
    labels = torch.arange(42) % 7
    drawn = list(chain(*PerClassBatches(labels, 4, 4, batches=7 * 3)))
    assert len(drawn) == 7 * 3 * 16
    assert set(Counter((torch.tensor(drawn) % 7).tolist()).values()) == {48}  # 12 batches each
    assert set(Counter(drawn).values()) == {8}  # 48 / 6
    classes = [drawn[k] % 7 for k in range(0, len(drawn), 4)]
    for first in range(0, len(classes), 7):
        assert set(classes[first : first + 7]) == set(range(7))


@pytest.mark.parametrize(
    "labels",
    [
        [3, 1, 3, 1, 2, 2] * 4,
        ["c", "a", "c", "a", "b", "b"] * 4,
        np.array([3, 1, 3, 1, 2, 2] * 4, dtype=np.uint8),
        np.array(["c", "a", "c", "a", "b", "b"] * 4),
        torch.tensor([3, 1, 3, 1, 2, 2] * 4),
        torch.tensor([3.0, 1, 3.0, 1, 2, 2] * 4),
        [torch.tensor(k) for k in [3, 1, 3, 1, 2, 2]] * 4,
        list(np.array([3, 1, 3, 1, 2, 2] * 4)),
    ],
    ids=["list", "strings", "array", "array of strings", "tensor", "floats", "tensors", "numpy scalars"],
)
def test_kinds_of_labels_give_the_same_batches(labels: Any) -> None:
    assert list(PerClassBatches(labels, 2, 3)) == list(PerClassBatches([0, 1, 0, 1, 2, 2] * 4, 2, 3))


def test_epochs_and_seeds() -> None:
    labels = torch.arange(60) % 6
    batches = PerClassBatches(labels, 3, 4)
    assert len(batches) == 5
    epochs = [list(batches) for _ in range(3)]
    assert batches.epoch == 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    again = PerClassBatches(labels, 3, 4)
    again.set_epoch(2)
    assert list(again) == epochs[2]
    again.set_epoch(1, start=3)  # resumed within an epoch
    assert list(again) == epochs[1][3:]
    assert list(again) == epochs[2]
    assert list(PerClassBatches(labels, 3, 4, seed=1)) != epochs[0]
    assert len(PerClassBatches(labels[:2], 1, 2)) == 1


def test_processes_divide_the_batches() -> None:
    labels = torch.arange(60) % 6
    whole = list(PerClassBatches(labels, 3, 4, batches=6))
    parts = [
        PerClassBatches(labels, 3, 4, batches=5, num_processes=2, process_index=index) for index in (0, 1)
    ]
    assert [list(part) for part in parts] == [whole[::2], whole[1::2]]
    parts[1].set_epoch(0, start=1)
    assert list(parts[1]) == whole[3::2]
    first, second = ({int(labels[k]) for k in whole[index]} for index in (0, 1))
    assert first | second == set(range(6))  # no class is on two processes while the classes suffice


def test_a_plain_loader() -> None:
    dataset = TensorDataset(torch.arange(50), torch.arange(50) % 5)
    loader = DataLoader(dataset, batch_sampler=PerClassBatches(dataset.tensors[1], 5, 2), num_workers=1)
    batches = [*loader, *loader]
    assert [list(labels.unique(return_counts=True)[1]) for _, labels in batches] == [[2] * 5] * 10
    assert not torch.equal(batches[0][0], batches[5][0])


def test_accelerate_divides_the_batches() -> None:
    data_loader = pytest.importorskip("accelerate.data_loader")
    dataset = TensorDataset(torch.arange(60), torch.arange(60) % 6)
    whole = list(PerClassBatches(dataset.tensors[1], 4, 3, batches=6))
    for split, want in ((False, [whole[1::2]]), (True, [[batch[6:] for batch in whole]])):
        loader = DataLoader(dataset, batch_sampler=PerClassBatches(dataset.tensors[1], 4, 3, batches=6))
        prepared = data_loader.prepare_data_loader(
            loader, num_processes=2, process_index=1, split_batches=split, put_on_device=False
        )
        assert [[rows.tolist() for rows, _ in prepared]] == want
        assert [rows.tolist() for rows, _ in prepared] != want[0]  # the next epoch
    resumed = data_loader.skip_first_batches(
        DataLoader(dataset, batch_sampler=PerClassBatches(dataset.tensors[1], 4, 3, batches=6)), 2
    )
    assert [rows.tolist() for rows, _ in resumed] == whole[2:]


def test_processes_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="num_processes and process_index must be given among the 2 proc"):
        next(iter(PerClassBatches([0, 0], 1, 2)))
    assert list(PerClassBatches([0, 0], 1, 2, num_processes=1, process_index=0))


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        (([0, 1, 1], 3, 2), {}, "classes_per_batch must be at most the 2 classes of labels, got 3"),
        (([0, 1, 1], 0, 2), {}, "classes_per_batch must be at least 1, got 0"),
        (([], 1, 2), {}, "the 0 classes"),
        (([0, 1, 1], 2, 1), {}, "samples_per_class must be at least 2, got 1"),
        (([0, 1, 1], 2, 2.5), {}, "samples_per_class must be an integer, got 2.5"),
        (([0, 1, 1], 2, 2), {"batches": 0}, "batches must be at least 1, got 0"),
        (([0, 1, 1], 2, 2), {"num_processes": 2}, "must be given together, got 2 and None"),
        (([0, 1, 1], 2, 2), {"num_processes": 2, "process_index": 2}, "must be less than num_processes=2"),
        (([0, 1, 1], 2, 2), {"num_processes": 0, "process_index": 0}, "num_processes must be at least 1"),
        ((torch.zeros(4, 2), 1, 2), {}, r"in one dimension, got Tensor of float32 of shape \[4, 2\]"),
        ((torch.tensor(4), 1, 2), {}, r"in one dimension, got Tensor of int64 of shape \[\]"),
        (([torch.zeros(2)], 1, 2), {}, "in one dimension, got list"),
        ((7, 1, 2), {}, "in one dimension, got int"),
        ((torch.tensor([1.0, float("nan")]), 1, 2), {}, "labels must not be NaN, .*, got one at index 1"),
        (([0, 0, 1.5], 1, 2), {}, "labels must be integers or strings, got 1.5 at index 2"),
        ((np.array([0.5, 1, 1]), 1, 2), {}, "labels must be integers or strings, got 0.5 at index 0"),
        (([0, 0, None], 1, 2), {}, "labels must be integers or strings, got None at index 2"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], options: dict[str, Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        PerClassBatches(*arguments, **options)


# --- in the trainer


def test_ranks_get_whole_classes() -> None:
    labels = torch.arange(60) % 6
    whole = list(PerClassBatchSampler(labels, 12, samples_per_class=3, seed=5, steps=9))
    assert len(whole) == 9
    assert [draw for batch in whole for _, draw in batch] == list(range(108))
    ranks = [
        list(PerClassBatchSampler(labels, 12, samples_per_class=3, seed=5, steps=9, rank=rank, world_size=2))
        for rank in (0, 1)
    ]
    for batch, mine, theirs in zip(whole, *ranks, strict=True):
        assert mine + theirs == batch
        assert set(Counter(int(labels[sample]) for sample, _ in mine).values()) == {3}
    for start in (1, 5, 7):
        assert (
            list(PerClassBatchSampler(labels, 12, samples_per_class=3, seed=5, steps=9, start=start))
            == whole[start:]
        )


def test_config_of_the_trainer() -> None:
    config = DataConfig(
        dataset="digits", labels="fine", batch_size=24, sampler="per_class", samples_per_class=4
    )
    config.check()
    data = load_data(config)
    sampler = data.batch_sampler(seed=0, steps=3)
    for _, labels in data.loader(sampler):
        assert labels.unique(return_counts=True)[1].tolist() == [4] * 6
    with pytest.raises(ConfigError, match="give 6 classes per batch, not a multiple of the 4 processes"):
        data.batch_sampler(seed=0, steps=3, world_size=4)
    config.batch_size = 44
    with pytest.raises(ConfigError, match="give 11 classes per batch, more than the 10 of the training"):
        data.batch_sampler(seed=0, steps=3)
    for changes, text in (
        ({"batch_size": 30}, "data.batch_size must be a multiple of data.samples_per_class=4, got 30"),
        ({"samples_per_class": 1}, "data.samples_per_class must be at least 2, got 1"),
        ({"samples_per_class": None}, "data.samples_per_class must be given for data.sampler=per_class"),
        ({"sampler": "shuffled"}, "data.samples_per_class has no effect with data.sampler=shuffled"),
    ):
        with pytest.raises(ConfigError, match=text):
            DataConfig(**{**vars(config), "batch_size": 24, **changes}).check()
