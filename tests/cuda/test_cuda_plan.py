"""csrc/cuda/plan.h: decisions of the host before a kernel starts, compiled as plain C++."""

from __future__ import annotations

import heapq
import math
import platform
import shutil
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
OPERATIONS = {
    "stats": 0,
    "stats_backward": 1,
    "softplus": 2,
    "softplus_backward": 3,
}
DTYPES = {"f64": 0, "f32": 1, "bf16": 2, "f16": 3}
LARGE, SMALL = 228 << 10, 100 << 10  # shared memory of a multiprocessor
SOURCE = """
#include <cstdio>
#include "plan.h"
using namespace pysupcon::cuda;
void show(const Runs& runs) {
  printf("%d %d %d %lld %lld ", runs.row_blocks, runs.tiles, runs.blocks, (long long)runs.units,
         (long long)runs.parts());
}
int main() {
  int operation, dtype, parts, processors, shared, form, negatives, positives, instances;
  long long m, n, width;
  const char* line = "%d %d %d %d %d %d %d %d %d %lld %lld %lld";
  while (scanf(line, &operation, &dtype, &parts, &processors, &shared, &form, &negatives, &positives,
               &instances, &m, &n, &width) == 12) {
    Problem p{};
    p.operation = Operation(operation), p.dtype = Dtype(dtype), p.parts = parts;
    p.multiprocessors = processors, p.shared_memory = shared;
    p.negatives = negatives, p.positives = positives;
    p.triangular_rows = kTriangularRows;
    p.width = width, p.anchors.count = m, p.candidates.count = n, p.one_set = form == 0;
    static int64_t word;  // any address says "given"
    static double statistic;
    if (instances) p.anchors.instances = p.candidates.instances = &word;
    if (form > 0) p.self_index = &word;
    if (form == 1) p.grad_candidates = &word;
    if (form == 2) p.candidate_grad_n = &statistic;
    p.out_grad_n = &statistic;
    const Workspace w = lay_out(p);
    const Shape s = pair_shape(p);
    printf("%lld %lld ", (long long)w.bytes, (long long)w.arrival_count);
    printf("%d %d %d %d %d ", s.rows, s.columns, s.per_multiprocessor, s.shares, s.share_width);
    show(w.negatives.anchor_runs), show(w.negatives.candidate_runs);
    show(w.positives.anchor_runs), show(w.positives.candidate_runs), puts("");
  }
}
"""


class Runs(NamedTuple):
    row_blocks: int
    tiles: int
    blocks: int
    units: int
    parts: int

    def lengths(self) -> list[int]:
        """Number of units of each run, as run_begin() has them; see test_runs_cover_every_unit_once."""
        begins = [self.units * run // self.blocks for run in range(self.blocks + 1)]
        return [end - begin for begin, end in pairwise(begins)]


class Plan(NamedTuple):
    bytes: int
    arrivals: int
    """counters of row blocks that several runs share, over all launches"""
    rows: int
    """of a row block"""
    columns: int
    """of a tile"""
    per_multiprocessor: int
    shares: int
    share_width: int
    anchors: Runs
    """of negatives, anchors being the rows"""
    candidates: Runs
    positive_anchors: Runs
    """of pairs within classes"""
    positive_candidates: Runs

    def part_bytes(self) -> int:
        """Maximal size of one part of a row block: its gradient and a number per row, or its statistics."""
        return self.rows * (4 * self.share_width * self.shares + 4 if self.share_width else 24)

    def part_count(self) -> int:
        """Launches run one after the other and share memory: the size of the largest."""
        return max(runs.parts for runs in self[7:])


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
        operation: str,
        dtype: str,
        m: int,
        n: int,
        width: int,
        form: int = ONE_SET,
        parts: int = 3,
        multiprocessors: int = 132,
        shared_memory: int = LARGE,
        negatives: bool = True,
        positives: bool = True,
        instances: bool = False,
    ) -> Plan:
        kind = (OPERATIONS[operation], DTYPES[dtype], parts, multiprocessors, shared_memory)
        asked = map(int, (form, negatives, positives, instances))
        line = " ".join(map(str, (*kind, *asked, m, n, width)))
        done = subprocess.run([str(program)], input=line, capture_output=True, text=True, check=True)
        assert not done.stderr
        words = list(map(int, done.stdout.split()))
        runs = (Runs(*words[at : at + 5]) for at in range(7, 27, 5))
        return Plan(*words[:7], *runs)

    return ask


