"""The start of a training from given weights: files of weights, and layers that are not trained."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pysupcon.errors import ConfigError
from pysupcon.reading import one_line

WEIGHTS_FILE = "model.safetensors"
"""File of the weights in the folders of runs, checkpoints and exports."""
_CONTAINERS = ("state_dict", "model_state_dict", "model", "net")
"""Entries of a file of torch.save that hold the state dict, as common trainers name them."""
_SHOWN = 4


def is_path(name: str) -> bool:
    """Return whether ``model.pretrained`` is a path, not the name of a timm model."""
    return os.path.exists(name) or "/" in name or Path(name).suffix in (".safetensors", ".pt", ".pth", ".bin")


def load_initial_weights(backbone: nn.Module, path: str) -> list[str]:
    """Load the weights of a file into ``backbone``.

    The names in the file may have a prefix, e.g. "backbone." or "module.encoder."; the one that most names of
    the backbone have is removed. A weight of the file is left out if the backbone has no part of that name,
    e.g. that of a classification head.

    Args:
        backbone: the backbone.
        path: file of safetensors or torch.save, or a folder that holds model.safetensors.

    Returns:
        The names of the weights that were left out.

    Raises:
        ConfigError: the file cannot be read, or its weights are not those of the backbone; the message names
            the first ones that differ.
    """
    weights = _read(Path(path).expanduser())
    own = backbone.state_dict()
    prefix = _prefix(own, weights)
    found = {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
    parts = {name.partition(".")[0] for name in own}
    problems = {
        "missing": [name for name in own if name not in found and not name.endswith("num_batches_tracked")],
        "unexpected": [name for name in found if name not in own and name.partition(".")[0] in parts],
        "of another shape": [
            f"{name} ({list(found[name].shape)} instead of {list(value.shape)})"
            for name, value in own.items()
            if name in found and found[name].shape != value.shape
        ],
    }
    told = [f"{kind}: {_first(names)}" for kind, names in problems.items() if names]
    if told:
        raise ConfigError(f"model.pretrained={path} holds the weights of another backbone: {'; '.join(told)}")
    backbone.load_state_dict({name: found.get(name, value) for name, value in own.items()})
    return [name for name in weights if name.removeprefix(prefix) not in own or not name.startswith(prefix)]


def freeze(backbone: nn.Module, layers: int | list[str] | str) -> None:
    """Freeze parameters: they take no gradient. See ``ModelConfig.frozen_layers``.

    Raises:
        ConfigError: there are fewer stages, or no parameter has a prefix.
    """
    for name in _frozen_names(backbone, layers):
        backbone.get_parameter(name).requires_grad_(False)


def keep_statistics(backbone: nn.Module, layers: int | list[str] | str) -> None:
    """Put the frozen BatchNorm layers into eval mode: they use and keep their statistics."""
    frozen = set(_frozen_names(backbone, layers))
    for name, module in backbone.named_modules():
        if isinstance(module, _BatchNorm):
            parameters = {f"{name}.{entry}" if name else entry for entry, _ in module.named_parameters()}
            named = isinstance(layers, list) and _has_prefix(name, layers)
            if layers == "backbone" or named or (parameters and parameters <= frozen):
                module.eval()


def _frozen_names(backbone: nn.Module, layers: int | list[str] | str) -> list[str]:
    """Names of the frozen parameters."""
    names = [name for name, _ in backbone.named_parameters()]
    if layers == "backbone":
        return names
    if isinstance(layers, list):
        for prefix in layers:
            if not any(_has_prefix(name, [prefix]) for name in names):
                parts = dict.fromkeys(name.partition(".")[0] for name in names)
                raise ConfigError(
                    f"model.frozen_layers: no parameter of the backbone has the prefix {prefix}; its parts "
                    f"are {', '.join(parts)}"
                )
        return [name for name in names if _has_prefix(name, layers)]
    assert isinstance(layers, int)
    stages = _stages(backbone, names)
    if layers > len(stages):
        raise ConfigError(
            f"model.frozen_layers must be at most {len(stages)}, the stages of the backbone, got {layers}"
        )
    return [name for stage in stages[:layers] for name in stage]


def _stages(backbone: nn.Module, names: list[str]) -> list[list[str]]:
    """Names of the parameters by stage."""
    matcher = getattr(backbone, "group_matcher", None)
    if matcher is not None:
        from timm.models import group_parameters

        groups: dict[int, list[str]] = group_parameters(backbone, matcher(coarse=True))
        return [groups[number] for number in sorted(groups)]
    parent, root = backbone, ""
    while len(children := list(parent.named_children())) == 1:  # e.g. one Sequential that holds all
        root, parent = f"{root}{children[0][0]}.", children[0][1]
    stages: dict[str, list[str]] = {}
    for name in names:
        stages.setdefault(name.removeprefix(root).partition(".")[0], []).append(name)
    return list(stages.values())


def _has_prefix(name: str, prefixes: Iterable[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _prefix(own: Iterable[str], weights: dict[str, Tensor]) -> str:
    """The prefix in the file under which most of the backbone's names are found; the first of equal ones."""
    counts = {"": 0}
    wanted = set(own)
    for name in weights:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in wanted:
                prefix = "".join(f"{part}." for part in parts[:start])
                counts[prefix] = counts.get(prefix, 0) + 1
    return max(counts, key=lambda prefix: counts[prefix])


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict in a file. Reading it runs no code."""
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"model.pretrained={path}: there is no file {file}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"model.pretrained={path} holds Python objects, not weights alone: save model.state_dict()"
        ) from error
    except Exception as error:  # the readers of safetensors, zip files and pickles raise errors of their own
        raise ConfigError(f"model.pretrained={path} cannot be read: {one_line(error)}") from error
    for name in _CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if isinstance(content, dict):
        content = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"model.pretrained={path} must hold a state dict of tensors")
    return content


def _first(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
