"""csrc/cuda_glue.cpp without a GPU: registered for CPU tensors over emulated kernels."""

from __future__ import annotations

import platform
import random
import shutil
from typing import Any

import pytest
import raw_operators
import torch
from cuda_emulation import build
from gradients import added
from torch import Tensor

from pysupcon import _ops, tiled

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.system() != "Linux", reason="the emulation needs g++ on Linux"
)


@pytest.fixture(scope="module")
def emulated() -> Any:
    torch.ops.load_library(str(build.build_operators()))
    return torch.ops.pysupcon_emulated


def rows(
    count: int, width: int, dtype: torch.dtype, classes: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64)).to(
        dtype
    )
    labels = torch.randint(classes, (count,), generator=generator)
    return x, labels, torch.argsort(labels, stable=True)


def scale_for(dtype: torch.dtype) -> Tensor:
    return torch.tensor(5.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


NONE = (None, None, None, None)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("separate", [False, True], ids=["one set", "candidates"])
def test_operators_agree_with_tiled(emulated: Any, dtype: torch.dtype, separate: bool) -> None:
    x, labels, order = rows(21, 12, dtype, 3, 0)
    x = torch.cat([x, x], 1)[:, :12]  # strided rows
    scale, tolerance = scale_for(dtype), TOLERANCE[dtype]
    candidates: Any = NONE
    if separate:
        c, c_labels, _ = rows(30, 12, dtype, 3, 1)
        c[:4], c_labels[:4] = x[:4], labels[:4]
        self_index = torch.full((21,), -1)
        self_index[:4] = torch.arange(4)
        candidates = (c, c_labels, torch.argsort(c_labels, stable=True), self_index)

    def truth(t: Any) -> Any:
        return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t

    here = (x, labels, order, scale, *candidates)
    there = tuple(truth(t) for t in here)

    n, p = emulated.pair_stats(*here, True, True)
    want_n, want_p = tiled.pair_stats(*there, True, True)
    assert n.dtype == p.dtype == scale.dtype
    close(n, want_n, 1e-5)
    close(p, want_p, 1e-5)

    u, v = torch.randn(21, dtype=scale.dtype), torch.randn(21, dtype=scale.dtype)
    own = (None, None, None, None)

    def same_gradients(name: str, arguments: Any, slack: float) -> None:
        got = added(getattr(emulated, name), *here, *arguments, candidates=separate)
        want = added(
            getattr(tiled, name), *there, *(truth(value) for value in arguments), candidates=separate
        )
        for g, w in zip(got, want, strict=True):
            assert (g is None) == (w is None)
            if g is not None:
                close(g, w, tolerance * slack)

    same_gradients("pair_stats_backward", (n, p, u, v, *own, True, True), 5)
    both = torch.logaddexp(n, p)  # SupCon's: one sum stands for both, in one place
    same_gradients("pair_stats_backward", (both, both, u, u, *own, True, True), 5)

    total = emulated.positive_softplus(*here, n, 0.25)
    close(total, tiled.positive_softplus(*there, truth(n), 0.25), 3e-5)
    same_gradients("positive_softplus_backward", (n, 0.25, u, None, None), 20)

    close(emulated.positive_sum(*here), tiled.positive_sum(*there), 1e-5)
    same_gradients("positive_sum_backward", (u, None), 20)


def test_matmul_precision_chooses_the_split(emulated: Any) -> None:
    x, labels, order = rows(40, 64, torch.float32, 4, 3)
    scale = torch.tensor(20.0)
    want, _ = tiled.pair_stats(x.double(), labels, order, scale.double(), *NONE, True, True)
    errors = {}
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            n, _ = emulated.pair_stats(x, labels, order, scale, *NONE, True, True)
            errors[precision] = float((n.double() - want).abs().max())
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors["highest"] < 3e-6
    assert errors["highest"] < errors["high"] < 1e-4
    assert errors["high"] < errors["medium"] < 0.1


def test_newer_precision_setting_is_understood(emulated: Any) -> None:
    """torch.get_float32_matmul_precision() raises once this one is set; the operators must not."""
    x, labels, order = rows(40, 64, torch.float32, 4, 3)
    scale = torch.tensor(20.0)
    exact, _ = emulated.pair_stats(x, labels, order, scale, *NONE, True, True)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        split, _ = emulated.pair_stats(x, labels, order, scale, *NONE, True, True)
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        again, _ = emulated.pair_stats(x, labels, order, scale, *NONE, True, True)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert not torch.equal(split, exact)
    torch.testing.assert_close(split, exact, rtol=1e-4, atol=1e-4)
    assert torch.equal(again, exact)


def test_empty_batches(emulated: Any) -> None:
    x, labels, order = rows(0, 8, torch.float32, 3, 0)
    n, p = emulated.pair_stats(x, labels, order, torch.tensor(1.0), *NONE, True, True)
    assert n.shape == p.shape == (0,)
    y, y_labels, y_order = rows(6, 8, torch.float32, 3, 1)
    one = torch.ones(6)
    no_candidates = (x, labels, order, None)
    n, p = emulated.pair_stats(y, y_labels, y_order, torch.tensor(1.0), *no_candidates, True, True)
    assert bool((n == -torch.inf).all())
    assert bool((p == -torch.inf).all())
    empty = torch.empty(0)
    own = (None, None, None, None)
    no_anchors = (x, labels, order, torch.tensor(1.0), y, y_labels, y_order, None)
    operator = emulated.pair_stats_backward
    gx, g, _ = added(operator, *no_anchors, empty, empty, empty, empty, *own, True, True, candidates=True)
    assert gx.shape == (0, 8)
    assert bool((g == 0).all())
    gx, _, _ = added(
        operator, y, y_labels, y_order, torch.tensor(1.0), *no_candidates, n, p, one, one, *own, True, True
    )
    assert bool((gx == 0).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(5).long()}, r"must be int64 of shape \[6\] on cpu, got Long of shape \[5"),
        ({"labels": torch.zeros(6)}, r"labels must be int64 of shape \[6\] on cpu, got Float"),
        ({"x": torch.zeros(6)}, r"x must be \[rows, D\] with D at least 1, got Float of shape \[6\] on cpu"),
        ({"x": torch.zeros(6, 4, dtype=torch.int32)}, "x must be float32, float64, .* got Int"),
        ({"scale": torch.ones(1)}, r"scale must be .* of no dimensions on cpu, got Float of shape \[1\]"),
    ],
)  # fmt: skip
def test_errors_name_argument_contract_and_value(
    emulated: Any, change: dict[str, Tensor], message: str
) -> None:
    x, labels, order = rows(6, 4, torch.float32, 2, 0)
    arguments = {"x": x, "labels": labels, "order": order, "scale": torch.tensor(1.0), **change}
    with pytest.raises(ValueError, match=message):
        emulated.pair_stats(*arguments.values(), *NONE, True, True)


