"""Freed memory stays in the process during a training on a CPU."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from pysupcon.trainer import heap

CPU = torch.device("cpu")
PAGES = 64 * 2**20 // resource.getpagesize()
pytestmark = pytest.mark.skipif(heap._glibc() is None, reason="needs glibc")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*heap.VARIABLES, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)


def new_pages() -> int:
    """Pages that the system maps for a block of 64 MiB after equal ones were freed."""
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def test_freed_blocks_are_used_again() -> None:
    with heap.freed_memory_kept(CPU):
        assert new_pages() < PAGES / 100
        kept = resident()
    assert resident() < kept - 50 * 2**20
    assert new_pages() > PAGES / 1000  # huge pages need fewer faults


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_MMAP_MAX_", "100"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1")]
)
def test_variables_of_the_user_decide(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with heap.freed_memory_kept(CPU):
        assert new_pages() > PAGES / 1000


def test_a_training_on_a_gpu_changes_nothing() -> None:
    with heap.freed_memory_kept(torch.device("cuda")):
        assert new_pages() > PAGES / 1000


def test_the_settings_of_an_ended_training_are_restored() -> None:
    with pytest.raises(KeyboardInterrupt), heap.freed_memory_kept(CPU):
        raise KeyboardInterrupt
    assert new_pages() > PAGES / 1000
