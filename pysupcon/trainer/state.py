"""The state of a training: what a checkpoint stores, and how all processes save and restore it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object, set_seed
from torch import nn

from pysupcon.config import Config
from pysupcon.errors import RunError
from pysupcon.reading import one_line
from pysupcon.trainer import checkpoint
from pysupcon.trainer.checkpoint import Checkpoint
from pysupcon.trainer.early_stopping import EarlyStopping
from pysupcon.trainer.environment import dynamo_backend
from pysupcon.trainer.folders import is_restart
from pysupcon.trainer.objective import Objective
from pysupcon.trainer.progress import print_line, report_if_slow
from pysupcon.trainer.setup import call_on_main_process

if TYPE_CHECKING:
    from accelerate import Accelerator


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the random states of Python, NumPy, torch and ``device`` as numbers and tensors."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  # libraries draw from the global generator
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what :func:`random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type], device)


@dataclass
class TrainingState:
    """The objects of a training that change from step to step.

    Attributes:
        accelerator: the Accelerate object of this process.
        config: the resolved config.
        run_dir: folder of the run.
        steps_per_epoch: optimizer steps per epoch.
        network: the model without the wrappers of Accelerate.
        objective: the loss with its parameters.
        optimizer, scheduler: prepared by Accelerate.
        ema: timm's ``ModelEmaV3``, or None.
        key_encoder: with ``model.momentum``, or None.
        early_stopping: with ``trainer.early_stopping``, or None.
        done: number of finished steps.
    """

    accelerator: Accelerator
    config: Config
    run_dir: Path
    steps_per_epoch: int
    network: nn.Module
    objective: Objective
    optimizer: Any
    scheduler: Any
    ema: Any = None
    key_encoder: nn.Module | None = None
    early_stopping: EarlyStopping | None = None
    done: int = 0

    def save(self, metrics: dict[str, float]) -> Path:
        """Write a checkpoint. Every process calls this; the main process writes.

        Args:
            metrics: validation results at this step.

        Returns:
            The folder of the checkpoint.

        Raises:
            RunError: the checkpoint could not be written; raised on every process.
        """
        accelerator, config = self.accelerator, self.config
        random_states = gather_object([random_state(accelerator.device)])
        queue = self.objective.queue
        queues: list[dict[str, torch.Tensor]] = []
        if queue is not None and config.loss.gather is False:
            own = {name: buffer.cpu() for name, buffer in queue.state_dict().items()}
            queues = gather_object([own])[1:]

        def write() -> str:
            epoch, step = divmod(self.done, self.steps_per_epoch)
            content = Checkpoint(
                step=self.done,
                weights=self.network.state_dict(),
                training=self._training() | ({"queues": queues} if queues else {}),
                random=random_states,
                ema=None if self.ema is None else self.ema.module.state_dict(),
                sampler={
                    "seed": config.seed,
                    "batch_size": config.data.global_batch_size,
                    "epoch": epoch,
                    "batch": step * config.trainer.accumulation_steps,
                },
                metrics=metrics,
                compiled=dynamo_backend(config),
                threads=_threads(accelerator),
            )
            keep, best_by = config.trainer.keep_checkpoints, config.trainer.best_by
            with report_if_slow(f"writing a checkpoint of step {self.done}"):
                return str(
                    checkpoint.save_checkpoint(self.run_dir, content, config, keep=keep, best_by=best_by)
                )

        return Path(call_on_main_process(accelerator, write))

    def restore(self, path: Path, saved: Checkpoint) -> None:
        """Load a checkpoint. Every process calls this.

        Args:
            path: folder of the checkpoint, for messages.
            saved: its content.

        Raises:
            RunError: the checkpoint does not fit the model, the optimizer or the objective, or a state is
                malformed; raised on every process.
        """
        accelerator, device = self.accelerator, self.accelerator.device
        failure: str | None = None
        try:
            self.network.load_state_dict(saved.weights)
            training = saved.training
            self.optimizer.load_state_dict(training["optimizer"])
            self.scheduler.load_state_dict(training["scheduler"])
            self.objective.load_state_dict(training["objective"])
            if self.key_encoder is not None:
                self.key_encoder.load_state_dict(training["key_encoder"])
            if self.early_stopping is not None and "early_stopping" in training:
                self.early_stopping.load_state_dict(training["early_stopping"])
            queue, queues = self.objective.queue, training.get("queues", [])
            own = accelerator.process_index - 1
            if queue is not None and self.config.loss.gather is False and 0 <= own < len(queues):
                queue.load_state_dict(queues[own])
            if accelerator.scaler is not None and training["scaler"] is not None:
                accelerator.scaler.load_state_dict(training["scaler"])
            if self.ema is not None:  # a checkpoint without an average starts it from its weights
                self.ema.module.load_state_dict(saved.weights if saved.ema is None else saved.ema)
            _check_loaded(self.optimizer, training)
            rank = accelerator.process_index
            if rank < len(saved.random):
                set_random_state(saved.random[rank], device)
            else:  # the checkpoint was written by fewer processes
                set_seed(self.config.seed + 1_000_003 * saved.step, device_specific=True)
        except Exception as error:  # a malformed state can raise anything
            kind = "" if isinstance(error, RuntimeError | ValueError) else f"{type(error).__name__}: "
            failure = f"checkpoint {path} does not fit: {kind}{one_line(error)}"
        failures = [text for text in gather_object([failure]) if text is not None]
        if failures:
            raise RunError(failures[0])
        self.done = saved.step

    def _training(self) -> dict[str, Any]:
        scaler, keys, stopping = self.accelerator.scaler, self.key_encoder, self.early_stopping
        return {
            **({} if keys is None else {"key_encoder": keys.state_dict()}),
            **({} if stopping is None else {"early_stopping": stopping.state_dict()}),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "objective": self.objective.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }


def _check_loaded(optimizer: Any, training: dict[str, Any]) -> None:
    """Check what ``load_state_dict`` of optimizers and schedulers does not: types, and shapes of the state.

    The states of the optimizers that pysupcon uses are scalars or have the shape of the parameter.

    Raises:
        KeyError, TypeError, ValueError: a state is malformed.
    """
    groups, scheduler = training["optimizer"]["param_groups"], training["scheduler"]
    numbers = {f"scheduler/{name}": scheduler[name] for name in ("last_epoch", "_step_count")}
    numbers |= {f"scheduler/base_lrs/{i}": scheduler["base_lrs"][i] for i in range(len(groups))}
    for i, group in enumerate(groups):
        numbers |= {f"optimizer/{i}/{name}": group[name] for name in ("lr", "initial_lr", "weight_decay")}
    for name, number in numbers.items():
        if type(number) not in (int, float):
            raise TypeError(f"{name} must be a number, got {number!r:.60}")
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape not in ((), parameter.shape):
                raise ValueError(
                    f"optimizer state {name} of shape {tuple(value.shape)} does not fit a parameter of shape "
                    f"{tuple(parameter.shape)}"
                )


def find_resume_checkpoint(
    accelerator: Accelerator, config: Config, run_dir: Path
) -> tuple[Path, Checkpoint] | None:
    """Read the checkpoint to resume from. Every process calls this.

    Only the main process reads files: the other processes may run on machines without access to them.

    Args:
        accelerator: the Accelerate object of this process.
        config: the resolved config.
        run_dir: folder of the run.

    Returns:
        The folder and the content of the checkpoint, or None if the training starts from the beginning.

    Raises:
        ConfigError, RunError: there is no checkpoint, none is complete, or it does not match the config;
            raised on every process.
    """
    which = config.resume_from_checkpoint
    if is_restart():
        which = "auto" if which is None or checkpoint.checkpoints(run_dir) else which
    if which is None:
        return None

    def read() -> tuple[Path, Checkpoint] | None:
        with report_if_slow("reading the checkpoint"):
            return _read_and_report(config, run_dir, which, accelerator)

    found: tuple[Path, Checkpoint] | None = call_on_main_process(accelerator, read)
    return found


def _read_and_report(
    config: Config, run_dir: Path, which: str, accelerator: Accelerator
) -> tuple[Path, Checkpoint] | None:
    """Read the checkpoint and print what differs from the interrupted training."""
    found = checkpoint.find_checkpoint(run_dir, which)
    if found is None:
        return None
    path, content, rejected = found
    changes = checkpoint.compare_configs(path, config)
    for reason in rejected:
        print_line(f"rejected: {reason}")
    print_line(f"resuming from {path}, after step {content.step}")
    backend = dynamo_backend(config)
    if content.compiled != backend:
        changes.append(f"ACCELERATE_DYNAMO_BACKEND: {content.compiled} -> {backend}")
    processes, threads = accelerator.num_processes, _threads(accelerator)
    if None not in (content.threads, threads) and content.threads != threads:
        changes.append(
            f"CPU threads per process: {content.threads} -> {threads}: sums are rounded in another order, so "
            f"the run will differ from an uninterrupted one; --trainer.threads {content.threads} avoids this"
        )
    before = len(content.random)
    if before != processes:
        size = config.data.global_batch_size
        changes.append(
            f"processes: {before} -> {processes}: each takes {size // processes} samples of a global batch "
            f"of {size} instead of {size // before}; batches, learning rate and epochs are unchanged"
        )
        if config.loss.gather is False:
            changes.append(
                "loss.gather is false: each process contrasts its own rows only, so the loss changes"
            )
        if processes > before:
            changes.append(f"processes {before} to {processes - 1} start from new random states")
    for change in changes:
        print_line(f"  changed: {change}")
    return path, content


def _threads(accelerator: Accelerator) -> int | None:
    """CPU threads of this process, if the model runs on them."""
    return torch.get_num_threads() if accelerator.device.type == "cpu" else None
