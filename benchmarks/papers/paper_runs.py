"""The trainings that the tables of paper_results.py need: data set, regime, methods, seeds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "small"
SEEDS = (0, 1, 2)

REGIMES: dict[str, tuple[str, ...]] = {
    "none": (),
    "strong": (
        "--data.augmentation", "strong", "--data.views", "2",
        "--trainer.epochs", "10", "--trainer.checkpoint_epochs", "10",
    ),
}  # fmt: skip
"""Augmentation -> arguments added to the config, which has no augmentation."""


@dataclass(frozen=True)
class Method:
    """A row of a table.

    Attributes:
        name: end of the config's name.
        title: title in the table.
        parts: methods whose frozen encoders are concatenated; empty for a method that is trained.
        overrides: arguments added after those of the regime.
    """

    name: str
    title: str
    parts: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


METHODS = (
    Method("ce", "cross-entropy"),
    Method("infonce", "InfoNCE"),
    Method("supcon", "SupCon"),
    Method("sincere", "SINCERE"),
    Method("supcon_cnce", "SupCon + cNCE"),
    Method("supcon_cnce_spectral", "SupCon + cNCE, spectral normalisation"),
    Method("supcon_autoencoder", "SupCon + autoencoder"),
    Method("ce_autoencoder", "cross-entropy + autoencoder"),
    Method("thanos_one", "Thanos, one backbone"),
    Method("thanos", "Thanos, two backbones trained together"),
    Method("thanos_frozen", "Thanos, two frozen backbones", parts=("supcon_cnce", "ce_autoencoder")),
)
_MECHANISMS = ("supcon_cnce_spectral", "supcon_autoencoder", "thanos_one", "thanos")
"""Other methods that break the invariance under permutations within a class; compared once, without
augmentation."""
MARGIN_METHODS = (
    Method("supcon", "SupCon, temperature 0.05", overrides=("--loss.temperature", "0.05")),
    Method("supcon", "SupCon, temperature 0.1"),
    Method("sincere", "SINCERE, temperature 0.1"),
)
"""SINCERE's paper trains SupCon on CIFAR-10 at 0.05, SINCERE at 0.1."""
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
ALPHA_METHODS = tuple(
    Method("supcon_cnce", f"alpha {alpha:g}", overrides=("--loss.alpha", f"{alpha:g}")) for alpha in ALPHAS
)
MOCO_METHODS = (
    Method("moco", "SupCon, no queue", overrides=("--loss.queue", "0")),
    Method("moco", "SupCon, queue of 2,048 keys"),
)


@dataclass(frozen=True)
class Table:
    """Methods that are compared on one data set under one augmentation.

    Attributes:
        name: name of its folder of runs and of its results.
        data: prefix of the names of the configs, relative to configs/small.
        regime: key of :data:`REGIMES`; "none" adds nothing to the configs.
        methods: its rows.
        baseline: name of the method that the others are compared with.
        also_against: names of further methods to compare with.
        seeds: seeds of the trainings.
    """

    name: str
    data: str
    regime: str
    methods: tuple[Method, ...]
    baseline: str = "supcon"
    also_against: tuple[str, ...] = ()
    seeds: tuple[int, ...] = SEEDS


@dataclass(frozen=True)
class Job:
    """One training, or the concatenation of two encoders, and its evaluation.

    Attributes:
        table: its table.
        method: its row.
        seed: seed of the training.
    """

    table: Table
    method: Method
    seed: int

    @property
    def name(self) -> str:
        """Name of the run's folder in the folder of the table."""
        return f"{_slug(self.method)}_seed{self.seed}"

    @property
    def key(self) -> str:
        """Name in messages."""
        return f"{self.table.name}/{self.name}"

    @property
    def needs(self) -> list[str]:
        """Names of the runs that must be finished before."""
        return [f"{part}_seed{self.seed}" for part in self.method.parts]

    def arguments(self, run_dir: Path, roots: Sequence[str] = ()) -> list[str]:
        """Arguments of pysupcon/train.py; none for concatenated encoders."""
        if self.method.parts:
            return []
        config = CONFIGS / f"{self.table.data}_{self.method.name}.yaml"
        overrides = (*REGIMES[self.table.regime], *self.method.overrides, *roots)
        given = ["--config", str(config), *overrides, "--seed", str(self.seed), "--output_dir", str(run_dir)]
        return [*given, "--trainer.threads", "1"]


def _slug(method: Method) -> str:
    ending = "".join(method.overrides[1::2]).replace(".", "")
    return method.name + (f"_{ending}" if ending else "")


def _transfer(data: str, regime: str, mechanisms: bool = False) -> Table:
    methods = tuple(method for method in METHODS if mechanisms or method.name not in _MECHANISMS)
    name = f"{data.removesuffix('_coarse')}_{regime}"
    return Table(name, data, regime, methods, also_against=("supcon_cnce", "supcon_cnce_spectral"))


TABLES = {
    table.name: table
    for table in (
        _transfer("mnist5k_coarse", "none", mechanisms=True),
        Table("mnist5k_fine", "mnist5k_fine", "none", MARGIN_METHODS, "supcon_005", ("supcon",)),
        _transfer("mnist5k_coarse", "strong"),
        _transfer("fashion_mnist_coarse", "none"),
        _transfer("fashion_mnist_coarse", "strong"),
        Table("mnist5k_moco", "../mnist5k", "none", MOCO_METHODS, baseline="moco_0"),
        Table("mnist5k_alpha", "mnist5k_coarse", "none", ALPHA_METHODS, baseline="supcon_cnce_0", seeds=(0,)),
    )
}
"""All tables, in the order of training."""


def jobs(tables: Iterable[Table], seeds: Sequence[int]) -> Iterator[Job]:
    """The jobs by table and then by seed, so that the comparisons of finished seeds are complete."""
    for table in tables:
        for seed in (seed for seed in table.seeds if seed in seeds):
            for method in table.methods:
                yield Job(table, method, seed)


def title(table: Table, run: str) -> str:
    """Title of the row of a run, or of a configuration of :mod:`pysupcon.commands.compare`."""
    return {_slug(method): method.title for method in table.methods}[run.rpartition("_seed")[0] or run]
