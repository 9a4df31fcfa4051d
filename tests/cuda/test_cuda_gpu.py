"""Tests of the CUDA kernels that need a GPU, because emulation cannot cover them."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emulation import build
from helpers.gradients import added
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "csrc")]

from find_cuda import find_cuda  # noqa: E402

import pysupcon  # noqa: E402
from benchmarks.kernels import tolerances  # noqa: E402
from benchmarks.kernels.tolerances import TABLE  # noqa: E402
from pysupcon import functional  # noqa: E402
from pysupcon.pairs import ops, tiled  # noqa: E402

_cuda = pysupcon.backends()["cuda"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _cuda["available"], reason=f"backend cuda: {_cuda['detail']}"),
]

ALONE = (None,) * 8
"""no candidates, no instances, no weights"""
NO_SUMS = (None,) * 8
"""no gradients of sums, no statistics of candidates"""
MANY = 1 << 20
LOSSES: dict[str, Any] = {
    "supcon": functional.supcon,
    "sincere": functional.sincere,
    "cnce": functional.class_conditional_info_nce,
    "spread": functional.spread,
}


def features(samples: int, width: int, dtype: torch.dtype, classes: int) -> tuple[Tensor, Tensor]:
    """[samples, 2, width] unit rows on the GPU, and labels."""
    generator = torch.Generator().manual_seed(samples * 1009 + width)
    x = torch.nn.functional.normalize(torch.randn(samples, 2, width, generator=generator), dim=-1)
    labels = torch.randint(classes, (samples,), generator=generator)
    return x.to("cuda", dtype), labels.cuda()


def both(loss: Any, x: Tensor, labels: Tensor, **arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradient of the kernels and of the dense loss in float64."""
    mine = x.clone().requires_grad_()
    value = loss(mine, labels, backend="cuda", **arguments)
    (grad,) = torch.autograd.grad(value, mine)
    truth = x.double().requires_grad_()
    want = loss(truth, labels, backend="reference", **arguments)
    (want_grad,) = torch.autograd.grad(want, truth)
    return value.detach(), grad, want.detach(), want_grad


def assert_close(value: Tensor, grad: Tensor, want: Tensor, want_grad: Tensor, temperature: float) -> None:
    """A mean loss of unit rows and its gradient, against float64 on the same rounded rows."""
    similarity, rows = 1 / temperature, want_grad.numel() // want_grad.shape[-1]
    both = tolerances.parts(similarity / rows, rows)
    loss_bar = tolerances.loss_bar(want.item(), grad.dtype, similarity)
    gradient_bar = tolerances.gradient_bar(norm(want_grad), grad.dtype, similarity, both)
    assert abs(value.double() - want) <= loss_bar
    assert norm(grad.double() - want_grad) <= gradient_bar


def norm(rows: Tensor) -> float:
    return torch.linalg.vector_norm(rows.double()).item()


@pytest.fixture(scope="module")
def wrappers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    toolkit, detail = find_cuda()
    if toolkit is None:
        pytest.skip(detail)
    program = tmp_path_factory.mktemp("wrappers") / "wrappers"
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    source = build.HERE / "wrappers.cu"
    flags = ["-std=c++17", f"-arch={arch}", f"-I{build.KERNELS}", *toolkit.include_flags]
    link = [f"-L{toolkit.cudart}", "-o", str(program)]
    subprocess.run([toolkit.nvcc, *flags, str(source), *link], check=True)
    return program


