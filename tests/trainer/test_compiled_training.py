"""Trainings of a model that Accelerate compiles (``accelerate launch --dynamo_backend``)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from helpers.parallel_training import assert_same_training, training_arguments
from helpers.training_server import ENVIRONMENT, REPOSITORY, TrainingServer, start_training_server  # noqa: F401
from safetensors.torch import load_file

from pysupcon.commands.export import export_run
from pysupcon.config import Config, parse_args
from pysupcon.errors import RunError
from pysupcon.evaluation.evaluate import evaluate_run
from pysupcon.train import EX_TEMPFAIL
from pysupcon.trainer import loop
from pysupcon.trainer.checkpoint import checkpoints, read_checkpoint, read_manifest
from pysupcon.trainer.loop import train
from pysupcon.trainer.run import load_run, read_log

VIT = "{img_size: 8, patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2, proj_drop_rate: 0.2}"


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith("ACCELERATE_"):
            monkeypatch.delenv(name)
    _forget()
    yield
    _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch._dynamo.reset()


def config(output_dir: Path, *args: str) -> Config:
    """Ten steps of a network with dropout, which uses random numbers; checkpoints after 6 and 10."""
    fixed = (
        "--data.dataset digits --data.augmentation weak --data.batch_size 128 --trainer.epochs 1 "
        "--trainer.threads 1 --evaluate false --trainer.cpu true --model.backbone vit_tiny_patch16_224 "
        "--trainer.checkpoint_steps 6 --trainer.ema_decay 0.5 --trainer.clip_norm 0.2"
    )
    return parse_args([*fixed.split(), "--model.timm_args", VIT, "--output_dir", str(output_dir), *args])[0]


def compile_with(monkeypatch: pytest.MonkeyPatch, backend: str, **options: str) -> None:
    _forget()
    for name, value in {"BACKEND": backend, **options}.items():
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", value)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training without a compiler."""
    _forget()
    return train(config(tmp_path_factory.mktemp("plain") / "run"))


def assert_same(one: Path, other: Path) -> None:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    logs = [read_log(run / "log.jsonl") for run in (one, other)]
    for name in ("loss", "val_loss", "gradient_norm"):
        assert [line.get(name) for line in logs[0]] == [line.get(name) for line in logs[1]], name


def cut(finished: Path, folder: Path) -> Path:
    """The run after its sixth step."""
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints/step_00000010")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The arguments of torch.compile."""
    given: list[object] = []
    compiled = torch.compile

    def noted(model: object, **options: object) -> object:
        given.append(model)
        return compiled(model, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "compile", noted)
    return given


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_weights_have_their_own_names(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[object], backend: str
) -> None:
    """These backends run torch's own kernels, so the compiled training is bitwise equal."""
    compile_with(monkeypatch, backend, USE_FULLGRAPH="True", USE_DYNAMIC="False")
    train(config(tmp_path / "run"))
    assert len(compilations) == 1
    assert_same(tmp_path / "run", plain)
    saved = read_checkpoint(checkpoints(tmp_path / "run")[-1])
    assert saved.ema is not None
    for names in (saved.weights, saved.ema):
        assert names.keys() == load_file(plain / "model.safetensors").keys()


@pytest.mark.parametrize("by", ["the field", "the flag"])
def test_inductor_by_the_field_or_the_flag(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    backends: list[object] = []
    compiled = torch.compile

    def fast(model: object, **options: object) -> object:
        backends.append(options["backend"])
        return compiled(model, **{**options, "backend": "eager"})  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "compile", fast)
    if by == "the flag":
        compile_with(monkeypatch, "inductor")
    train(config(tmp_path / "run", *(["--trainer.compile", "true"] if by == "the field" else [])))
    assert backends == ["inductor"]
    assert_same(tmp_path / "run", plain)
    assert load_run(tmp_path / "run").config.trainer.compile
    assert read_manifest(checkpoints(tmp_path / "run")[-1])["compiled"] == "inductor"


def test_repeated_blocks_compiled_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[object]
) -> None:
    two = "--model.encoders two --model.decoder plain --loss.reconstruction_weight 1"
    options = [*two.split(), "--model.backbone", "small_cnn", "--model.timm_args", "{}", "--model.width", "8"]
    one = train(config(tmp_path / "plain", *options))
    compile_with(monkeypatch, "eager", USE_REGIONAL_COMPILATION="True")
    assert_same(train(config(tmp_path / "run", *options)), one)
    assert len(compilations) > 1


