"""Set up the process group, Accelerate, the trackers and the CPU threads of a training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list, gather_object

from pysupcon.config import Config
from pysupcon.data.workers import cores_per_process
from pysupcon.errors import ConfigError, RunError
from pysupcon.reading import one_line
from pysupcon.trainer.environment import check_processes, dynamo_backend

LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun and accelerate launch set for each process"""


def join_processes(cpu: bool) -> PartialState:
    """Join the process group of the launcher.

    After a restart by torchrun its store may still hold addresses of the dead processes, so each restart uses
    a key prefix of its own.

    Args:
        cpu: train on CPUs even if there is an accelerator.

    Returns:
        Accelerate's state of the processes.

    Raises:
        ConfigError: number or rank of the processes differ between launcher, Accelerate and process group.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt != "0" and not dist.is_initialized():
        store, rank, processes = next(dist.rendezvous("env://"))
        backend = "nccl" if torch.cuda.is_available() and not cpu else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore(f"restart_{attempt}", store), rank=rank, world_size=processes
        )
    # Before Accelerate adds its defaults.
    given = [f"{name}={os.environ[name]}" for name in LAUNCHER if name in os.environ]
    missing = [name for name in LAUNCHER if name not in os.environ]
    try:
        state = PartialState(cpu=cpu)
    except ValueError as error:  # variables are missing or no numbers
        failure = ConfigError(
            f"the processes of a launcher cannot join: {one_line(error)}; the environment has "
            f"{', '.join(given) or 'none of its variables'}"
            + (f", and lacks {', '.join(missing)}" if given and missing else "")
            + ": start them with torchrun or accelerate launch; for a single process unset the variables"
        )
        failure.on_one_process = True  # there may be no other process
        raise failure from error
    check_processes(state.num_processes, state.process_index)
    return state


@contextmanager
def own_accelerator_state() -> Iterator[None]:
    """Context manager of a training: the next one in this process may use another precision.

    The state of an Accelerate object that the caller has created before stays.
    """
    before = bool(AcceleratorState._shared_state)
    try:
        yield
    finally:
        if not before:
            AcceleratorState._reset_state()


def call_on_main_process(state: PartialState | Accelerator, action: Callable[[], Any]) -> Any:
    """Call ``action`` on the main process. Every process calls this.

    Returns:
        The result of ``action``, which must be picklable, on every process.

    Raises:
        ConfigError, RunError: raised by ``action``; raised on every process.
    """
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = action()
        except (ConfigError, RunError) as error:
            outcome[1] = error
    if state.num_processes > 1:
        outcome = broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def build_accelerator(config: Config, run_dir: Path) -> Accelerator:
    """Create the Accelerate object of a config, after :func:`pysupcon.trainer.environment.apply_environment`.

    Args:
        config: resolved config.
        run_dir: folder of the run.

    Raises:
        ConfigError: the machine does not support the precision, a tracker or synchronised batch norm.
    """
    trainer, matmul_precision = config.trainer, torch.get_float32_matmul_precision()
    try:
        accelerator = Accelerator(
            cpu=trainer.cpu,
            mixed_precision=trainer.mixed_precision,
            log_with=list(trainer.trackers) or None,
            project_dir=str(run_dir),
            step_scheduler_with_optimizer=False,
            dynamo_backend=dynamo_backend(config),
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # TrainingStep accumulates
        )
    except ValueError as error:
        raise ConfigError(
            f"trainer.mixed_precision or trainer.trackers is not supported here: {error}"
        ) from error
    # Accelerate allows TF32 if the model is compiled. That would change the numerics of the losses too.
    torch.set_float32_matmul_precision(matmul_precision)
    if trainer.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ConfigError(
            f"trainer.mixed_precision=fp16 does not work on {accelerator.device.type}: use bf16 or no"
        )
    if trainer.sync_batch_norm and accelerator.device.type != "cuda":
        raise ConfigError(
            "trainer.sync_batch_norm needs CUDA devices, as torch.nn.SyncBatchNorm does; this training runs "
            f"on {accelerator.device.type}: leave it out"
        )
    return accelerator


def check_trackers(accelerator: Accelerator, config: Config) -> None:
    """Check that all trackers of the config are installed.

    Raises:
        ConfigError: a tracker is not installed.
    """
    available = {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}
    missing = [name for name in config.trainer.trackers if name not in available]
    if missing:
        raise ConfigError(
            f"trainer.trackers: {', '.join(missing)} is not installed: install it with pip or leave it out"
        )


def start_trackers(accelerator: Accelerator, config: Config) -> None:
    """Start the trackers and pass them the config as the run's parameters. Every process calls this.

    Raises:
        ConfigError: a tracker is not installed or does not start; raised on every process.
    """
    if not config.trainer.trackers:
        return
    check_trackers(accelerator, config)
    flat: dict[str, Any] = {}
    for part, value in asdict(config).items():
        fields = value if isinstance(value, dict) else {"": value}
        flat |= {f"{part}.{key}".rstrip("."): _plain(field) for key, field in fields.items()}
    failure: str | None = None
    try:
        accelerator.init_trackers("pysupcon", config=flat)
    except Exception as error:  # a tracker can raise anything, e.g. if its server does not answer
        failure = f"trainer.trackers: {', '.join(config.trainer.trackers)} does not start: {one_line(error)}"
    failures = [text for text in gather_object([failure]) if text is not None]
    if failures:
        raise ConfigError(failures[0])


def set_threads(config: Config, state: PartialState) -> None:
    """Set the CPU threads of this process. ``accelerate launch`` gives each process one thread only."""
    threads = config.trainer.threads
    if threads is None and state.device.type == "cpu":
        threads = cores_per_process(state.num_processes)
    if threads is not None:
        torch.set_num_threads(threads)


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str) else str(value)
