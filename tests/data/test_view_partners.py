"""Views from different images of a class (``data.view_partners``)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pysupcon import ClassConditionalInfoNCELoss
from pysupcon.config import parse_args
from pysupcon.data.augment import Augmentation
from pysupcon.data.config import DataConfig
from pysupcon.data.datamodule import DataModule, MultiViewDataset
from pysupcon.data.samples import Samples
from pysupcon.data.view_partners import ViewPartners
from pysupcon.errors import ConfigError, Interrupted
from pysupcon.trainer import loop

LABELS = torch.tensor([2, 0, 1, 0, -1, 2, 2, 0, 2, -1, 2, 0, 0, 3])
"""Classes of 5, 5, 1 and 1 images, and two of unknown class"""
SAMPLES = list(range(len(LABELS)))
EPOCH = 100


def partners(epoch: int, view: int = 1, seed: int = 0) -> list[int]:
    paired = ViewPartners(LABELS, seed, EPOCH)
    return paired.images(SAMPLES, [EPOCH * epoch + draw for draw in SAMPLES], view)


@pytest.mark.parametrize("view", [1, 2, 4])
def test_partners_are_a_permutation_within_the_classes(view: int) -> None:
    for epoch in range(20):
        found = partners(epoch, view)
        assert sorted(found) == SAMPLES
        assert torch.equal(LABELS[found], LABELS)
        alone = [sample for sample in SAMPLES if found[sample] == sample]
        assert alone == [2, 4, 9, 13], "single images, and those of unknown class"
    assert partners(3, view=0) == SAMPLES
    three = {tuple(partners(5, view)) for view in (0, 1, 2)}
    assert len(three) == 3, "the views show different images"


def test_partners_change_every_epoch_and_with_the_seed() -> None:
    epochs = [tuple(partners(epoch)) for epoch in range(10)]
    assert len(set(epochs)) == 10
    assert partners(0, seed=1) != list(epochs[0])
    # Every other image of the class becomes the partner.
    assert {epoch[0] for epoch in (tuple(partners(epoch)) for epoch in range(60))} == {5, 6, 8, 10}


def test_partners_do_not_depend_on_what_was_drawn_before() -> None:
    """Draws of two epochs in one object, in any order: workers and resumed trainings see the same pairs."""
    paired = ViewPartners(LABELS, 0, EPOCH)
    draws = [EPOCH - 1, EPOCH, 5 * EPOCH, 0]
    expected = [partners(draw // EPOCH)[0] for draw in draws]
    assert paired.images([0] * 4, draws, 1) == expected
    assert len(set(expected)) > 1


def test_views_show_the_partners() -> None:
    images = torch.arange(len(LABELS), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    paired = ViewPartners(LABELS, 0, EPOCH)
    augmentation = Augmentation("none", "grey", 4)
    dataset = MultiViewDataset(Samples(images, LABELS, LABELS), LABELS, augmentation, 3, 0, paired)
    keys = [(sample, 7 * EPOCH + sample) for sample in SAMPLES]
    views, labels = dataset.__getitems__(keys)
    assert views.shape == (len(LABELS), 3, 1, 4, 4)
    assert torch.equal(labels, LABELS)
    for view in range(3):
        assert views[:, view, 0, 0, 0].tolist() == partners(7, view)
    for key, found in zip(keys, views, strict=True):
        assert torch.equal(dataset[key][0], found), "alone as in a batch"


def test_what_the_loss_becomes() -> None:
    """With own views cNCE is lower for spread embeddings than for collapsed ones; averaged over the pairings
    it is higher, and collapse gives its minimum, the logarithm of the other rows."""
    torch.manual_seed(0)
    spread = torch.nn.functional.normalize(torch.randn(6, 8, dtype=torch.float64), dim=1)
    collapsed = torch.ones_like(spread) / 8**0.5
    labels = torch.zeros(6, dtype=torch.int64)
    criterion = ClassConditionalInfoNCELoss(temperature=0.2)
    paired = ViewPartners(labels, 0, 6)

    def loss(rows: Tensor, images: list[int]) -> float:
        return float(criterion(torch.stack([rows, rows[images]], dim=1), labels))

    own = [loss(rows, list(range(6))) for rows in (spread, collapsed)]
    epochs = [paired.images(list(range(6)), [6 * epoch] * 6, 1) for epoch in range(3000)]
    permuted = [sum(loss(rows, images) for images in epochs) / 3000 for rows in (spread, collapsed)]
    assert own[0] < own[1] == pytest.approx(permuted[1])
    assert permuted[0] > permuted[1] == pytest.approx(math.log(11))


def module(**arguments: Any) -> DataModule:
    fixed = {"dataset": "digits", "augmentation": "weak", "batch_size": 64, "view_partners": "class"}
    config = DataConfig(**{**fixed, **arguments})
    config.check()
    config.resolve()
    return DataModule(config)


def batches(data: DataModule, steps: int, **options: Any) -> list[tuple[Tensor, Tensor]]:
    return list(data.loader(data.batch_sampler(seed=4, steps=steps, **options)))


def test_processes_and_resumed_trainings_see_the_same_pairs() -> None:
    data = module()
    per_epoch = data.batch_sampler(seed=4, steps=0).steps_per_epoch
    whole = batches(data, per_epoch + 2)
    resumed = batches(data, per_epoch + 2, start=per_epoch - 1)
    for (views, labels), (again, same) in zip(whole[-3:], resumed, strict=True):
        assert torch.equal(views, again)
        assert torch.equal(labels, same)
    parts = [batches(module(), 2, rank=rank, world_size=2) for rank in (0, 1)]
    for step in range(2):
        assert torch.equal(whole[step][0][0::2], parts[0][step][0])
        assert torch.equal(whole[step][0][1::2], parts[1][step][0])
    own = batches(module(view_partners="own"), 1)
    assert torch.equal(own[0][0][:, 0], whole[0][0][:, 0]), "the first view is unchanged"
    assert not torch.equal(own[0][0][:, 1], whole[0][0][:, 1])


def test_each_epoch_shows_every_image_as_first_and_as_second_view() -> None:
    data = module(augmentation="none", sampler="shuffled", batch_size=64)
    per_epoch = data.batch_sampler(seed=4, steps=0).steps_per_epoch
    sampler = data.batch_sampler(seed=4, steps=2 * per_epoch)
    dataset: Any = data.loader(sampler).dataset
    for batch in list(sampler)[per_epoch - 1 : per_epoch + 1]:
        samples, draws = [sample for sample, _ in batch], [draw for _, draw in batch]
        assert {draw // dataset.partners.draws_per_epoch for draw in draws} in ({0}, {1})
        second = dataset.partners.images(samples, draws, 1)
        assert torch.equal(dataset.labels[second], dataset.labels[samples])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"views": 1}, r"data.views must be at least 2 for data.view_partners=class, got 1"),
        (
            {"groups": "annotated", "sampler": "groups"},
            r"mixes the groups of a class.*data.groups is annotated",
        ),
        (
            {"dataset": "image_table", "root": "x", "image_size": 8, "sampler": "shuffled"},
            r"data.view_partners=class needs one label per sample",
        ),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(view_partners="class", **arguments).check()


@pytest.mark.slow
def test_a_resumed_training_equals_an_uninterrupted_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = (
        "--data.dataset digits --data.augmentation none --data.batch_size 512 --data.view_partners class "
        "--loss.name spread --model.width 2 --trainer.epochs 3 --trainer.threads 1 --trainer.cpu true "
        "--evaluate false"
    )

    def train(name: str, *more: str) -> dict[str, Tensor]:
        folder = tmp_path / name
        loop.train(parse_args([*fixed.split(), "--output_dir", str(folder), *more])[0])
        return load_file(folder / "model.safetensors")

    whole = train("whole")
    assert "2 views of images of a class, none augmentation" in capsys.readouterr().err
    with pytest.raises(Interrupted):
        train("stopped", "--trainer.time_budget", "1e-9")
    resumed = train("stopped", "--resume_from_checkpoint", "latest")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    own = train("own", "--data.view_partners", "own")
    assert not all(torch.equal(value, own[name]) for name, value in whole.items())
