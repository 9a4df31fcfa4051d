"""``python -m pysupcon concatenate RUN RUN --output DIR``: two frozen encoders side by side, as one run.

Thanos in the form of its paper (Chen et al. 2022, "Perfectly Balanced", arXiv 2204.07596): one backbone
trained with cross-entropy and L_spread, one with cross-entropy and reconstruction, and judged together. DIR
is a run that is not trained: config.yaml and model.safetensors, with the configs of both runs beside them.
Its embedding is that of :class:`pysupcon.models.concatenation.Concatenation`, each part of unit length.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pysupcon.errors import ConfigError, RunError

if TYPE_CHECKING:
    from torch import Tensor

    from pysupcon.config import Config
    from pysupcon.trainer.run import Run

PARTS = ("first.yaml", "second.yaml")
FREE = ("root", "download", "workers", "views", "augmentation", "batch_size", "sampler", "groups")
"""Fields of the data that say how images are read and drawn in training, not which images and labels"""


def concatenate_runs(first: str | Path, second: str | Path, output: str | Path) -> Path:
    """Write a run whose embedding is that of two finished runs, one after the other.

    Args:
        first, second: folders of the runs; data and split must be the same.
        output: folder to be made; it must not exist, or be empty.

    Returns:
        ``output``.

    Raises:
        RunError: a run is not finished or damaged, their data differ, or ``output`` holds something.
        ConfigError: the config of a run is broken.
    """
    from pysupcon.config import Config, to_yaml
    from pysupcon.models import ModelConfig
    from pysupcon.trainer import LossConfig
    from pysupcon.trainer.checkpoint import pack_weights
    from pysupcon.trainer.files import check_vacant, new_folder
    from pysupcon.trainer.run import CONFIG_FILE, WEIGHTS_FILE, build_model, load_run

    runs, output = [load_run(first), load_run(second)], Path(output)
    check_vacant(output)
    check_same_data(*runs)
    one = runs[0].config
    config = Config(
        output_dir=str(output),
        seed=one.seed,
        data=replace(one.data),
        model=ModelConfig(concatenated=[training_of(run.config) for run in runs]),
        loss=LossConfig(name="none"),
        evaluation=one.evaluation,
    )
    config.resolve()
    weights = {
        f"backbone.parts.{i}.{name}": value for i in (0, 1) for name, value in _weights(runs[i]).items()
    }
    build_model(config, runs[0].data).load_state_dict(weights)
    with new_folder(output) as folder:
        (folder / CONFIG_FILE).write_text(to_yaml(config), encoding="utf-8")
        (folder / WEIGHTS_FILE).write_bytes(pack_weights(weights))
        for run, name in zip(runs, PARTS, strict=True):
            (folder / name).write_text(to_yaml(run.config), encoding="utf-8")
    return output


def check_same_data(one: Run, other: Run) -> None:
    """Refuse runs of other images, labels or splits: the test images of one may be the other's training
    images.

    Raises:
        RunError: names the field.
    """
    mine, theirs = one.config.data, other.config.data
    for field in fields(mine):
        values = getattr(mine, field.name), getattr(theirs, field.name)
        if field.name not in FREE and values[0] != values[1]:
            raise RunError(
                f"the runs must share their data and their split, but data.{field.name} is {values[0]!r} in "
                f"{one.dir} and {values[1]!r} in {other.dir}"
            )


def training_of(config: Config) -> dict[str, Any]:
    """What ``model.concatenated`` says of a run."""
    return {
        "model": asdict(config.model),
        "loss": asdict(config.loss),
        "optimizer": asdict(config.optimizer),
        "epochs": config.trainer.epochs,
        "final_weights": config.trainer.final_weights,
    }


def _weights(run: Run) -> dict[str, Tensor]:
    from pysupcon.models.spectral import unparametrized_state_dict

    return unparametrized_state_dict(run.model.backbone)


def main(arguments: Sequence[str]) -> int:
    """``python -m pysupcon concatenate RUN RUN --output DIR``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pysupcon concatenate",
        description="Put the frozen encoders of two runs of the same data side by side: a run whose "
        "embedding is both, of unit length each. evaluate, compare, transfer and export take it like any "
        "other.",
    )
    parser.add_argument("runs", nargs=2, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--output", required=True, help="folder to be made")
    given = parser.parse_args(arguments)
    try:
        output = concatenate_runs(given.runs[0], given.runs[1], given.output)
    except (RunError, ConfigError) as error:
        print(f"pysupcon concatenate: {error}", file=sys.stderr)
        return 1
    print(f"written to {output}; judge it with: python -m pysupcon evaluate {output}")
    return 0
