"""From live objects to a checkpoint and back, among all processes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object, set_seed

from pysupcon.config import Config
from pysupcon.errors import ConfigError, RunError
from pysupcon.trainer import checkpoint
from pysupcon.trainer.checkpoint import Checkpoint
from pysupcon.trainer.environment import dynamo_backend
from pysupcon.trainer.folders import restarted
from pysupcon.trainer.progress import say, waiting

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pysupcon.trainer.loop import Trainer


def random_state(device: torch.device) -> dict[str, Any]:
    """Of Python, NumPy, torch, and the device, as numbers and tensors."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  # the global one is what libraries draw from
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """The inverse of :func:`random_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type], device)


def save(trainer: Trainer, metrics: dict[str, float]) -> Path:
    """Write a checkpoint of a trainer; every process calls it, the main process writes.

    Raises:
        RunError: it could not be written; on every process.
    """
    accelerator, config = trainer.accelerator, trainer.config
    states = gather_object([random_state(trainer.device)])
    outcome: list[str | None] = [None, None]
    if accelerator.is_main_process:
        epoch, batch = divmod(trainer.done, trainer.steps_per_epoch)
        content = Checkpoint(
            step=trainer.done,
            weights=trainer.weights(),
            training=_training(trainer),
            random=states,
            ema=None if trainer.ema is None else trainer.ema.module.state_dict(),
            sampler={
                "seed": config.seed,
                "batch_size": config.data.batch_size,
                "epoch": epoch,
                "batch": batch * trainer.batches_per_step,
            },
            metrics=metrics,
            compiled=dynamo_backend(),
        )
        try:
            with waiting(f"writing a checkpoint of step {trainer.done}"):
                keep, best_by = config.trainer.keep_checkpoints, config.trainer.best_by
                path = checkpoint.save_checkpoint(
                    trainer.run_dir, content, config, keep=keep, best_by=best_by
                )
            outcome[0] = str(path)
        except RunError as error:
            outcome[1] = str(error)
    outcome = broadcast_object_list(outcome)
    if outcome[0] is None:
        raise RunError(outcome[1])
    return Path(outcome[0])


def find(accelerator: Accelerator, config: Config, run_dir: Path) -> Checkpoint | None:
    """The checkpoint to go on from, as the main process finds it; every process calls it.

    Only the main process reads files, so the others may be on machines that do not see them.

    Raises:
        ConfigError, RunError: there is none, none is whole, or it is of another training; on every process.
    """
    which = config.resume_from_checkpoint
    if restarted():
        which = "auto" if which is None or checkpoint.checkpoints(run_dir) else which
    if which is None:
        return None
    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            with waiting("reading the checkpoint"):
                found[0] = _find(config, run_dir, which, accelerator.num_processes)
        except (ConfigError, RunError) as error:
            found[1] = error
    if accelerator.num_processes > 1:
        found = broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    content: Checkpoint | None = found[0]
    return content


def restore(trainer: Trainer, saved: Checkpoint) -> None:
    """Put a checkpoint's state into a trainer's objects. Every process calls it.

    Raises:
        RunError: the state is of other objects.
    """
    accelerator = trainer.accelerator
    try:
        trainer.network.load_state_dict(saved.weights)
        training = saved.training
        trainer.optimizer.load_state_dict(training["optimizer"])
        trainer.scheduler.load_state_dict(training["scheduler"])
        trainer.objective.load_state_dict(training["objective"])
        if accelerator.scaler is not None and training["scaler"] is not None:
            accelerator.scaler.load_state_dict(training["scaler"])
        if trainer.ema is not None:  # switched on since: it starts from the weights as they are
            trainer.ema.module.load_state_dict(saved.weights if saved.ema is None else saved.ema)
    except (RuntimeError, ValueError, KeyError) as error:
        raise RunError(
            f"the checkpoint of step {saved.step} does not fit: {' '.join(str(error).split())}"
        ) from error
    rank = accelerator.process_index
    if rank < len(saved.random):
        set_random_state(saved.random[rank], trainer.device)
    else:  # a process more than there were
        set_seed(trainer.config.seed + 1_000_003 * saved.step, device_specific=True)
    trainer.done = saved.step


def _training(trainer: Trainer) -> dict[str, Any]:
    scaler = trainer.accelerator.scaler
    return {
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.scheduler.state_dict(),
        "objective": trainer.objective.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
    }


def _find(config: Config, run_dir: Path, which: str, processes: int) -> Checkpoint | None:
    found = checkpoint.find_checkpoint(run_dir, which)
    if found is None:
        return None
    path, content, refused = found
    changes = checkpoint.compare_configs(path, config)
    for sentence in refused:
        say(f"refused: {sentence}")
    say(f"going on from {path}, after step {content.step}")
    if content.compiled != dynamo_backend():
        changes.append(f"ACCELERATE_DYNAMO_BACKEND: {content.compiled} -> {dynamo_backend()}")
    before = len(content.random)
    if before != processes:
        size = config.data.batch_size
        changes.append(
            f"processes: {before} -> {processes}: each takes {size // processes} samples of a global batch "
            f"of {size} instead of {size // before}; batches, learning rate and epochs stay as they were"
        )
        if config.loss.gather is False:
            changes.append(
                "loss.gather is false: each process contrasts with its own rows only, so the loss changes"
            )
        if processes > before:
            changes.append(f"processes {before} to {processes - 1} start from new random states")
    for sentence in changes:
        say(f"  changed: {sentence}")
    return content
