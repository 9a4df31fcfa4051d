"""configs/: every file is a training that resolves, says what it costs and how it is started, and builds on
shared parts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.data_files import write_cifar

from pysupcon.config import Config, compose, load_config, parse_args, to_yaml
from pysupcon.errors import ConfigError
from pysupcon.models.backbones import build_backbone, notes_of
from pysupcon.models.lipschitz import certified_bound

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.relative_to(CONFIGS).parts[0] != "parts")
LAUNCH = "accelerate launch pysupcon/train.py "
COARSE = ("cifar10", "cifar100", "cifar100_u", "mnist", "tiny_imagenet")
METHODS = (
    "ce",
    "infonce",
    "supcon",
    "sincere",
    "supcon_cnce",
    "supcon_autoencoder",
    "ce_autoencoder",
    "thanos",
)


def header(path: Path) -> str:
    """The first comment of a file, without the comment signs."""
    lines = path.read_text(encoding="utf-8").splitlines()
    count = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:count])


def commands(path: Path) -> list[list[str]]:
    """Arguments of the trainings that a file's header names, the configs made findable."""
    found = []
    for line in header(path).splitlines():
        if line.strip().startswith(LAUNCH):
            words = shlex.split(line.strip().removeprefix(LAUNCH))
            found.append(
                [str(CONFIGS.parent / word) if word.startswith("configs/") else word for word in words]
            )
    return found


def resolved(name: str) -> Config:
    """The config of a file, started by its own command."""
    return parse_args(commands(CONFIGS / f"{name}.yaml")[0])[0]


def identity(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


@pytest.mark.parametrize("path", RECIPES, ids=identity)
def test_resolves_by_its_own_command_and_says_what_it_costs(path: Path, tmp_path: Path) -> None:
    text = " ".join(header(path).split())
    started = commands(path)
    assert started, "the header names no command"
    assert started[0][:2] == ["--config", str(path)], "the first command is that of the file itself"
    for args in started:
        config, name = parse_args(args)
        assert name == Path(args[1]).stem
    config, _ = parse_args(started[0])
    said = re.search(r"Cost: (\d+) epochs of [^.]*? in (\d) view", text)
    if said is not None:
        assert (int(said[1]), int(said[2])) == (config.trainer.epochs, config.data.views)
    if path.parent.name in ("coarse", "sincere", "small"):
        assert re.search(r"Cost: \d+ epochs of .* Paper", text), "no cost, or nothing about the paper"
    stored = tmp_path / "config.yaml"
    stored.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(stored) == config
    assert "config" not in yaml.safe_load(stored.read_text(encoding="utf-8")), "a stored config is complete"


def test_every_part_is_used() -> None:
    named = {(path.parent / part).resolve() for path in CONFIGS.rglob("*.yaml") for part in _named(path)}
    assert {path.resolve() for path in (CONFIGS / "parts").rglob("*.yaml")} <= named


def _named(path: Path) -> list[str]:
    found = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("config", [])
    return [found] if isinstance(found, str) else found


@pytest.mark.parametrize("file", ["pysupcon/trainer/README.md", "Makefile"])
def test_configs_that_are_named_exist(file: str) -> None:
    text = (CONFIGS.parent / file).read_text(encoding="utf-8")
    named = set(re.findall(r"configs/[a-z0-9_/]+\.yaml", text))
    assert named
    assert named <= {f"configs/{identity(path)}" for path in RECIPES}


def test_names_of_runs_differ() -> None:
    stems = [path.stem for path in RECIPES]
    assert len(stems) == len(set(stems))


@pytest.mark.parametrize(
    ("data", "rate", "decay", "adjustment"),
    [("waterbirds", 1e-5, 1.0, 2.0), ("celeba", 1e-5, 0.1, 3.0), ("isic", 1e-3, 1e-3, 0.0)],
)
def test_worst_group_recipes_are_those_of_sohoni_et_al(
    data: str, rate: float, decay: float, adjustment: float
) -> None:
    erm, dro = resolved(f"worst_group/{data}_erm"), resolved(f"worst_group/{data}_group_dro_thanos")
    assert (erm.optimizer.learning_rate, erm.optimizer.weight_decay) == (rate, decay)
    assert erm.loss.group_dro is None
    assert erm.trainer.best_by == "accuracy"
    assert dro.loss.group_dro is not None
    assert dro.loss.group_dro.adjustment == adjustment
    assert dro.trainer.best_by == "worst_known_group"  # the groups of data.groups, which are inferred
    assert str(dro.data.groups).endswith(f"runs/{data}_thanos_groups.safetensors")
    for config in (erm, dro):
        assert (config.data.dataset, config.trainer.final_weights) == (data, "best")
        assert config.evaluation.worst_group.adjusted == (data == "waterbirds")
        assert config.evaluation.worst_group.auroc == (data == "isic")
        assert config.data.batch_size == (16 if data == "isic" else 128)
    encoder = resolved(f"worst_group/{data}_supcon_cnce")
    assert (encoder.trainer.best_by, encoder.trainer.final_weights) == (None, "last")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("worst_group/*_group_dro_*.yaml")), ids=identity)
