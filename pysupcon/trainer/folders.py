"""Which folder a run is in, and whether it goes on from something."""

from __future__ import annotations

import os
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from pysupcon.config import Config
from pysupcon.errors import ConfigError
from pysupcon.trainer.checkpoint import FOLDER
from pysupcon.trainer.run import CONFIG_FILE, LOG_FILE, WEIGHTS_FILE


def restarted() -> bool:
    """Whether torchrun has started these processes again after one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def agree_on_folder(config: Config, name: str, state: PartialState) -> Path:
    """The main process chooses, so that all name the same; an error of its is everybody's.

    Raises:
        ConfigError: ``output_dir`` holds a run already, and it is not to be continued.
    """
    choice: list[str | None] = [None, None]
    if state.is_main_process:
        try:
            choice[0] = str(choose_folder(config, name))
        except ConfigError as error:
            choice[1] = str(error)
    choice = broadcast_object_list(choice)
    if choice[0] is None:
        raise ConfigError(choice[1])
    return Path(choice[0])


def choose_folder(config: Config, name: str) -> Path:
    """``output_dir``, the folder of the checkpoint to go on from, or a folder under runs/."""
    resume = config.resume_from_checkpoint
    if config.output_dir is not None:
        folder = Path(config.output_dir)
        if _holds_run(folder) and resume is None:
            raise ConfigError(
                f"output_dir {folder} already holds a run; continue it with --resume_from_checkpoint latest, "
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
