"""Freed memory stays in the process during a training on a CPU.

Fresh processes measure it: a heap with large holes, which other tests leave, hides the difference.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from helpers.training_server import SEARCHED

from pysupcon.profiling import malloc
from pysupcon.trainer import heap

pytestmark = pytest.mark.skipif(malloc.glibc() is None, reason="needs glibc")
PROGRAM = """
import json, resource, sys
import torch
from pysupcon.trainer.heap import freed_memory_kept

def new_pages():
    # The least of several: malloc aligns blocks, and a freed one without room for that is not used again.
    found = []
    for _ in range(9):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16 * 2**20)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

result = {"before": new_pages()}
try:
    with freed_memory_kept(torch.device(sys.argv[1])):
        result |= {"during": new_pages(), "kept": resident()}
        raise KeyboardInterrupt
except KeyboardInterrupt:
    result |= {"left": resident(), "after": new_pages()}
print(json.dumps(result))
"""


def measure(device: str = "cpu", **variables: str) -> dict[str, Any]:
    """Pages that the system maps for a block of 64 MiB, and bytes of the process."""
    environment = {name: value for name, value in os.environ.items() if name not in heap.VARIABLES}
    environment.pop("GLIBC_TUNABLES", None)
    environment |= {"PYTHONPATH": SEARCHED, **variables}
    command = [sys.executable, "-c", PROGRAM, device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_freed_blocks_are_used_again_until_the_training_ends() -> None:
    found = measure()
    assert found["during"] < 10 < found["before"]  # huge pages: 32
    assert found["after"] > 10
    assert found["left"] < found["kept"] - 50 * 2**20


@pytest.mark.parametrize(
    ("device", "variables"),
    [
        ("cuda", {}),
        ("cpu", {"MALLOC_MMAP_MAX_": "100"}),
        ("cpu", {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=100"}),
    ],
)
def test_other_devices_and_variables_of_the_user_change_nothing(
    device: str, variables: dict[str, str]
) -> None:
    found = measure(device, **variables)
    assert min(found["before"], found["during"], found["after"]) > 10
