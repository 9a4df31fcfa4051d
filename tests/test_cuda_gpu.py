"""The CUDA kernels on a GPU: what emulation cannot see. Skipped, with the reason, where there is none."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emulation import build
from gradients import added
from torch import Tensor

import pysupcon
from pysupcon import _ops, functional, tiled

_cuda = pysupcon.backends()["cuda"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _cuda["available"], reason=f"backend cuda: {_cuda['detail']}"),
]

NONE = (None, None, None, None)
# The loss's relative error, and the gradient's by norms, against float64 on the same rounded rows.
LOSS_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
GRADIENT_TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
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
    """Loss and gradient by the kernels, and by dense float64."""
    mine = x.clone().requires_grad_()
    value = loss(mine, labels, backend="cuda", **arguments)
    (grad,) = torch.autograd.grad(value, mine)
    truth = x.double().requires_grad_()
    want = loss(truth, labels, backend="reference", **arguments)
    (want_grad,) = torch.autograd.grad(want, truth)
    return value.detach(), grad, want.detach(), want_grad


@pytest.fixture(scope="module")
def wrappers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        pytest.skip("no nvcc to compile the wrappers' test with")
    program = tmp_path_factory.mktemp("wrappers") / "wrappers"
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    source = build.HERE / "wrappers.cu"
    command = [nvcc, "-std=c++17", f"-arch={arch}", f"-I{build.KERNELS}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def test_tensor_core_wrappers_agree_with_plain_arithmetic(wrappers: Path) -> None:
    done = subprocess.run([str(wrappers)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", list(LOSS_TOLERANCE), ids=str)
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
    assert abs(value.double() - want) <= LOSS_TOLERANCE[dtype] * max(1.0, abs(want))
    assert torch.linalg.vector_norm(grad.double() - want_grad) <= GRADIENT_TOLERANCE[dtype] * max(
        1e-3, torch.linalg.vector_norm(want_grad)
    )


@pytest.mark.parametrize("temperature", [0.005, 0.02, 1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_temperatures(temperature: float, dtype: torch.dtype) -> None:
    x, labels = features(300, 64, dtype, classes=10)
    value, grad, want, want_grad = both(functional.supcon, x, labels, temperature=temperature)
    assert abs(value.double() - want) <= 4e-6 * max(1.0, abs(want))
    bound = GRADIENT_TOLERANCE[dtype] * max(1.0, 0.1 / temperature)
    assert torch.linalg.vector_norm(grad.double() - want_grad) <= bound * torch.linalg.vector_norm(want_grad)


def test_matmul_precision_chooses_the_split() -> None:
    x, labels = features(400, 128, torch.float32, classes=5)
    errors = []
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            _, grad, _, want = both(functional.supcon, x, labels, temperature=0.1)
            errors.append(
                float(torch.linalg.vector_norm(grad.double() - want) / torch.linalg.vector_norm(want))
            )
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors[0] < 5e-6
    assert errors[0] < errors[1] < 2e-4
    assert errors[1] < errors[2] < 3e-2


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
    stats = _ops.stats_dtype(x)
    return x, labels, torch.argsort(labels, stable=True), torch.tensor(10.0, dtype=stats, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_own_rows_gradient_is_complete(dtype: torch.dtype) -> None:
    """Half of the rows as anchors, with every row's statistics: their part of the whole batch's gradient."""
    x, labels, order, scale = row_problem(301, 96, dtype, 4)
    n, p = _ops.pair_stats(x, labels, order, scale, *NONE, True, True)
    u, v = torch.randn_like(n), torch.randn_like(p)
    own = (None, None, None, None)
    backward = _ops.pair_stats_backward
    whole = added(backward, x, labels, order, scale, *NONE, n, p, u, v, *own, True, True)[0]
    half = 150
    mine = labels[:half]
    candidates = (x, labels, order, torch.arange(half, device="cuda"))
    part, _, _ = added(
        backward, x[:half], mine, torch.argsort(mine, stable=True), scale, *candidates,
        n[:half], p[:half], u[:half], v[:half], n, p, u, v, True, True,
    )  # fmt: skip
    error = torch.linalg.vector_norm(part.double() - whole[:half].double())
    assert error <= (1e-5 if dtype == torch.float32 else 8e-3) * torch.linalg.vector_norm(
        whole[:half].double()
    )


@pytest.mark.parametrize("dtype", list(LOSS_TOLERANCE), ids=str)
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


def test_a_cuda_graph_can_hold_it() -> None:
    x, labels, order, scale = row_problem(400, 64, torch.bfloat16, 5)
    own = (None, None, None, None)

    def run() -> tuple[Tensor, Tensor]:
        n, p = _ops.pair_stats(x, labels, order, scale, *NONE, True, True)
        one = torch.ones_like(n)
        backward = _ops.pair_stats_backward
        return n, added(backward, x, labels, order, scale, *NONE, n, p, one, one, *own, True, True)[0]

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
    want = _ops.pair_stats(x, labels, order, scale, *NONE, True, True)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        y = torch.zeros_like(x)
        torch.cuda._sleep(20_000_000)  # a kernel on the wrong stream reads zeros
        y.copy_(x)
        got = _ops.pair_stats(y, labels, order, scale, *NONE, True, True)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_autocast_and_compile() -> None:
    x, labels = features(100, 64, torch.float32, classes=4)
    want = functional.supcon(x, labels, backend="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(functional.supcon(x, labels, backend="cuda"), want)
    compiled = torch.compile(lambda x: functional.supcon(x, labels, backend="cuda"), fullgraph=True)
    torch.testing.assert_close(compiled(x), want)


def test_extra_memory() -> None:
    """At most 32 bytes a row beside the sorted copy, the results, and a scratch that does not grow with N."""
    count, width = 1 << 17, 64
    x, labels, order, scale = row_problem(count, width, torch.bfloat16, 1000)
    n, p = _ops.pair_stats(x, labels, order, scale, *NONE, True, True)
    own = (None, None, None, None)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backward = _ops.pair_stats_backward
    grad = added(backward, x, labels, order, scale, *NONE, n, p, n, p, *own, True, True)[0]
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
    _, p = _ops.pair_stats(x, labels, order, scale, *NONE, False, True)
    own = (None, None, None, None)
    one = torch.ones_like(p)
    arguments = (x, labels, order, scale, *NONE, p - torch.inf, p, one, one, *own, False, True)
    grad = added(_ops.pair_stats_backward, *arguments)[0]
    for i in (0, (1 << 23) + 1, count - 20_001, count - 6):
        j = i ^ 1
        similarity = 2.0 * (x[i].double() @ x[j].double())
        torch.testing.assert_close(p[i].double(), similarity, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad[i].double(), 4.0 * x[j].double(), rtol=2e-2, atol=1e-3)


def test_large_batch_against_tiled() -> None:
    x, labels, order, scale = row_problem(20_000, 128, torch.float32, 50)
    n, p = _ops.pair_stats(x, labels, order, scale, *NONE, True, True)
    double = (x.double(), labels, order, scale.double())
    want_n, want_p = tiled.pair_stats(*double, *NONE, True, True)
    torch.testing.assert_close(n.double(), want_n, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(p.double(), want_p, rtol=2e-6, atol=2e-6)
