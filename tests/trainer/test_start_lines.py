"""What a training says at its start about its data, its length and what it trains on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data_files import write_grey_image, write_text

from pysupcon import train as entry
from pysupcon.config import config_of, load_config
from pysupcon.data.datamodule import load_data
from pysupcon.errors import ConfigError
from pysupcon.trainer.start_lines import start_lines


def lines(
    data: dict[str, Any], *, steps: int = 100, steps_per_epoch: int = 1, processes: int = 1, **sections: Any
) -> list[str]:
    config = config_of(None, {"data": {"batch_size": 8, **data}, **sections})
    config.resolve()
    return start_lines(
        config, load_data(config.data), steps=steps, steps_per_epoch=steps_per_epoch, processes=processes
    )


def photos(root: Path, *, count: int = 40) -> dict[str, Any]:
    rows = ["path,species,kind"]
    for index in range(count):
        write_grey_image(root / f"photos/{index}.png", index)
        rows.append(
            f"{index}.png,{('cat', 'dog', 'cod', 'eel')[index % 4]},{('mammal', 'fish')[index % 4 // 2]}"
        )
    write_text(root / "photos/labels.csv", "\n".join(rows))
    return {
        "dataset": "image_folder", "root": str(root / "photos"), "image_size": 8, "table": "labels.csv",
        "columns": {"file": "path", "label": "species", "coarse": "kind"},
    }  # fmt: skip


def test_two_levels_of_labels(tmp_path: Path) -> None:
    data = photos(tmp_path)
    assert lines(data, steps_per_epoch=4)[:3] == [
        "image_folder photos: 40 images, 4 fine and 2 coarse classes; train 28, val 4, test 8",
        "training on the coarse labels (kind, 2 classes; data.labels fine: species, 4 classes): balanced "
        "batches of 8, 2 views, strong augmentation; 4 steps an epoch, 100 steps",
        "small_cnn, SupCon at temperature 0.07, adamw with learning rate 0.001",
    ]
    assert (
        "training on the fine labels (species, 4 classes; data.labels coarse: kind, 2 classes): "
        in (lines({**data, "labels": "fine"})[1])
    )


def test_one_level_without_columns() -> None:
    said = lines(
        {"dataset": "digits", "views": 1, "sampler": "per_class", "samples_per_class": 4, "labels": "fine"},
        processes=2, trainer={"accumulation_steps": 3},
        loss={"name": "sincere", "weight": 0.5, "temperature": 1},
    )  # fmt: skip
    assert said[0].startswith("digits: 1,797 images, 10 fine and 2 coarse classes; train 1,29")
    assert said[1] == (
        "training on the fine labels (10 classes; data.labels coarse: 2 classes): batches of 8 over 2 "
        "processes (4 of each of 2 classes), 3 a step, 1 view, strong augmentation; 1 step an epoch, "
        "100 steps"
    )
    assert said[2].startswith("small_cnn, 0.5 x SINCERE at temperature 1, adamw")
    said = lines({"dataset": "digits", "sampler": "shuffled"}, loss={"name": "infonce"})
    assert said[1].startswith("training without labels: shuffled batches of 8, 2 views")
    said = lines(
        {"dataset": "digits"}, loss={"name": "none", "cross_entropy_weight": 1}, model={"classifier": True}
    )
    assert said[1].startswith("training on the coarse labels")
    assert said[2].startswith("small_cnn, cross-entropy, adamw")


def test_features_and_the_index_of_pandas(tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    rows = [f"{i},{i % 7},{i % 5},{-i},{'ab'[i % 2]}" for i in range(60)]
    write_text(path, "\n".join([",e0,e1,e2,topic", *rows]))
    data = {"dataset": "arrays", "root": str(path), "columns": {"label": "topic"}}
    note, found, training = lines(data, model={"backbone": "mlp"})[:3]
    assert "texts.csv: the first column, without a name, numbers the rows" in note
    assert (
        found == "arrays texts.csv: 60 vectors of 3 features e0 ... e2, 2 classes; train 44, val 4, test 12"
    )
    assert training.startswith("training on the labels (topic: 2 classes): balanced batches of 8, 2 views, ")
    np.savez(tmp_path / "x.npz", features=np.ones((40, 1)), label=np.arange(40) % 2 - 1)
    data = {"dataset": "arrays", "root": str(tmp_path / "x.npz"), "ignore_index": -1, "sampler": "shuffled"}
    found = lines(data, model={"backbone": "mlp"})[0]
    assert found.startswith("arrays x.npz: 40 vectors of 1 feature, 1 class, 20 of unknown class; train 14")


def test_several_labels_per_image(tmp_path: Path) -> None:
    rows = ["file,a,b,c"]
    for index in range(40):
        write_grey_image(tmp_path / f"{index}.png", index)
        rows.append(f"{index}.png,{index % 2},1,0")
    write_text(tmp_path / "labels.csv", "\n".join(rows))
    data = {"dataset": "image_table", "root": str(tmp_path), "image_size": 8, "sampler": "shuffled"}
    said = lines(data, evaluate=False)
    assert ": 40 images, 3 labels per image; train " in said[0]
    assert said[1].startswith("training on the labels (3 labels): shuffled batches of 8")


@pytest.mark.parametrize(
    ("size", "more", "processes", "share", "fitting"),
    [
        (256, {}, 1, "41%", 216),
        (250, {}, 5, "42%", 215),
        (250, {"samples_per_class": 25}, 1, "42%", 200),
        (144, {"accumulation": 2}, 1, "33%", 108),
        (300, {}, 1, "31%", 216),
        (180, {}, 1, None, None),
    ],
)
def test_samples_that_an_epoch_leaves_out(
    tmp_path: Path, size: int, more: dict[str, int], processes: int, share: str | None, fitting: int | None
) -> None:
    """432 training samples; the named size leaves out at most a tenth of them and fits the processes."""
    path = tmp_path / "x.npz"
    np.savez(
        path, features=np.random.default_rng(0).normal(size=(456, 2)), label=np.arange(456) % 12,
        split=[0] * 432 + [1] * 12 + [2] * 12,
    )  # fmt: skip
    data = {"dataset": "arrays", "root": str(path), "batch_size": size}
    accumulated = more.get("accumulation", 1)
    if "samples_per_class" in more:
        data |= {"sampler": "per_class", "samples_per_class": more["samples_per_class"]}
    said = lines(
        data, processes=processes, model={"backbone": "mlp"}, trainer={"accumulation_steps": accumulated}
    )[3:]
    if share is None:
        assert not said
        return
    (line,) = said
    assert f"it leaves out {share} of the 432 training samples" in line
    assert line.endswith(f"lower data.batch_size, e.g. to {fitting}")


def test_few_steps() -> None:
    data = {"dataset": "digits", "batch_size": 64}
    (line,) = lines(data, steps=49, steps_per_epoch=7)[3:]
    assert line == (
        "49 steps are few to learn from: raise trainer.epochs (8 give 56 steps), or lower data.batch_size"
    )
    assert not lines(data, steps=50, steps_per_epoch=7)[3:]
    assert not lines(data, steps=5, steps_per_epoch=7, trainer={"max_steps": 5})[3:]


@pytest.mark.parametrize("dry", [False, True])
def test_a_training_prints_them(tmp_path: Path, capsys: pytest.CaptureFixture[str], dry: bool) -> None:
    entry.run(
        data={**photos(tmp_path), "batch_size": 8, "workers": 0}, model={"width": 2}, evaluate=False,
        output_dir=None if dry else str(tmp_path / "run"),
        trainer={"epochs": 1, "cpu": True, "best_by": None, "threads": 1, "dry_run": dry},
    )  # fmt: skip
    said = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(" ...")]
    assert said[0].startswith("image_folder photos: 40 images")
    assert said[1].endswith("; 3 steps an epoch, 3 steps")
    assert said[2].startswith("small_cnn, ")
    assert said[3].startswith("3 steps are few")
    assert len(said) == (4 if dry else 5)


@pytest.mark.parametrize(("count", "size"), [(320, 256), (240, 64), (40, 8), (8, 2)])
def test_a_batch_size_that_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int, size: int
) -> None:
    """A training without data.batch_size: its config records the number, and its resumption has it, too."""
    path = tmp_path / "x.npz"
    held_out = [1] * 4 + [2] * 4
    np.savez(
        path, features=np.random.default_rng(0).normal(size=(count + 8, 2)), label=np.arange(count + 8) % 2,
        split=[0] * count + held_out,
    )  # fmt: skip
    fields = {
        "data": {"dataset": "arrays", "root": str(path)}, "model": {"backbone": "mlp"}, "evaluate": False,
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    trainer = {"max_steps": 1, "cpu": True, "best_by": None, "threads": 1}
    finished = entry.run(**fields, trainer=trainer)
    note = f"data.batch_size is {size}, because there are only {count} training samples; the default is 256"
    assert capsys.readouterr().err.splitlines().count(note) == (size != 256)
    assert load_config(finished.dir / "config.yaml").data.batch_size == size
    entry.run(**fields, trainer={**trainer, "max_steps": 2}, resume_from_checkpoint="latest")
    assert load_config(finished.dir / "config.yaml").data.batch_size == size


def test_a_batch_size_that_is_too_large() -> None:
    message = "data.batch_size must be at most the 1295 training samples, got {}"
    with pytest.raises(ConfigError, match=message.format("1296, e.g. --data.batch_size 256$")):
        lines({"dataset": "digits", "batch_size": 1296})
    per_class = {"sampler": "per_class", "samples_per_class": 16, "train_size": 200}
    with pytest.raises(ConfigError, match=r"at most the 200 training samples, got 256$"):
        lines({"dataset": "digits", "batch_size": None, **per_class})
