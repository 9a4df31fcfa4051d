"""Accuracy of the CPU kernels for every instruction set that was compiled and runs on this machine."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from helpers import weighted_pairs
from helpers.tolerances import TABLE
from torch import Tensor

import pysupcon
from pysupcon import functional
from pysupcon.pairs import ops

if not pysupcon.backends()["cpu"]["available"]:
    pytest.skip(pysupcon.backends()["cpu"]["detail"], allow_module_level=True)
_C = importlib.import_module("pysupcon._C")

ROWS, WIDTH, CLASSES = 1000, 128, 10  # several blocks, the last one partial; several chunks per row
LOSSES = {
    "supcon": functional.supcon,
    "sincere": functional.sincere,
    "cnce": functional.class_conditional_info_nce,
    "spread": functional.spread,
}


@pytest.fixture(params=_C.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


def rows(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    x = torch.nn.functional.normalize(x, dim=1)
    return x if kind == "unit" else x * (0.2 + 2 * torch.rand(ROWS, 1, generator=generator))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("temperature", [0.005, 0.07, 10.0])  # running maxima; one reference; flat
@pytest.mark.parametrize("kind", ["unit", "unnormalised"])
def test_results_are_within_tolerance(isa: str, kind: str, temperature: float, loss: str) -> None:
    labels = torch.arange(ROWS // 2) % CLASSES

    def run(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        x = x.view(ROWS // 2, 2, WIDTH).detach().requires_grad_()
        value = LOSSES[loss](x, labels, temperature=temperature, backend=backend)
        return value.detach().double(), torch.autograd.grad(value, x)[0].double()

    x = rows(kind)
    value, grad = run(x, "cpu")
    truth, true_grad = run(x.double(), "reference")
    tolerance = TABLE[torch.float32]
    assert (value - truth).abs() <= tolerance.loss * truth.abs()
    assert (grad - true_grad).norm() <= tolerance.gradient * true_grad.norm()


@pytest.mark.parametrize("form", ["self", "own rows"])
@pytest.mark.parametrize("weights", ["near", "far"])
@pytest.mark.parametrize("temperature", [0.005, 0.07])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_candidates(
    isa: str, dtype: torch.dtype, temperature: float, weights: str, form: str
) -> None:
    weighted_pairs.check(weighted_pairs.draw(form, dtype, temperature, weights, seed=7), ops)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be one of .*generic.* on this machine, got 'mmx'"):
        _C.set_cpu_isa("mmx")


def test_the_environment_selects_the_instruction_set() -> None:
    command = "from pysupcon import _C; print(_C.cpu_isa())"
    for name in ("generic", _C.cpu_isas()[0]):
        done = subprocess.run(
            [sys.executable, "-c", f"import torch; {command}"],
            env={**os.environ, "PYSUPCON_CPU_ISA": name},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == name
