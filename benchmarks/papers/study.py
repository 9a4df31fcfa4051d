"""What a study of the papers' claims is: jobs that train and measure, and how their records are shown.

A study is a module of this folder. ``results.py`` runs the jobs of all studies, stores their records in
``benchmarks/results/paper_NAME.json``, and writes the tables and pictures.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SEEDS = tuple(range(8))
QUICK_SEEDS = (0, 1)
Record = Mapping[str, Any]
Records = Mapping[str, Record]
"""Name of a job -> its record."""
Verdict = Literal["shown", "not shown", "contradicted"]


@dataclass(frozen=True)
class Job:
    """A piece of work for one process on one thread.

    Attributes:
        name: name of its record, unique in its study.
        minutes: processor minutes that it takes on the machine of the stored results.
        needs: names of the jobs of the same study that must be finished before.
    """

    name: str
    minutes: float
    needs: tuple[str, ...] = ()


Source = Literal["Thanos", "SINCERE", "control"]
"""The paper that makes a claim; control: a comparison of this project."""


class Claim(NamedTuple):
    """A claim and what was measured.

    Attributes:
        claim: in plain words, with the data set and the controls.
        source: who makes it.
        measured: the value with its interval, its unit and the number of seeds.
        verdict: see :func:`verdict`.
        headline: it stands in the summary of the project's README.
        repeated: claims with an equal text here are the same one on other data or at other temperatures.
    """

    claim: str
    source: Source
    measured: str
    verdict: Verdict
    headline: bool = False
    repeated: str = ""


class Study(Protocol):
    """The names that a module of a study has."""

    NAME: str
    """Name of its folder of runs and of its results."""
    TITLE: str
    """Heading of its tables."""

    def missing(self) -> str:
        """Why the study cannot run here, e.g. that data are missing; empty if it can."""

    def jobs(self, quick: bool) -> list[Job]:
        """All jobs; ``quick``: fewer of them, or shorter ones with names of their own."""

    def run(self, job: Job, folder: Path) -> dict[str, Any]:
        """Do a job and return its record: numbers, strings, lists and dicts for a JSON file.

        ``folder`` is the study's own; it keeps checkpoints between jobs. A job that was stopped is run again.
        """

    def tables(self, records: Records) -> str:
        """The records as Markdown; works with the records of some of the jobs."""

    def draw(self, records: Records, folder: Path) -> list[str]:
        """Draw pictures into ``folder``; return the names of the files."""

    def claims(self, records: Records) -> list[Claim]:
        """The claims that the records decide."""


def verdict(low: float, high: float) -> Verdict:
    """Verdict on a claim that a difference is above 0, from the difference's interval."""
    return "shown" if low > 0 else "contradicted" if high < 0 else "not shown"


def pack_bits(bits: Tensor) -> str:
    """A bool tensor [N] as text; see :func:`unpack_bits`."""
    return base64.b64encode(np.packbits(bits.cpu().numpy())).decode("ascii")


def unpack_bits(text: str, count: int) -> Tensor:
    """The bool tensor [count] of :func:`pack_bits`."""
    packed = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(packed, count=count).astype(bool))


def seeds_of(names: Sequence[str]) -> list[int]:
    """The seeds in the names ``..._seedN``, ascending, each once."""
    return sorted({int(name.rpartition("_seed")[2]) for name in names})