def test_tensor_core_wrappers_agree_with_plain_arithmetic(wrappers: Path) -> None:
    done = subprocess.run([str(wrappers)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", list(TABLE), ids=str)
@pytest.mark.parametrize(
    ("samples", "width"),
    [
        (1, 8),  # a single sample: no negatives
        (32, 1),  # the narrowest rows
        (64, 128),  # exactly one block of rows
        (65, 130),  # one row more, and rows that do not fill a slice
        (500, 128),  # splits of the columns
        (300, 256),  # rows that stay on chip in the forward only
        (200, 300),  # streamed rows, two shares of the gradient
        (100, 1100),  # wide rows, odd last slice
    ],
)
def test_losses_agree_with_float64(loss: str, dtype: torch.dtype, samples: int, width: int) -> None:
    x, labels = features(samples, width, dtype, classes=7)
    value, grad, want, want_grad = both(LOSSES[loss], x, labels, temperature=0.1)
    assert grad.dtype == dtype
    assert_close(value, grad, want, want_grad, temperature=0.1)


@pytest.mark.parametrize("temperature", [0.005, 0.02, 1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_temperatures(temperature: float, dtype: torch.dtype) -> None:
    x, labels = features(300, 64, dtype, classes=10)
    value, grad, want, want_grad = both(functional.supcon, x, labels, temperature=temperature)
    assert_close(value, grad, want, want_grad, temperature)


def test_matmul_precision_chooses_the_split() -> None:
    x, labels = features(400, 128, torch.float32, classes=5)
    errors = []
    before = torch.get_float32_matmul_precision()
    try:
        for precision in tolerances.PRECISION:
            torch.set_float32_matmul_precision(precision)
            _, grad, _, want = both(functional.supcon, x, labels, temperature=0.1)
            errors.append(norm(grad.double() - want) / norm(want))
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors == sorted(errors)
    assert all(error < bar for error, bar in zip(errors, tolerances.PRECISION.values(), strict=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss: str) -> None:
    x, labels = features(6, 5, torch.float64, classes=3)
    temperature = torch.tensor(0.5, dtype=torch.float64, device="cuda", requires_grad=True)

    def function(x: Tensor, temperature: Tensor) -> Tensor:
        return LOSSES[loss](x, labels, temperature=temperature, backend="cuda")

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), temperature))


def test_gradcheck_with_candidates() -> None:
    x, labels = features(4, 5, torch.float64, classes=2)
    c, c_labels = features(5, 5, torch.float64, classes=2)

    def function(x: Tensor, c: Tensor) -> Tensor:
        return functional.supcon(
            x, labels, candidates=c, candidate_labels=c_labels, temperature=0.5, backend="cuda"
        )

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), c.requires_grad_()))


