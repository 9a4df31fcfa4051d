"""csrc/cuda/plan.h: what is decided before a kernel starts, compiled as the plain C++ it is."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

KERNELS = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
OPERATIONS = {
    "stats": 0,
    "stats_backward": 1,
    "softplus": 2,
    "softplus_backward": 3,
    "sum": 4,
    "sum_backward": 5,
}
DTYPES = {"f64": 0, "f32": 1, "bf16": 2, "f16": 3}
SOURCE = """
#include <cstdio>
#include "plan.h"
using namespace pysupcon::cuda;
int main() {
  int operation, dtype, parts, processors, form;
  long long m, n, width;
  const char* line = "%d %d %d %d %d %lld %lld %lld";
  while (scanf(line, &operation, &dtype, &parts, &processors, &form, &m, &n, &width) == 8) {
    Problem p{};
    p.operation = Operation(operation), p.dtype = Dtype(dtype), p.parts = parts;
    p.multiprocessors = processors;
    p.width = width, p.anchors.count = m, p.candidates.count = n, p.one_set = form == 0;
    static int64_t word;  // any address says "given"
    if (form > 0) p.self_index = &word;
    if (form == 1) p.grad_candidates = &word;
    if (form == 2) p.candidate_grad_n = &word;
    p.out_grad_n = &word;
    const Workspace w = lay_out(p);
    printf("%lld %d %d ", (long long)w.bytes, w.anchor_splits, w.candidate_splits);
    printf("%d\\n", w.candidate_sums.levels);
  }
}
"""


class Plan(NamedTuple):
    bytes: int
    anchor_splits: int
    candidate_splits: int
    levels: int


Planner = Callable[..., Plan]
ONE_SET, CANDIDATES, OWN_ROWS = 0, 1, 2


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("plan")
    (folder / "plan.cpp").write_text(SOURCE)
    program = folder / "plan"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-fsanitize=undefined", f"-I{KERNELS}"]
    subprocess.run(["g++", *flags, str(folder / "plan.cpp"), "-o", str(program)], check=True)

    def ask(
        operation: str, dtype: str, m: int, n: int, width: int, form: int = ONE_SET, parts: int = 3
    ) -> Plan:
        words = (OPERATIONS[operation], DTYPES[dtype], parts, 132, form, m, n, width)
        line = " ".join(map(str, words))
        done = subprocess.run([str(program)], input=line, capture_output=True, text=True, check=True)
        assert not done.stderr
        return Plan(*map(int, done.stdout.split()))

    return ask


SLACK = 16 * 256  # every piece starts at a multiple of 256 bytes


@pytest.mark.parametrize("form", [ONE_SET, CANDIDATES, OWN_ROWS])
@pytest.mark.parametrize("operation", ["stats", "stats_backward", "softplus", "softplus_backward"])
@pytest.mark.parametrize(("dtype", "element"), [("bf16", 2), ("f16", 2), ("f32", 6)])
def test_large_batches_take_the_copy_and_32_bytes_a_row(
    plan: Planner, operation: str, dtype: str, element: int, form: int
) -> None:
    rows, width = 1 << 20, 128
    sides = 1 if form == ONE_SET else 2
    found = plan(operation, dtype, rows, rows, width, form)
    assert found.anchor_splits == 1
    assert found.bytes <= sides * rows * (element * width + 32) + SLACK


@pytest.mark.parametrize("rows", [1, 100, 128, 129, 1000, 4096, 16_384, 100_000])
@pytest.mark.parametrize("width", [1, 128, 300, 1024])
def test_splits_fill_the_device_and_their_parts_stay_small(plan: Planner, rows: int, width: int) -> None:
    blocks = -(-rows // 128)
    for operation, tile, wanted in (("stats", 128, 264), ("stats_backward", 64, 132)):
        found = plan(operation, "bf16", rows, rows, width)
        shares = -(-width // 256) if operation == "stats_backward" else 1
        assert 1 <= found.anchor_splits <= max(1, min(32, -(-rows // tile)))
        assert found.anchor_splits == 1 or found.anchor_splits * blocks * shares <= wanted
        copy = rows * (2 * 8 * -(-width // 8) + 32)
        assert found.bytes <= copy + 132 * (128 << 10) + 64 * 16 + SLACK


def test_offsets_of_the_largest_batch_are_64_bit(plan: Planner) -> None:
    rows = (1 << 31) - 256
    assert plan("stats_backward", "bf16", rows, rows, 1024).bytes > rows * 2048


def test_double_precision_needs_ranges_only(plan: Planner) -> None:
    assert plan("stats_backward", "f64", 1000, 1000, 64).bytes == 8192  # 8000 bytes, rounded up


@pytest.mark.parametrize(
    ("rows", "levels"), [(0, 0), (64, 0), (65, 1), (4096, 1), (4097, 2), ((1 << 31) - 256, 5)]
)
def test_levels_of_the_tree_of_sums(plan: Planner, rows: int, levels: int) -> None:
    assert plan("sum", "f32", rows, rows, 4).levels == levels


def test_empty_batches_have_a_plan(plan: Planner) -> None:
    for operation in OPERATIONS:
        for form in (ONE_SET, CANDIDATES, OWN_ROWS):
            assert plan(operation, "f32", 0, 0, 8, form).bytes <= SLACK