def test_groups_come_from_the_command_of_the_header(path: Path) -> None:
    """The command parses, its runs are those that the header trains, and its file is data.groups."""
    from pysupcon.commands import config_parser
    from pysupcon.commands.infer_groups import InferenceArguments
    from pysupcon.reading import join_lists, list_options

    lines = [line.strip() for line in header(path).splitlines() if "infer-groups" in line]
    if path.stem.endswith("annotated"):
        assert not lines
        return
    words = shlex.split(lines[0].partition("infer-groups ")[2])
    at = words.index("--output")
    assert words[:at] == [f"runs/{Path(args[1]).stem}" for args in commands(path)[1:]]
    assert str(resolved(identity(path).removesuffix(".yaml")).data.groups).endswith(words[at + 1])
    parser = config_parser(prog="infer-groups", description="")
    parser.add_class_arguments(InferenceArguments)
    flags = join_lists(words[at + 2 :], list_options(InferenceArguments))
    found = parser.instantiate(parser.parse_args(flags))
    assert found["subgroups"].whole_classes == ([1] if "isic" in path.stem else [])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", COARSE)
def test_coarse_data_set_with_method(data: str, method: str) -> None:
    config = resolved(f"coarse/{data}_coarse_{method}")
    assert (config.data.dataset, config.data.labels) == (data, "coarse")
    loss, model = config.loss, config.model
    contrastive = {"ce": "none", "ce_autoencoder": "none", "supcon_cnce": "spread", "thanos": "spread"}
    assert loss.name == contrastive.get(method, method.removesuffix("_autoencoder"))
    assert loss.temperature == (None if loss.name == "none" else 0.5)
    assert loss.cross_entropy_weight == (0 if method == "infonce" else 1)
    assert (model.decoder != "none") == (method in ("supcon_autoencoder", "ce_autoencoder", "thanos"))
    assert model.encoders == ("two" if method == "thanos" else "one")
    side = {"mnist": 28, "tiny_imagenet": 64}.get(data, 32)
    wanted = {"patch_size": 4, "embed_dim": 256, "depth": 7, "num_heads": 8, "mlp_ratio": 2}
    assert model.timm_args == {**wanted, "drop_path_rate": 0.05, "img_size": side}
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.learning_rate, config.trainer.epochs) == ("adamw", 3e-4, 600)


def test_the_vision_transformer_is_the_papers() -> None:
    """256 wide, 7 layers, patches of 4: built for MNIST's 28 pixels, with the decoder."""
    import torch

    from pysupcon.models.model import ContrastiveModel

    config = resolved("coarse/mnist_coarse_ce_autoencoder")
    model = ContrastiveModel(config.model, channels=1, image_size=28, classes=2).eval()
    assert model.embedding_dim == 256
    assert sum(p.numel() for p in model.backbone.parameters()) == pytest.approx(3.7e6, rel=0.05)
    with torch.inference_mode():
        assert model.backbone(torch.zeros(2, 1, 28, 28)).shape == (2, 256)


@pytest.mark.parametrize(
    ("name", "rate", "temperature"),
    [
        ("cifar10_sincere", 0.65, 0.1),
        ("cifar10_supcon", 0.35, 0.05),
        ("sincere/cifar100_sincere", 0.65, 0.05),
        ("sincere/cifar100_supcon", 0.65, 0.1),
        ("sincere/imagenet100_sincere", 0.65, 0.05),
        ("sincere/imagenet100_supcon", 0.5, 0.05),
        ("sincere/cifar2_sincere", 0.65, 0.1),
        ("sincere/cifar2_supcon", 0.5, 0.1),
    ],
)
def test_recipes_of_sincere(name: str, rate: float, temperature: float) -> None:
    config = resolved(name)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, config.loss.temperature) == (rate, temperature)
    assert config.loss.name == name.rpartition("_")[2]
    assert optimizer.warmup_start * rate == pytest.approx(0.01, rel=0.01)
    assert (optimizer.name, optimizer.momentum, optimizer.weight_decay) == ("sgd", 0.9, 1e-4)
    assert (optimizer.warmup_epochs, optimizer.final, config.trainer.epochs) == (10, 1e-3, 800)
    assert (config.data.batch_size, config.data.sampler, config.data.labels) == (512, "balanced", "fine")
    assert (config.model.backbone, config.model.projection_dim) == ("resnet50", 128)
    assert config.model.small_stem == ("imagenet" not in name)