def row_problem(
    count: int, width: int, dtype: torch.dtype, classes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(count)
    x = torch.nn.functional.normalize(torch.randn(count, width, device="cuda"), dim=1).to(dtype)
    labels = torch.randint(classes, (count,), device="cuda")
    stats = ops.stats_dtype(x)
    return x, labels, torch.argsort(labels, stable=True), torch.tensor(10.0, dtype=stats, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_own_rows_gradient_is_complete(dtype: torch.dtype) -> None:
    """Half of the rows as anchors, with the statistics of all rows: their part of the gradient."""
    x, labels, order, scale = row_problem(301, 96, dtype, 4)
    n, p, *_ = ops.pair_stats(x, labels, order, scale, *ALONE, True, True)
    u, v = torch.randn_like(n), torch.randn_like(p)
    backward = ops.pair_stats_backward
    whole = added(backward, x, labels, order, scale, *ALONE, n, p, u, v, *NO_SUMS, True, True)[0]
    half = 150
    mine = labels[:half]
    candidates = (x, labels, order, torch.arange(half, device="cuda"))
    part, _, _ = added(
        backward, x[:half], mine, torch.argsort(mine, stable=True), scale, *candidates,
        *(None,) * 4, n[:half], p[:half], u[:half], v[:half], None, None, n, p, u, v, None, None, True, True,
    )  # fmt: skip
    # Both have errors from float32 sums and 16-bit weights.
    bar = 2 * (TABLE[dtype].gradient + TABLE[dtype].output)
    assert norm(part.double() - whole[:half].double()) <= bar * norm(whole[:half])


@pytest.mark.parametrize("dtype", list(TABLE), ids=str)
def test_same_bits_twice(dtype: torch.dtype) -> None:
    x, labels = features(700, 128, dtype, classes=11)

    def run() -> tuple[Tensor, Tensor]:
        y = x.clone().requires_grad_()
        value = functional.spread(y, labels, temperature=0.1, backend="cuda")
        (grad,) = torch.autograd.grad(value, y)
        return value.detach(), grad

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@functools.cache
def leaning_rows(count: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """[count, width] unit rows with a common direction, so that their sum grows with their number."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator).add_(0.3)
    return torch.nn.functional.normalize(x, dim=1).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("few", [1, 5])
def test_few_anchors_and_many_candidates(few: int, dtype: torch.dtype) -> None:
    """Sums a million rows per anchor: a sum that truncates loses a part of the gradient."""
    x, c = leaning_rows(few, 128, dtype, 1), leaning_rows(MANY, 128, dtype, 0)
    labels = torch.zeros(few, dtype=torch.long, device="cuda")
    c_labels = torch.ones(MANY, dtype=torch.long, device="cuda")
    order, c_order = torch.arange(few, device="cuda"), torch.arange(MANY, device="cuda")
    scale = torch.tensor(10.0, device="cuda")
    candidates = (c, c_labels, c_order, None)
    n, p, *_ = ops.pair_stats(x, labels, order, scale, *candidates, *(None,) * 4, True, False)
    s = 10.0 * (x.double() @ c.double().T)
    want_n = s.logsumexp(1)
    torch.testing.assert_close(n.double(), want_n, rtol=TABLE[dtype].loss, atol=TABLE[dtype].loss)
    u = torch.rand(few, device="cuda") + 0.5
    grads = (n, p, u, torch.zeros_like(u), *NO_SUMS)
    arguments = (x, labels, order, scale, *candidates, *(None,) * 4, *grads, True, False)
    grad = added(ops.pair_stats_backward, *arguments)[0]
    assert grad.dtype == torch.float32
    want = 10.0 * u.double()[:, None] * (s.softmax(1) @ c.double())
    assert norm(grad.double() - want) <= tolerances.BIAS * norm(want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("few", [1, 5])
def test_many_anchors_and_few_candidates(few: int, dtype: torch.dtype) -> None:
    """The same for the gradient of the candidates, which is a sum over the anchors."""
    x, c = leaning_rows(MANY, 128, dtype, 0), leaning_rows(few, 128, dtype, 1)
    labels = torch.zeros(MANY, dtype=torch.long, device="cuda")
    c_labels = torch.ones(few, dtype=torch.long, device="cuda")
    order, c_order = torch.arange(MANY, device="cuda"), torch.arange(few, device="cuda")
    scale = torch.tensor(10.0, device="cuda")
    candidates = (c, c_labels, c_order, None)
    n, p, *_ = ops.pair_stats(x, labels, order, scale, *candidates, *(None,) * 4, True, False)
    u = torch.full((MANY,), 1 / MANY, device="cuda")
    grads = (n, p, u, torch.zeros_like(u), *NO_SUMS)
    arguments = (x, labels, order, scale, *candidates, *(None,) * 4, *grads, True, False)
    _, grad, _ = added(ops.pair_stats_backward, *arguments, candidates=True)
    assert grad.dtype == torch.float32
    weights = (10.0 * (x.double() @ c.double().T)).softmax(1) / MANY
    want = 10.0 * (weights.T @ x.double())
    assert norm(grad.double() - want) <= tolerances.BIAS * norm(want)


def test_wide_rows_that_are_alike() -> None:
    """Similarities near 0.9 of 4,096 numbers: a product that truncates is too small for every pair."""
    count, width, temperature = 512, 4096, 0.07
    generator = torch.Generator().manual_seed(7)
    shared = torch.randn(1, width, generator=generator)
    x = shared + 0.3 * torch.randn(count, width, generator=generator)
    x = torch.nn.functional.normalize(x, dim=1).to("cuda", torch.bfloat16)
    labels = torch.arange(count, device="cuda")
    scale = torch.tensor(1 / temperature, device="cuda")
    n, *_ = ops.pair_stats(x, labels, labels, scale, *ALONE, True, False)
    s = scale.double() * (x.double() @ x.double().T)
    want = s.fill_diagonal_(-torch.inf).logsumexp(1)
    assert abs((n.double() - want).mean().item()) <= tolerances.BIAS_OF_N
    torch.testing.assert_close(n.double(), want, rtol=TABLE[torch.bfloat16].loss, atol=0.0)


def test_threads_with_rows_of_different_widths() -> None:
    """Two host threads on one device: the launches of one must not affect those of the other."""
    widths, repetitions = (64, 256), 200
    start = threading.Barrier(len(widths))

    def work(width: int) -> int:
        x, labels, order, scale = row_problem(700, width, torch.bfloat16, 5)
        n, p, *_ = ops.pair_stats(x, labels, order, scale, *ALONE, True, True)
        arguments = (x, labels, order, scale, *ALONE, n, p, n, p, *NO_SUMS, True, True)
        grad = added(ops.pair_stats_backward, *arguments)[0]
        torch.cuda.synchronize()
        start.wait(timeout=60)
        wrong = 0
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(repetitions):
                again_n, again_p, *_ = ops.pair_stats(x, labels, order, scale, *ALONE, True, True)
                again = added(ops.pair_stats_backward, *arguments)[0]
                pairs = ((again_n, n), (again_p, p), (again, grad))
                wrong += not all(torch.equal(a, b) for a, b in pairs)
        return wrong

    with ThreadPoolExecutor(len(widths)) as pool:
        assert list(pool.map(work, widths)) == [0, 0]


def in_a_fresh_process(body: str) -> None:
    """Run a program that has rows x, their labels and order, and ``step``: statistics and their gradient."""
    program = f"""
import torch
from pysupcon import ops

none = (None,) * 8

def problem(dtype):
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(400, 64, device="cuda"), dim=1).to(dtype)
    labels = torch.randint(5, (400,), device="cuda")
    scale = torch.tensor(10.0, device="cuda")
    one = torch.ones(400, device="cuda")
    return x, labels, torch.argsort(labels, stable=True), scale, one

def step(x, labels, order, scale, one):
    n, p, *_ = ops.pair_stats(x, labels, order, scale, *none, True, True)
    grad = torch.zeros(x.shape, device="cuda")
    ops.pair_stats_backward(
        x, labels, order, scale, *none, n, p, one, one, *none, True, True, grad, None
    )
    return n, p, grad

def same(found, wanted):
    torch.cuda.synchronize()
    return all(torch.equal(a, b) for a, b in zip(found, wanted)) and all(a.isfinite().all() for a in found)
{body}
"""
    searched = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": searched}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_a_capture_may_be_the_first_use() -> None:
    """Kernels are loaded when they are first used, here while a graph is captured."""
    in_a_fresh_process("""
for dtype in (torch.bfloat16, torch.float32):
    inputs = problem(dtype)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(*inputs)
    graph.replay()
    assert same(found, step(*inputs)), dtype
""")


def test_a_failed_call_leaves_no_error_behind() -> None:
    """A launch into an invalid capture fails; the next call on a valid stream must not."""
    in_a_fresh_process("""
inputs = problem(torch.bfloat16)
wanted = step(*inputs)
failures = []

def expect(call):
    try:
        call()
    except RuntimeError as error:
        failures.append(str(error))

def capture():
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        expect(torch.cuda.synchronize)  # not allowed during a capture, which becomes invalid
        expect(lambda: step(*inputs))

expect(capture)
assert len(failures) == 3, failures
assert same(step(*inputs), wanted)
""")


def test_a_cuda_graph_can_hold_it() -> None:
    x, labels, order, scale = row_problem(400, 64, torch.bfloat16, 5)

    def run() -> tuple[Tensor, Tensor]:
        n, p, *_ = ops.pair_stats(x, labels, order, scale, *ALONE, True, True)
        one = torch.ones_like(n)
        backward = ops.pair_stats_backward
        return n, added(backward, x, labels, order, scale, *ALONE, n, p, one, one, *NO_SUMS, True, True)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        n, grad = run()
    x.copy_(torch.nn.functional.normalize(torch.randn(400, 64, device="cuda"), dim=1))
    graph.replay()
    want_n, want_grad = run()
    assert torch.equal(n, want_n)
    assert torch.equal(grad, want_grad)


def test_other_streams() -> None:
    x, labels, order, scale = row_problem(2000, 128, torch.bfloat16, 5)
    want = ops.pair_stats(x, labels, order, scale, *ALONE, True, True)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        y = torch.zeros_like(x)
        torch.cuda._sleep(20_000_000)  # a kernel on the wrong stream reads zeros
        y.copy_(x)
        got = ops.pair_stats(y, labels, order, scale, *ALONE, True, True)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_autocast_and_compile() -> None:
    x, labels = features(100, 64, torch.float32, classes=4)

    def loss(x: Tensor) -> Tensor:
        return functional.supcon(x, labels, backend="cuda")

    def result(function: Any) -> tuple[Tensor, Tensor]:
        mine = x.clone().requires_grad_()
        value = function(mine)
        (grad,) = torch.autograd.grad(value, mine)
        return value.detach(), grad

    want, want_grad = result(loss)
    assert norm(want_grad) > 0
    with torch.autocast("cuda", torch.bfloat16):
        value, grad = result(loss)
    assert torch.equal(value, want)
    assert torch.equal(grad, want_grad)
    value, grad = result(torch.compile(loss, fullgraph=True))
    torch.testing.assert_close(value, want)
    # Compiled code may add the parts of the gradient in another order.
    assert norm(grad - want_grad) <= TABLE[torch.float32].gradient * norm(want_grad)


def test_extra_memory() -> None:
    """At most 32 bytes per row besides the sorted copy, the results and a scratch of constant size."""
    count, width = 1 << 17, 64
    x, labels, order, scale = row_problem(count, width, torch.bfloat16, 1000)
    n, p, *_ = ops.pair_stats(x, labels, order, scale, *ALONE, True, True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backward = ops.pair_stats_backward
    grad = added(backward, x, labels, order, scale, *ALONE, n, p, n, p, *NO_SUMS, True, True)[0]
    extra = torch.cuda.max_memory_allocated() - before - grad.nbytes - x.nbytes
    assert extra <= 32 * count + (1 << 21)


def test_offsets_beyond_32_bits() -> None:
    """2^31 numbers in one operand: small classes, positives only, so that the work stays linear."""
    count, width = (1 << 24) + 3, 128
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    x = torch.empty(count, width, dtype=torch.bfloat16, device="cuda").normal_().mul_(0.05)
    labels = torch.arange(count, device="cuda") // 2
    labels[-1] = labels[-2]
    order = torch.arange(count, device="cuda")
    scale = torch.tensor(2.0, device="cuda")
    _, p, *_ = ops.pair_stats(x, labels, order, scale, *ALONE, False, True)
    one = torch.ones_like(p)
    arguments = (x, labels, order, scale, *ALONE, p - torch.inf, p, one, one, *NO_SUMS, False, True)
    grad = added(ops.pair_stats_backward, *arguments)[0]
    for i in (0, (1 << 23) + 1, count - 20_001, count - 6):
        j = i ^ 1
        similarity = 2.0 * (x[i].double() @ x[j].double())
        torch.testing.assert_close(p[i].double(), similarity, rtol=1e-5, atol=1e-5)
        rounding = tolerances.ROUNDINGS * TABLE[torch.bfloat16].output
        torch.testing.assert_close(grad[i].double(), 4.0 * x[j].double(), rtol=rounding, atol=1e-3)


@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.05, 0.02], ids=str)
@pytest.mark.parametrize("count", [8192, 20_001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_of_the_pairs(dtype: torch.dtype, count: int, temperature: float) -> None:
    """The triangular kernel computes n alone of many rows; at 0.02 another kernel does, at 0.05 partly."""
    x, labels, order, _ = row_problem(count, 128, dtype, 50)
    scale = torch.tensor(1 / temperature, device="cuda")
    apart = torch.arange(count, device="cuda")
    for own, sequence in ((labels, order), (apart, apart)):
        n, p, *_ = ops.pair_stats(x, own, sequence, scale, *ALONE, True, False)
        again, *_ = ops.pair_stats(x, own, sequence, scale, *ALONE, True, False)
        want, *_ = tiled.pair_stats(x.double(), own, sequence, scale.double(), *ALONE, True, False)
        assert torch.equal(n, again)
        assert bool((p == -torch.inf).all())
        bar = TABLE[torch.float32].loss
        torch.testing.assert_close(n.double(), want, rtol=bar, atol=bar)


def test_large_batch_against_tiled() -> None:
    x, labels, order, scale = row_problem(20_000, 128, torch.float32, 50)
    n, p, *_ = ops.pair_stats(x, labels, order, scale, *ALONE, True, True)
    double = (x.double(), labels, order, scale.double())
    want_n, want_p, *_ = tiled.pair_stats(*double, *ALONE, True, True)
    bar = TABLE[torch.float32].loss
    torch.testing.assert_close(n.double(), want_n, rtol=bar, atol=bar)
    torch.testing.assert_close(p.double(), want_p, rtol=bar, atol=bar)
