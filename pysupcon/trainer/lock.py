"""A lock on a folder: only one process at a time writes into it."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from pysupcon.errors import ConfigError
from pysupcon.reading import one_line
from pysupcon.trainer.progress import print_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
ATTEMPTS = 100
"""Attempts to lock a folder. An attempt fails if another process removes its lock file at the same time."""

_held: set[int] = set()
"""Descriptors of the lock files of this process."""


def _close_in_child() -> None:
    """Close the lock files in a forked process.

    Otherwise a worker of a DataLoader would keep the lock of a training that was killed.
    """
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


class FolderInUse(ConfigError):
    """Another process holds the lock of a folder. The message names the folder and the process."""


class FolderLock:
    """Exclusive lock on a folder, as a context manager. A missing folder is created.

    The lock is ``flock`` on a file in the folder. The operating system releases it when the process dies, so
    the file that a killed process leaves behind does not block. Network file systems pass ``flock`` on to
    their server (NFS, Lustre with ``-o flock``) or restrict it to one machine (Lustre with
    ``-o localflock``). In the second case the lock does not exclude processes on other machines. If ``flock``
    is missing or fails, nothing is locked, and a line on stderr says so.

    Attributes:
        folder: the folder.
        created: whether this lock created the folder.
        exclusive: whether the folder is locked; False if ``flock`` is missing or fails.

    Args:
        folder: the folder to lock.
        name: name of the lock file. Locks of different names are independent.

    Raises:
        FolderInUse: another process holds the lock.
        OSError: the folder or the lock file cannot be created or written.
    """

    def __init__(self, folder: Path, name: str = LOCK_FILE) -> None:
        self.folder = folder
        self.created = False
        self.exclusive = True
        self._file = folder / name
        self._descriptor = -1
        for attempt in range(ATTEMPTS):
            try:
                if self._try_lock():
                    break
            except FileNotFoundError:  # the process that created the folder has removed it
                if attempt == ATTEMPTS - 1:
                    raise
        else:
            raise FolderInUse(f"{folder} is in use by other processes: wait until they end")
        try:
            self._write_holder()
        except BaseException:
            self.release()
            raise

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Remove the lock file and release the lock; remove the folder if it was created here and is empty.

        A second call has no effect.
        """
        if self._descriptor not in _held:
            return
        with suppress(OSError):  # a lock file that stays does not block: its lock is released below
            # Remove the file before its lock is released. A process that has already opened the file then
            # finds in _try_lock that it is gone, and tries again.
            os.unlink(self._file)
        if self.created:
            with suppress(OSError):  # not empty
                self.folder.rmdir()
        _held.discard(self._descriptor)
        os.close(self._descriptor)

    def _try_lock(self) -> bool:
        """Open and lock the file; false if another process has removed it in the meantime."""
        with suppress(FileExistsError):
            self.folder.mkdir(parents=True)
            self.created = True
        descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            self._flock(descriptor)
            current = os.path.samestat(os.fstat(descriptor), os.stat(self._file))
        except FileNotFoundError:
            current = False
        except BaseException:
            os.close(descriptor)
            raise
        if current:
            self._descriptor = descriptor
            _held.add(descriptor)
        else:
            os.close(descriptor)
        return current

    def _flock(self, descriptor: int) -> None:
        """Lock the open file. If the system cannot lock it, print a line and set ``exclusive`` to False.

        Raises:
            FolderInUse: another process holds the lock.
        """
        if fcntl is None:
            reason = "this system has no flock"
        else:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                holder = _read_line(descriptor) or "another process"
                raise FolderInUse(f"{self.folder} is in use by {holder}: wait until it ends") from error
            except OSError as error:
                reason = f"flock: {one_line(error)}"
        self.exclusive = False
        print_line(
            f"{self.folder} cannot be locked ({reason}): make sure that no other process writes into it"
        )

    def _write_holder(self) -> None:
        """Write this process into the lock file. Print the former holder if it ran on another host."""
        host, before = socket.gethostname(), _read_line(self._descriptor)
        if before and f" on {host}," not in before:
            print_line(
                f"{self.folder} was in use by {before}. It is free now. If that machine does not share its "
                "file locks with this one, check that the process has ended"
            )
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {host}, started {since}\n".encode(), 0)


def _read_line(descriptor: int) -> str:
    """Return the first line of a lock file, printable characters only. It names the process that wrote it."""
    line = os.pread(descriptor, 200, 0).decode(errors="replace").partition("\n")[0]
    return "".join(letter for letter in line if letter.isprintable())
