"""What a training stands on: accelerator, trackers, threads."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import GradientAccumulationPlugin

from pysupcon.config import Config
from pysupcon.errors import ConfigError
from pysupcon.trainer.environment import check_processes


def join_processes(cpu: bool) -> PartialState:
    """Accelerate's view of the processes. After a restart by torchrun addresses of the dead ones may still
    stand in its store: the new ones meet under a name of their own.

    Raises:
        ConfigError: the launcher started processes that do not join.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt != "0" and not dist.is_initialized():
        store, rank, processes = next(dist.rendezvous("env://"))
        backend = "nccl" if torch.cuda.is_available() and not cpu else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore(f"restart_{attempt}", store), rank=rank, world_size=processes
        )
    state = PartialState(cpu=cpu)
    check_processes(state.num_processes)
    return state


def build_accelerator(config: Config, run_dir: Path) -> Accelerator:
    """Accelerate's object for a config, after :func:`pysupcon.trainer.environment.settle`.

    Raises:
        ConfigError: the precision, a tracker or synchronised batch norm does not fit the machine.
    """
    trainer, matmul_precision = config.trainer, torch.get_float32_matmul_precision()
    try:
        accelerator = Accelerator(
            cpu=trainer.cpu,
            mixed_precision=trainer.mixed_precision,
            log_with=list(trainer.trackers) or None,
            project_dir=str(run_dir),
            step_scheduler_with_optimizer=False,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the step accumulates
        )
    except ValueError as error:
        raise ConfigError(
            f"trainer.mixed_precision or trainer.trackers does not fit here: {error}"
        ) from error
    # With a compiled model Accelerate allows TF32, in the losses too, which would be another training.
    torch.set_float32_matmul_precision(matmul_precision)
    if trainer.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ConfigError(
            "trainer.mixed_precision=fp16 is not for this training, which runs on "
            f"{accelerator.device.type}: take bf16 or no"
        )
    if trainer.sync_batch_norm and accelerator.device.type != "cuda":
        raise ConfigError(
            "trainer.sync_batch_norm needs CUDA devices, which torch.nn.SyncBatchNorm is written for; this "
            f"training runs on {accelerator.device.type}: leave it out"
        )
    return accelerator


def start_trackers(accelerator: Accelerator, config: Config) -> None:
    """Start the trackers with the config as the run's parameters; on the main process only.

    Raises:
        ConfigError: a tracker is not installed.
    """
    if not config.trainer.trackers:
        return
    flat: dict[str, Any] = {}
    for part, value in asdict(config).items():
        fields = value if isinstance(value, dict) else {"": value}
        flat |= {f"{part}.{key}".rstrip("."): _plain(field) for key, field in fields.items()}
    accelerator.init_trackers("pysupcon", config=flat)
    started = {tracker.name for tracker in accelerator.trackers}
    missing = [name for name in config.trainer.trackers if name not in started]
    if missing and accelerator.is_main_process:
        raise ConfigError(f"trainer.trackers: {', '.join(missing)} is not installed")


def set_threads(config: Config, state: PartialState) -> None:
    """accelerate launch gives a process one thread; on a CPU that leaves the other cores idle."""
    threads = config.trainer.threads
    if threads is None and state.device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        threads = max(cores // local, 1)
    if threads is not None:
        torch.set_num_threads(threads)


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str) else str(value)