@pytest.mark.parametrize(
    "fault", [fault for fault in raw_operators.FAULTS if not fault.on_device], ids=lambda fault: fault.name
)
def test_faults_that_the_host_can_see_are_refused(emulated: Any, fault: raw_operators.Fault) -> None:
    tried = 0
    for form in raw_operators.FORMS:
        dice = random.Random(form)
        for dtype in raw_operators.DTYPES:
            values = raw_operators.draw(dice, form, dtype)
            for name, taken in raw_operators.operators("pysupcon_emulated").items():
                wrong = raw_operators.applied(fault, taken, values)
                if wrong is not None:
                    tried += 1
                    with pytest.raises(ValueError, match=fault.message):
                        raw_operators.call("pysupcon_emulated", name, wrong)
    assert tried


def test_candidate_statistics_need_candidates(emulated: Any) -> None:
    x, labels, order = rows(6, 4, torch.float32, 2, 0)
    one = torch.ones(6)
    with pytest.raises(ValueError, match="go with candidates"):
        emulated.positive_sum_backward(x, labels, order, torch.tensor(1.0), *NONE, one, one, x.clone(), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda g: g[:5],
            r"grad_x must be a contiguous tensor of Float and shape \[6, 4\] on cpu, got Float of",
        ),
        (lambda g: g.double(), r"grad_x must be .* of Float and shape \[6, 4\] on cpu, got Double"),
        (lambda g: g.new_zeros(4, 6).T, r"got Float of shape \[6, 4\] and strides \[1, 6\]"),
    ],
)
def test_gradient_buffers_are_checked(emulated: Any, change: Any, message: str) -> None:
    x, labels, order = rows(6, 4, torch.float32, 2, 0)
    with pytest.raises(ValueError, match=message):
        emulated.positive_sum_backward(
            x, labels, order, torch.tensor(1.0), *NONE, torch.ones(6), None, change(x.clone()), None
        )


@pytest.mark.skipif(not _ops.compiled_for("cuda"), reason="this build has no CUDA kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_fakes_answer_for_cuda_tensors_without_a_gpu(dtype: torch.dtype) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(8, 4, dtype=dtype, device="cuda")
        labels = torch.empty(8, dtype=torch.int64, device="cuda")
        stats = _ops.stats_dtype(x)
        scale = torch.empty((), dtype=stats, device="cuda")
        n, p = torch.ops.pysupcon.pair_stats(x, labels, labels, scale, *NONE, True, True)
        assert n.dtype == p.dtype == stats
        assert n.device.type == "cuda"
        assert n.shape == (8,)
        own = (None, None, None, None)
        grad_x, _, _ = added(
            torch.ops.pysupcon.pair_stats_backward,
            *(x, labels, labels, scale, *NONE, n, p, n, p, *own, True, True),
        )
        assert grad_x.dtype == torch.promote_types(dtype, torch.float32)
        assert grad_x.device.type == "cuda"
        grad_n = torch.ops.pysupcon.positive_softplus_backward(
            x, labels, labels, scale, *NONE, n, 0.0, n, None, None, grad_x, None
        )
        assert grad_n.dtype == stats
        assert grad_n.device.type == "cuda"
