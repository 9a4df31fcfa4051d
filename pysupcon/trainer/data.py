"""The data of a training, and the record of the image files that ``data.on_error: skip`` leaves out.

The splits depend on the files that are left out. Therefore a resumed or evaluated run takes them from its
record, and does not read all files again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator, PartialState

from pysupcon.config import Config
from pysupcon.data.datamodule import DataModule, load_data
from pysupcon.data.unreadable import check_readable, describe_skipped
from pysupcon.trainer import checkpoint
from pysupcon.trainer.batch_notes import batch_notes
from pysupcon.trainer.folders import is_restart
from pysupcon.trainer.progress import print_line, report_if_slow
from pysupcon.trainer.run import read_skipped
from pysupcon.trainer.setup import call_on_main_process


def read_data(
    config: Config, dataset: object, state: PartialState, run_dir: Path | None = None
) -> DataModule:
    """Read the data of a training, and print what the user should know about them. Every process calls this.

    Args:
        config: resolved config.
        dataset: the data set, if ``config.data.dataset`` records a passed object.
        state: Accelerate's state of the processes.
        run_dir: folder of the run, if the data depend on it (``data.on_error`` skip).

    Raises:
        ConfigError: the data cannot be read, or do not fit the loss.
        RunError: the run that is resumed has no record of the files that were left out.
    """
    main: list[DataModule] = []
    skipped: Mapping[str, str] | None = None

    def read() -> dict[str, str] | None:
        main.append(load_data(config.data, dataset, _recorded(config, run_dir)))
        return main[0].skipped

    with report_if_slow(f"reading {config.data.dataset}", enabled=state.is_main_process):
        if config.data.on_error == "skip":  # processes could find different files
            skipped = call_on_main_process(state, read)
        if main:
            data = main[0]
        elif config.data.download:
            with state.main_process_first():
                data = load_data(config.data, dataset, skipped)
        else:
            data = load_data(config.data, dataset, skipped)
    lines = [describe_skipped(data.skipped)] if data.skipped else []
    lines += batch_notes(config, data, state.num_processes).lines
    for line in lines if state.is_main_process else ():
        print_line(line)
    return data


def check_held_out(config: Config, data: DataModule, state: PartialState | Accelerator) -> None:
    """Check that the image files that validation and evaluation read can be read. Every process calls this.

    The training itself does not read them: a damaged one would end the run after its last step.

    Raises:
        ConfigError: a file cannot be read; raised on every process.
    """
    names = ("val", "test") if config.evaluate else ("val",) if config.trainer.best_by is not None else ()
    if config.data.on_error == "skip" or config.data.root is None:  # skip has read every file
        return
    splits, root = {name: data.splits[name] for name in names}, os.path.expanduser(config.data.root)
    call_on_main_process(state, lambda: check_readable(splits, root))


def _recorded(config: Config, run_dir: Path | None) -> dict[str, str] | None:
    """The files that the resumed run leaves out; None if the training starts from the beginning."""
    which = config.resume_from_checkpoint
    if run_dir is None or which is None:
        return None
    if which not in ("latest", "auto") and not (is_restart() and checkpoint.checkpoints(run_dir)):
        run_dir = Path(os.path.realpath(which)).parent.parent
    return read_skipped(run_dir) if checkpoint.checkpoints(run_dir) else None
