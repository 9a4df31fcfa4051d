"""The typed config: messages for invalid values, and what is written and read back."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from pysupcon.config import Config, load_config, parse_args, to_yaml
from pysupcon.errors import ConfigError, check_all
from pysupcon.train import main

ENTROPY = "--loss.name none --model.classifier true --loss.cross_entropy_weight 1"
RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--loss.tau 1", "unrecognized arguments: --loss.tau 1$"),
        ("--los.temperature 1", r"arguments: --los.temperature 1; did you mean loss.temperature\?$"),
        ("--loss.temperature hot", "loss.temperature must be float or NoneType, got 'hot'"),
        ("--loss.temperature 0", "loss.temperature must be greater than 0, got 0"),
        ("--loss.name triplet", "loss.name must be Literal.*'sincere'.*, got 'triplet'"),
        ("--loss.gather round", "loss.gather must be bool or Literal.*'ring'.*, got 'round'"),
        ("--loss.alpha 0.3", "loss.alpha has no effect with loss.name=supcon, only with spread"),
        ("--loss.name spread --loss.alpha 1.5", r"loss.alpha must lie in \[0, 1\], got 1.5"),
        ("--loss.name sincere --loss.epsilon 0.1", "loss.epsilon has no effect with loss.name=sincere"),
        ("--loss.name cnce --data.views 1", "data.views must be at least 2 for loss.name=cnce.*got 1"),
        ("--loss.contrast_mode one --data.views 1", "loss.contrast_mode=one needs data.views of at least 2"),
        ("--loss.cross_entropy_weight 1", "loss.cross_entropy_weight is 1.0, but model.classifier is false"),
        ("--model.classifier true", "model.classifier is true, but loss.cross_entropy_weight is 0"),
        ("--loss.reconstruction_weight 1", "loss.reconstruction_weight is 1.0, but model.decoder is none"),
        ("--model.decoder plain", "model.decoder is plain, but loss.reconstruction_weight is 0"),
        ("--loss.reconstruction_weight -1", "loss.reconstruction_weight must be at least 0, got -1"),
        ("--loss.name none", "loss.name=none leaves nothing to train on: pass --model.classifier true"),
        (f"{ENTROPY} --loss.temperature 1", "loss.temperature has no effect with loss.name=none: leave it"),
        (f"{ENTROPY} --loss.weight 2", "loss.weight has no effect with loss.name=none"),
        (f"{ENTROPY} --loss.pairing cross", "loss.pairing has no effect with loss.name=none"),
        (f"{ENTROPY} --loss.alpha 0.5", "loss.alpha has no effect with loss.name=none, only with spread"),
        (f"{ENTROPY} --model.projection mlp", "model.projection has no effect with loss.name=none"),
        (f"{ENTROPY} --model.normalize false", "model.normalize has no effect with loss.name=none"),
        (f"{ENTROPY} --trainer.best_by contrastive", "best_by=contrastive needs a contrastive loss"),
        ("--trainer.best_by reconstruction", "trainer.best_by=reconstruction needs model.decoder"),
        ("--loss.name infonce --loss.infonce_weight 1", "loss.infonce_weight adds InfoNCE to another loss"),
        ("--loss.infonce_weight 1 --data.views 1", "loss.infonce_weight needs data.views of at least 2"),
        ("--loss.pairing cross --data.views 3", "loss.pairing=cross needs data.views of 2, got 3"),
        (
            "--loss.pairing cross --loss.contrast_mode one",
            "loss.contrast_mode must be left out for loss.pair",
        ),
        ("--loss.queue -1", "loss.queue must be at least 0, got -1"),
        ("--loss.batch_negatives false", "loss.queue must be greater than 0 for loss.batch_negatives=false"),
        ("--loss.pairing cross --loss.queue 9", "loss.queue must be left out for loss.pairing=cross, got 9"),
        (f"{ENTROPY} --loss.queue 9", "loss.queue has no effect with loss.name=none"),
        (f"{ENTROPY} --model.momentum 0.9", "model.momentum needs a contrastive loss, got loss.name=none"),
        ("--model.momentum 1", r"model.momentum must lie in \[0, 1\), got 1"),
        ("--model.momentum 0.9 --data.views 1", "model.momentum needs data.views of 2, got 1"),
        ("--model.momentum 0.9 --loss.pairing cross", "loss.pairing must be left out for model.momentum"),
        ("--model.encoders two", "model.encoders=two needs model.decoder, which trains the second backbone"),
        (
            "--model.encoders two --model.decoder plain --loss.reconstruction_weight 1 --loss.name none",
            "model.encoders=two needs a contrastive loss for the first backbone",
        ),
        ("--model.lipschitz 2", "model.lipschitz has no effect with model.spectral_norm=false"),
        ("--model.spectral_norm true --model.lipschitz 0", "model.lipschitz must be greater than 0, got 0"),
        (
            "--model.spectral_norm true --trainer.sync_batch_norm true",
            "trainer.sync_batch_norm does not work with model.spectral_norm",
        ),
        (
            '--model.concatenated [{"model":{}},{"model":{}}]',
            "model.concatenated describes backbones that are",
        ),
        (
            '--model.concatenated [{"model":{"depth":1}}]',
            r"model.concatenated\[0\] must describe a trained model",
        ),
        (
            '--model.concatenated [{"model":{}}] --model.classifier true',
            "model.classifier has no effect with model.concatenated",
        ),
        (
            "--model.width 8 --model.backbone resnet18",
            "model.width must be left out for the timm model resnet18",
        ),
        ("--model.projection_dim 8", "model.projection_dim has no effect with model.projection=none"),
        ("--model.timm_args {a:1}", "model.timm_args must be"),
        ("--model.small_stem true", "model.small_stem must be false for small_cnn"),
        ("--data.dataset mnist", "data.root must be the folder that holds mnist, got None; pass --data.root"),
        ("--data.root /somewhere", "data.root has no effect with data.dataset=mnist5k"),
        ("--data.download true", "data.download has no effect with data.dataset=mnist5k"),
        ("--data.dataset mnist --data.root . --data.test_fraction 0.1", "data.test_fraction has no effect"),
        (
            "--data.dataset image_folder --data.root .",
            "data.image_size must be given for image_folder, got None",
        ),
        ("--data.coarse_map {a:b}", "data.coarse_map"),
        ("--data.batch_size 1", "data.batch_size must be at least 2, got 1"),
        ("--data.val_fraction 0", "data.val_fraction must lie in"),
        ("--trainer.epochs 1.5", "trainer.epochs must be int, got '?1.5"),
        ("--trainer.epochs 0", "trainer.epochs must be at least 1, got 0"),
        ("--trainer.clip_norm 0", "trainer.clip_norm must be greater than 0"),
        ("--trainer.mixed_precision int8", "trainer.mixed_precision must be"),
        ("--trainer.chunk_size 0", "trainer.chunk_size must be at least 1, got 0"),
        ("--trainer.checkpoint_steps 0", "trainer.checkpoint_steps must be at least 1, got 0"),
        ("--trainer.time_budget 0", "trainer.time_budget must be greater than 0, got 0"),
        ("--trainer.ema_decay 1", r"trainer.ema_decay must lie in \(0, 1\), got 1"),
        ("--trainer.final_weights ema", "trainer.ema_decay must be given for final_weights=ema"),
        (
            "--trainer.final_weights best --trainer.best_by null",
            "trainer.best_by must be given for final_weights=best",
        ),
        ("--trainer.best_by cross_entropy", "trainer.best_by=cross_entropy needs model.classifier"),
        ("--trainer.best_by precision", "trainer.best_by must be"),
        ("--evaluation.features projection", "evaluation.features=projection needs a projection head"),
        ("--data.train_on_val true", "trainer.best_by must be null for data.train_on_val"),
        (
            "--data.train_on_val true --trainer.best_by null --evaluation.evaluators knn,linear_probe",
            "linear_probe chooses on validation images, which data.train_on_val trains on",
        ),
        (
            "--data.train_on_val true --data.train_size 100 --trainer.best_by null",
            "data.train_size must be left out for data.train_on_val",
        ),
        ("--trainer.best_by accuracy", "trainer.best_by=accuracy needs model.classifier"),
        ("--optimizer.momentum 0.9", "optimizer.momentum must be left out for adamw, got 0.9"),
        ("--optimizer.warmup_epochs 11", "optimizer.warmup_epochs must be at most trainer.epochs=10, got 11"),
        ("--evaluation.evaluators [nothing]", "evaluation.*nothing"),
        ("--config /nowhere/x.yaml", "/nowhere/x.yaml"),
    ],
)
def test_refuses(args: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_args(args.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss: {name: supcon\ndata: [", "line 2"),
        ("loss:\n  tau: 3\n", "loss.*tau"),
        ("loss:\n  temperatur: 3\n", r"'temperatur'; did you mean loss.temperature\?$"),
        ("- 1\n- 2\n", "mapping|Expected"),
        ("trainer:\n  epochs: many\n", "trainer.epochs must be int, got 'many'"),
    ],
)
def test_refuses_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)
    with pytest.raises(ConfigError, match=str(path)):
        load_config(path)
    with pytest.raises(ConfigError):
        parse_args(["--config", str(path)])


def test_command_line_overrides_file(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("loss: {name: sincere, temperature: 0.2}\ntrainer: {epochs: 3}\n")
    config, name = parse_args(["--config", str(path), "--loss.temperature", "0.1"])
    assert (config.loss.name, config.loss.temperature, config.trainer.epochs) == ("sincere", 0.1, 3)
    assert name == "short"
    assert parse_args([])[1] == "supcon-mnist5k"


def test_resolved_config_is_written_and_read_back(tmp_path: Path) -> None:
    config, _ = parse_args(["--loss.name", "spread", "--optimizer.name", "lars", "--model.projection", "mlp"])
    resolved = (config.loss.temperature, config.loss.alpha, config.loss.base, config.optimizer.momentum)
    assert resolved == (0.5, 0.5, "supcon", 0.9)
    assert (config.model.width, config.model.projection_dim, config.data.test_fraction) == (32, 128, 0.2)
    assert config.model.lipschitz is None
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_what_is_trained_without_a_contrastive_loss_has_no_temperature(tmp_path: Path) -> None:
    config, _ = parse_args([*ENTROPY.split(), "--model.spectral_norm", "true"])
    assert (config.loss.temperature, config.loss.alpha, config.model.lipschitz) == (None, None, 1.0)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    own = ("data", "model", "loss", "optimizer", "trainer")
    for part in own:
        for field in fields(getattr(Config(), part)):
            start = text.index(f"\n  --{part}.{field.name}")
            explanation = text[start:].split("(type:")[0].split()[2:]
            assert len(explanation) > 3, f"{part}.{field.name} has no explanation"
    assert all(is_dataclass(getattr(Config(), part)) for part in own)


def test_print_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--loss.temperature", "0.3", "--print_config"])
    assert "temperature: 0.3" in capsys.readouterr().out


def test_mistake_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["--output_dir", str(out), "--data.dataset", "digits", "--data.batch_size", "5000"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    line = "train.py: error: data.batch_size must be at most the 1295 training samples, got 5000, e.g. "
    assert captured.err.endswith(line + "--data.batch_size 256\n")
    assert not out.exists()


def test_all_mistakes_are_reported_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    args = "--data.dataset image_folder --data.batch_size 1 --loss.temperature 0 --trainer.epochs 0"
    assert main(args.split()) == 2
    assert capsys.readouterr().err.splitlines() == [
        "train.py: error: data.batch_size must be at least 2, got 1",
        "data.root must be the folder that holds image_folder, got None; pass --data.root FOLDER",
        "data.image_size must be given for image_folder, got None",
        "loss.temperature must be greater than 0, got 0.0",
        "trainer.epochs must be at least 1, got 0",
    ]


def test_a_check_that_relies_on_a_failed_one_adds_nothing() -> None:
    with pytest.raises(ConfigError) as raised:
        parse_args(["--data.sampler", "per_class", "--optimizer.schedule", "step"])
    assert [line.split()[0] for line in str(raised.value).splitlines()] == [
        "data.samples_per_class",
        "optimizer.milestones",
    ]
    with pytest.raises(ZeroDivisionError):
        check_all(lambda: 1 / 0)


def test_the_summary_of_torchrun_shows_the_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert main(["--data.batch_size", "1"]) == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    assert failure.message["message"] == "data.batch_size must be at least 2, got 1"
    assert failure.timestamp > 0


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid_and_opens_with_its_cost(recipe: Path) -> None:
    args = ["--config", str(recipe)]
    if "cifar" in recipe.stem:
        args += ["--data.root", "somewhere"]
    parse_args(args)
    assert recipe.read_text().startswith("# ")
    assert f"accelerate launch pysupcon/train.py --config configs/{recipe.name}" in recipe.read_text()


def test_there_are_recipes() -> None:
    assert {"mnist_coarse_spread", "digits_smoke", "cifar10_supcon", "cifar10_sincere"} <= {
        p.stem for p in RECIPES
    }


def stored(tmp_path: Path, evaluation: str) -> Path:
    """The config of a run with an unknown evaluator."""
    config = parse_args(["--loss.temperature", "0.3"])[0]
    text = to_yaml(config)
    path = tmp_path / "config.yaml"
    path.write_text(text[: text.index("evaluation:")] + evaluation)
    return path


def test_evaluators_that_this_version_does_not_know_leave_a_run_readable(tmp_path: Path) -> None:
    path = stored(tmp_path, "evaluation:\n  batch_size: 33\n  vanished: {a: 1}\n  knn: {neighbours_of: 3}\n")
    with pytest.warns(
        UserWarning, match=r"config.yaml: evaluation.vanished, evaluation.knn.neighbours_of is unk"
    ):
        config = load_config(path)
    assert (config.loss.temperature, config.evaluation.batch_size) == (0.3, 33)
    path = stored(tmp_path, "evaluation:\n  batch_size: 33\n  evaluators: [oracle]\n")
    with pytest.warns(UserWarning, match=r"config.yaml: the defaults are used for evaluation: .*oracle"):
        config = load_config(path)
    assert config.evaluation == Config().evaluation
    assert config.loss.temperature == 0.3
    path.write_text(path.read_text().replace("temperature: 0.3", "temperature: 0.3\n  tau: 1"))
    with pytest.raises(ConfigError, match="tau"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"evaluation.*vanished"):
        parse_args(["--evaluation.vanished", "1"])
