"""Checkpoints: a resumed run equals an uninterrupted one; damaged files are named and nothing is lost."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pysupcon.config import Config, parse_args
from pysupcon.errors import ConfigError, Interrupted, RunError
from pysupcon.trainer import checkpoint
from pysupcon.trainer.checkpoint import read_checkpoint
from pysupcon.trainer.loop import train
from pysupcon.trainer.manifest import digest
from pysupcon.trainer.run import load_run

VIT = (
    "{img_size: 8, patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2, "
    "drop_path_rate: 0.3, proj_drop_rate: 0.2}"
)
TIMES = ("images_per_second", "peak_memory_mib")


def config(output_dir: Path, *args: str) -> Config:
    """Three epochs of ten steps of a network with random depth and dropout: random states matter. No
    validation, because the best checkpoint would depend on chance."""
    fixed = (
        "--data.dataset digits --data.augmentation weak --data.batch_size 128 --trainer.epochs 3 "
        "--trainer.threads 1 --evaluate false --trainer.cpu true --model.backbone vit_tiny_patch16_224 "
        "--trainer.keep_checkpoints 2 --trainer.best_by null"
    )
    return parse_args([*fixed.split(), "--model.timm_args", VIT, "--output_dir", str(output_dir), *args])[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config(tmp_path_factory.mktemp("finished") / "run"))


@pytest.fixture
def interrupted(finished: Path, tmp_path: Path) -> Path:
    """The run after its 20th step, with three more lines in the log, the last of them truncated."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints/step_00000030")
    (folder / "model.safetensors").unlink()
    lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(lines[:23])[:-10])
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def without_times(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in log]


def test_layout(finished: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == [
        "checkpoints", "config.yaml", "data.json", "environment.json", "log.jsonl", "model.safetensors",
        "summary.csv",
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
    assert_same_weights(interrupted, finished)
    assert without_times(load_run(interrupted).log()) == without_times(load_run(finished).log())


def test_a_truncated_checkpoint_is_named(interrupted: Path) -> None:
    for name in ("model.safetensors", "training.pt", "random.pt"):
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
    torn = folder / "checkpoints/step_00000030"
    (torn / "training.pt").unlink()
    offer = r"training.pt is missing; an earlier checkpoint exists: --resume_from_checkpoint .*step_00000020"
    with pytest.raises(RunError, match=offer):
        train(config(folder, "--resume_from_checkpoint", str(torn)))


@pytest.mark.parametrize("damage", ["a bit", "tampered manifest", "truncated", "missing"])
def test_the_checkpoint_before_a_damaged_one_is_used(
    finished: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The damaged checkpoint is named; the run resumes from the one before and ends with the same weights."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    torn = folder / "checkpoints/step_00000030"
    file = torn / ("manifest.json" if damage == "tampered manifest" else "training.pt")
    content = file.read_bytes()
    if damage == "a bit":
        file.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
        message = f"rejected: checkpoint file {file} is damaged: its content is not what was written"
    elif damage == "tampered manifest":
        file.write_bytes(content.replace(b'"step": 30', b'"step": 29'))
        message = f"rejected: {file} is damaged: its content does not match its checksum"
    elif damage == "truncated":
        file.write_bytes(content[:-7])
        message = (
            f"rejected: checkpoint file {file} is truncated or damaged: {len(content)} bytes were written"
        )
    else:
        file.unlink()
        message = f"rejected: checkpoint file {file} is missing"
    train(config(folder, "--resume_from_checkpoint", "latest"))
    said = capsys.readouterr().err
    assert message in said
    assert f"resuming from {folder}/checkpoints/step_00000020, after step 20" in said
    assert_same_weights(folder, finished)
    assert read_checkpoint(torn).step == 30


def test_foreign_code_is_not_run(interrupted: Path) -> None:
    """Even if the checksums of the checkpoint are correct."""
    folder = interrupted / "checkpoints/step_00000020"
    proof = interrupted / "code ran"

    class Foreign:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (proof,)

    torch.save({"optimizer": Foreign()}, folder / "training.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / "training.pt").read_bytes()
    manifest["files"]["training.pt"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["sha256"] = digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=r"step_00000020 cannot be read: .*[Ww]eights.only"):
        train(config(interrupted, "--resume_from_checkpoint", "latest"))
    assert not proof.exists()


def test_an_earlier_course_is_left(finished: Path, tmp_path: Path) -> None:
    """A run resumed from an earlier checkpoint deletes later ones as soon as it saves a new one."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    first = str(folder / "checkpoints/step_00000020")
    short = ("--trainer.checkpoint_steps", "5", "--trainer.keep_checkpoints", "1")
    with pytest.raises(Interrupted):
        train(config(folder, "--resume_from_checkpoint", first, "--trainer.time_budget", "1e-9", *short))
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["step_00000021"]
    assert len(load_run(folder).log()) == 21


def test_the_best_is_kept(tmp_path: Path) -> None:
    """The last checkpoint and the one with the lowest validation loss are kept; the latter can give the final
    weights."""
    folder = tmp_path / "run"
    with_best = ("--trainer.keep_checkpoints", "1", "--trainer.checkpoint_steps", "4")
    with_best += ("--trainer.best_by", "loss")
    bad_end = ("--optimizer.name", "sgd", "--optimizer.learning_rate", "30", "--optimizer.warmup_epochs", "3")
    train(config(folder, *with_best, *bad_end, "--trainer.final_weights", "best"))
    losses = {line["step"]: line["val_loss"] for line in load_run(folder).log() if "val_loss" in line}
    assert sorted(losses) == [4, 8, 12, 16, 20, 24, 28, 30]
    best = min(losses, key=lambda step: losses[step])
    assert best < 30, "the end was to be worse"
    kept = checkpoint.checkpoints(folder)
    assert [checkpoint.step_of(path) for path in kept] == [best, 30]
    assert checkpoint.read_manifest(kept[0])["metrics"]["loss"] == losses[best]
    final = load_file(folder / "model.safetensors")
    assert all(torch.equal(final[name], value) for name, value in read_checkpoint(kept[0]).weights.items())


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
    """A temporary folder of a killed process is not resumed from, and is deleted."""
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
    with pytest.raises(RunError, match=r"run/model.safetensors is truncated or not a safetensors file"):
        _ = load_run(folder).model
    weights.unlink()
    with pytest.raises(RunError, match=r"run/model.safetensors is missing: the run has not finished"):
        _ = load_run(folder).model
    (folder / "log.jsonl").write_text(json.dumps({"step": 1}) + "\n{")
    with pytest.raises(RunError, match=r"log.jsonl, line 2, is not JSON"):
        load_run(folder).log()


@pytest.mark.parametrize("threads", [2, 1, None], ids=["other", "same", "old checkpoint"])
def test_another_number_of_threads_is_reported(
    interrupted: Path, capsys: pytest.CaptureFixture[str], threads: int | None
) -> None:
    """Sums over threads are rounded in another order, so the result differs."""
    path = interrupted / "checkpoints/step_00000020"
    manifest = checkpoint.read_manifest(path)
    assert manifest["threads"] == 1
    manifest["threads"] = threads
    if threads is None:
        del manifest["threads"]
    manifest["sha256"] = digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Interrupted):
        train(config(interrupted, "--resume_from_checkpoint", "latest", "--trainer.time_budget", "1e-9"))
    said = capsys.readouterr().err
    change = "changed: CPU threads per process: 2 -> 1: sums are rounded in another order, so the run will"
    assert (change in said) == (threads == 2)
    assert ("CPU threads" in said) == (threads == 2)
