"""The one training loop."""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor
from tqdm import tqdm

from pysupcon.config import Config, to_yaml
from pysupcon.data.datamodule import DataModule, load_data
from pysupcon.errors import Interrupted, RunError, check
from pysupcon.profiling.recorder import StepRecorder
from pysupcon.trainer import checkpoint, environment, state
from pysupcon.trainer.files import replace_file
from pysupcon.trainer.folders import agree_on_folder, restarted
from pysupcon.trainer.group_dro import build_group_dro
from pysupcon.trainer.log import StepLog, peak_memory
from pysupcon.trainer.objective import Objective
from pysupcon.trainer.optim import build_optimizer, build_scheduler
from pysupcon.trainer.progress import waiting
from pysupcon.trainer.run import CONFIG_FILE, LOG_FILE, WEIGHTS_FILE, build_model
from pysupcon.trainer.setup import build_accelerator, join_processes, set_threads, start_trackers
from pysupcon.trainer.step import Step
from pysupcon.trainer.stop import StopRequests
from pysupcon.trainer.validation import Validation


def train(config: Config, name: str = "run") -> Path:
    """Train, log, write checkpoints and the final weights; every process calls it.

    Args:
        config: of the run; resolved here.
        name: of the run's folder under runs/, if ``config.output_dir`` is None.

    Returns:
        The folder of the run.

    Raises:
        ConfigError: the config cannot run; nothing has been written.
        RunError: the loss or the gradient is not finite, a checkpoint is damaged, or the disk is full; what
            was written stays.
        Interrupted: a signal came or the time budget is over; a checkpoint is written.
    """
    config.resolve()
    environment.settle(config)
    stop = StopRequests(config.trainer.time_budget)
    processes = join_processes(config.trainer.cpu)
    set_threads(config, processes)
    with waiting(f"reading {config.data.dataset}", shown=processes.is_main_process):
        if config.data.download:
            with processes.main_process_first():
                data = load_data(config.data)
        else:
            data = load_data(config.data)
    if restarted() and config.resume_from_checkpoint is None:
        config.resume_from_checkpoint = "auto"
    run_dir = agree_on_folder(config, name, processes)
    config.output_dir = str(run_dir)
    trainer = Trainer(config, data, run_dir)
    with stop:
        return trainer.fit(stop)


