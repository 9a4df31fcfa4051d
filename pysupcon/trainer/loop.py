"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor

from pysupcon import user_code
from pysupcon.config import Config
from pysupcon.data.datamodule import DataModule
from pysupcon.errors import Interrupted, RunError, check
from pysupcon.evaluators import build_evaluators
from pysupcon.memory import MemoryQueue
from pysupcon.models.backbones import notes_of
from pysupcon.models.model import memory_format
from pysupcon.models.momentum import MomentumEncoder
from pysupcon.profiling.recorder import StepRecorder
from pysupcon.trainer import checkpoint
from pysupcon.trainer.batch_notes import batch_notes
from pysupcon.trainer.data import check_held_out, read_data
from pysupcon.trainer.data_record import DATA_FILE, check_same_samples, pack_identity, read_identity
from pysupcon.trainer.dry_run import dry_run
from pysupcon.trainer.early_stopping import EarlyStopping
from pysupcon.trainer.environment import apply_environment
from pysupcon.trainer.files import named_disk_errors, replace_file
from pysupcon.trainer.folders import is_restart, locked_run_dir
from pysupcon.trainer.group_dro import build_group_dro
from pysupcon.trainer.heap import freed_memory_kept
from pysupcon.trainer.log import peak_memory
from pysupcon.trainer.objective import Objective
from pysupcon.trainer.optim import build_optimizer, build_scheduler
from pysupcon.trainer.progress import print_line, report_if_slow
from pysupcon.trainer.report import TrainingReport
from pysupcon.trainer.run import SKIPPED_FILE, WEIGHTS_FILE, build_model, pack_skipped
from pysupcon.trainer.setup import (
    build_accelerator,
    call_on_main_process,
    join_processes,
    set_threads,
    start_trackers,
)
from pysupcon.trainer.start_lines import start_lines
from pysupcon.trainer.state import TrainingState, find_resume_checkpoint
from pysupcon.trainer.step import TrainingStep
from pysupcon.trainer.stop import StopRequests
from pysupcon.trainer.validation import Validation


def train(
    config: Config,
    name: str = "run",
    *,
    dataset: object = None,
    model: torch.nn.Module | None = None,
    evaluators: Mapping[str, Any] | None = None,
) -> Path:
    """Train; write the log, the checkpoints and the final weights. Every process calls this.

    Args:
        config: config of the run; resolved here.
        name: name of the run's folder under runs/ if ``config.output_dir`` is None.
        dataset: the data set, if ``config.data.dataset`` records a passed object.
        model: the backbone, if ``config.model.backbone`` records a passed object; trained in place.
        evaluators: passed evaluators by their names in ``config.evaluation.evaluators``.

    Returns:
        The folder of the run. After a dry run (``trainer.dry_run``) it has been removed.

    Raises:
        ConfigError: the config is not valid, or another process trains into the folder; nothing has been
            written.
        RunError: the loss or the gradient is not finite, a checkpoint is damaged, or the disk is full; files
            that were written stay.
        Interrupted: a signal arrived or the time budget is used up; a checkpoint has been written.
    """
    config.resolve()
    user_code.allow()
    if config.evaluate:
        build_evaluators(config.evaluation, evaluators)  # a wrong reference is reported before the training
    apply_environment(config)
    stop = StopRequests(config.trainer.time_budget)
    processes = join_processes(config.trainer.cpu)
    set_threads(config, processes)
    recorded = config.data.on_error == "skip" and not config.trainer.dry_run  # in the folder of the run
    data = None if recorded else read_data(config, dataset, processes)
    if config.trainer.dry_run:
        assert data is not None
        with TemporaryDirectory() as temporary:
            trainer = Trainer(config, data, Path(temporary), model)
            dry_run(trainer.step, trainer.state, trainer.validate, trainer.loader, trainer.steps)
        return Path(temporary)
    if is_restart() and config.resume_from_checkpoint is None:
        config.resume_from_checkpoint = "auto"
    with locked_run_dir(config, name, processes) as run_dir:
        config.output_dir = str(run_dir)
        if data is None:
            data = read_data(config, dataset, processes, run_dir)
        trainer = Trainer(config, data, run_dir, model)
        if trainer.state.done == 0:
            check_held_out(config, data, trainer.accelerator)
        with stop:
            return trainer.fit(stop)


