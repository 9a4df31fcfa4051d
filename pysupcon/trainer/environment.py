"""The environment in which a training starts, checked before Accelerate's objects read it.

What :mod:`pysupcon.trainer.variables` calls refused is refused, what it calls honoured is checked against the
config and the rest of the environment. Precision and CPU are written to the config, so that a run's folder
says how it was trained.
"""

from __future__ import annotations

import os

import torch
from accelerate.utils import is_torch_xla_available

from pysupcon.config import Config
from pysupcon.errors import ConfigError
from pysupcon.trainer.progress import say
from pysupcon.trainer.variables import find

ON = ("y", "yes", "t", "true", "on", "1")
OFF = ("n", "no", "f", "false", "off", "0")
BACKENDS = ("no", "eager", "aot_eager", "inductor")
"""of Dynamo, that train; the others are for inference or for other devices"""
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
"""modes that keep a model's outputs only until it runs again"""
PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""How many processes there are, as launchers say it"""


def settle(config: Config) -> None:
    """Refuse what cannot be honoured, and write to the config what the environment decides.

    Every process calls it, before it makes any of Accelerate's objects.

    Raises:
        ConfigError: names the variable.
    """
    for name, value in sorted(os.environ.items()):
        variable = find(name)
        if variable is None:
            if name.startswith("ACCELERATE_") and os.environ.get("RANK", "0") == "0":
                say(f"{name}={value} is unknown here: what it does to a training is not tested")
        elif variable.kind == "refused" and value.lower() not in (*OFF, "", "none"):
            raise ConfigError(f"{name}={value} is not supported: {variable.text}")
    if is_torch_xla_available():
        raise ConfigError("torch_xla is installed and XLA devices are not supported: set USE_TORCH_XLA=0")
    _settle_precision(config)
    config.trainer.cpu = _flag("ACCELERATE_USE_CPU") or config.trainer.cpu
    _check_device(config)
    _check_agreement("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "accumulation_steps", config)
    _check_agreement("ACCELERATE_GRADIENT_CLIPPING", "clip_norm", config)
    _check_dynamo(config)


def dynamo_backend() -> str:
    """By which the model is compiled; "no": it is not."""
    return os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()


def check_processes(joined: int) -> None:
    """Refuse processes that would each train by themselves.

    Raises:
        ConfigError: a launcher started another number of processes than the ``joined`` ones.
    """
    for name in PROCESSES:
        if os.environ.get(name, "1") not in ("1", str(joined)):
            raise ConfigError(
                f"{name}={os.environ[name]}, but {joined} joined: processes on CPUs need --trainer.cpu true, "
                "and a single process needs the variable unset"
            )


def _flag(name: str) -> bool:
    value = os.environ.get(name, "false")
    if value.lower() not in (*ON, *OFF):
        raise ConfigError(f"{name} must be true or false, got {value!r}")
    return value.lower() in ON


def _several_processes() -> bool:
    return any(os.environ.get(name, "1") != "1" for name in PROCESSES)


def _settle_precision(config: Config) -> None:
    name, trainer = "ACCELERATE_MIXED_PRECISION", config.trainer
    told = os.environ.get(name, "no").lower()
    if told not in ("no", "bf16", "fp16"):
        raise ConfigError(f"{name}={told} is not supported: the precisions are no, bf16 and fp16")
    if trainer.mixed_precision is not None and told not in ("no", trainer.mixed_precision):
        raise ConfigError(
            f"{name}={told} contradicts trainer.mixed_precision={trainer.mixed_precision}: leave one of them "
            "out"
        )
    if trainer.mixed_precision is None:
        trainer.mixed_precision = told  # type: ignore[assignment]


def _check_device(config: Config) -> None:
    name = "ACCELERATE_TORCH_DEVICE"
    value = os.environ.get(name)
    if value is None:
        return
    try:
        kind = torch.device(value).type
    except RuntimeError as error:
        raise ConfigError(f"{name}={value} is no device: {' '.join(str(error).split())}") from error
    here = torch.accelerator.current_accelerator()
    kinds = {"cpu"} if config.trainer.cpu or here is None else {"cpu", here.type}
    if kind not in kinds:
        raise ConfigError(
            f"{name}={value} must be of {' or '.join(sorted(kinds))} here, with "
            f"trainer.cpu={config.trainer.cpu}"
        )
    if _several_processes():
        raise ConfigError(
            f"{name}={value} would give the same device to every process: leave it out, and choose with "
            "CUDA_VISIBLE_DEVICES"
        )


def _check_agreement(name: str, field: str, config: Config) -> None:
    told, own = os.environ.get(name), getattr(config.trainer, field)
    try:
        agrees = told is None or (own is None if told.lower() in ("", "none") else float(told) == own)
    except ValueError:
        agrees = False
    if not agrees:
        raise ConfigError(
            f"{name}={told} does not agree with trainer.{field}={own}: set the field, and leave the variable "
            "out"
        )


def _check_dynamo(config: Config) -> None:
    prefix = "ACCELERATE_DYNAMO_"
    backend, mode = dynamo_backend(), os.environ.get(f"{prefix}MODE", "default")
    flags = ("USE_FULLGRAPH", "USE_DYNAMIC", "USE_REGIONAL_COMPILATION")
    used = [f"{prefix}{flag}" for flag in flags if _flag(f"{prefix}{flag}")]
    if backend not in BACKENDS:
        raise ConfigError(
            f"{prefix}BACKEND={backend} is not supported: it must be one of {', '.join(BACKENDS)}"
        )
    if mode not in MODES:
        raise ConfigError(f"{prefix}MODE={mode} is unknown: it must be one of {', '.join(MODES)}")
    if backend != "inductor" and mode != "default":
        raise ConfigError(
            f"{prefix}MODE={mode} has no effect with {prefix}BACKEND={backend}, only with inductor"
        )
    if backend == "no" and used:
        raise ConfigError(f"{', '.join(used)} has no effect without {prefix}BACKEND")
    if mode in WITH_CUDA_GRAPHS:
        for field, several in (
            ("chunk_size", config.trainer.chunk_size is not None),
            ("accumulation_steps", config.trainer.accumulation_steps > 1),
        ):
            if several:
                raise ConfigError(
                    f"{prefix}MODE={mode} runs CUDA graphs, which do not go with trainer.{field}: the model "
                    "runs several times a step; take max-autotune-no-cudagraphs or default"
                )
    regional = f"{prefix}USE_REGIONAL_COMPILATION" in used
    if f"{prefix}USE_FULLGRAPH" in used and _several_processes() and not regional:
        raise ConfigError(
            f"{prefix}USE_FULLGRAPH does not go with several processes: DistributedDataParallel is no part "
            "of a graph"
        )
    if regional and config.model.spectral_norm:
        raise ConfigError(
            f"{prefix}USE_REGIONAL_COMPILATION does not go with model.spectral_norm, whose parts Accelerate "
            "takes for repeated blocks"
        )