class Trainer:
    """State of one run: the prepared objects, and ``done``, the number of the optimiser's steps done.

    ``network`` is the model itself: its weights have the names that checkpoints and evaluation know, whatever
    Accelerate wraps around it in ``model``, which only the training steps call.
    """

    def __init__(self, config: Config, data: DataModule, run_dir: Path) -> None:
        self.config, self.data, self.run_dir = config, data, run_dir
        self.accelerator = build_accelerator(config, run_dir)
        self.device = self.accelerator.device
        main = self.accelerator.is_main_process
        ranks = {"rank": self.accelerator.process_index, "world_size": self.accelerator.num_processes}
        ranks["accumulation_steps"] = self.batches_per_step = config.trainer.accumulation_steps
        batches_per_epoch = data.batch_sampler(seed=config.seed, steps=0, **ranks).steps_per_epoch
        self.steps_per_epoch = batches_per_epoch // self.batches_per_step
        self.steps = config.trainer.epochs * self.steps_per_epoch
        steps = config.trainer.profile_steps
        check(max(steps, default=0) <= self.steps, "trainer.profile_steps", f"end by {self.steps}", steps)
        self.done = 0
        saved = state.find(self.accelerator, config, run_dir)

        set_seed(config.seed)
        with waiting(f"building {config.model.backbone}", shown=main):
            network = build_model(config, data).to(self.device).to(memory_format=torch.channels_last)
        if config.trainer.sync_batch_norm:
            network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.network: torch.nn.Module = network
        self.ema: Any = None
        if config.trainer.ema_decay is not None:
            from timm.utils import ModelEmaV3

            self.ema = ModelEmaV3(self.network, decay=config.trainer.ema_decay)
        group_dro = build_group_dro(config, data, self.accelerator)
        self.objective = Objective(config.loss, config.data.views, group_dro).to(self.device)
        optimizer = build_optimizer(config.optimizer, self.network, self.objective)
        scheduler = build_scheduler(
            config.optimizer, optimizer, steps=self.steps, steps_per_epoch=self.steps_per_epoch
        )
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(
            self.network, optimizer, scheduler
        )
        self.step = Step(
            self.accelerator, config, data, self.network, self.model, self.objective, self.optimizer,
            self.scheduler,
        )  # fmt: skip
        self.validate: Validation | None = None
        if config.trainer.best_by is not None:
            self.validate = Validation(self.accelerator, config, data, self.objective)
        set_seed(config.seed, device_specific=True)  # dropout differs between processes
        if saved is not None:
            state.restore(self, saved)
        batches = data.batch_sampler(
            seed=config.seed,
            steps=self.steps * self.batches_per_step,
            start=self.done * self.batches_per_step,
            **ranks,
        )
        self.loader = data.loader(batches, pin_memory=self.device.type == "cuda")

    def fit(self, stop: StopRequests) -> Path:
        """Train to the end, or until ``stop`` has a reason."""
        main = self.accelerator.is_main_process
        log: StepLog | None = None
        if main:
            try:
                self.run_dir.mkdir(parents=True, exist_ok=True)
                replace_file(self.run_dir / CONFIG_FILE, to_yaml(self.config).encode())
                log = StepLog(self.run_dir / LOG_FILE, self.done)
            except OSError as error:
                raise RunError(f"{self.run_dir} cannot be written to: {error}") from error
        start_trackers(self.accelerator, self.config)
        self.accelerator.wait_for_everyone()
        try:
            self._loop(log, stop)
        except BaseException:
            for tracker in self.accelerator.trackers:
                tracker.finish()
            raise
        finally:
            if log is not None:
                log.close()
        if main:
            checkpoint.save_weights(self._final_weights(), self.run_dir / WEIGHTS_FILE)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return self.run_dir

    def weights(self) -> dict[str, Tensor]:
        """Of the model as it is now."""
        state_dict: dict[str, Tensor] = self.network.state_dict()
        return state_dict

    def _loop(self, log: StepLog | None, stop: StopRequests) -> None:
        trainer = self.config.trainer
        every = trainer.checkpoint_steps or trainer.checkpoint_epochs * self.steps_per_epoch
        recorded = trainer.profile_steps if self.accelerator.is_main_process else ()
        recorder = StepRecorder(recorded, self.run_dir / "profile", self.device)
        self.model.train()
        bar = tqdm(total=self.steps, initial=self.done, desc="train", unit="step", disable=log is None)
        images = self.config.data.batch_size * self.config.data.views * self.batches_per_step
        batches, last = iter(self.loader), time.perf_counter()
        with bar:
            while self.done < self.steps:
                learning_rate = self.scheduler.get_last_lr()[0]
                learnable = (
                    {"temperature": self.objective.temperature}
                    if self.config.loss.learnable_temperature
                    else {}
                )
                with recorder.step(self.done + 1):
                    together = islice(batches, self.batches_per_step)
                    values, asked = self.step(together, self.done + 1, stop.reason is not None)
                self.done += 1
                if self.ema is not None:
                    self.ema.update(self.network, self.done)
                speed = images / (time.perf_counter() - last)
                due = self.done % every == 0 or self.done == self.steps
                metrics = self._validation() if due and not asked else {}
                line = {
                    "step": self.done,
                    "epoch": self.done / self.steps_per_epoch,
                    **values,
                    **learnable,
                    **{f"val_{name}": value for name, value in metrics.items()},
                    "learning_rate": learning_rate,
                    "images_per_second": speed,
                    "peak_memory_mib": peak_memory(self.device),
                }
                if log is not None:
                    log.write(line)
                if self.accelerator.trackers:
                    self.accelerator.log({key: line[key] for key in line if key != "step"}, step=self.done)
                bar.update()
                bar.set_postfix_str(f"loss {values['loss']:.3f}, {speed:,.0f} images/s", refresh=False)
                if due or asked:
                    if log is not None:
                        log.sync()
                    path = state.save(self, metrics)
                    if asked:
                        self._interrupt(stop, path)
                last = time.perf_counter()

    def _validation(self) -> dict[str, float]:
        if self.validate is None:
            return {}
        averaged = self.config.trainer.final_weights == "ema"
        return self.validate(self.ema.module if averaged else self.network)

    def _interrupt(self, stop: StopRequests, path: Path) -> None:
        reason = stop.reason or "a signal to another process"
        raise Interrupted(
            f"stopped by {reason} after step {self.done} of {self.steps}; "
            f"checkpoint {path} is whole; go on with --resume_from_checkpoint latest "
            f"--output_dir {self.run_dir}"
        )

    def _final_weights(self) -> dict[str, Tensor]:
        """As trainer.final_weights says; on the main process."""
        final = self.config.trainer.final_weights
        if final == "ema":
            averaged: dict[str, Tensor] = self.ema.module.state_dict()
            return averaged
        if final == "best":
            best = checkpoint.best_checkpoint(self.run_dir, self.config.trainer.best_by, self.done)
            if best is None:
                raise RunError(f"{self.run_dir} holds no checkpoint with a finite validation loss")
            return checkpoint.read_checkpoint(best).weights
        return self.weights()
