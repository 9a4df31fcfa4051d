"""One step of the optimiser: forward, backward (whole, or chunk by chunk) of its batches, update, numbers."""

from __future__ import annotations

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
from pysupcon.errors import RunError
from pysupcon.gradcache import GradCache
from pysupcon.models.model import ModelOutput
from pysupcon.models.spectral import power_iteration
from pysupcon.profiling.ranges import region
from pysupcon.trainer.environment import dynamo_backend
from pysupcon.trainer.objective import Objective, batch_statistics
from pysupcon.trainer.progress import say

MAX_SKIPPED = 25
"""fp16 steps in a row that the gradient scaler may skip: from 2^16 its scale has then fallen out of use."""


class Step:
    """``values, stop = step(batches, number, stop)``.

    Args:
        accelerator: that prepared the rest.
        config: resolved.
        data: normalises the views.
        network: the model itself, without what Accelerate wraps around it: neither compiled nor among
            processes.
        model, optimizer, scheduler: prepared; ``model`` runs ``network``.
        objective: on the model's device; its parameters' gradients are averaged over the processes here.
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
    ) -> None:
        self.accelerator, self.config, self.data, self.network = accelerator, config, data, network
        self.model, self.objective, self.optimizer, self.scheduler = model, objective, optimizer, scheduler
        chunk_size = config.trainer.chunk_size
        self.cache: GradCache | None = None
        if chunk_size is not None:
            self.cache = GradCache(model, chunk_size, forward=self._forward, scaler=accelerator.scaler)
            share = config.data.batch_size // accelerator.num_processes
            normed = any(isinstance(module, _BatchNorm) for module in network.modules())
            if normed and chunk_size < share and accelerator.is_main_process:
                say(
                    f"trainer.chunk_size {chunk_size}: BatchNorm normalises each chunk by itself: the step "
                    f"is not quite that of {share} samples at once"
                )
        batches = config.trainer.accumulation_steps
        if batches > 1 and config.loss.name != "none" and accelerator.is_main_process:
            say(
                f"trainer.accumulation_steps {batches}: a step takes the mean gradient of {batches} batches "
                f"of {config.data.batch_size} samples, each contrasted by itself. This is no larger "
                "contrastive batch: for that raise data.batch_size, with trainer.chunk_size if memory is "
                "short"
            )
        self.parameters = [*network.parameters(), *objective.parameters()]
        self.skipped = 0

    def __call__(
        self, batches: Iterable[Sequence[Tensor]], number: int, stop: bool
    ) -> tuple[dict[str, float], bool]:
        """One step.

        Args:
            batches: ``trainer.accumulation_steps`` of them, each of this process's views uint8
                [b, V, C, S, S], labels int64 [b] and, for GroupDRO, groups int64 [b].
            number: of the step, for messages.
            stop: whether this process wants the training to stop.

        Returns:
            Means over the processes and batches (of the valid anchors, the sum), and whether any process
            wants to stop.

        Raises:
            RunError: loss or gradient is not finite.
        """
        if self.config.model.spectral_norm:
            power_iteration(self.network)
        parts, statistics = self._accumulate(batches, number)
        for parameter in self.objective.parameters():  # not DistributedDataParallel's
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.accelerator.reduce(grad, "mean")
        self.accelerator.unscale_gradients()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        values = self._values({**parts, "gradient_norm": norm, **statistics}, stop)
        stop = values.pop("stop") > 0
        self._refuse_non_finite(values, number)
        if self.config.trainer.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.trainer.clip_norm, norm)
        with region("optimizer"):
            self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return values, stop

    def _accumulate(
        self, batches: Iterable[Sequence[Tensor]], number: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Forward and backward of each batch; the gradients become their mean.

        Returns:
            The mean parts of the loss, and the batches' statistics.
        """
        device, count = self.accelerator.device, self.config.trainer.accumulation_steps
        parts: dict[str, Tensor] = {}
        statistics: dict[str, Tensor] = {}
        for index, batch in enumerate(batches, start=1):
            views, labels, *groups = (tensor.to(device, non_blocking=True) for tensor in batch)
            # The processes exchange gradients once a step: in the backward of the last batch.
            among_processes = nullcontext if index == count else getattr(self.model, "no_sync", nullcontext)
            with among_processes(), self._named_if_compiled(number):
                found = self._backward(views, labels, number, groups[0] if groups else None)
            for name, value in found.items():
                parts[name] = parts.get(name, 0.0) + value.to(torch.float64) / count
            if self.config.loss.name != "none":
                valid, chance = self._batch_statistics(labels)
                statistics["valid_anchors"] = statistics.get("valid_anchors", 0.0) + valid
                statistics["chance"] = statistics.get("chance", 0.0) + chance / count
        return parts, statistics

    def _forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> ModelOutput:
        views, labels = batch
        images = self.data.normalize(views).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        with region("encoder"):
            outputs: ModelOutput = model(images, labels.repeat_interleave(views.shape[1]))
        return outputs

    def _backward(
        self, views: Tensor, labels: Tensor, number: int, groups: Tensor | None
    ) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}

        def loss(outputs: ModelOutput) -> Tensor:
            try:
                parts.update(self.objective(outputs, labels, groups))
            except ValueError as error:
                if bool(outputs.projection.isfinite().all()):
                    raise
                raise self._error(f"step {number}: the features are not finite ({error})") from error
            return parts["loss"] / self.config.trainer.accumulation_steps

        if self.cache is None:
            self.accelerator.backward(loss(self._forward(self.model, (views, labels))))
        else:
            self.cache((views, labels), loss)
        return {name: value.detach() for name, value in parts.items()}

    def _values(self, tensors: dict[str, Tensor], stop: bool) -> dict[str, float]:
        """All numbers of a step, in one transfer from the device."""
        scalars = [value.detach().to(torch.float64) for value in tensors.values()]
        wish = scalars[0].new_tensor(float(stop))
        together = self.accelerator.reduce(torch.stack([*scalars, wish]), "mean").tolist()
        values = dict(zip([*tensors, "stop"], together, strict=True))
        if "valid_anchors" in values:
            values["valid_anchors"] *= self.accelerator.num_processes
        return values

    def _batch_statistics(self, labels: Tensor) -> Tensor:
        counts = one_hot(labels, len(self.data.class_names)).sum(0)  # bincount would wait for the device
        if self.config.loss.gather is not False:
            counts = self.accelerator.reduce(counts, "sum")
        return batch_statistics(self.config.loss, labels, counts, self.config.data.views)

    def _refuse_non_finite(self, values: dict[str, float], number: int) -> None:
        wrong = [name for name, value in values.items() if not abs(value) < float("inf")]
        if wrong == ["gradient_norm"] and self.accelerator.scaler is not None:
            self.skipped += 1  # the scaler lowers its scale and leaves this step out
            if self.skipped < MAX_SKIPPED:
                return
        elif not wrong:
            self.skipped = 0
            return
        parameters = [
            name
            for name, parameter in (*self.network.named_parameters(), *self.objective.named_parameters())
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
        ]
        found = ", ".join(f"{name} = {values[name]}" for name in wrong)
        where = f"; gradients that are not finite: {', '.join(parameters[:4])}" if parameters else ""
        more = f" and {len(parameters) - 4} more" if len(parameters) > 4 else ""
        raise RunError(f"step {number}: {found}{where}{more}")

    @contextmanager
    def _named_if_compiled(self, number: int) -> Iterator[None]:
        """Say of what fails in a compiled model that it is compiled, and by which variable."""
        try:
            yield
        except RuntimeError as error:
            backend = dynamo_backend()
            if backend == "no" or isinstance(error, RunError | torch.OutOfMemoryError):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise self._error(
                f"step {number} fails with the model compiled by ACCELERATE_DYNAMO_BACKEND={backend}: leave "
                f"that out or take another backend ({type(error).__name__}: {reason})"
            ) from error

    def _error(self, text: str) -> RunError:
        """Of this process, which the others may not share: to be told by whichever it is."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        error = RunError(text + (f" in process {rank}" if processes > 1 else ""))
        error.of_one_process = True
        return error