@pytest.mark.parametrize("data", ["cifar10", "cifar100", "cifar2", "imagenet100"])
@pytest.mark.parametrize("loss", ["sincere", "supcon", "eps_supinfonce"])
def test_official_recipes_of_sincere(data: str, loss: str) -> None:
    """The final runs: all images, a joining warm-up, the head's output, votes by cosine."""
    config = resolved(f"sincere/{data}_{loss}_official")
    assert config.loss.name == loss
    assert config.data.train_on_val
    assert config.trainer.best_by is None
    rate, optimizer = config.optimizer.learning_rate, config.optimizer
    assert (optimizer.warmup_joins, optimizer.warmup_epochs, optimizer.final) == (True, 10, 1e-3)
    assert optimizer.warmup_start * rate == pytest.approx(0.01, rel=0.01)
    assert (config.evaluation.features, config.evaluation.knn.votes) == ("projection", "cosine")
    if loss == "eps_supinfonce":
        assert (rate, config.loss.temperature, config.loss.epsilon) == (0.5, 0.1, 0.25)
        return
    name = f"{data}_{loss}" if data == "cifar10" else f"sincere/{data}_{loss}"
    plain = resolved(name)
    assert (rate, config.loss.temperature) == (plain.optimizer.learning_rate, plain.loss.temperature)


OFFICIAL = sorted((CONFIGS / "coarse").glob("*_official.yaml"))


@pytest.mark.parametrize("path", OFFICIAL, ids=identity)
def test_official_recipes_of_thanos(path: Path) -> None:
    """Settings of the public code, and the names of what still differs."""
    config = resolved(identity(path).removesuffix(".yaml"))
    text = " ".join(header(path).split())
    assert "What still differs from the code:" in text
    contrastive = config.loss.name != "none"
    assert ("clamps the similarities of positives at s <= 1" in text) == contrastive
    optimizer, trainer = config.optimizer, config.trainer
    assert (optimizer.weight_decay, optimizer.cosine_epochs, trainer.epochs) == (0.01, 100, 600)
    assert (trainer.best_by, trainer.final_weights, config.data.views) == ("accuracy", "best", 2)
    assert config.model.timm_args["proj_drop_rate"] == config.model.timm_args["attn_drop_rate"] == 0.05
    assert config.model.timm_args["patch_size"] == 4
    probe = config.evaluation.coarse_to_fine
    assert (probe.solver, probe.standardize, probe.weight_decay) == ("adamw", False, 0.01)
    assert probe.augmented_passes == probe.epochs == 100, "images are augmented anew in each epoch"
    assert "plain training images" not in text
    if contrastive:
        assert config.loss.pairing == "cross"
        assert "sincere" in (config.loss.name, config.loss.base)
    joint = path.stem.endswith("_thanos_official")
    assert (config.model.encoders == "two", config.model.joint_classifier) == (joint, joint)


def test_the_official_vision_transformer_is_built_with_dropout() -> None:
    from torch import nn

    from pysupcon.models.model import ContrastiveModel

    config = resolved("coarse/cifar10_coarse_thanos_official")
    model = ContrastiveModel(config.model, channels=3, image_size=32, classes=2)
    rates = {layer.p for layer in model.backbone.modules() if isinstance(layer, nn.Dropout)}
    assert 0.05 in rates
    assert model.classifier is not None
    assert model.classifier.in_features == 512


