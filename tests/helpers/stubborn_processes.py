"""A program whose child processes are hard to end, and functions that find them."""

from __future__ import annotations

import re
from pathlib import Path

#: Starts two child processes that ignore SIGINT and SIGTERM. The second also starts its own session.
STUBBORN_CHILDREN = """
import os, signal, subprocess, sys, time
stubborn = "import signal, time; signal.signal(2, signal.SIG_IGN); signal.signal(15, signal.SIG_IGN); "
stubborn += "print('ready', flush=True); time.sleep(600)"
command = [sys.executable, "-c", stubborn]
for leaves in (False, True):
    child = subprocess.Popen(command, start_new_session=leaves, stdout=subprocess.PIPE)
    child.stdout.readline()
    print("child", child.pid, flush=True)
"""


def printed_pids(printed: str) -> list[int]:
    """The process ids that STUBBORN_CHILDREN printed."""
    return [int(pid) for pid in re.findall(r"^child (\d+)$", printed, re.MULTILINE)]


def is_running(pid: int) -> bool:
    """Whether the process still runs. A zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
