"""``pysupcon concatenate RUN RUN --output DIR``: concatenate the frozen encoders of two runs into one run.

This gives Thanos as in its paper (Chen et al. 2022, "Perfectly Balanced", arXiv 2204.07596): one backbone is
trained with cross-entropy and L_spread, the other with cross-entropy and reconstruction, and both are
evaluated together. DIR is a run without a training: config.yaml, model.safetensors, and the configs of both
runs. Its embedding is a :class:`pysupcon.models.concatenation.Concatenation` of parts of unit length.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pysupcon.commands import plain_parser, program
from pysupcon.errors import ConfigError, RunError

if TYPE_CHECKING:
    from torch import Tensor

    from pysupcon.trainer.run import Run

PARTS = ("first.yaml", "second.yaml")
FREE = (
    "root", "download", "workers", "views", "augmentation",
    "batch_size", "sampler", "samples_per_class", "groups", "view_partners",
)  # fmt: skip
"""Fields of the data config that may differ: they do not affect the images, labels and splits."""


def concatenate_runs(first: str | Path, second: str | Path, output: str | Path) -> Path:
    """Write a run whose embedding is the concatenation of the embeddings of two finished runs.

    Args:
        first, second: folders of the runs; they must have the same data and splits.
        output: folder to create; it must not exist or must be empty.

    Returns:
        ``output``.

    Raises:
        RunError: a run is not finished or damaged, the data differ, or ``output`` is not empty.
        ConfigError: the config of a run is not valid.
    """
    from pysupcon.config import Config, to_yaml
    from pysupcon.models import ModelConfig
    from pysupcon.trainer import LossConfig
    from pysupcon.trainer.checkpoint import pack_weights
    from pysupcon.trainer.data_record import DATA_FILE, pack_identity, read_identity
    from pysupcon.trainer.files import check_new_or_empty, new_folder
    from pysupcon.trainer.run import (
        CONFIG_FILE,
        SKIPPED_FILE,
        WEIGHTS_FILE,
        build_model,
        load_run,
        pack_skipped,
    )

    runs, output = [load_run(first), load_run(second)], Path(output)
    check_new_or_empty(output)
    check_same_data(*runs)
    one = runs[0].config
    config = Config(
        output_dir=str(output),
        seed=one.seed,
        data=replace(one.data),
        model=ModelConfig(concatenated=[run.config.as_concatenated_part() for run in runs]),
        loss=LossConfig(name="none"),
        evaluation=replace(one.evaluation, features="embedding"),  # it has no projection head
    )
    config.resolve()
    weights = {
        f"backbone.parts.{i}.{name}": value for i in (0, 1) for name, value in _weights(runs[i]).items()
    }
    build_model(config, runs[0].data).load_state_dict(weights)
    with new_folder(output) as folder:
        (folder / CONFIG_FILE).write_text(to_yaml(config), encoding="utf-8")
        (folder / WEIGHTS_FILE).write_bytes(pack_weights(weights))
        if runs[0].data.skipped is not None:
            (folder / SKIPPED_FILE).write_bytes(pack_skipped(runs[0].data.skipped))
        if any(read_identity(run.dir) is not None for run in runs):
            (folder / DATA_FILE).write_bytes(pack_identity(runs[0].data.identity))
        for run, name in zip(runs, PARTS, strict=True):
            (folder / name).write_text(to_yaml(run.config), encoding="utf-8")
    return output


def check_same_data(one: Run, other: Run) -> None:
    """Check that two runs have the same images, labels and splits.

    With different splits, test images of one run could be training images of the other.

    Raises:
        RunError: the data differ; the message names the field.
    """
    from pysupcon.trainer.run import SKIPPED_FILE

    first, second = one.config.data, other.config.data
    for field in fields(first):
        values = getattr(first, field.name), getattr(second, field.name)
        if field.name not in FREE and values[0] != values[1]:
            raise RunError(
                f"the runs must share their data and their split, but data.{field.name} is {values[0]!r} in "
                f"{one.dir} and {values[1]!r} in {other.dir}"
            )
    kept, compared = one.data_of_model.skipped, other.data_of_model.skipped
    if kept is not None and set(kept) != set(compared or ()):
        raise RunError(
            f"the runs must share their data and their split, but the files that data.on_error=skip left out "
            f"differ: {one.dir / SKIPPED_FILE} and {other.dir / SKIPPED_FILE}"
        )
    for run in (one, other):
        _ = run.data  # compared with the record of the run


def _weights(run: Run) -> dict[str, Tensor]:
    from pysupcon.models.spectral import unparametrized_state_dict

    return unparametrized_state_dict(run.model.backbone)


def main(arguments: Sequence[str]) -> int:
    """Write the run; return the exit status."""
    parser = plain_parser(
        prog=f"{program()} concatenate",
        description="Concatenate the frozen encoders of two runs with the same data. The result is a run "
        "whose embedding consists of both embeddings, each scaled to unit length. The commands evaluate, "
        "compare, transfer and export accept it.",
    )
    parser.add_argument("runs", nargs=2, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--output", required=True, help="folder to create")
    given = parser.parse_args(arguments)
    try:
        output = concatenate_runs(given.runs[0], given.runs[1], given.output)
    except (RunError, ConfigError) as error:
        print(f"pysupcon concatenate: {error}", file=sys.stderr)
        return 1
    print(f"written to {output}; evaluate it with: {program()} evaluate {output}")
    return 0
