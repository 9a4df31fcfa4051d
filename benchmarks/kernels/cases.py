"""Benchmark problems (a loss and the shape of its inputs), their random inputs, and named sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from pysupcon.profiling.workload import VIEWS, Inputs, unit_rows

LOSSES = ("supcon", "sincere", "cnce", "spread")
#: Losses of two sets without labels: first views are queries, second views their candidates. "infonce" is the
#: cross entropy of each query's own candidate among all; "clip" is the mean over both directions.
TWO_SETS = ("infonce", "clip")
#: SupCon with several labels per row: values of ``multi_label``.
MANY_LABELS = ("per_label", "any", "jaccard")
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Problem:
    """One loss on N unit rows of D: two views of N / 2 samples in ``classes`` classes of equal size."""

    loss: str = "supcon"
    n: int = 16_384
    dim: int = 128
    classes: int = 100
    dtype: str = "float32"
    temperature: float = 0.07
    device: str = "cpu"

    def __post_init__(self) -> None:
        losses = LOSSES + TWO_SETS + MANY_LABELS
        if self.loss not in losses:
            raise ValueError(f"loss must be one of {', '.join(losses)}, got {self.loss!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.n < 2 or self.n % VIEWS:
            raise ValueError(f"n must be even and at least 2 (two views of each sample), got {self.n}")
        if self.dim < 1 or self.classes < 1:
            raise ValueError(f"dim and classes must be at least 1, got {self.dim} and {self.classes}")

    @property
    def flops(self) -> float:
        """4u = 4 N^2 D: the cost of both passes over pairs if both use the symmetry of s."""
        return 4.0 * self.n * self.n * self.dim

    @property
    def anchors(self) -> int:
        """Number of rows whose losses are averaged."""
        return self.n // VIEWS if self.loss in TWO_SETS else self.n

    @property
    def input_bytes(self) -> int:
        """Size of the rows in bytes; their gradient has the same size."""
        return self.n * self.dim * DTYPES[self.dtype].itemsize

    def smaller(self, n: int) -> Problem:
        """This problem with at most ``n`` rows, and so few classes that several samples share one."""
        rows = min(self.n, n)
        return replace(self, n=rows, classes=max(1, min(self.classes, rows // (2 * VIEWS))))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_inputs(problem: Problem, seed: int) -> Inputs:
    """Fresh random inputs."""
    return unit_rows(
        problem.n,
        problem.dim,
        problem.classes,
        dtype=DTYPES[problem.dtype],
        device=problem.device,
        seed=seed,
    )


def label_rows(labels: torch.Tensor, count: int = 20) -> torch.Tensor:
    """Labels [N, ``count``] of rows of some classes: each with probability 0.15, and class % count."""
    classes = torch.arange(int(labels.max()) + 1)
    table = torch.rand(len(classes), count, generator=torch.Generator().manual_seed(0)) < 0.15
    table[classes, classes % count] = True
    return table.to(labels.device)[labels]


class Point(NamedTuple):
    """A problem and a number of threads; None: the number of the run."""

    problem: Problem
    threads: int | None = None


@dataclass(frozen=True)
class Case:
    """A named sweep and the implementations to compare."""

    name: str
    purpose: str
    points: tuple[Point, ...]
    implementations: tuple[str, ...]
    measures: tuple[str, ...] = ("time",)
    """subset of "time" and "memory" """
    in_turns: bool = False
    """the points have the same inputs and are timed in turns, because their ratios matter"""


ALL = ("pysupcon", "tiled", "dense", "written", "compiled", "metric-learning", "keops")
OURS = ("pysupcon", "tiled")
PAIRED = ("pysupcon", "written", "compiled", "inf-cl", "memeff")


def build_cases(device: str, sizes: Sequence[int] | None = None) -> dict[str, Case]:
    """All cases of a device.

    Args:
        device: "cpu" or "cuda".
        sizes: replaces the values of N of every case.
    """
    cuda = device == "cuda"
    base = Problem(device=device, dtype="bfloat16" if cuda else "float32")
    thousand = replace(base, classes=1000)

    def at(default: Sequence[int], problem: Problem = base) -> tuple[Point, ...]:
        return tuple(Point(replace(problem, n=n)) for n in (sizes or default))

    def sweep(default: Sequence[int], problems: Sequence[Problem]) -> tuple[Point, ...]:
        return tuple(point for problem in problems for point in at(default, problem))

    one = (65_536,) if cuda else (16_384,)
    small = (256, 512, 1024, 2048)
    medium = (16_384,) if cuda else (4_096,)
    found = [
        Case(
            "small",
            "small batches against every dense implementation",
            at(small),
            ("pysupcon", "dense", "written", "compiled", "metric-learning"),
        ),
        Case(
            "speed",
            "SupCon against N, every implementation",
            at((4_096, 16_384, 65_536) if cuda else (4_096, 16_384)),
            ALL,
        ),
        Case(
            "memory",
            "peak memory against N, every implementation",
            at((4_096, 16_384, 65_536, 262_144) if cuda else (4_096, 16_384, 65_536)),
            ALL,
            ("memory",),
        ),
        Case(
            "memory65k",
            "SupCon at a batch whose matrix alone is 16 GiB",
            at((65_536,)),
            ("pysupcon",),
            ("time", "memory"),
        ),
        Case(
            "losses",
            "SupCon, SINCERE, cNCE and spread, 1000 classes",
            sweep(one, [replace(thousand, loss=loss) for loss in LOSSES]),
            ("pysupcon",),
            in_turns=True,
        ),
        Case(
            "many_labels",
            "SupCon with one label per row, and with any number of 20 labels",
            sweep(one, [replace(base, loss=loss) for loss in ("supcon", *MANY_LABELS)]),
            ("pysupcon",),
            in_turns=True,
        ),
        Case(
            "dims",
            "SupCon against the number of dimensions",
            sweep(medium, [replace(base, dim=dim) for dim in (32, 64, 128, 256, 512, 768)]),
            ("pysupcon", "compiled"),
        ),
        Case(
            "classes",
            "SupCon and SINCERE against the number of classes",
            sweep(
                medium,
                [
                    replace(base, loss=loss, classes=classes)
                    for loss in ("supcon", "sincere")
                    for classes in (2, 10, 100, 1000)
                ],
            ),
            ("pysupcon",),
        ),
        Case(
            "dtypes",
            "SupCon against the dtype of the rows",
            sweep(medium, [replace(base, dtype=dtype) for dtype in DTYPES]),
            ("pysupcon", "dense"),
        ),
        Case(
            "temperatures",
            "SupCon against the temperature",
            sweep(medium, [replace(base, temperature=t) for t in (0.01, 0.07, 0.5, 5.0)]),
            ("pysupcon",),
        ),
        Case(
            "pairs",
            "N / 2 queries against N / 2 candidates, as the fused losses for image-text pairs compute it",
            sweep((16_384, 65_536) if cuda else (4_096,), [replace(base, loss=loss) for loss in TWO_SETS]),
            PAIRED,
            ("time", "memory"),
        ),
        Case(
            "blocks",
            "SupCon just below and above 128 and 132 blocks of 128 rows: a device's last wave",
            at((16_384, 16_896, 17_408, 20_000)),
            ("pysupcon",),
        ),
    ]
    if not cuda:
        points = tuple(
            Point(replace(base, n=n, loss=loss), threads)
            for n in (sizes or (8_192,))
            for loss in ("supcon", "sincere")
            for threads in (1, 2)
        )
        found.append(Case("threads", "one and two threads: time, and the same bits", points, ("pysupcon",)))
        found.append(
            Case(
                "rate",
                "4u / time against torch.mm on 2048 x 128 by 128 x 2048 in the same run",
                at(one),
                ("pysupcon",),
            )
        )
    return {case.name: case for case in found}
