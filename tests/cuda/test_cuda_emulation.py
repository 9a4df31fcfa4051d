"""Runs the sources of the CUDA kernels on the CPU, against a float64 oracle and under sanitizers.

The emulation cannot detect races between blocks, wrong PTX strings, register use or speed; test_cuda_gpu.py
tests those on a GPU.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emulation import build

import pysupcon
from pysupcon.pairs import statistics

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.system() != "Linux", reason="the emulation needs g++ on Linux"
)

# The smallest case of every kernel, because the sanitizers are slow.
ASAN_CASES = [
    "bf16-candidates",
    "f16-own",
    "f32x3-own",
    "f32x2-own",
    "f64-candidates",
    "bf16-long",
    "f32x3-two-rows",
    "bf16-empty-parts",
    "bf16-views-candidates",
    "f32x3-views-own",
    "f64-views-candidates",
    "bf16-weights-own-rows",
    "f32x3-weights-candidates",
    "f64-weights-candidates",
]
ASAN_BROKEN = ["bf16-streamed", "f64-own"]
TSAN_CASES = ["bf16-own", "f32x3-two-rows", "f64-own", "bf16-shares", "bf16-views-own"]
SHARES = 6
FORMATS = ["bf16", "f16", "f32x1", "f32x2", "f32x3", "f64"]
TENSOR_CORES = ["h100", "a100"]


def check(kind: str, *cases: str, order: str = "forward", tensor_core: str = "h100") -> None:
    done = build.run(build.build(kind), *cases, order=order, tensor_core=tensor_core)
    passed = done.returncode == 0 and done.stdout.rstrip().endswith("PASS")
    assert passed, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("tensor_core", TENSOR_CORES)
@pytest.mark.parametrize("prefix", FORMATS)
def test_operators_agree_with_the_oracle(prefix: str, tensor_core: str) -> None:
    check("plain", prefix, tensor_core=tensor_core)


@pytest.mark.parametrize("tensor_core", TENSOR_CORES)
@pytest.mark.parametrize("what", ["columns", "rows"])
def test_long_sums_do_not_shrink(what: str, tensor_core: str) -> None:
    check("plain", f"large-bf16-{what}", f"large-f16-{what}", tensor_core=tensor_core)


@pytest.mark.parametrize("order", ["reverse", "1"])
def test_results_do_not_depend_on_the_order_of_threads_and_blocks(order: str) -> None:
    check("plain", "bf16-tiles", "f32x3-candidates", "f64-tiles", order=order)


def test_address_and_undefined_behaviour_sanitizers_are_silent() -> None:
    check("asan", *ASAN_CASES)


def test_thread_sanitizer_is_silent() -> None:
    check("tsan", *TSAN_CASES)


def broken(kind: str, *shapes: str) -> None:
    done = build.run(build.build(kind, "broken.cpp"), *shapes, timeout=1200)
    passed = done.returncode == 0 and done.stdout.rstrip().endswith("PASS")
    assert passed, done.stdout[-3000:] + done.stderr[-3000:]


def test_broken_operands_give_nan_everywhere() -> None:
    broken("plain")


def test_broken_operands_access_no_invalid_memory() -> None:
    broken("asan", *ASAN_BROKEN)


def test_emulation_primitives() -> None:
    done = build.run(build.build("plain", "shim_selftest.cpp"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_host_twins_of_the_wrappers_agree_with_plain_arithmetic() -> None:
    done = build.run(build.build("plain", "wrappers.cu"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_tensor_core_agrees_with_a_second_implementation() -> None:
    done = build.run(build.build("plain", "tensor_core_selftest.cpp"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_unknown_tensor_core_is_an_error() -> None:
    done = build.run(build.build("plain"), "bf16-tiles", tensor_core="v100")
    assert done.returncode != 0
    assert "neither h100 nor a100" in done.stdout


def test_thread_sanitizer_sees_a_missing_syncwarp_and_accepts_fences() -> None:
    program = build.build("tsan", "shim_selftest.cpp")
    silent, race = build.run(program), build.run(program, "race")
    assert silent.returncode == 0, silent.stdout + silent.stderr
    assert "data race" in race.stderr


def test_unknown_case_is_a_failure() -> None:
    assert build.run(build.build("plain"), "no-such-case").returncode != 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_supcon_starts_six_kernels(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Launches limit the speed of small batches. Counts those of forward and backward through autograd.

    The first batch runs its kernels and memsets, the others only count them; both give the same counts.
    """
    path = str(build.build_operators())
    torch.ops.load_library(path)
    library = ctypes.CDLL(path)
    enqueued = ctypes.c_long.in_dll(library, "cuda_shim_enqueued")
    count_only = ctypes.c_int.in_dll(library, "cuda_shim_count_only")
    each: dict[str, int] = {}

    class Counted:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            operator = getattr(torch.ops.pysupcon_emulated, name)

            def call(*arguments: Any) -> Any:
                before = enqueued.value
                result = operator(*arguments)
                each[name] = enqueued.value - before
                return result

            return call

    monkeypatch.setitem(statistics.OPERATORS, "cpu", Counted())

    def launches(n: int) -> dict[str, int]:
        each.clear()
        generator = torch.Generator().manual_seed(n)
        x = torch.nn.functional.normalize(torch.randn(n, 128, generator=generator))
        x = x.to(dtype).requires_grad_()
        loss = pysupcon.SupConLoss(backend="cpu")(x, torch.randint(10, (n,), generator=generator))
        loss.backward()
        return dict(each)

    ran = launches(64)
    monkeypatch.setattr(count_only, "value", 1)
    assert launches(64) == ran
    for n in (64, 128, 300, 1000, 2048, 4096):
        found = launches(n)
        assert list(found) == ["pair_stats", "pair_stats_backward"]
        assert min(found.values()) >= 1
        assert sum(found.values()) <= 6, (n, found)
        print(n, sum(found.values()), found)


