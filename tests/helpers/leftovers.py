"""A program that leaves processes behind which are hard to end, and how to find them."""

from __future__ import annotations

import re
from pathlib import Path

#: Starts two children that ignore SIGINT and SIGTERM, of which the second leaves its parent's session, too.
GRANDCHILDREN = """
import os, signal, subprocess, sys, time
stubborn = "import signal, time; signal.signal(2, signal.SIG_IGN); signal.signal(15, signal.SIG_IGN); "
stubborn += "print('ready', flush=True); time.sleep(600)"
command = [sys.executable, "-c", stubborn]
for leaves in (False, True):
    child = subprocess.Popen(command, start_new_session=leaves, stdout=subprocess.PIPE)
    child.stdout.readline()
    print("child", child.pid, flush=True)
"""


def children(printed: str) -> list[int]:
    """Process ids that GRANDCHILDREN printed."""
    return [int(pid) for pid in re.findall(r"^child (\d+)$", printed, re.MULTILINE)]


def alive(pid: int) -> bool:
    """Whether it still runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
