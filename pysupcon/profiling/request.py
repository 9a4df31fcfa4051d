"""The arguments of a profile, and the work that they describe."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from pysupcon.pairs.backends import backends, resolve_backend
from pysupcon.profiling.cost import loss_flops
from pysupcon.profiling.workload import VIEWS, Encoder, LossWork, StepWork, loss_function, unit_rows
from pysupcon.profiling.workspace import Problem


@dataclass(frozen=True)
class ProfileRequest:
    """Checked arguments of a profile."""

    loss: str
    n: int | None
    """Rows; None: as many as the limits allow."""
    dim: int
    classes: int
    temperature: float
    dtype: torch.dtype
    device: torch.device
    backend: str
    encoder: str | None
    image_size: int
    chunk: int | None
    measure: bool
    """Run the full size too."""
    output: Path
    step_seconds: float | None = None
    """Limit of the time, or None."""
    memory: int | None = None
    """Limit of the memory in bytes; None: the free memory."""

    def describe(self, n: int) -> str:
        """Return the arguments as text, with N rows."""
        return (
            f"{self.loss}, N={n:,}, D={self.dim}, {self.classes} classes, "
            f"{str(self.dtype).removeprefix('torch.')}, temperature {self.temperature:g}, "
            f"backend {self.backend}"
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of a row with its label and sample number."""
        return self.dim * self.dtype.itemsize + 16

    @property
    def image_bytes(self) -> int:
        """Bytes of an image with its label and sample number."""
        return 12 * self.image_size**2 + 16

    def flops(self, n: int) -> float:
        """Return the floating-point operations of the loss on N rows (4 u)."""
        return loss_flops(self.loss, n, self.dim, self._classes(n))

    def kernel_bytes(self, n: int) -> int:
        """Return the memory of the loss on N rows that is not in tensors."""
        found = self._of_kernels(n)
        return 0 if found is None else found.values_bytes(n) + found.scratch_bytes(n)

    def scratch_bytes(self, n: int) -> int:
        """Return the part of it that the threads keep."""
        found = self._of_kernels(n)
        return 0 if found is None else found.scratch_bytes(n)

    def _of_kernels(self, n: int) -> Problem | None:
        if self._isa is None:
            return None
        size, threads = self.dtype.itemsize, torch.get_num_threads()
        return Problem(self.loss, self.dim, self._classes(n), size, self.temperature, threads, self._isa)

    def _classes(self, n: int) -> int:
        return max(n // VIEWS, 1) if self.loss == "infonce" else self.classes

    @cached_property
    def _isa(self) -> str | None:
        """Instruction set of the CPU kernels; None: they do not compute this loss."""
        if self.resolved_backend != "cpu":
            return None
        return str(backends()["cpu"]["isa"])

    @property
    def resolved_backend(self) -> str:
        """The backend that computes the loss."""
        return resolve_backend(self.backend, self.device, None)

    def loss_work(self, n: int, backend: str | None = None) -> LossWork:
        """Return forward and backward of the loss on N random rows."""
        inputs = unit_rows(n, self.dim, self.classes, dtype=self.dtype, device=self.device, seed=0)
        return LossWork(loss_function(self.loss, self.temperature, backend or self.backend), inputs)

    def step_work(
        self, encoder: Encoder, optimizer: torch.optim.Optimizer, n: int, chunk: int | None
    ) -> StepWork:
        """Return a training step on N random images."""
        inputs = unit_rows(n, self.dim, self.classes, dtype=self.dtype, device=self.device, seed=0)
        images = torch.randn(n, 3, self.image_size, self.image_size, device=self.device)
        loss = loss_function(self.loss, self.temperature, self.backend)
        return StepWork(encoder, optimizer, loss, images, inputs, chunk)
