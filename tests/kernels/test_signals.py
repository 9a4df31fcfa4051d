"""Signals during a kernel: Ctrl-C ends it, other handlers run without changing the result."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pysupcon import backends, functional

pytestmark = pytest.mark.skipif(not backends()["cpu"]["available"], reason="needs the compiled CPU kernels")

N = 30_000
"""Rows of a loss whose forward and backward each take much longer than the time between two checks."""


@pytest.fixture(params=[1, 2])
def rows(request: pytest.FixtureRequest) -> Iterator[Tensor]:
    threads = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield F.normalize(torch.randn(N, 64, generator=torch.Generator().manual_seed(0)), dim=1).requires_grad_()
    torch.set_num_threads(threads)


def supcon(rows: Tensor) -> Tensor:
    return functional.supcon(rows, torch.arange(N) % 10, temperature=0.1)


def processor_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


class Alarm:
    """Sends SIGALRM to this process shortly after the block begins, so that it arrives in the kernel."""

    def __init__(self, handler: Callable[[int, FrameType | None], None]) -> None:
        self.handler = handler

    def __enter__(self) -> None:
        self.before = signal.signal(signal.SIGALRM, self.handler)
        signal.setitimer(signal.ITIMER_REAL, 0.05)

    def __exit__(self, *error: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)


def interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def test_an_exception_of_a_signal_handler_ends_the_pass(rows: Tensor) -> None:
    """Without the check, the exception would come after the whole pass."""
    loss = supcon(rows)
    passes = {"forward": lambda: supcon(rows), "backward": lambda: loss.backward(retain_graph=True)}
    for name, work in passes.items():
        whole = processor_seconds(work)
        start = time.process_time()
        with Alarm(interrupt), pytest.raises(KeyboardInterrupt):
            work()
        assert time.process_time() - start < 0.8 * whole, name


def test_a_handler_that_returns_changes_nothing(rows: Tensor) -> None:
    heard = []
    expected = supcon(rows)
    with Alarm(lambda number, frame: heard.append(time.process_time())):
        start = time.process_time()
        loss = supcon(rows)
        end = time.process_time()
    assert len(heard) == 1
    assert heard[0] - start < 0.8 * (end - start)
    assert torch.equal(loss, expected)


def test_a_handler_may_compute_a_loss(rows: Tensor) -> None:
    inner = F.normalize(torch.randn(600, 200, generator=torch.Generator().manual_seed(1)), dim=1)
    labels = torch.arange(600) % 7
    expected, found = [supcon(rows), functional.supcon(inner, labels)], []
    with Alarm(lambda number, frame: found.append(functional.supcon(inner, labels))):
        found.insert(0, supcon(rows))
    assert len(found) == 2
    assert all(map(torch.equal, found, expected))
