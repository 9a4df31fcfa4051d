"""Select the folder of a run."""

from __future__ import annotations

import os
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from pysupcon.config import Config
from pysupcon.errors import ConfigError
from pysupcon.trainer.checkpoint import FOLDER
from pysupcon.trainer.run import CONFIG_FILE, LOG_FILE, WEIGHTS_FILE


def is_restart() -> bool:
    """Return whether torchrun restarted these processes after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def select_run_dir(config: Config, name: str, state: PartialState) -> Path:
    """Select the folder of the run on the main process and broadcast it. Every process calls this.

    Args:
        config: resolved config.
        name: name of the folder under runs/ if ``config.output_dir`` is None.
        state: Accelerate's state of the processes.

    Raises:
        ConfigError: ``output_dir`` already holds a run and the config does not resume it; raised on every
            process.
    """
    outcome: list[str | None] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = str(choose_run_dir(config, name))
        except ConfigError as error:
            outcome[1] = str(error)
    outcome = broadcast_object_list(outcome)
    if outcome[0] is None:
        raise ConfigError(outcome[1])
    return Path(outcome[0])


def choose_run_dir(config: Config, name: str) -> Path:
    """``output_dir``, the run of the checkpoint to resume from, or a folder under runs/."""
    resume = config.resume_from_checkpoint
    if config.output_dir is not None:
        folder = Path(config.output_dir)
        if _holds_run(folder) and resume is None:
            raise ConfigError(
                f"output_dir {folder} already holds a run; continue it with --resume_from_checkpoint latest "
                "or choose another folder"
            )
        return folder
    if resume is not None and resume not in ("latest", "auto"):
        own = Path(resume).resolve().parent
        if own.name == FOLDER and _holds_run(own.parent):
            return own.parent
    number, folder, last = 1, Path("runs") / name, None
    while _holds_run(folder):
        number, last = number + 1, folder
        folder = Path("runs") / f"{name}-{number}"
    if last is not None and (resume == "latest" or (resume == "auto" and not (last / WEIGHTS_FILE).exists())):
        return last
    return folder


def _holds_run(folder: Path) -> bool:
    return any((folder / file).exists() for file in (CONFIG_FILE, LOG_FILE, FOLDER))
