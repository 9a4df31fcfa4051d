"""Checkpoints and runs: resuming equals not stopping; what is damaged is named and nothing is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pysupcon.config import Config, parse_args
from pysupcon.errors import ConfigError, RunError
from pysupcon.trainer.loop import train
from pysupcon.trainer.run import load_run

VIT = (
    "{img_size: 8, patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2, "
    "drop_path_rate: 0.3, proj_drop_rate: 0.2}"
)
TIMES = ("images_per_second", "peak_memory_mib")


def config(output_dir: Path, *args: str) -> Config:
    """Three epochs of ten steps of a network with random depth and dropout: random states matter."""
    fixed = (
        "--data.dataset digits --data.augmentation weak --data.batch_size 128 --trainer.epochs 3 "
        "--trainer.threads 1 --evaluate false --trainer.cpu true --model.backbone vit_tiny_patch16_224 "
        "--trainer.keep_checkpoints 2"
    )
    return parse_args([*fixed.split(), "--model.timm_args", VIT, "--output_dir", str(output_dir), *args])[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config(tmp_path_factory.mktemp("finished") / "run"))


@pytest.fixture
def interrupted(finished: Path, tmp_path: Path) -> Path:
    """The run as it was after its 20th step, but for three lines of log more, the last of them cut."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints/step_00000030")
    (folder / "model.safetensors").unlink()
    lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(lines[:23])[:-10])
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def without_times(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in log]


def test_layout(finished: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == [
        "checkpoints", "config.yaml", "log.jsonl", "model.safetensors",
    ]  # fmt: skip
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [
        "step_00000020",
        "step_00000030",
    ]
    last = finished / "checkpoints/step_00000030/model.safetensors"
    final, kept = load_file(finished / "model.safetensors"), load_file(last)
    assert final.keys() == kept.keys()
    assert all(torch.equal(final[name], kept[name]) for name in final)


@pytest.mark.parametrize("which", ["latest", "path"])
def test_a_resumed_run_equals_an_uninterrupted_one(finished: Path, interrupted: Path, which: str) -> None:
    given = "latest" if which == "latest" else str(interrupted / "checkpoints/step_00000020")
    torch.manual_seed(987)  # nothing may depend on the state the process happens to be in
    train(config(interrupted, "--resume_from_checkpoint", given))
    whole, resumed = load_file(finished / "model.safetensors"), load_file(interrupted / "model.safetensors")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    assert without_times(load_run(interrupted).log()) == without_times(load_run(finished).log())


def test_a_truncated_checkpoint_is_named(interrupted: Path) -> None:
    for name in ("model.safetensors", "optimizer.bin", "random_states_0.pkl"):
        file = interrupted / "checkpoints/step_00000020" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-7])
        before = contents(interrupted)
        with pytest.raises(
            RunError, match=rf"step_00000020/{name} is truncated.*: {len(whole)} bytes were written"
        ):
            train(config(interrupted, "--resume_from_checkpoint", "latest"))
        assert contents(interrupted) == before
        file.write_bytes(whole)


def test_an_earlier_checkpoint_is_offered(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "checkpoints/step_00000030/optimizer.bin").unlink()
    offer = (
        r"optimizer.bin is missing; an earlier checkpoint is there: --resume_from_checkpoint .*step_00000020"
    )
    with pytest.raises(RunError, match=offer):
        train(config(folder, "--resume_from_checkpoint", "latest"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl"])
def test_damage_of_the_same_size_is_named(interrupted: Path, name: str) -> None:
    file = interrupted / "checkpoints/step_00000020" / name
    file.write_bytes(b"\xff" * file.stat().st_size)
    before = contents(interrupted)
    with pytest.raises(RunError, match=r"step_00000020.* cannot be read"):
        train(config(interrupted, "--resume_from_checkpoint", "latest"))
    assert contents(interrupted) == before


def test_a_damaged_manifest_is_named(interrupted: Path) -> None:
    (interrupted / "checkpoints/step_00000020/manifest.json").write_text('{"step": 2')
    with pytest.raises(RunError, match=r"manifest.json is missing or damaged"):
        train(config(interrupted, "--resume_from_checkpoint", "latest"))


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"resume_from_checkpoint latest: .*checkpoints holds no checkpoint"):
        train(config(tmp_path / "run", "--resume_from_checkpoint", "latest"))
    with pytest.raises(RunError, match=r"is no checkpoint: there is no manifest.json in it"):
        train(config(tmp_path / "run", "--resume_from_checkpoint", str(tmp_path)))
    assert not (tmp_path / "run").exists()


def test_another_model_or_data_is_refused(interrupted: Path) -> None:
    other = ("--loss.temperature", "0.2", "--data.augmentation", "strong")
    with pytest.raises(
        ConfigError, match=r"^data.augmentation, loss.temperature must be as in the checkpoint"
    ):
        train(config(interrupted, "--resume_from_checkpoint", "latest", *other))


def test_a_half_written_checkpoint_is_not_taken(interrupted: Path) -> None:
    """What a killed process leaves under the temporary name is neither resumed from nor kept."""
    aside = interrupted / "checkpoints/writing_00000030"
    shutil.copytree(interrupted / "checkpoints/step_00000020", aside)
    (aside / "manifest.json").unlink()
    train(config(interrupted, "--resume_from_checkpoint", "latest"))
    assert sorted(path.name for path in aside.parent.iterdir()) == ["step_00000020", "step_00000030"]


# --- reading a run back


def test_load_run(finished: Path) -> None:
    run = load_run(finished)
    assert run.config.output_dir == str(finished)
    assert (run.config.loss.name, run.config.loss.temperature) == ("supcon", 0.07)
    assert not run.model.training
    test = run.splits()["test"]
    assert run.model.backbone(test[0][0].unsqueeze(0)).shape == (1, 16)
    assert [len(split) for split in run.splits().values()] == [1295, 143, 359]
    assert len(run.log()) == 30


def test_load_run_names_what_is_wrong(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no run: there is no config.yaml in it"):
        load_run(tmp_path)
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RunError, match=r"run/model.safetensors is truncated or no safetensors file"):
        _ = load_run(folder).model
    weights.unlink()
    with pytest.raises(RunError, match=r"run/model.safetensors is missing: the run has not finished"):
        _ = load_run(folder).model
    (folder / "log.jsonl").write_text(json.dumps({"step": 1}) + "\n{")
    with pytest.raises(RunError, match=r"log.jsonl, line 2, is no JSON"):
        load_run(folder).log()
