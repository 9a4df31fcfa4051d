"""Select and lock the folder of a run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import PartialState

from pysupcon.config import Config
from pysupcon.errors import ConfigError, RunError
from pysupcon.trainer import provenance, summary
from pysupcon.trainer.checkpoint import FOLDER
from pysupcon.trainer.data_record import DATA_FILE
from pysupcon.trainer.files import remove
from pysupcon.trainer.lock import LOCK_FILE, FolderInUse, FolderLock
from pysupcon.trainer.run import CONFIG_FILE, LOG_FILE, SKIPPED_FILE, WEIGHTS_FILE
from pysupcon.trainer.setup import call_on_main_process


def is_restart() -> bool:
    """Return whether torchrun restarted these processes after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def locked_run_dir(config: Config, name: str, state: PartialState) -> Iterator[Path]:
    """Context manager that selects the folder of the run and locks it. Every process calls this.

    The main process creates and locks the folder, and the other processes receive its name. The end of the
    block releases the lock, and removes the folder if it is new and still empty. If the block raises before
    the first step of a new run, its files are removed too, so that the folder does not count as a run.

    Args:
        config: resolved config.
        name: name of the folder under runs/ if ``config.output_dir`` is None.
        state: Accelerate's state of the processes.

    Yields:
        The folder of the run.

    Raises:
        ConfigError: ``output_dir`` already holds a run and the config does not resume it, or another process
            trains into the folder; raised on every process.
        RunError: the folder cannot be created or written; raised on every process.
    """
    locks: list[FolderLock] = []

    def lock() -> str:
        try:
            locks.append(lock_run_dir(config, name))
        except ConfigError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a null character in the name
            run_dir = config.output_dir or name
            raise RunError(f"the folder of the run, {run_dir}, cannot be used: {error}") from error
        return str(locks[0].folder)

    try:
        run_dir = Path(call_on_main_process(state, lock))
        used = _holds_run(run_dir)
        try:
            yield run_dir
        except BaseException:
            if locks and not used and not _has_steps(run_dir):
                _remove_failed_start(run_dir, everything=locks[0].created)
            raise
    finally:
        for held in locks:
            held.release()


def _has_steps(run_dir: Path) -> bool:
    log = run_dir / LOG_FILE
    return (run_dir / FOLDER).exists() or (log.exists() and log.stat().st_size > 0)


def _remove_failed_start(run_dir: Path, *, everything: bool) -> None:
    """Remove the files of a training that has not finished a step.

    Args:
        run_dir: folder of the run, which held no run before.
        everything: the folder is new; remove what other code, e.g. a tracker, has written into it too. The
            lock file stays.
    """
    own = (CONFIG_FILE, LOG_FILE, SKIPPED_FILE, DATA_FILE, provenance.FILE, summary.FILE)
    with suppress(OSError):
        for path in list(run_dir.iterdir()):
            if path.name != LOCK_FILE and (everything or path.name in own):
                remove(path)


def lock_run_dir(config: Config, name: str) -> FolderLock:
    """Lock ``output_dir``, the run of the checkpoint to resume from, or a folder under runs/.

    Trainings that start at the same time get different new folders under runs/.

    Args:
        config: resolved config.
        name: name of the folder under runs/ if ``config.output_dir`` is None.

    Returns:
        The lock. Its ``folder`` is the folder of the run.

    Raises:
        ConfigError: see :func:`locked_run_dir`.
        OSError, ValueError: the folder cannot be created or written.
    """
    resume = config.resume_from_checkpoint
    if config.output_dir is not None:
        lock = FolderLock(Path(config.output_dir))
        if _holds_run(lock.folder) and resume is None:
            lock.release()
            raise ConfigError(
                f"output_dir {lock.folder} already holds a run; continue it with --resume_from_checkpoint "
                "latest or choose another folder"
            )
        return lock
    if resume is not None and resume not in ("latest", "auto"):
        checkpoints = Path(os.path.realpath(resume)).parent
        if checkpoints.name == FOLDER and _holds_run(checkpoints.parent):
            return FolderLock(checkpoints.parent)
    # Try name, name-2, name-3, ... in turn; ``last`` is the last of them that holds a run.
    number, last = 0, None
    while True:
        number += 1
        folder = Path("runs") / re.sub(r"[:\s]+", "-", name if number == 1 else f"{name}-{number}")
        if not _holds_run(folder):
            if last is not None and (resume == "latest" or (resume == "auto" and not _is_finished(last))):
                return FolderLock(last)
            try:
                lock = FolderLock(folder)
            except FolderInUse:  # another training holds it, and has not written anything yet
                if resume is not None:
                    raise
                continue
            if not _holds_run(folder) and (lock.created or lock.exclusive):
                return lock
            lock.release()  # another training has used the name in the meantime
        last = folder


def _holds_run(folder: Path) -> bool:
    return any((folder / file).exists() for file in (CONFIG_FILE, LOG_FILE, FOLDER))


def _is_finished(folder: Path) -> bool:
    return (folder / WEIGHTS_FILE).exists()