SLACK = 20 * 256  # every buffer starts at a multiple of 256 bytes
SCANNED = 16 * 256  # extremes of large batches
VERDICTS = 8 * 4 * 1024  # of the rows and the orders of two sides


def copy_bytes(rows: int, width: int, dtype: str, parts: int = 3) -> int:
    """Bytes of the sorted 16-bit copy: rows padded to 256, width to slices of 64 (several parts: 32)."""
    split = parts if dtype == "f32" else 1
    numbers = 64 if split == 1 else 32
    return -(-rows // 256) * 256 * -(-width // numbers) * numbers * 2 * split


@pytest.mark.parametrize("form", [ONE_SET, CANDIDATES, OWN_ROWS])
@pytest.mark.parametrize("operation", ["stats", "stats_backward", "softplus", "softplus_backward"])
@pytest.mark.parametrize(("dtype", "width"), [("bf16", 128), ("f16", 100), ("f32", 33), ("bf16", 1000)])
@pytest.mark.parametrize("instances", [False, True])
def test_large_batches_take_the_copy_and_32_bytes_a_row(
    plan: Planner, operation: str, dtype: str, width: int, form: int, instances: bool
) -> None:
    """12 more with instances."""
    sides, each = 1 if form == ONE_SET else 2, 44 if instances else 32
    for rows in (1 << 20, (1 << 20) + 1):
        found = plan(operation, dtype, rows, rows, width, form, instances=instances)
        parts = 2 * 132 * found.per_multiprocessor * found.part_bytes() // found.shares
        arrivals = 4 * sides * found.anchors.row_blocks * found.shares
        extra = parts + arrivals if found.part_count() else 0
        assert (
            found.bytes
            <= sides * (copy_bytes(rows, width, dtype) + each * rows) + extra + VERDICTS + SCANNED + SLACK
        )


def test_the_copy_in_one_part_is_as_long_as_in_16_bits(plan: Planner) -> None:
    for operation in ("stats", "softplus_backward"):
        for rows, width in ((1000, 65), (70_000, 256)):
            one = plan(operation, "f32", rows, rows, width, parts=1)
            assert one == plan(operation, "bf16", rows, rows, width)


@pytest.mark.parametrize("rows", [1, 100, 128, 129, 1000, 4096, 16_384, 17_408, 100_000, 3_000_000])
@pytest.mark.parametrize("width", [1, 128, 300, 1024])
@pytest.mark.parametrize("shared_memory", [LARGE, SMALL])
def test_parts_stay_small_whatever_the_batch(
    plan: Planner, rows: int, width: int, shared_memory: int
) -> None:
    for operation in ("stats", "stats_backward", "softplus_backward"):
        for dtype in ("bf16", "f32"):
            found = plan(operation, dtype, rows, rows, width, shared_memory=shared_memory)
            slots = 132 * found.per_multiprocessor // found.shares
            for runs in (found.anchors, found.positive_anchors):
                assert runs.parts in (0, 2 * runs.blocks)
                assert runs.parts <= 2 * slots
            parts = found.part_count()
            most = copy_bytes(rows, width, dtype) + 32 * rows + parts * found.part_bytes()
            assert found.bytes <= most + 4 * found.arrivals + VERDICTS + SCANNED + SLACK
            # a number: 2 parts of at most 128 KiB for each block that runs at the same time
            assert parts * found.part_bytes() <= 2 * 132 * found.per_multiprocessor * (129 << 10)


def makespan(runs: Runs, slots: int) -> int:
    """Tiles of the slot that ends last, if each block in order starts on the first free slot."""
    ends = [0] * slots
    for length in runs.lengths():
        heapq.heappush(ends, heapq.heappop(ends) + length)
    return max(ends)


@pytest.mark.parametrize("multiprocessors", [108, 132, 142, 170])
@pytest.mark.parametrize(
    ("dtype", "width"), [("bf16", 128), ("bf16", 64), ("bf16", 768), ("f32", 128), ("f32", 768)]
)
def test_the_device_is_kept_busy(plan: Planner, dtype: str, width: int, multiprocessors: int) -> None:
    """No multiprocessor is idle for more than a tile, or 1/17 of the time, while others work."""
    around = [size + step for size in (16_384, 17_408, 20_000, 65_536) for step in (-128, -1, 0, 1, 128)]
    for n in (300, 1000, 2048, 4096, 8192, 33_792, 33_793, *around, 262_144):
        for operation in ("stats", "stats_backward"):
            found = plan(operation, dtype, n, n, width, multiprocessors=multiprocessors)
            slots = multiprocessors * found.per_multiprocessor // found.shares
            runs, shared = found.anchors, runs_in_full(found.anchors)
            assert shared == runs.units
            longest, ideal = makespan(runs, slots), runs.units / slots
            if runs.units >= 16 * slots:
                assert ideal / longest >= 16 / 17, (operation, n, ideal / longest)
            assert longest <= max(math.ceil(ideal), ideal * 17 / 16), (operation, n)


def runs_in_full(runs: Runs) -> int:
    assert runs.units == runs.row_blocks * runs.tiles
    lengths = runs.lengths()
    assert min(lengths) >= 1  # every block has work
    return sum(lengths)


@pytest.mark.parametrize(("multiprocessors", "n"), [(132, 17_408), (132, 20_000), (108, 16_384)])
def test_whole_row_blocks_would_leave_half_of_the_device_idle(
    plan: Planner, multiprocessors: int, n: int
) -> None:
    """The test above detects blocks of 128 rows with one block per multiprocessor."""
    found = plan("stats", "f32", n, n, 128, multiprocessors=multiprocessors)
    runs = found.anchors
    whole = runs._replace(blocks=runs.row_blocks)
    assert runs.units / multiprocessors / makespan(whole, multiprocessors) < 0.65
    assert runs.units / multiprocessors / makespan(runs, multiprocessors) > 0.98


def test_pairs_within_classes_stay_in_whole_row_blocks_once_there_are_enough(plan: Planner) -> None:
    for operation, negatives in (("softplus", True), ("softplus_backward", True), ("stats_backward", False)):
        for n in (1000, 16_384, 20_000, 65_536):
            found = plan(operation, "bf16", n, n, 768, negatives=negatives)
            slots = 132 * found.per_multiprocessor // found.shares
            runs = found.positive_anchors
            assert found.anchors.blocks == 0
            assert runs_in_full(runs) == runs.units
            assert runs.blocks == (runs.row_blocks if runs.row_blocks >= slots else min(slots, runs.units))


def test_both_directions_are_shared_out(plan: Planner) -> None:
    found = plan("stats_backward", "bf16", 1000, 50_000, 128, CANDIDATES)
    assert (found.anchors.row_blocks, found.anchors.tiles) == (8, 782)
    assert (found.candidates.row_blocks, found.candidates.tiles) == (391, 16)
    for runs in (found.anchors, found.candidates):
        assert runs_in_full(runs) == runs.units
        assert runs.blocks == 264
    for positives, all_pairs in (
        (found.positive_anchors, found.anchors),
        (found.positive_candidates, found.candidates),
    ):
        assert positives.units == all_pairs.units
    # every launch counts its own arrivals
    cut = [runs.row_blocks for runs in found[7:] if runs.blocks != runs.row_blocks]
    assert found.arrivals == sum(cut)
    assert len(cut) == 3


RUNS = r"""
#include <cstdio>
#include <cstdlib>
#include "runs.cuh"
using namespace pysupcon::cuda;
void check(bool ok, const char* what, const Runs& r, long long at) {
  if (ok) return;
  printf("%s: %d row blocks of %d tiles in %d runs, at %lld\n", what, r.row_blocks, r.tiles, r.blocks, at);
  exit(1);
}
// Runs are equal. What a run has of a row block that it shares is its first or its last; the two parts have
// places of their own.
void check_run(const Runs& r, int run) {
  const int64_t begin = run_begin(r, run), end = run_begin(r, run + 1), length = r.units / r.blocks;
  check(end - begin == length || end - begin == length + 1, "unequal runs", r, run);
  const int first = first_row_block(r, run), last = last_row_block(r, run);
  check(int64_t(first) * r.tiles <= begin && begin < (int64_t(first) + 1) * r.tiles, "first", r, run);
  check(int64_t(last) * r.tiles < end && end <= (int64_t(last) + 1) * r.tiles, "last", r, run);
  check(part_of(r, run, first) / 2 == run && part_of(r, run, last) / 2 == run, "a part of others", r, run);
  check(first == last || part_of(r, run, first) != part_of(r, run, last), "parts in one place", r, run);
  for (int between = first + 1; between < last && between < first + 100; ++between)
    check(segment(r, run, between).whole, "a third part", r, run);
}
// The runs of a row block have its tiles, each once and in order.
void check_row_block(const Runs& r, int row_block) {
  if (!r.cut()) {  // kernels do not ask for the runs then
    check(segment(r, row_block, row_block).whole, "not whole", r, row_block);
    return;
  }
  const int2 sharing = runs_of(r, row_block);
  check(0 <= sharing.x && sharing.x <= sharing.y && sharing.y < r.blocks, "no such run", r, row_block);
  int next = 0;
  for (int run = sharing.x; run <= sharing.y; ++run) {
    const Segment s = segment(r, run, row_block);
    check(s.row_block == row_block && s.first == next && s.last > s.first, "tiles", r, row_block);
    check(s.whole == (sharing.x == sharing.y), "whole", r, row_block);
    next = s.last;
  }
  check(next == r.tiles, "tiles left out", r, row_block);
}
Runs make(int row_blocks, int tiles, int blocks) {
  return {row_blocks, tiles, blocks, int64_t(row_blocks) * tiles};
}
int main() {
  int checked = 0;
  for (int row_blocks = 1; row_blocks <= 24; ++row_blocks)
    for (int tiles = 1; tiles <= 20; ++tiles)
      for (int blocks = 1; blocks <= row_blocks * tiles; ++blocks) {
        const Runs r = make(row_blocks, tiles, blocks);
        check(run_begin(r, 0) == 0 && run_begin(r, blocks) == r.units, "ends", r, 0);
        for (int run = 0; run < blocks; ++run) check_run(r, run);
        for (int b = 0; b < row_blocks; ++b) check_row_block(r, b);
        ++checked;
      }
  constexpr int rows = 1 << 24, tiles = 1 << 25;
  for (const Runs& r : {make(rows, tiles, 264), make(rows, tiles - 1, 341), make(rows, tiles, 1024),
                        make(rows - 1, tiles, rows - 1), make(1, tiles, 340), make(rows, 1, 340)}) {
    check(run_begin(r, 0) == 0 && run_begin(r, r.blocks) == r.units, "ends", r, 0);
    for (int i = 0; i <= 1000; ++i) {
      const int run = int(int64_t(r.blocks - 1) * i / 1000);
      check_run(r, run);
      for (const int b : {first_row_block(r, run), last_row_block(r, run)}) check_row_block(r, b);
      check_row_block(r, int(int64_t(r.row_blocks - 1) * i / 1000));
    }
    ++checked;
  }
  printf("%d\n", checked);
}
"""


def test_runs_cover_every_unit_once(tmp_path: Path) -> None:
    """runs.cuh, compiled for the CPU: row blocks, runs and parts agree, without overflow up to 2^49 units."""
    if shutil.which("g++") is None or platform.system() != "Linux":
        pytest.skip("needs g++ on Linux")
    from cuda_emulation import build

    source = tmp_path / "runs.cpp"
    source.write_text(RUNS)
    flags = ["-O1", "-fsanitize=undefined", "-fno-sanitize-recover=undefined"]
    (compiled,) = build.compile_objects([source], flags, tmp_path, build.KERNELS, jobs=1)
    subprocess.run(["g++", *flags, str(compiled), "-o", str(tmp_path / "runs")], check=True)
    done = subprocess.run([str(tmp_path / "runs")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    small = sum(rows * tiles for rows in range(1, 25) for tiles in range(1, 21))
    assert int(done.stdout) == small + 6


def test_offsets_of_the_largest_batch_are_64_bit(plan: Planner) -> None:
    rows = (1 << 31) - 256
    found = plan("stats_backward", "bf16", rows, rows, 1024)
    assert found.bytes > rows * 2048
    assert found.anchors.units == -(-rows // 128) * -(-rows // 64)


def test_pairs_that_are_not_asked_for_have_no_pass(plan: Planner) -> None:
    for operation in ("stats", "stats_backward"):
        for negatives, positives in ((True, False), (False, True)):
            found = plan(operation, "bf16", 1000, 1000, 64, negatives=negatives, positives=positives)
            assert bool(found.anchors.blocks) == negatives
            assert bool(found.positive_anchors.blocks) == positives
    for operation in ("softplus", "softplus_backward"):
        assert plan(operation, "bf16", 1000, 1000, 64).anchors.blocks == 0


def test_double_precision_needs_verdicts_and_ranges_only(plan: Planner) -> None:
    assert plan("stats_backward", "f64", 1000, 1000, 64).bytes == VERDICTS + 8192  # 8000 bytes, rounded up


def test_empty_batches_have_a_plan(plan: Planner) -> None:
    for operation in OPERATIONS:
        for form in (ONE_SET, CANDIDATES, OWN_ROWS):
            assert plan(operation, "f32", 0, 0, 8, form).bytes <= VERDICTS + SLACK
