"""Signals during a kernel: Ctrl-C ends it, other handlers run without changing the result."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import FrameType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pysupcon import backends, functional

pytestmark = pytest.mark.skipif(
    not backends()["cpu"]["available"] or not hasattr(signal, "setitimer"),
    reason="needs the compiled CPU kernels and interval timers",
)


class Stop(Exception):
    """Raised by a handler."""


@pytest.fixture(params=[1, 2], autouse=True)
def restored(request: pytest.FixtureRequest) -> Iterator[None]:
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGALRM)
    torch.set_num_threads(request.param)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, handler)
    torch.set_num_threads(threads)


def unit_rows(count: int, dim: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def supcon(rows: Tensor) -> Tensor:
    return functional.supcon(rows, torch.arange(len(rows)) % 10, temperature=0.1)


def forward(rows: Tensor) -> Callable[[], Tensor]:
    return lambda: supcon(rows)


def backward(rows: Tensor) -> Callable[[], Tensor]:
    loss = supcon(rows.requires_grad_())
    return lambda: torch.autograd.grad(loss, rows, retain_graph=True)[0]


def during(
    act: Callable[[], object], prepare: Callable[[Tensor], Callable[[], Tensor]]
) -> tuple[Tensor | None, Tensor]:
    """Calls ``act`` in a handler in the middle of a pass.

    Python calls a handler at most once before and once after a long operator, however many signals come. The
    third call therefore comes from the kernel. The number of rows is doubled until a pass is long enough.

    Returns:
        The result of the pass, None if ``act`` has stopped it, and the result without signals.
    """
    for doubled in range(4):  # the largest takes seconds
        work, calls = prepare(unit_rows(2**14 * 2**doubled, 32, seed=0)), 0

        def handle(number: int, frame: FrameType | None) -> None:
            nonlocal calls
            calls += 1
            if calls == 3:
                act()
            else:
                signal.setitimer(signal.ITIMER_REAL, 0.1)

        signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        result = None
        with suppress(Stop):
            result = work()
        signal.setitimer(signal.ITIMER_REAL, 0)
        if calls >= 3:
            return result, work()
    raise AssertionError("no handler was called during a pass")


@pytest.mark.parametrize("prepare", [forward, backward])
def test_an_exception_of_a_handler_ends_the_pass(prepare: Callable[[Tensor], Callable[[], Tensor]]) -> None:
    def stop() -> None:
        raise Stop

    result, _ = during(stop, prepare)
    assert result is None


def test_a_handler_may_compute_a_loss() -> None:
    inner, found = unit_rows(600, 200, seed=1), []
    result, expected = during(lambda: found.append(supcon(inner)), backward)
    assert result is not None
    assert torch.equal(result, expected)
    assert torch.equal(found[0], supcon(inner))