class Trainer:
    """The objects of one training.

    ``network`` is the model itself; checkpoints and evaluation use the names of its weights. ``model`` is the
    network with the wrappers of Accelerate, and only the training steps call it.

    Args:
        config: resolved config.
        data: the data of the config.
        run_dir: folder of the run.
        module: the backbone, if it is a passed object.
    """

    def __init__(
        self, config: Config, data: DataModule, run_dir: Path, module: torch.nn.Module | None = None
    ) -> None:
        self.config, self.data, self.run_dir = config, data, run_dir
        self.accelerator = build_accelerator(config, run_dir)
        self.device = self.accelerator.device
        main = self.accelerator.is_main_process
        ranks = {"rank": self.accelerator.process_index, "world_size": self.accelerator.num_processes}
        ranks["accumulation_steps"] = self.batches_per_step = config.trainer.accumulation_steps
        batches_per_epoch = data.batch_sampler(seed=config.seed, steps=0, **ranks).steps_per_epoch
        self.steps_per_epoch = batches_per_epoch // self.batches_per_step
        self.steps = config.trainer.max_steps or config.trainer.epochs * self.steps_per_epoch
        self._check_warmup()
        steps = config.trainer.profile_steps
        check(max(steps, default=0) <= self.steps, "trainer.profile_steps", f"end by {self.steps}", steps)
        saved = find_resume_checkpoint(self.accelerator, config, run_dir)
        self.records_data = True
        if saved is not None:
            resumed = saved[0].resolve().parent.parent
            # Without a record, the first steps may have seen other data than those of now.
            self.records_data = call_on_main_process(
                self.accelerator, lambda: check_same_samples(data, resumed)
            )
        said = start_lines(
            config, data, steps=self.steps, steps_per_epoch=self.steps_per_epoch,
            processes=self.accelerator.num_processes,
        )  # fmt: skip
        for line in said if main else ():
            print_line(line)

        set_seed(config.seed)
        with report_if_slow(f"building {config.model.backbone}", enabled=main):
            # A resumed training takes all weights from its checkpoint.
            of_start = config.model if saved is None else config.model.without_initial_weights()
            network = build_model(replace(config, model=of_start), data, module).to(self.device)
            network = network.to(memory_format=memory_format(config.model))
        for line in notes_of(network) if main else ():
            print_line(line)
        frozen = config.model.frozen_layers
        check(
            any(parameter.requires_grad for parameter in network.parameters()),
            "model.frozen_layers" if frozen else "model",
            "leave a parameter that is trained (model.projection mlp adds a head; a number counts the direct "
            "submodules of the backbone)" if frozen else "have a parameter that is trained",
            frozen or config.model.backbone,
        )  # fmt: skip
        if config.trainer.sync_batch_norm:
            network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.network: torch.nn.Module = network
        self.ema: Any = None
        if config.trainer.ema_decay is not None:
            from timm.utils import ModelEmaV3

            self.ema = ModelEmaV3(self.network, decay=config.trainer.ema_decay)
        momentum = config.model.momentum
        key_encoder = MomentumEncoder(network, momentum) if momentum > 0 else None
        queue = MemoryQueue(config.loss.queue, network.projection_dim) if config.loss.queue > 0 else None
        group_dro = build_group_dro(config, data, self.accelerator)
        unlabelled = data.training is not data.splits["train"]
        self.objective = Objective(
            config.loss, config.data.views, group_dro, queue, momentum > 0, unlabelled=unlabelled
        )
        self.objective.to(self.device)
        optimizer = build_optimizer(config.optimizer, self.network, self.objective)
        scheduler = build_scheduler(
            config.optimizer, optimizer, steps=self.steps, steps_per_epoch=self.steps_per_epoch
        )
        self.model, optimizer, self.scheduler = self.accelerator.prepare(self.network, optimizer, scheduler)
        self.step = TrainingStep(
            self.accelerator, config, data, self.network, self.model, self.objective, optimizer,
            self.scheduler, key_encoder,
        )  # fmt: skip
        self.state = TrainingState(
            self.accelerator, config, run_dir, self.steps_per_epoch, self.network, self.objective, optimizer,
            self.scheduler, self.ema, key_encoder,
        )  # fmt: skip
        if config.trainer.early_stopping is not None:
            assert config.trainer.best_by is not None  # checked by the config
            self.state.early_stopping = EarlyStopping(config.trainer.best_by, config.trainer.early_stopping)
        self.validate: Validation | None = None
        if config.trainer.best_by is not None:
            self.validate = Validation(self.accelerator, config, data, self.objective)
        set_seed(config.seed, device_specific=True)  # dropout differs between processes
        if saved is not None:
            self.state.restore(*saved)
        batches = data.batch_sampler(
            seed=config.seed,
            steps=self.steps * self.batches_per_step,
            start=self.state.done * self.batches_per_step,
            **ranks,
        )
        self.loader = data.loader(batches, pin_memory=self.device.type == "cuda")

    def _check_warmup(self) -> None:
        """Check the schedule against the length of the training in steps."""
        optimizer, per_epoch = self.config.optimizer, self.steps_per_epoch
        end = f"{self.steps / per_epoch:g}, the end of the training in epochs"
        warmup = optimizer.warmup_epochs
        check(round(warmup * per_epoch) <= self.steps, "optimizer.warmup_epochs", f"be at most {end}", warmup)
        last = max(optimizer.milestones, default=0.0)
        before = round(last * per_epoch) < self.steps
        check(before, "optimizer.milestones", f"be less than {end}", optimizer.milestones)

    def fit(self, stop: StopRequests) -> Path:
        """Train to the end, or until ``stop`` requests it.

        Returns:
            The folder of the run.

        Raises:
            RunError, Interrupted: see :func:`train`.
        """
        start_trackers(self.accelerator, self.config)
        reports: list[TrainingReport] = []
        call_on_main_process(self.accelerator, lambda: reports.append(self._open_report()))
        report = reports[0] if reports else None
        self.accelerator.wait_for_everyone()
        try:
            with report or nullcontext(), freed_memory_kept(self.device):
                self._loop(report, stop)
        except BaseException:
            for tracker in self.accelerator.trackers:
                tracker.finish()
            raise
        final = self.run_dir / WEIGHTS_FILE
        call_on_main_process(self.accelerator, lambda: checkpoint.save_weights(self._final_weights(), final))
        self.accelerator.end_training()
        return self.run_dir

    def _open_report(self) -> TrainingReport:
        processes = self.accelerator.num_processes
        if self.data.skipped is not None:
            with named_disk_errors(self.run_dir / SKIPPED_FILE):
                replace_file(self.run_dir / SKIPPED_FILE, pack_skipped(self.data.skipped))
        if self.records_data and read_identity(self.run_dir) != self.data.identity:
            with named_disk_errors(self.run_dir / DATA_FILE):
                replace_file(self.run_dir / DATA_FILE, pack_identity(self.data.identity))
        return TrainingReport(
            self.config, self.run_dir, done=self.state.done, steps=self.steps, device=self.device,
            steps_per_epoch=self.steps_per_epoch, processes=processes,
            told=batch_notes(self.config, self.data, processes).told,
        )  # fmt: skip

    def _loop(self, report: TrainingReport | None, stop: StopRequests) -> None:
        trainer, state = self.config.trainer, self.state
        every = trainer.checkpoint_steps or trainer.checkpoint_epochs * self.steps_per_epoch
        profile_steps = trainer.profile_steps if self.accelerator.is_main_process else ()
        recorder = StepRecorder(profile_steps, self.run_dir / "profile", self.device)
        self.model.train()
        images_per_step = self.config.data.global_batch_size * self.config.data.views * self.batches_per_step
        batches, start = iter(self.loader), time.perf_counter()

        def sync() -> None:
            if report is not None:
                report.sync()

        while state.done < self.steps and not self._stops_early():
            learning_rate = self.scheduler.get_last_lr()[0]
            temperature = (
                {"temperature": self.objective.temperature} if self.config.loss.learnable_temperature else {}
            )
            with recorder.step(state.done + 1):
                step_batches = islice(batches, self.batches_per_step)
                failed = report is not None and report.failed
                values, stopping = self.step(step_batches, state.done + 1, stop.reason is not None or failed)
            state.done += 1
            if self.ema is not None:
                self.ema.update(self.network, state.done)
            speed = images_per_step / (time.perf_counter() - start)
            due = state.done % every == 0 or state.done == self.steps
            metrics: dict[str, float] = {}
            if due and not stopping:
                metrics = self._validation()
                self._update_early_stopping(metrics)
            line = {
                "step": state.done,
                "epoch": state.done / self.steps_per_epoch,
                **values,
                **temperature,
                **{f"val_{name}": value for name, value in metrics.items()},
                "learning_rate": learning_rate,
                "images_per_second": speed,
                "peak_memory_mib": peak_memory(self.device),
            }
            if report is not None:
                report.add(line, last=state.done == self.steps or self._stops_early())
            if self.accelerator.trackers:
                self.accelerator.log({key: line[key] for key in line if key != "step"}, step=state.done)
            if due or stopping or state.done % self.steps_per_epoch == 0:
                call_on_main_process(self.accelerator, sync)
            if due or stopping:
                path = state.save(metrics)
                if stopping:
                    self._interrupt(stop, path)
            start = time.perf_counter()
        if report is not None and state.early_stopping is not None and state.done < self.steps:
            print_line(f"stopped early after step {state.done}: {state.early_stopping.describe()}")

    def _update_early_stopping(self, metrics: dict[str, float]) -> None:
        """Record a validation; the other processes take over the state of the main process."""
        stopping = self.state.early_stopping
        if stopping is not None:
            stopping.update(metrics.get(stopping.metric), self.state.done)
            stopping.load_state_dict(call_on_main_process(self.accelerator, stopping.state_dict))

    def _stops_early(self) -> bool:
        return self.state.early_stopping is not None and self.state.early_stopping.finished

    def _validation(self) -> dict[str, float]:
        if self.validate is None:
            return {}
        averaged = self.config.trainer.final_weights == "ema"
        return self.validate(self.ema.module if averaged else self.network)

    def _interrupt(self, stop: StopRequests, path: Path) -> None:
        reason = stop.reason or "a signal to another process"
        raise Interrupted(
            f"stopped by {reason} after step {self.state.done} of {self.steps}; "
            f"checkpoint {path} is complete; resume with --resume_from_checkpoint latest "
            f"--output_dir {self.run_dir}"
        )

    def _final_weights(self) -> dict[str, Tensor]:
        """The weights that ``trainer.final_weights`` selects; called on the main process."""
        final = self.config.trainer.final_weights
        if final == "best":
            best = checkpoint.best_checkpoint(self.run_dir, self.config.trainer.best_by, self.state.done)
            if best is None:
                raise RunError(f"{self.run_dir} holds no checkpoint with a finite validation loss")
            return checkpoint.read_checkpoint(best).weights
        network = self.ema.module if final == "ema" else self.network
        weights: dict[str, Tensor] = network.state_dict()
        return weights
