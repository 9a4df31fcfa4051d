"""One optimizer step: forward and backward of its batches, update, and the values for the log."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.nn.modules.batchnorm import _BatchNorm

from pysupcon.config import Config
from pysupcon.data.datamodule import DataModule
from pysupcon.data.unlabelled import UNKNOWN
from pysupcon.errors import RunError
from pysupcon.gradcache import GradCache
from pysupcon.models.model import ModelOutput, memory_format
from pysupcon.models.momentum import MomentumEncoder
from pysupcon.models.spectral import power_iteration
from pysupcon.ranges import region
from pysupcon.trainer.environment import dynamo_backend
from pysupcon.trainer.objective import METRICS, Objective, batch_statistics, finite
from pysupcon.trainer.progress import print_line

MAX_SKIPPED = 25
"""Consecutive fp16 steps that the gradient scaler may skip; its scale of 2^16 is then below 1."""


class TrainingStep:
    """Callable that runs one optimizer step.

    Args:
        accelerator: the Accelerate object of this process.
        config: resolved config.
        data: the data; normalises the views.
        network: the model without the wrappers of Accelerate.
        model, optimizer, scheduler: prepared by Accelerate; ``model`` wraps ``network``.
        objective: the loss, on the model's device. This class averages the gradients of its parameters over
            the processes.
        key_encoder: encodes the second view, and follows ``network``; None: the model encodes all views.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: Config,
        data: DataModule,
        network: nn.Module,
        model: nn.Module,
        objective: Objective,
        optimizer: Any,
        scheduler: Any,
        key_encoder: MomentumEncoder | None = None,
    ) -> None:
        self.accelerator, self.config, self.data, self.network = accelerator, config, data, network
        self.model, self.objective, self.optimizer, self.scheduler = model, objective, optimizer, scheduler
        self.key_encoder = key_encoder
        self.memory_format = memory_format(config.model)
        chunk_size = config.trainer.chunk_size
        self.cache: GradCache | None = None
        if chunk_size is not None:
            self.cache = GradCache(model, chunk_size, forward=self._forward, scaler=accelerator.scaler)
            share = config.data.global_batch_size // accelerator.num_processes
            batch_norm = any(isinstance(module, _BatchNorm) for module in network.modules())
            if batch_norm and chunk_size < share and accelerator.is_main_process:
                print_line(
                    f"trainer.chunk_size {chunk_size}: BatchNorm normalises each chunk separately: the step "
                    f"differs slightly from a step without chunks of {share} samples"
                )
        batches = config.trainer.accumulation_steps
        if batches > 1 and config.loss.name != "none" and accelerator.is_main_process:
            print_line(
                f"trainer.accumulation_steps {batches}: a step takes the mean gradient of {batches} batches "
                f"of {config.data.global_batch_size} samples; each batch is contrasted separately. For a "
                "larger contrastive batch raise data.batch_size; trainer.chunk_size (GradCache) limits its "
                "memory"
            )
        self.parameters = [*network.parameters(), *objective.parameters()]
        self.skipped = 0

    def __call__(
        self, batches: Iterable[Sequence[Tensor]], number: int, stop: bool
    ) -> tuple[dict[str, float], bool]:
        """Run one step.

        Args:
            batches: ``trainer.accumulation_steps`` batches of this process: views uint8 [b, V, C, S, S],
                labels int64 [b] (or [b, L]) and, for GroupDRO, groups int64 [b].
            number: number of the step, for messages.
            stop: whether this process requests the training to stop.

        Returns:
            Values for the log, averaged over processes and batches (valid_anchors is summed), and whether any
            process requests a stop. Every ``trainer.metrics_steps`` steps also the metrics of the features,
            those that are finite.

        Raises:
            RunError: the loss or the gradient is not finite.
        """
        if self.config.model.spectral_norm:
            power_iteration(self.network)
        parts, statistics = self._accumulate(batches, number)
        for parameter in self.objective.parameters():  # DistributedDataParallel does not reduce these
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.accelerator.reduce(grad, "mean")
        self.accelerator.unscale_gradients()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        values = self._values({**parts, "gradient_norm": norm, **statistics}, stop)
        stop = values.pop("stop") > 0
        metrics = {name: values.pop(name) for name in METRICS if name in values}
        self._check_finite(values, number)
        if self.config.trainer.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.trainer.clip_norm, norm)
        with region("optimizer"):
            self.optimizer.step()
            if self.key_encoder is not None:
                self.key_encoder.update(self.network)
        self.scheduler.step()
        self.optimizer.zero_grad()
        return values | finite(metrics), stop

    def _accumulate(
        self, batches: Iterable[Sequence[Tensor]], number: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Run forward and backward of each batch; the gradients add up to their mean.

        Returns:
            The mean loss terms, and the statistics of the batches.
        """
        device, count = self.accelerator.device, self.config.trainer.accumulation_steps
        every = self.config.trainer.metrics_steps
        measured = every is not None and number % every == 0
        parts: dict[str, Tensor] = {}
        statistics: dict[str, Tensor] = {}
        for index, batch in enumerate(batches, start=1):
            views, labels, *groups = (tensor.to(device, non_blocking=True) for tensor in batch)
            if self.config.loss.name != "none" and labels.dim() == 1:  # before the queue changes
                valid, chance = self._batch_statistics(labels)
                statistics["valid_anchors"] = statistics.get("valid_anchors", 0.0) + valid
                statistics["chance"] = statistics.get("chance", 0.0) + chance / count
            # The processes exchange gradients once per step, in the backward of the last batch.
            sync_context = nullcontext if index == count else getattr(self.model, "no_sync", nullcontext)
            with sync_context(), self._explain_compile_errors(number), self._expected_short_rows():
                terms, metrics = self._backward(
                    views, labels, number, groups[0] if groups else None, measured
                )
            for name, value in terms.items():
                parts[name] = parts.get(name, 0.0) + value.to(torch.float64) / count
            for name, value in metrics.items():
                statistics[name] = statistics.get(name, 0.0) + value.to(torch.float64) / count
        return parts, statistics

    def _forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> ModelOutput:
        views, labels = batch
        images = self.data.normalize(views).flatten(0, 1).contiguous(memory_format=self.memory_format)
        with region("encoder"):
            outputs: ModelOutput = model(images, labels.repeat_interleave(views.shape[1], dim=0))
        return outputs

    def _encode_keys(self, views: Tensor) -> Tensor | None:
        """Encodes the second view: [B, D]; None without a key encoder."""
        if self.key_encoder is None:
            return None
        keys = []
        for chunk in views[:, 1:2].split(self.config.trainer.chunk_size or len(views)):
            images = self.data.normalize(chunk).flatten(0, 1).contiguous(memory_format=self.memory_format)
            with region("key encoder"), self.accelerator.autocast():
                keys.append(self.key_encoder(images))
        return torch.cat(keys).float()

    def _backward(
        self, views: Tensor, labels: Tensor, number: int, groups: Tensor | None, measured: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns the terms of the loss and, if ``measured``, the metrics of the features."""
        parts: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        keys = self._encode_keys(views)
        rows = [] if keys is None else [keys]  # for the queue
        if keys is not None:
            views = views[:, :1]

        def loss(outputs: ModelOutput) -> Tensor:
            if keys is None:
                rows.append(outputs.projection.detach())
            try:
                parts.update(self.objective(outputs, labels, groups, keys))
                if measured:
                    metrics.update(self.objective.metrics(outputs, labels, keys))
            except ValueError as error:
                if bool(outputs.projection.isfinite().all()):
                    raise
                raise self._error(f"step {number}: the features are not finite ({error})") from error
            return parts["loss"] / self.config.trainer.accumulation_steps

        if self.cache is None:
            self.accelerator.backward(loss(self._forward(self.model, (views, labels))))
        else:
            self.cache((views, labels), loss)
        self.objective.enqueue(rows[0], labels)
        return {name: value.detach() for name, value in parts.items()}, metrics

    def _values(self, tensors: dict[str, Tensor], stop: bool) -> dict[str, float]:
        """Average all values of a step over the processes, with a single transfer from the device."""
        scalars = [value.detach().to(torch.float64) for value in tensors.values()]
        stop_request = scalars[0].new_tensor(float(stop))
        means = self.accelerator.reduce(torch.stack([*scalars, stop_request]), "mean").tolist()
        values = dict(zip([*tensors, "stop"], means, strict=True))
        if "valid_anchors" in values:
            values["valid_anchors"] *= self.accelerator.num_processes
        return values

    def _batch_statistics(self, labels: Tensor) -> Tensor:
        # Entry 0 counts the samples whose class is not known. bincount would synchronise.
        counts = one_hot(labels - UNKNOWN, len(self.data.class_names) + 1).sum(0)
        if self.config.loss.gather is not False:
            counts = self.accelerator.reduce(counts, "sum")
        memory = self.objective.memory_counts(len(counts) - 1)
        momentum = self.key_encoder is not None
        views = self.config.data.views
        return batch_statistics(self.config.loss, labels, counts[1:], views, counts[0], memory, momentum)

    def _check_finite(self, values: dict[str, float], number: int) -> None:
        non_finite = [name for name, value in values.items() if not abs(value) < float("inf")]
        if non_finite == ["gradient_norm"] and self.accelerator.scaler is not None:
            self.skipped += 1  # the scaler lowers its scale and skips this step
            if self.skipped < MAX_SKIPPED:
                return
        elif not non_finite:
            self.skipped = 0
            return
        parameters = [
            name
            for name, parameter in (*self.network.named_parameters(), *self.objective.named_parameters())
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
        ]
        shown = ", ".join(f"{name} = {values[name]}" for name in non_finite)
        where = f"; gradients that are not finite: {', '.join(parameters[:4])}" if parameters else ""
        more = f" and {len(parameters) - 4} more" if len(parameters) > 4 else ""
        raise RunError(f"step {number}: {shown}{where}{more}")

    @contextmanager
    def _explain_compile_errors(self, number: int) -> Iterator[None]:
        """If the model is compiled, name the variable that does so in the error message."""
        try:
            yield
        except RuntimeError as error:
            backend = dynamo_backend(self.config)
            if backend == "no" or isinstance(error, RunError | torch.OutOfMemoryError):
                raise
            by = f"ACCELERATE_DYNAMO_BACKEND={backend}" if backend != "inductor" else "trainer.compile"
            reason = str(error).strip().partition("\n")[0]
            raise self._error(
                f"step {number} failed in the model compiled by {by}: leave that out or use another backend "
                f"of ACCELERATE_DYNAMO_BACKEND ({type(error).__name__}: {reason})"
            ) from error

    @contextmanager
    def _expected_short_rows(self) -> Iterator[None]:
        """The rows of a bounded encoder are shorter than 1 at first, which the losses would warn of."""
        if not self.config.model.spectral_norm:
            yield
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the rows of features have a mean norm")
            yield

    def _error(self, text: str) -> RunError:
        """Create an error that the other processes may not raise, so that this process prints it."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        error = RunError(text + (f" in process {rank}" if processes > 1 else ""))
        error.on_one_process = True
        return error
