"""The trainings that the tables compare: data set, augmentation, methods and controls."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from benchmarks.papers.study import ROOT

CONFIGS = ROOT / "configs" / "small"
FASHION_SOURCE = "Debian's package dataset-fashion-mnist, or the folder in FASHION_MNIST_ROOT"
LETTERS = ROOT / "runs" / "data" / "letters.npz"
FASHION_ROOT = os.environ.get("FASHION_MNIST_ROOT", "/usr/share/datasets/fashion-mnist")
"""Folder of Fashion-MNIST's files; the default is that of Debian's package dataset-fashion-mnist."""

STRONG = (
    "--data.augmentation", "strong", "--data.views", "2",
    "--trainer.epochs", "10", "--trainer.checkpoint_epochs", "10",
)  # fmt: skip
"""Arguments that are added to a config without augmentation."""

Kind = Literal["trained", "concatenated", "pixels", "untrained"]


@dataclass(frozen=True)
class Method:
    """A row of a table, or an encoder that other rows are made of.

    Attributes:
        key: name of its runs.
        title: title of the row.
        config: end of the name of its config; "" takes ``key``.
        overrides: arguments added after those of the table.
        parts: keys of the two frozen encoders that are concatenated.
        kind: how its features are made. pixels: the images themselves; untrained: random weights.
        shown: whether it is a row. Otherwise it is only trained, as a part of other rows.
        new_seeds: its seeds follow those of the other methods, so that it is independent of its equal.
        quick: whether the quick form has it.
        also: figures that are measured in addition to those of the table.
    """

    key: str
    title: str = ""
    config: str = ""
    overrides: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    kind: Kind = "trained"
    shown: bool = True
    new_seeds: bool = False
    quick: bool = False
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Methods that are compared on one data set under one augmentation.

    Attributes:
        name: name of the study.
        title: heading of the table.
        data: start of the names of the configs, relative to configs/small.
        methods: its rows, and the encoders that they are made of.
        baseline: key of the method that the others are compared with.
        figures: columns, keys of :data:`benchmarks.papers.figures.FIGURES`.
        compared: columns whose differences to the baseline are shown.
        arguments: arguments added to every config.
        root: file or folder of the data set, if its config needs one.
        source: how to get it.
        minutes: processor minutes of a training and evaluation.
    """

    name: str
    title: str
    data: str
    methods: tuple[Method, ...]
    baseline: str = "supcon"
    figures: tuple[str, ...] = ("coarse", "logistic", "knn", "spread")
    compared: tuple[str, ...] = ("logistic", "knn")
    arguments: tuple[str, ...] = ()
    root: str = ""
    source: str = ""
    minutes: float = 0.5


_COLD = ("--loss.temperature", "0.1")
LOW_ALPHA = 0.12
"""Just above the threshold of a collapse, 0.107 without cross-entropy, with equal views, two classes of 75
images in a batch, temperature 0.5 and the gap 1 of features after a ReLU:
``threshold.alpha_star(75, 2, 0.5, "supcon", gap=1)``."""
LOW = (
    Method("supcon_cnce_low", f"SupCon + cNCE, alpha {LOW_ALPHA}", "supcon_cnce",
           ("--loss.alpha", str(LOW_ALPHA))),
    Method("thanos_low", f"Thanos, two frozen backbones, alpha {LOW_ALPHA}", kind="concatenated",
           parts=("supcon_cnce_low", "ce_autoencoder")),
)  # fmt: skip


COLD = (
    Method("supcon_cold", "SupCon, tau 0.1", "supcon", _COLD),
    Method("sincere_cold", "SINCERE, tau 0.1", "sincere", _COLD),
    Method("supcon_cnce_cold", "SupCon + cNCE, tau 0.1", "supcon_cnce", _COLD),
    Method("thanos_cold", "Thanos, two frozen backbones, tau 0.1", kind="concatenated",
           parts=("supcon_cnce_cold", "ce_autoencoder")),
)  # fmt: skip
"""The temperature of SINCERE's recipes. That of Thanos, 0.5, is high for the losses without cNCE."""

CONTROLS = (
    Method("pixels", "control: the pixels themselves", kind="pixels", quick=True),
    Method("untrained", "control: untrained network", kind="untrained", quick=True),
)
PAIR = (
    Method("ce_autoencoder_second", config="ce_autoencoder", shown=False, new_seeds=True),
    Method("ce_autoencoder_pair", "control: two cross-entropy + autoencoder", kind="concatenated",
           parts=("ce_autoencoder", "ce_autoencoder_second")),
)  # fmt: skip
"""Thanos has two encoders: this control has its width."""
WIDTHS = (
    Method("supcon_cnce_second", config="supcon_cnce", shown=False, new_seeds=True),
    Method("supcon_cnce_half", config="supcon_cnce", overrides=("--model.width", "4"), shown=False),
    Method("ce_autoencoder_half", config="ce_autoencoder", overrides=("--model.width", "4"), shown=False),
    Method("supcon_cnce_pair", "control: two SupCon + cNCE", kind="concatenated",
           parts=("supcon_cnce", "supcon_cnce_second")),
    *PAIR,
    Method("thanos_half", "control: Thanos of half the width", kind="concatenated",
           parts=("supcon_cnce_half", "ce_autoencoder_half")),
)  # fmt: skip
"""All controls of the width."""


def transfer_methods(
    more: tuple[Method, ...] = (),
    widths: tuple[Method, ...] = (),
    low_alpha: bool = False,
    full_probe: bool = False,
) -> tuple[Method, ...]:
    """The rows of a coarse-to-fine table.

    Args:
        more: further rows, before Thanos.
        widths: controls of the width, at the end.
        low_alpha: with a weight of cNCE just above the threshold.
        full_probe: with the full probe of Thanos for the main rows.
    """
    also = ("probe",) if full_probe else ()
    return (
        Method("ce", "cross-entropy"),
        Method("supcon", "SupCon", quick=True, also=also),
        Method("sincere", "SINCERE"),
        Method("supcon_cnce", "SupCon + cNCE", quick=True, also=also),
        Method("ce_autoencoder", "cross-entropy + autoencoder", quick=True, also=also),
        *more,
        Method("thanos_frozen", "Thanos, two frozen backbones", kind="concatenated", quick=True,
               also=also, parts=("supcon_cnce", "ce_autoencoder")),
        *(LOW if low_alpha else ()),
        *COLD,
        *CONTROLS,
        *widths,
    )  # fmt: skip