@pytest.mark.parametrize(
    ("before", "after"), [("aot_eager", "aot_eager"), ("aot_eager", "no"), ("no", "eager")]
)
def test_resumed_with_and_without(
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    before: str,
    after: str,
) -> None:
    """Weights, optimizer and random states load whether or not a part was compiled; changes are printed."""
    whole = plain
    if before != "no":
        compile_with(monkeypatch, before)
        whole = train(config(tmp_path / "whole"))
    assert read_manifest(checkpoints(whole)[-1])["compiled"] == before
    compile_with(monkeypatch, after)
    folder = cut(whole, tmp_path / "run")
    train(config(folder, "--resume_from_checkpoint", "latest"))
    assert_same(folder, plain)
    told = f"changed: ACCELERATE_DYNAMO_BACKEND: {before} -> {after}"
    assert (told in capsys.readouterr().err) == (before != after)


def test_in_chunks_and_several_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GradCache runs the model twice, without and with a graph; dropout is the same in both."""
    options = ("--trainer.chunk_size", "50", "--trainer.accumulation_steps", "2")
    one = train(config(tmp_path / "plain", *options))
    compile_with(monkeypatch, "aot_eager")
    assert_same(train(config(tmp_path / "compiled", *options)), one)


def test_a_compiled_run_is_evaluated_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_with(monkeypatch, "eager")
    whole = config(tmp_path / "run", "--evaluation.evaluators", "[knn]", "--trainer.mixed_precision", "bf16")
    folder = train(whole)
    report = evaluate_run(folder)
    assert any(name.startswith("knn/") for name in report.metrics)
    hub = export_run(folder, tmp_path / "hub")
    assert (hub / "model.safetensors").is_file()
    exported, trained = load_file(hub / "model.safetensors"), load_run(folder).model.backbone.state_dict()
    assert exported.keys() == trained.keys()


def test_what_does_not_compile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = loop.build_model

    def with_a_break(*args: object) -> torch.nn.Module:
        model = build(*args)  # type: ignore[arg-type]
        model.backbone.register_forward_hook(lambda *_: torch._dynamo.graph_break())
        return model

    monkeypatch.setattr(loop, "build_model", with_a_break)
    compile_with(monkeypatch, "eager", USE_FULLGRAPH="True")
    message = r"^step 1 failed in the model compiled by ACCELERATE_DYNAMO_BACKEND=eager: .*Unsupported"
    with pytest.raises(RunError, match=message):
        train(config(tmp_path / "run"))


def test_two_processes_train_what_one_trains(server: TrainingServer, tmp_path: Path) -> None:
    """Compiled around DistributedDataParallel, which goes on exchanging gradients after validation and
    checkpoints."""
    one, two = tmp_path / "one", tmp_path / "two"
    fast = ("--trainer.checkpoint_steps", "4")
    assert server.run(training_arguments(one, *fast)) == 0, server.output()
    environment = {"ACCELERATE_DYNAMO_BACKEND": "eager"}
    assert server.run(training_arguments(two, *fast), processes=2, environment=environment) == 0, (
        server.output()
    )
    assert_same_training(two, one)


@pytest.mark.slow
def test_accelerate_launch_with_inductor(tmp_path: Path) -> None:
    """Stopped, resumed, evaluated and exported by the commands; the resumed run is bitwise equal."""
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu"]
    launch += ["--num_processes", "1", "--dynamo_backend", "inductor", str(REPOSITORY / "pysupcon/train.py")]
    fixed = (
        "--data.dataset digits --data.augmentation weak --data.batch_size 128 --model.width 8 "
        "--trainer.epochs 1 --trainer.threads 1 --evaluation.evaluators [knn]"
    )

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=560
        )

    whole, folder = str(tmp_path / "whole"), str(tmp_path / "run")
    done = command(*launch, *fixed.split(), "--output_dir", whole)
    assert done.returncode == 0, done.stderr
    assert "knn" in done.stdout
    stopped = command(*launch, *fixed.split(), "--output_dir", folder, "--trainer.time_budget", "1e-6")
    assert f"exit status {EX_TEMPFAIL}" in stopped.stderr
    resumed = command(*launch, *fixed.split(), "--output_dir", folder, "--resume_from_checkpoint", "latest")
    assert resumed.returncode == 0, resumed.stderr
    assert_same(tmp_path / "run", tmp_path / "whole")
    for words in (["evaluate", folder], ["export", folder, "--output", str(tmp_path / "hub")]):
        finished = command(sys.executable, "-m", "pysupcon", *words)
        assert finished.returncode == 0, finished.stderr
