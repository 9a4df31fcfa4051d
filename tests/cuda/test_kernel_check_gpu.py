"""The self-test of the CUDA kernels on a GPU, in addition to tests/pairs/test_kernel_check.py."""

from __future__ import annotations

import pytest
import torch

import pysupcon
from pysupcon import functional
from pysupcon.pairs import backends, kernel_check, known_answers, ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and ops.compiled_for("cuda")),
        reason=f"backend cuda: {pysupcon.backends()['cuda']['detail']}",
    ),
]


@pytest.fixture(autouse=True)
def _unjudged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts without a result of the self-test."""
    monkeypatch.setattr(kernel_check, "_verdicts", {})
    monkeypatch.setattr(kernel_check, "_warned", set())
    monkeypatch.delenv("PYSUPCON_TRUST", raising=False)
    torch.cuda.init()


@pytest.mark.parametrize(("dtype", "parts"), list(known_answers.TOLERANCES), ids=str)
def test_kernels_answer_right(dtype: torch.dtype, parts: int) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision({2: "high", 1: "medium"}.get(parts, "highest"))
        for index in range(torch.cuda.device_count()):
            assert kernel_check.unusable_reason(index, dtype) is None
            assert list(kernel_check._verdicts)[-1] == (index, dtype, parts)
    finally:
        torch.set_float32_matmul_precision(before)


def test_nothing_is_kept() -> None:
    device, held = torch.cuda.current_device(), torch.cuda.memory_allocated()
    state = torch.cuda.get_rng_state()
    assert kernel_check.unusable_reason(0, torch.bfloat16) is None
    assert torch.cuda.memory_allocated() == held
    assert torch.cuda.current_device() == device
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_a_capture_goes_on() -> None:
    x = torch.ones(4, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert backends.check_kernels("cuda", x.device, x.dtype) == "cuda"
        y = x + 1
    graph.replay()
    assert torch.equal(y, x + 1)
    assert kernel_check._verdicts == {}


def test_a_trace_judges() -> None:
    x, labels = torch.randn(8, 2, 4, device="cuda"), torch.arange(8, device="cuda") % 3
    torch._dynamo.reset()
    compiled = torch.compile(functional.supcon, fullgraph=True, backend="aot_eager")
    got = compiled(x, labels, backend="cuda")
    assert list(kernel_check._verdicts.values()) == [None]
    torch.testing.assert_close(got, functional.supcon(x, labels, backend="cuda"))
