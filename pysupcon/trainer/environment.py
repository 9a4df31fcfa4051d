"""What Accelerate reads from the environment, and what becomes of it here.

``accelerate launch`` passes its flags and its config file on as environment variables, and Accelerate's
objects read them wherever their arguments do not say otherwise. :data:`VARIABLES` lists them all: each is
honoured, refused by its name before the training starts, or harmless. Precision and CPU are written to the
config, so that a run's folder says how it was trained.
"""

from __future__ import annotations

import os
from typing import Literal, NamedTuple

import torch
from accelerate.utils import is_torch_xla_available

from pysupcon.config import Config
from pysupcon.errors import ConfigError
from pysupcon.trainer.progress import say

ON = ("y", "yes", "t", "true", "on", "1")
OFF = ("n", "no", "f", "false", "off", "0")
BACKENDS = ("no", "eager", "aot_eager", "inductor")
"""of Dynamo, that train; the others are for inference or for other devices"""
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
"""modes that keep a model's outputs only until it runs again"""
PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""How many processes there are, as launchers say it"""


class Variable(NamedTuple):
    """What becomes of a variable, or of all whose names a pattern with ``*`` at its end stands for.

    Attributes:
        kind: harmless: without effect on a training here, as ``text`` explains.
        text: what it does (honoured), what to do instead (refused), or why it has no effect (harmless).
    """

    kind: Literal["honoured", "refused", "harmless"]
    text: str


def _honoured(text: str) -> Variable:
    return Variable("honoured", text)


def _refused(text: str) -> Variable:
    return Variable("refused", text)


def _harmless(text: str) -> Variable:
    return Variable("harmless", text)


_SHARDED = "a model is not sharded here: every process holds all of it; for a larger batch use "
_PROCESSES = _honoured("numbers the processes and finds the first of them")
_MPI = _honoured("numbers the processes on CPUs that mpirun starts; needs trainer.cpu")
_TRACKER = _honoured("names what the tracker of trainer.trackers writes")
_XLA = _harmless("read on XLA devices, which are refused")
_NOTEBOOK = _harmless("read by Accelerate's launchers for notebooks")
_COMMAND = _harmless("read by Accelerate's command line, before it starts the training")

VARIABLES: dict[str, Variable] = {
    "ACCELERATE_MIXED_PRECISION": _honoured("trainer.mixed_precision, where that is None; no else"),
    "ACCELERATE_USE_CPU": _honoured("trainer.cpu"),
    "ACCELERATE_TORCH_DEVICE": _honoured("the device of the only process"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": _honoured("has to agree with trainer.accumulation_steps"),
    "ACCELERATE_GRADIENT_CLIPPING": _honoured("has to agree with trainer.clip_norm"),
    "ACCELERATE_DYNAMO_BACKEND": _honoured("compiles the model: eager, aot_eager or inductor"),
    "ACCELERATE_DYNAMO_MODE": _honoured("of inductor"),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": _honoured("fullgraph of torch.compile"),
    "ACCELERATE_DYNAMO_USE_DYNAMIC": _honoured("dynamic of torch.compile"),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": _honoured("compiles repeated blocks one by one"),
    "ACCELERATE_CPU_AFFINITY": _honoured("binds a process to the cores near its GPU; nothing without GPUs"),
    "ACCELERATE_DEBUG_MODE": _honoured("compares what the processes exchange"),
    "ACCELERATE_LOG_LEVEL": _honoured("of Accelerate's own messages"),
    "USE_TORCH_XLA": _honoured("0 has Accelerate pass over an installed torch_xla"),
    "RANK": _PROCESSES, "LOCAL_RANK": _PROCESSES, "WORLD_SIZE": _PROCESSES, "LOCAL_WORLD_SIZE": _PROCESSES,
    "MASTER_ADDR": _PROCESSES, "MASTER_PORT": _PROCESSES,
    "NCCL_P2P_DISABLE": _honoured("by NCCL"), "NCCL_IB_DISABLE": _honoured("by NCCL"),
    "CCL_WORKER_COUNT": _honoured("by oneCCL"),
    "PMI_*": _MPI, "OMPI_COMM_WORLD_*": _MPI, "MV2_COMM_WORLD_*": _MPI, "MPI_*": _MPI,
    "CLEARML_*": _TRACKER, "MLFLOW_*": _TRACKER, "WANDB_*": _TRACKER,
    "ACCELERATE_USE_FSDP": _refused(_SHARDED + "trainer.chunk_size"),
    "ACCELERATE_USE_DEEPSPEED": _refused(_SHARDED + "trainer.chunk_size"),
    "ACCELERATE_USE_MEGATRON_LM": _refused("Megatron-LM trains language models"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": _refused(
        "the only parallelism here is that of the data; for a loss over all processes' rows use loss.gather"
    ),
    "ACCELERATE_USE_SAGEMAKER": _refused("start it there with torchrun"),
    "ACCELERATE_USE_IPEX": _refused("the Intel extension is not supported; Accelerate 1.15 dropped it"),
    "ACCELERATE_FP8_BACKEND": _refused("the precisions are no, bf16 and fp16 (trainer.mixed_precision)"),
    "ACCELERATE_FP8_*": _harmless("read for the precision fp8, which is refused"),
    "FSDP_*": _harmless("read with ACCELERATE_USE_FSDP, which is refused"),
    "ACCELERATE_DEEPSPEED_*": _harmless("read with ACCELERATE_USE_DEEPSPEED, which is refused"),
    "ACCELERATE_CONFIG_DS_FIELDS": _harmless("read with ACCELERATE_USE_DEEPSPEED, which is refused"),
    "DEEPSPEED_USE_HPU": _harmless("written, not read, by Accelerate"),
    "MEGATRON_LM_*": _harmless("read with ACCELERATE_USE_MEGATRON_LM, which is refused"),
    "PARALLELISM_CONFIG_*": _harmless("read with ACCELERATE_USE_PARALLELISM_CONFIG, which is refused"),
    "ACCELERATE_ALLOW_CP_STANDALONE": _harmless("read for context parallelism, which is refused"),
    "ACCELERATE_SAGEMAKER_*": _harmless("read with ACCELERATE_USE_SAGEMAKER, which is refused"),
    "ACCELERATE_DOWNCAST_BF16": _XLA, "XLA_*": _XLA, "TPU_NAME": _XLA, "PJRT_DEVICE": _XLA,
    "ACCELERATE_IN_TPU_POD": _XLA,
    "PT_HPU_LAZY_MODE": _harmless("read with ACCELERATE_USE_DEEPSPEED, which is refused"),
    "ACCELERATE_BYPASS_DEVICE_MAP": _harmless("the model has no device map"),
    "ACCELERATE_INIT_INCLUDE_BUFFERS": _harmless("read for models that are built without memory"),
    "ACCELERATE_ENABLE_RICH": _harmless("colours error messages"),
    "PYTORCH_ENABLE_MPS_FALLBACK": _harmless("written by Accelerate, read by torch"),
    "OMP_NUM_THREADS": _harmless("trainer.threads decides; accelerate launch always sets it"),
    "FORK_LAUNCHED": _NOTEBOOK, "NPROC": _NOTEBOOK, "NODE_RANK": _NOTEBOOK, "KAGGLE*": _NOTEBOOK,
    "ACCELERATE_DEBUG_RDV_FILE": _NOTEBOOK,
    "HF_HOME": _COMMAND, "XDG_CACHE_HOME": _COMMAND, "AWS_*": _COMMAND, "systemdrive": _COMMAND,
}  # fmt: skip


def find(name: str) -> Variable | None:
    """The entry of a variable: its own, else that of the longest pattern that fits."""
    if name in VARIABLES:
        return VARIABLES[name]
    patterns = [key for key in VARIABLES if key.endswith("*") and name.startswith(key[:-1])]
    return VARIABLES[max(patterns, key=len)] if patterns else None


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
    if any(os.environ.get(processes, "1") != "1" for processes in PROCESSES):
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
    if f"{prefix}USE_REGIONAL_COMPILATION" in used and config.model.spectral_norm:
        raise ConfigError(
            f"{prefix}USE_REGIONAL_COMPILATION does not go with model.spectral_norm, whose parts Accelerate "
            "takes for repeated blocks"
        )