@pytest.mark.slow
def test_an_official_recipe_trains_and_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both backbones with one head, and SINCERE's final run, on images of the form of CIFAR-10."""
    from pysupcon.evaluation.evaluate import evaluate_run
    from pysupcon.trainer.loop import train

    write_cifar(tmp_path, monkeypatch, 10, count=40, test_count=40)
    few = f"--data.root {tmp_path} --data.workers 0 --trainer.cpu true --trainer.threads 1"
    few += " --trainer.max_steps 2 --data.batch_size 10 --trainer.mixed_precision no"
    few += " --evaluation.pictures false --evaluation.coarse_to_fine.steps 30 --evaluation.progress false"
    found = {}
    for name, more in (
        (
            "coarse/cifar10_coarse_thanos_official",
            "--model.timm_args.depth 2 --evaluation.coarse_to_fine.augmented_passes 2",
        ),
        ("sincere/cifar10_sincere_official", "--model.backbone resnet18 --optimizer.warmup_epochs 0.05"),
    ):
        words = ["--config", str(CONFIGS / f"{name}.yaml"), *few.split(), *more.split()]
        run = train(parse_args([*words, "--output_dir", str(tmp_path / name)])[0])
        found[name] = evaluate_run(run)
    thanos, sincere = found.values()
    assert "coarse_to_fine/fine/accuracy" in thanos.metrics
    assert any("2 passes over augmented training images" in note for note in thanos.notes)
    held_out = thanos.metadata["samples"]
    assert sincere.metadata["samples"]["train"] == held_out["train"] + held_out["val"]
    assert sincere.metadata["feature_width"] == 128
    assert "separation/fine/margin" in sincere.metrics


def test_the_size_of_the_unbalanced_cifar_is_that_of_its_headers() -> None:
    """450 of the 500 images of a class are left for training; the others are the validation split."""
    from pysupcon.data.torchvision_datasets import CIFAR100_U_SIZES

    images = 20 * sum(min(450, size) for size in CIFAR100_U_SIZES)
    recipes = [path for path in RECIPES if path.stem.startswith("cifar100_u_")]
    assert recipes
    assert all(f"epochs of {images:,} images" in " ".join(header(path).split()) for path in recipes)


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def test_files_are_merged_in_order(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "parts/base.yaml": "trainer: {epochs: 3, clip_norm: 1e-2}\nloss: {name: sincere}\n",
            "parts/middle.yaml": "config: base.yaml\ntrainer: {epochs: 4}\n",
            "parts/data.yaml": "data: {batch_size: 64}\nloss: {temperature: 0.3}\n",
            "run.yaml": "data: {views: 3}\nconfig: [parts/middle.yaml, parts/data.yaml]\nloss: {name: "
            "supcon}\n",
        },
    )
    merged: dict[str, Any] = {
        "trainer": {"epochs": 4, "clip_norm": 0.01},
        "loss": {"name": "supcon", "temperature": 0.3},
        "data": {"batch_size": 64, "views": 3},
    }
    assert compose(tmp_path / "run.yaml") == merged
    config, name = parse_args(["--config", str(tmp_path / "run.yaml"), "--trainer.epochs", "5"])
    assert (config.trainer.epochs, config.trainer.clip_norm, config.data.batch_size) == (5, 0.01, 64)
    assert (config.loss.name, config.loss.temperature, name) == ("supcon", 0.3, "run")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config: none.yaml", r"none.yaml \(named by .*run.yaml\) cannot be read"),
        ("config: run.yaml", "run.yaml: config must not lead back to the file itself"),
        ("config: {a: 1}", r"run.yaml: config must be a file or a list of files, got \{'a': 1\}"),
        ("config: [1]", r"run.yaml: config must be a file or a list of files, got \[1\]"),
        ("config: list.yaml", "list.yaml must hold a mapping of config fields, got list"),
        ("config: wrong.yaml", "trainer.epochs must be int, got 'many'"),
    ],
)
def test_refuses_to_compose(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, {"run.yaml": text, "list.yaml": "[1]", "wrong.yaml": "trainer: {epochs: many}"})
    with pytest.raises(ConfigError, match=message):
        parse_args(["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem.endswith("_spectral")], ids=identity)
def test_bounded_recipes_bound_every_layer(path: Path) -> None:
    config = resolved(identity(path).removesuffix(".yaml"))
    assert config.model.spectral_norm
    size = config.data.image_size or 32
    backbone, _ = build_backbone(config.model, 3, size)
    assert notes_of(backbone) == []
    assert certified_bound(backbone, (3, size, size)) is not None


@pytest.mark.parametrize("data", ["mnist5k", "fashion_mnist"])
def test_the_permuted_recipe_differs_in_the_partners_only(data: str) -> None:
    plain, permuted = (resolved(f"small/{data}_coarse_supcon_cnce{end}") for end in ("", "_permuted"))
    assert (plain.data.view_partners, permuted.data.view_partners) == ("own", "class")
    plain.data.view_partners = "class"
    assert plain == permuted
