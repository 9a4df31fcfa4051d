"""configs/: every file is a training that resolves, says what it costs and how it is started, and builds on
shared parts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

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