NORMS = """
#include "prepare.cuh"
using namespace pysupcon::cuda;
int main() {
  constexpr int rows = 4097;  // some warps process one row, some two, one three
  static float x[rows], norms[kExtremeBlocks];
  for (const int place : {-1, 0, 7, 8, 2047, 2048, 4096}) {
    for (float& value : x) value = 0.5f;
    if (place >= 0) x[place] = NAN;
    gpu::launch(find_norms<float, gpu::Bf16>, dim3(kExtremeBlocks), dim3(kThreads), 0, nullptr, norms,
                Rows{x, rows, 1, nullptr, nullptr}, 1);
    float top = 0.f;
    for (const float norm : norms) top = fmaxf(top, norm);
    printf("%d %g\\n", place, top);
  }
}
"""


def test_the_norms_detect_every_nan_row(tmp_path: Path) -> None:
    """The triangular forward adds integers, which cannot represent NaN: it must not run on such a batch."""
    source = tmp_path / "norms.cpp"
    source.write_text(NORMS)
    (program,) = build.compile_objects([source], ["-O0"], tmp_path, build.KERNELS, jobs=1)
    subprocess.run(["g++", str(program), "-o", str(tmp_path / "norms")], check=True)
    out = subprocess.run([str(tmp_path / "norms")], capture_output=True, text=True, check=True).stdout
    found = dict(line.split() for line in out.splitlines())
    assert found.pop("-1") == "0.25"
    assert len(found) == 6
    assert set(found.values()) == {"inf"}, found


def test_every_mutant_finds_its_line() -> None:
    """The slow test of the mutants requires it."""
    from cuda_emulation import mutants

    lost = [m.name for m in mutants.MUTANTS if m.old not in (build.KERNELS / m.file).read_text()]
    assert not lost, f"mutants whose line no longer exists: {lost}"
    assert len({m.name for m in mutants.MUTANTS}) == len(mutants.MUTANTS)
    assert all(m.old != m.new for m in mutants.MUTANTS)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["forward", "reverse", "1", "2"])
def test_every_case_in_every_order(order: str) -> None:
    check("plain", order=order)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", FORMATS)
def test_every_case_under_the_address_sanitizer(prefix: str) -> None:
    check("asan", prefix)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["bf16", "f32x3", "f64"])
def test_every_case_under_the_thread_sanitizer(prefix: str) -> None:
    """The other formats synchronise in the same lines: f16 as bf16, smaller splits of float32 as f32x3."""
    check("tsan", prefix)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", FORMATS)
def test_broken_operands_under_the_address_sanitizer(prefix: str) -> None:
    broken("asan", prefix)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["f16", "f64"])
def test_broken_orders_under_the_thread_sanitizer(shape: str) -> None:
    """If an order holds a row twice, two threads write to the same place."""
    broken("tsan", "-order", shape)


@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
def test_nine_in_ten_injected_bugs_are_caught(share: int) -> None:
    """Tests a sample, split into shares for the test workers. One mutant in ten per share may be missed."""
    from cuda_emulation import mutants

    results = [mutants.judge(mutant) for mutant in mutants.sample()[share::SHARES]]
    missed = [r.name for r in results if not r.caught]
    assert len(missed) <= -(-len(results) // 10), f"not caught: {missed}"
