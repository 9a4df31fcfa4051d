"""Errors of the losses on converged and on random batches, beside those of a dense float32 loss.

    python benchmarks/kernels/converged.py [--losses supcon cnce] [--backends cpu tiled] [--json FILE]

In a converged batch, the views of a sample are nearly equal, and the loss is a small difference of large
parts. The ground truth is the dense loss in float64 (``pysupcon.pairs.reference``) of the same float32 rows.
Errors are compared with those of the dense loss in float32, which rounds every similarity once. Each error is
the largest over the seeds. The error of the losses is the root mean square over the anchors. The error of the
gradient is the norm of its tangential part, divided by 1 / (temperature sqrt(N)), the size of the parts that
cancel.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine, table
from pysupcon import functional

TEMPERATURES = (0.02, 0.05, 0.07, 0.1, 0.5)
VIEWS = (2, 8)
SEEDS = 5
ROWS, WIDTH = 1024, 128
ALLOWED = 2.0
"""Largest allowed error, as a multiple of the error of the dense float32 loss."""
SLACK = 1e-9
"""Added to the allowed error, because the dense float32 loss can be exact by chance."""

LOSSES: dict[str, Callable[..., Tensor]] = {
    "supcon": functional.supcon,
    "infonce": lambda x, labels, **options: functional.info_nce(x, **options),
    "sincere": functional.sincere,
    "cnce": functional.class_conditional_info_nce,
    "spread": functional.spread,
    "spread_sincere": lambda x, labels, **options: functional.spread(x, labels, base="sincere", **options),
}


class Case(NamedTuple):
    batch: str
    temperature: float
    views: int


class Errors(NamedTuple):
    loss: float
    gradient: float


WITHIN = {"cnce", "spread", "spread_sincere"}
"""Losses that contrast within a class; they need several samples per class."""


def rows(case: Case, seed: int, of_class: int = 1) -> tuple[Tensor, Tensor]:
    """Unit rows [1024 / V, V, 128] float32 and labels [1024 / V], with ``of_class`` samples per class.

    In a converged batch, the views of a sample differ by about 0.1.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    samples = ROWS // case.views
    x = normal(samples, case.views, WIDTH)
    if case.batch == "converged":
        x = F.normalize(normal(samples, 1, WIDTH), dim=-1) + 0.01 * x
    labels = torch.arange(samples) // of_class
    return F.normalize(x, dim=-1).float(), labels


def loss_and_gradient(loss: Callable[..., Tensor], x: Tensor, *arguments: Any, **options: Any) -> Any:
    """The losses of the anchors and the tangential part of the gradient of their mean, in float64."""
    leaf = x.clone().requires_grad_()
    losses = loss(leaf, *arguments, reduction="none", **options)
    losses.mean().backward()
    assert leaf.grad is not None
    along = (leaf.grad.double() * x.double()).sum(-1, keepdim=True) * x.double()
    return losses.detach().double(), leaf.grad.double() - along


def errors(name: str, case: Case, backends: list[str], seeds: int = SEEDS) -> tuple[float, dict[str, Errors]]:
    """The mean loss of the last seed, and the errors of "dense float32" and of every backend."""
    worst: dict[str, tuple[float, ...]] = {}
    mean = 0.0
    for seed in range(seeds):
        x, labels = rows(case, seed, 4 if name in WITHIN else 1)
        run = LOSSES[name]
        options = {"temperature": case.temperature}
        right, right_gradient = loss_and_gradient(run, x.double(), labels, backend="reference", **options)
        mean = right.mean().item()
        size = 1 / case.temperature / (x.shape[0] * x.shape[1]) ** 0.5
        for backend in ("reference", *backends):
            value, gradient = loss_and_gradient(run, x, labels, backend=backend, **options)
            rms = (value - right).square().mean().sqrt().item()
            found = rms, (gradient - right_gradient).norm().item() / size
            key = "dense float32" if backend == "reference" else backend
            worst[key] = tuple(map(max, worst.get(key, (0.0, 0.0)), found))
    return mean, {key: Errors(*value) for key, value in worst.items()}


def exceeded(found: dict[str, Errors]) -> list[str]:
    """A message for each backend whose error is more than ALLOWED times that of the dense float32 loss."""
    dense = found["dense float32"]
    return [
        f"{backend}: {part} {got:.1e}, dense float32 {peer:.1e}"
        for backend, error in found.items()
        if error is not dense
        for part, got, peer in zip(Errors._fields, error, dense, strict=True)
        if not got <= ALLOWED * peer + SLACK
    ]


def cases() -> Iterator[Case]:
    for batch in ("converged", "random"):
        for temperature in TEMPERATURES:
            for views in VIEWS:
                yield Case(batch, temperature, views)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=["supcon"])
    parser.add_argument("--backends", nargs="+", default=["cpu", "tiled"])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found, lines, wrong = [], [], []
    for name in arguments.losses:
        for case in cases():
            value, result = errors(name, case, arguments.backends, arguments.seeds)
            found.append({"loss": name, **case._asdict(), "value": value, "errors": result})
            shown = [f"{error.loss:.1e} / {error.gradient:.1e}" for error in result.values()]
            lines.append([name, case.batch, f"{case.temperature:g}", str(case.views), f"{value:.1e}", *shown])
            wrong += [f"{name}, {case}: {message}" for message in exceeded(result)]
    head = ["loss", "batch", "temperature", "views", "value", "dense float32", *arguments.backends]
    print(table.align([head, *lines]))
    print(f"\nmore than {ALLOWED:g} times the dense float32 error: {'; '.join(wrong) or 'none'}")
    if arguments.json:
        facts = {"machine": machine.describe("cpu"), "rows": found}
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
