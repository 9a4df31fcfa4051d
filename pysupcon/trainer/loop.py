"""The one training loop."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor
from torch.nn.functional import one_hot
from tqdm import tqdm

from pysupcon.config import Config, to_yaml
from pysupcon.data.bundle import Data, load_data
from pysupcon.errors import ConfigError, RunError
from pysupcon.trainer import checkpoint
from pysupcon.trainer.log import StepLog, peak_memory
from pysupcon.trainer.objective import Objective, batch_statistics
from pysupcon.trainer.optim import build_optimizer, build_scheduler
from pysupcon.trainer.run import CONFIG_FILE, LOG_FILE, WEIGHTS_FILE, build_model

MAX_SKIPPED = 25
"""fp16 steps in a row that the gradient scaler may skip: from 2^16 its scale has then fallen out of use."""


def train(config: Config, name: str = "run") -> Path:
    """Train, log, write checkpoints and the final weights; every process calls it.

    Args:
        config: of the run; resolved here.
        name: of the run's folder under runs/, if ``config.output_dir`` is None.

    Returns:
        The folder of the run.

    Raises:
        ConfigError: the config cannot run; nothing has been written.
        RunError: the loss or the gradient is not finite, or a checkpoint is damaged; what was written stays.
    """
    config.resolve()
    state = PartialState(cpu=config.trainer.cpu)
    _set_threads(config, state)
    if config.data.download:
        with state.main_process_first():
            data = load_data(config.data)
    else:
        data = load_data(config.data)
    run_dir = _agree_on_folder(config, name, state)
    config.output_dir = str(run_dir)
    return _Trainer(config, data, run_dir).fit()


class _Trainer:
    """State of one run: the prepared objects and the step."""

    def __init__(self, config: Config, data: Data, run_dir: Path) -> None:
        self.config, self.data, self.run_dir = config, data, run_dir
        self.accelerator = _accelerator(config, run_dir)
        self.device = self.accelerator.device
        ranks = {"rank": self.accelerator.process_index, "world_size": self.accelerator.num_processes}
        self.steps_per_epoch = data.batches(seed=config.seed, steps=0, **ranks).steps_per_epoch
        self.steps = config.trainer.epochs * self.steps_per_epoch

        self.done, resumed = 0, None
        if config.resume_from_checkpoint is not None:
            resumed = checkpoint.find_checkpoint(run_dir, config.resume_from_checkpoint)
            self.done = checkpoint.verify_checkpoint(resumed)
            checkpoint.check_same_run(resumed, config)

        set_seed(config.seed)
        model = build_model(config, data).to(memory_format=torch.channels_last)
        optimizer = build_optimizer(config.optimizer, model)
        scheduler = build_scheduler(
            config.optimizer, optimizer, steps=self.steps, steps_per_epoch=self.steps_per_epoch
        )
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, scheduler)
        self.objective = Objective(config.loss, config.data.views)
        batches = data.batches(seed=config.seed, steps=self.steps, start=self.done, **ranks)
        self.loader = data.loader(batches, pin_memory=self.device.type == "cuda")
        set_seed(config.seed, device_specific=True)  # dropout differs between processes
        if resumed is not None:
            checkpoint.load_checkpoint(self.accelerator, resumed)
        self.skipped = 0

    def fit(self) -> Path:
        main = self.accelerator.is_main_process
        if main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            (self.run_dir / CONFIG_FILE).write_text(to_yaml(self.config), encoding="utf-8")
        _start_trackers(self.accelerator, self.config)
        self.accelerator.wait_for_everyone()
        log = StepLog(self.run_dir / LOG_FILE, self.done) if main else None
        try:
            self._loop(log)
        finally:
            if log is not None:
                log.close()
        if main:
            checkpoint.save_weights(self.accelerator.unwrap_model(self.model), self.run_dir / WEIGHTS_FILE)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return self.run_dir

    def _loop(self, log: StepLog | None) -> None:
        trainer = self.config.trainer
        every = trainer.checkpoint_epochs * self.steps_per_epoch
        self.model.train()
        bar = tqdm(total=self.steps, initial=self.done, desc="train", unit="step", disable=log is None)
        last = time.perf_counter()
        with bar:
            for views, labels in self.loader:
                learning_rate = self.scheduler.get_last_lr()[0]
                values = self._step(views, labels)
                now = time.perf_counter()
                images = views[:, :, 0, 0, 0].numel() * self.accelerator.num_processes
                line = {
                    "step": self.done,
                    "epoch": self.done / self.steps_per_epoch,
                    **values,
                    "learning_rate": learning_rate,
                    "images_per_second": images / (now - last),
                    "peak_memory_mib": peak_memory(self.device),
                }
                last = now
                if log is not None:
                    log.write(line)
                if self.accelerator.trackers:
                    self.accelerator.log({key: line[key] for key in line if key != "step"}, step=self.done)
                bar.update()
                bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
                if self.done % every == 0 or self.done == self.steps:
                    keep = trainer.keep_checkpoints
                    checkpoint.save_checkpoint(self.accelerator, self.run_dir, self.done, self.config, keep)

    def _step(self, views: Tensor, labels: Tensor) -> dict[str, float]:
        """One step of the optimiser; what it gives is the mean over processes."""
        views = views.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        images = self.data.normalize(views).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        outputs = self.model(images)
        try:
            parts = self.objective(outputs, labels)
        except ValueError as error:
            if bool(outputs.projection.isfinite().all()):
                raise
            raise RunError(f"step {self.done + 1}: the features are not finite ({error})") from error
        self.accelerator.backward(parts["loss"])
        self.accelerator.unscale_gradients()
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        values = self._values({**parts, "gradient_norm": norm}, labels)
        self._refuse_non_finite(values)
        if self.config.trainer.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.trainer.clip_norm, norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.done += 1
        return values

    def _values(self, tensors: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
        """All numbers of a step, in one transfer from the device."""
        counts = one_hot(labels, len(self.data.class_names)).sum(0)  # bincount would wait for the device
        if self.config.loss.gather is not False:
            counts = self.accelerator.reduce(counts, "sum")
        statistics = batch_statistics(self.config.loss, labels, counts, self.config.data.views)
        scalars = [value.detach().to(torch.float64) for value in tensors.values()]
        together = self.accelerator.reduce(torch.stack([*scalars, *statistics]), "mean").tolist()
        values = dict(zip([*tensors, "valid_anchors", "chance"], together, strict=True))
        values["valid_anchors"] *= self.accelerator.num_processes
        return values

    def _refuse_non_finite(self, values: dict[str, float]) -> None:
        wrong = [name for name, value in values.items() if not abs(value) < float("inf")]
        if wrong == ["gradient_norm"] and self.accelerator.scaler is not None:
            self.skipped += 1  # the scaler lowers its scale and leaves this step out
            if self.skipped < MAX_SKIPPED:
                return
        elif not wrong:
            self.skipped = 0
            return
        model = self.accelerator.unwrap_model(self.model)
        parameters = [
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
        ]
        found = ", ".join(f"{name} = {values[name]}" for name in wrong)
        where = f"; gradients that are not finite: {', '.join(parameters[:4])}" if parameters else ""
        more = f" and {len(parameters) - 4} more" if len(parameters) > 4 else ""
        raise RunError(f"step {self.done + 1}: {found}{where}{more}")


def _accelerator(config: Config, run_dir: Path) -> Accelerator:
    trainer = config.trainer
    try:
        return Accelerator(
            cpu=trainer.cpu,
            mixed_precision=trainer.mixed_precision,
            log_with=list(trainer.trackers) or None,
            project_dir=str(run_dir),
            step_scheduler_with_optimizer=False,
        )
    except ValueError as error:
        raise ConfigError(
            f"trainer.mixed_precision or trainer.trackers does not fit here: {error}"
        ) from error


def _start_trackers(accelerator: Accelerator, config: Config) -> None:
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


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str) else str(value)


def _set_threads(config: Config, state: PartialState) -> None:
    """accelerate launch gives a process one thread; on a CPU that leaves the other cores idle."""
    threads = config.trainer.threads
    if threads is None and state.device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        threads = max(cores // local, 1)
    if threads is not None:
        torch.set_num_threads(threads)


def _agree_on_folder(config: Config, name: str, state: PartialState) -> Path:
    """The main process chooses, so that all name the same; an error of its is everybody's."""
    choice: list[str | None] = [None, None]
    if state.is_main_process:
        try:
            choice[0] = str(_choose_folder(config, name))
        except ConfigError as error:
            choice[1] = str(error)
    choice = broadcast_object_list(choice)
    if choice[0] is None:
        raise ConfigError(choice[1])
    return Path(choice[0])


def _choose_folder(config: Config, name: str) -> Path:
    resumes = config.resume_from_checkpoint == "latest"
    if config.output_dir is not None:
        folder = Path(config.output_dir)
        if _holds_run(folder) and config.resume_from_checkpoint is None:
            raise ConfigError(
                f"output_dir {folder} already holds a run; continue it with --resume_from_checkpoint latest, "
                "or choose another folder"
            )
        return folder
    if config.resume_from_checkpoint is not None and not resumes:
        own = Path(config.resume_from_checkpoint).resolve().parent
        if own.name == checkpoint.FOLDER and _holds_run(own.parent):
            return own.parent
    number, folder = 1, Path("runs") / name
    while _holds_run(folder):
        number += 1
        following = Path("runs") / f"{name}-{number}"
        if resumes and not _holds_run(following):
            return folder
        folder = following
    return folder


def _holds_run(folder: Path) -> bool:
    return any((folder / file).exists() for file in (CONFIG_FILE, LOG_FILE, checkpoint.FOLDER))
