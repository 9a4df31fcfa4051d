"""benchmarks/trainer_speed.py: the trainer beside a plain loop."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import jpeg_files, plain_loop, trainer_speed  # noqa: E402
from pysupcon.data.augment import Augmentation  # noqa: E402
from pysupcon.data.colour import ColorJitter, RandomGrayscale  # noqa: E402
from pysupcon.data.geometry import RandomAffine, RandomResizedCrop  # noqa: E402


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_jpeg_files_are_the_same_everywhere(tmp_path: Path) -> None:
    jpeg_files.write_images(tmp_path / "a", 8)
    jpeg_files.write_images(tmp_path / "b", 8)
    first, second = (sorted((tmp_path / name).rglob("*.jpg")) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert {path.parent.name for path in first} == {f"class{number}" for number in range(4)}
    sizes = [Image.open(path).size for path in first]
    assert len(set(sizes)) == 8
    assert all(96 <= side <= 256 for size in sizes for side in size)


def of_type(steps: Any, kind: type) -> Any:
    return next(step for step in steps if isinstance(step, kind))


@pytest.mark.parametrize("pil", [True, False])
def test_both_augment_equally_strongly(pil: bool) -> None:
    ours = Augmentation("strong", "colour", 64).transforms
    theirs = plain_loop.strong_transform("colour", 64, (0.0,) * 3, (1.0,) * 3, pil).transforms
    crop, mine = of_type(theirs, v2.RandomResizedCrop), of_type(ours, RandomResizedCrop)
    assert (list(crop.scale), list(crop.ratio)) == (list(mine.scale), list(mine.ratio))
    assert of_type(theirs, v2.RandomHorizontalFlip).p == 0.5
    assert of_type(theirs, v2.RandomGrayscale).p == of_type(ours, RandomGrayscale).p
    applied, jitter = of_type(theirs, v2.RandomApply), of_type(ours, ColorJitter)
    (colour,) = applied.transforms
    assert applied.p == jitter.p
    limits = [colour.brightness, colour.contrast, colour.saturation, colour.hue]
    assert [list(each) for each in limits] == [list(each) for each in jitter.ranges]
    ours = Augmentation("strong", "digits", 28).transforms
    theirs = plain_loop.strong_transform("digits", 28, (0.0,), (1.0,), pil).transforms
    affine, own = of_type(theirs, v2.RandomAffine), of_type(ours, RandomAffine)
    assert affine.degrees == [-own.degrees, own.degrees]
    assert list(affine.shear) == [-own.shear, own.shear]
    assert affine.translate is None
    assert own.translate == 0
    assert tuple(of_type(theirs, v2.RandomResizedCrop).scale) == of_type(ours, RandomResizedCrop).scale


@pytest.mark.parametrize("pil", [True, False])
def test_batches_of_the_plain_loop(pil: bool, tmp_path: Path) -> None:
    jpeg_files.write_images(tmp_path, 12)
    paths = sorted(tmp_path.rglob("*.jpg"))
    labels = torch.tensor([int(path.parent.name[-1]) for path in paths])
    transform = plain_loop.strong_transform("colour", 16, (0.5,) * 3, (0.25,) * 3, pil)
    data = plain_loop.loader(plain_loop.TwoViews(paths, labels, transform, pil), 4, workers=0)
    images, targets = next(plain_loop.batches(data, torch.channels_last))
    assert images.shape == (8, 3, 16, 16)
    assert images.dtype == torch.float32
    assert -2 <= float(images.min()) < -0.5 < 0.5 < float(images.max()) <= 2
    assert torch.equal(targets[::2], targets[1::2])
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("pil", [True, False])
def test_the_plain_loop_trains(pil: bool) -> None:
    """The classes are shades of grey."""
    labels = torch.arange(24) % 4
    images = (60 * labels).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    transform = plain_loop.strong_transform("digits", 28, (0.5,), (0.25,), pil)
    data = plain_loop.loader(plain_loop.TwoViews(images, labels, transform, pil), 8, workers=0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.AvgPool2d(28), torch.nn.Flatten(), torch.nn.Linear(1, 4))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-2)
    steps = plain_loop.training(
        data, model, torch.nn.functional.cross_entropy, optimizer, torch.contiguous_format
    )
    losses = [next(steps) for _ in range(60)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_the_clock_times_the_steps_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(trainer_speed.time, "perf_counter", lambda: now)
    count = trainer_speed.WARMUP + 2 + 1
    clock = trainer_speed.Clock(range(count))
    iterator = iter(clock)
    for number in range(count):  # a step of number seconds
        assert next(iterator) == number
        now += number
    warmup = trainer_speed.WARMUP
    assert clock.end - clock.start == warmup + (warmup + 1)


def _stored(ours: list[float], plain: list[float]) -> dict[str, Any]:
    rows = [
        {"work": "training", "contestant": trainer_speed.OURS, "samples_per_second": ours},
        {"work": "training", "contestant": trainer_speed.PLAIN, "samples_per_second": plain},
    ]
    return {"source": "memory", "rows": rows}


def test_ratios_are_those_of_the_rounds() -> None:
    contest = _stored([300.0, 150.0, 200.0], [200.0, 100.0, 100.0])
    assert trainer_speed.ratios(contest, "training", trainer_speed.PLAIN) == [1.5, 1.5, 2.0]
    assert trainer_speed.met(contest)
    assert not trainer_speed.met(_stored([149.0], [100.0]))
    line = trainer_speed.lines([contest])[2]
    assert line[3:] == ["100 [100, 200]", "200", "1.50 [1.50, 2.00]"]


@pytest.mark.slow
def test_a_tiny_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = tmp_path / "r.json"
    arguments = ["--rounds", "1", "--steps", "1", "--files", "90", "--threads", "1", "--json", str(stored)]
    assert trainer_speed.main(arguments) == 0
    found = json.loads(stored.read_text(encoding="utf-8"))
    assert {"torchvision", "pillow", "accelerate", "torch"} <= set(found["machine"]["versions"])
    assert [contest["source"] for contest in found["contests"]] == ["memory", "files"]
    for contest in found["contests"]:
        assert len(contest["rows"]) == 5
        assert all(0 < row["samples_per_second"][0] < 1e6 for row in contest["rows"])
        assert {len(trial) for trial in contest["trial"].values()} == {2, 4}
        for who, chosen in contest["loaders"].items():
            assert contest["trial"][who][chosen] == max(contest["trial"][who].values())
    assert trainer_speed.section(found) in capsys.readouterr().out


def test_the_page_shows_the_stored_speeds() -> None:
    stored = json.loads(trainer_speed.RESULTS.read_text(encoding="utf-8"))
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert trainer_speed.section(stored) in page


def test_the_page_shows_the_stored_measurements() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    results = ROOT / "benchmarks" / "results"
    stored, same_malloc = (
        json.loads((results / f"trainer_speed_{name}.json").read_text(encoding="utf-8"))
        for name in ("cpu", "same_malloc_cpu")
    )
    assert trainer_speed.section(stored) in page
    assert all(trainer_speed.met(contest) for contest in same_malloc["contests"])
    words = " ".join(page.split())
    for contest in same_malloc["contests"]:
        found = trainer_speed.ratios(contest, "training", "plain loop")
        assert f"{statistics.median(found):.2f} [{min(found):.2f}, {max(found):.2f}] for" in words
