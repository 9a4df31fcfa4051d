"""pysupcon/pairs/known_answers.py: correct operators pass, and every kind of wrong result is detected."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_emulation import build
from torch import Tensor

from pysupcon.pairs import kernel_check, known_answers, ops, tiled

CPU = torch.device("cpu")
PRECISIONS = {3: "highest", 2: "high", 1: "medium"}


@pytest.mark.parametrize(("dtype", "parts"), list(known_answers.TOLERANCES), ids=str)
def test_right_operators_agree(dtype: torch.dtype, parts: int) -> None:
    assert known_answers.disagreement(tiled, CPU, dtype, parts) is None


def test_the_default_device_moves_no_question() -> None:
    torch.set_default_device("meta")
    try:
        assert known_answers.disagreement(tiled, CPU, torch.float64, many=0) is None
    finally:
        torch.set_default_device(None)


@pytest.mark.skipif(not ops.compiled_for("cpu"), reason="the extension is not built")
def test_compiled_cpu_operators_agree() -> None:
    assert known_answers.disagreement(ops, CPU, torch.float64) is None


@pytest.mark.skipif(
    shutil.which("g++") is None or platform.system() != "Linux", reason="the emulation needs g++ on Linux"
)
@pytest.mark.parametrize(("dtype", "parts"), list(known_answers.TOLERANCES), ids=str)
def test_emulated_kernels_agree(dtype: torch.dtype, parts: int) -> None:
    torch.ops.load_library(str(build.build_operators()))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(PRECISIONS.get(parts, "highest"))
        assert kernel_check.parts_of_float32() == (parts or 3)
        assert known_answers.disagreement(torch.ops.pysupcon_emulated, CPU, dtype, parts) is None
    finally:
        torch.set_float32_matmul_precision(before)


def _one_element(right: Tensor) -> Tensor:
    """One element in the middle of the values has an error of 1 %."""
    wrong = right.clone().reshape(-1)
    sizes = torch.where(wrong.isfinite(), wrong, 0.0).abs()
    candidates = sizes.nonzero().reshape(-1)
    wrong[candidates[sizes[candidates].argsort()[len(candidates) // 2]]] *= 1.01
    return wrong.view_as(right)


def _one_nan(right: Tensor) -> Tensor:
    wrong = right.clone()
    wrong.reshape(-1)[-1] = torch.nan
    return wrong


def _scaled(right: Tensor) -> Tensor:
    return right * 1.01


def _last_row_missing(right: Tensor) -> Tensor:
    wrong = right.clone()
    wrong[-1] = 0.0
    return wrong


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one element": _one_element,
    "one NaN": _one_nan,
    "scaled": _scaled,
    "last row missing": _last_row_missing,
}
OUTPUTS = {
    "pair_stats": ["n", "p", "positive_sum", "instance_sum"],
    "pair_stats_backward": ["grad_x", "grad_candidates"],
    "positive_softplus": ["total"],
    "positive_softplus_backward": ["grad_x", "grad_candidates", "grad_n"],
}


class Wrong:
    """The operators of :mod:`pysupcon.pairs.tiled`, with a wrong output where ``when`` is true."""

    def __init__(
        self,
        operator: str,
        output: str,
        fault: Callable[[Tensor], Tensor],
        when: Callable[..., bool] = lambda *_: True,
    ) -> None:
        self.operator, self.output, self.fault, self.when = operator, output, fault, when

    def __getattr__(self, name: str) -> Any:
        function = getattr(tiled, name)
        return self._spoiled(function) if name == self.operator else function

    def _spoiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            buffer = {"grad_x": arguments[-2], "grad_candidates": arguments[-1]}.get(self.output)
            before = None if buffer is None else buffer.clone()
            result = function(*arguments)
            if not self.when(*arguments):
                return result
            if buffer is not None:
                buffer.copy_(before + self.fault(buffer - before))
            elif isinstance(result, tuple):
                place = OUTPUTS["pair_stats"].index(self.output)
                result = tuple(self.fault(r) if i == place else r for i, r in enumerate(result))
            elif self.output in ("total", "grad_n"):
                result = self.fault(result)
            return result

        return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("operator", "output"), [(name, output) for name, outputs in OUTPUTS.items() for output in outputs]
)
def test_every_wrong_answer_is_noticed(operator: str, output: str, fault: str, dtype: torch.dtype) -> None:
    parts = 3 if dtype == torch.float32 else 0
    message = known_answers.disagreement(Wrong(operator, output, FAULTS[fault]), CPU, dtype, parts)
    assert message is not None
    assert message.startswith(f"{operator} (")
    assert ("the sum" if output == "total" else output) in message
    assert ("is not finite in 1 of" in message) == (fault == "one NaN")


WHEN: dict[str, tuple[str, str, Callable[..., bool], str]] = {
    "wide rows": ("pair_stats_backward", "grad_x", lambda x, *_: x.shape[1] > 256, "D=264"),
    "one set": ("pair_stats", "n", lambda *a: a[4] is None, "one set"),
    "negatives only": ("pair_stats", "n", lambda *a: a[-2:] == (True, False), "negatives only"),
    "positives only": ("pair_stats", "p", lambda *a: a[-2:] == (False, True), "positives only"),
    "candidates": ("pair_stats_backward", "grad_x", lambda *a: a[-1] is not None, "candidates"),
    "no instances": ("pair_stats", "p", lambda *a: a[8] is None and a[-1], "no instances"),
    "own rows": ("positive_softplus_backward", "grad_x", lambda *a: a[13] is not None, "rows of one process"),
}  # fmt: skip


@pytest.mark.parametrize("name", WHEN)
def test_every_form_is_asked(name: str) -> None:
    """A fault of one form only: one width, one kind of candidates, one choice of sets."""
    operator, output, when, named = WHEN[name]
    message = known_answers.disagreement(Wrong(operator, output, _scaled, when), CPU, torch.bfloat16)
    assert message is not None
    assert named in message


def test_a_wrong_empty_set_is_noticed() -> None:
    def filled(right: Tensor) -> Tensor:
        return torch.where(right == -torch.inf, 0.0, right)

    message = known_answers.disagreement(Wrong("pair_stats", "p", filled), CPU, torch.float64)
    assert message == "pair_stats (one set, D=72): p is not -inf where a set is empty"


def test_a_gradient_that_replaces_what_was_there_is_noticed() -> None:
    class Replaces(Wrong):
        def _spoiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                arguments[-2].zero_()
                return function(*arguments)

            return call

    message = known_answers.disagreement(Replaces("pair_stats_backward", "", _scaled), CPU, torch.bfloat16)
    assert message is not None
    assert message.startswith("pair_stats_backward (one set, D=72): grad_x differs in")


def test_an_operator_that_cannot_run_is_named() -> None:
    def fail(right: Tensor) -> Tensor:
        raise RuntimeError("no kernel image is available for execution on the device\nmore words")

    message = known_answers.disagreement(Wrong("positive_softplus", "total", fail), CPU, torch.float16)
    assert message == (
        "positive_softplus (one set, D=72) did not run: no kernel image is available for execution on the "
        "device"
    )


def test_no_room_says_nothing_of_the_kernels() -> None:
    def fail(right: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        known_answers.disagreement(Wrong("pair_stats", "n", fail), CPU, torch.float16)


def test_n_of_many_rows_is_held_against_the_kernel_for_candidates() -> None:
    """Like a fault of the triangular forward on a GPU: only one set with at least so many rows."""

    class Half:
        def __getattr__(self, name: str) -> Any:
            return getattr(tiled, name)

        def pair_stats(self, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
            n, *others = tiled.pair_stats(x, *arguments)
            right = x.shape[0] < 1000 or arguments[3] is not None
            return n if right else _one_element(n), *others

    assert known_answers.disagreement(tiled, CPU, torch.float64, many=1001) is None
    assert known_answers.disagreement(Half(), CPU, torch.float64) is None
    message = known_answers.disagreement(Half(), CPU, torch.float64, many=1001)
    assert message is not None
    assert message.startswith("pair_stats (negatives only, 1001 rows): n differs in 1 of 1001 places")
