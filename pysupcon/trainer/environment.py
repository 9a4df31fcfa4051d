"""Check the environment variables of Accelerate before its objects read them.

Variables that :mod:`pysupcon.trainer.variables` lists as refused raise an error. Honoured variables are
checked against the config and against each other. The precision, the use of the CPU and inductor are written
to the config, so that the folder of a run records them.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from accelerate.utils import is_torch_xla_available

from pysupcon.config import Config
from pysupcon.errors import ConfigError
from pysupcon.reading import one_line
from pysupcon.trainer.progress import print_line
from pysupcon.trainer.variables import lookup

ON = ("y", "yes", "t", "true", "on", "1")
OFF = ("n", "no", "f", "false", "off", "0")
BACKENDS = ("no", "eager", "aot_eager", "inductor")
"""Dynamo backends that can train; the others are for inference or for other devices."""
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes in which the next run of a model overwrites its outputs."""
PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables in which launchers pass the number of processes."""


def apply_environment(config: Config) -> None:
    """Refuse unsupported variables and write the environment's choices to the config.

    Every process calls this before it creates an object of Accelerate.

    Raises:
        ConfigError: a variable is not supported or contradicts the config; the message names it.
    """
    for name, value in sorted(os.environ.items()):
        variable = lookup(name)
        if variable is None:
            first = os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"
            if name.startswith("ACCELERATE_") and first:
                print_line(f"{name}={value} is not known to pysupcon: its effect on a training is not tested")
        elif variable.kind == "refused" and value.lower() not in (*OFF, "", "none"):
            raise ConfigError(f"{name}={value} is not supported: {variable.text}")
    if is_torch_xla_available():
        raise ConfigError("torch_xla is installed and XLA devices are not supported: set USE_TORCH_XLA=0")
    _apply_precision(config)
    config.trainer.cpu = _flag("ACCELERATE_USE_CPU") or config.trainer.cpu
    if _several_processes() and not torch.accelerator.is_available():
        config.trainer.cpu = True  # otherwise Accelerate would take each process for a training of its own
    _check_device(config)
    _check_agreement("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "accumulation_steps", config)
    _check_agreement("ACCELERATE_GRADIENT_CLIPPING", "clip_norm", config)
    _check_dynamo(config)


def dynamo_backend(config: Config) -> str:
    """Return the torch.compile backend of the model: that of ACCELERATE_DYNAMO_BACKEND, else inductor with
    ``trainer.compile``; "no" if the model is not compiled."""
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    return "inductor" if backend == "no" and config.trainer.compile else backend


def check_processes(processes: int, rank: int) -> None:
    """Refuse processes that would train independently.

    Args:
        processes: number of processes that Accelerate knows.
        rank: number of this process for Accelerate.

    Raises:
        ConfigError: the launcher started another number of processes, or gave this process another rank; or
            the process group of torch.distributed has another number or rank.
    """
    for name in PROCESSES:
        if os.environ.get(name, "1") not in ("1", str(processes)):
            raise ConfigError(
                f"{name}={os.environ[name]}, but {processes} joined: several processes on CPUs need "
                "--trainer.cpu true; for a single process unset the variable"
            )
    own_rank = os.environ.get("RANK", str(rank))
    if own_rank != str(rank):
        raise ConfigError(f"RANK={own_rank}, but the process joined as rank {rank}: unset the variable")
    if dist.is_available() and dist.is_initialized():
        group = dist.get_world_size(), dist.get_rank()
        if group != (processes, rank):
            raise ConfigError(
                f"the process group has {group[0]} processes and this one is rank {group[1]}, but Accelerate "
                f"has {processes} and rank {rank}: leave torch.distributed.init_process_group to the trainer"
            )


def _flag(name: str) -> bool:
    value = os.environ.get(name, "false")
    if value.lower() not in (*ON, *OFF):
        raise ConfigError(f"{name} must be true or false, got {value!r}")
    return value.lower() in ON


def _several_processes() -> bool:
    return any(os.environ.get(name, "1") != "1" for name in PROCESSES)


def _apply_precision(config: Config) -> None:
    name, trainer = "ACCELERATE_MIXED_PRECISION", config.trainer
    value = os.environ.get(name, "no").lower()
    if value not in ("no", "bf16", "fp16"):
        raise ConfigError(f"{name}={value} is not supported: the precisions are no, bf16 and fp16")
    if trainer.mixed_precision is not None and value not in ("no", trainer.mixed_precision):
        raise ConfigError(
            f"{name}={value} contradicts trainer.mixed_precision={trainer.mixed_precision}: leave one of "
            "them out"
        )
    if trainer.mixed_precision is None:
        trainer.mixed_precision = value  # type: ignore[assignment]


def _check_device(config: Config) -> None:
    name = "ACCELERATE_TORCH_DEVICE"
    value = os.environ.get(name)
    if value is None:
        return
    try:
        kind = torch.device(value).type
    except RuntimeError as error:
        raise ConfigError(f"{name}={value} is not a device: {one_line(error)}") from error
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kinds = {"cpu"} if config.trainer.cpu or accelerator is None else {"cpu", accelerator.type}
    if kind not in kinds:
        raise ConfigError(
            f"{name}={value} must be a {' or '.join(sorted(kinds))} device on this machine with "
            f"trainer.cpu={config.trainer.cpu}"
        )
    if _several_processes():
        raise ConfigError(
            f"{name}={value} would give the same device to every process: leave it out and select devices "
            "with CUDA_VISIBLE_DEVICES"
        )


def _check_agreement(name: str, field: str, config: Config) -> None:
    value, own = os.environ.get(name), getattr(config.trainer, field)
    try:
        agrees = value is None or (own is None if value.lower() in ("", "none") else float(value) == own)
    except ValueError:
        agrees = False
    if not agrees:
        raise ConfigError(
            f"{name}={value} does not agree with trainer.{field}={own}: set the field and leave the variable "
            "out"
        )


def _check_dynamo(config: Config) -> None:
    prefix = "ACCELERATE_DYNAMO_"
    backend, mode = dynamo_backend(config), os.environ.get(f"{prefix}MODE", "default")
    flags = ("USE_FULLGRAPH", "USE_DYNAMIC", "USE_REGIONAL_COMPILATION")
    used = [f"{prefix}{flag}" for flag in flags if _flag(f"{prefix}{flag}")]
    if backend not in BACKENDS:
        raise ConfigError(
            f"{prefix}BACKEND={backend} is not supported: it must be one of {', '.join(BACKENDS)}"
        )
    if config.trainer.compile and backend != "inductor":
        raise ConfigError(
            f"{prefix}BACKEND={backend} contradicts trainer.compile=true, which means inductor: leave one of "
            "them out"
        )
    config.trainer.compile = backend == "inductor"
    if mode not in MODES:
        raise ConfigError(f"{prefix}MODE={mode} is unknown: it must be one of {', '.join(MODES)}")
    if backend != "inductor" and mode != "default":
        raise ConfigError(
            f"{prefix}MODE={mode} has no effect with {prefix}BACKEND={backend}, only with inductor"
        )
    if backend == "no" and used:
        raise ConfigError(f"{', '.join(used)} has no effect without {prefix}BACKEND or trainer.compile")
    if mode in WITH_CUDA_GRAPHS:
        for field, several in (
            ("chunk_size", config.trainer.chunk_size is not None),
            ("accumulation_steps", config.trainer.accumulation_steps > 1),
        ):
            if several:
                raise ConfigError(
                    f"{prefix}MODE={mode} uses CUDA graphs, which do not work with trainer.{field}: the "
                    "model runs several times per step; use max-autotune-no-cudagraphs or default"
                )
    regional = f"{prefix}USE_REGIONAL_COMPILATION" in used
    if f"{prefix}USE_FULLGRAPH" in used and _several_processes() and not regional:
        raise ConfigError(
            f"{prefix}USE_FULLGRAPH does not work with several processes: DistributedDataParallel breaks the "
            "graph"
        )
    if regional and config.model.spectral_norm:
        raise ConfigError(
            f"{prefix}USE_REGIONAL_COMPILATION does not work with model.spectral_norm: Accelerate would "
            "compile its modules as repeated blocks"
        )
