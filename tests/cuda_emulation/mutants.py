# ruff: noqa: E501  a mutant is a line of a table
"""Injects one bug at a time into csrc/cuda and reports which build of the emulator notices.

``python tests/cuda_emulation/mutants.py [NAME...]`` prints the table; the builds are tried in the order plain, reverse
order, large cases, address sanitizer, thread sanitizer, until one notices. Bugs marked invisible change speed only or need a size that
no emulation reaches; they are listed so that nobody believes them covered.
"""

from __future__ import annotations

import atexit
import functools
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cuda_emulation import build


class Mutant(NamedTuple):
    name: str
    file: str
    old: str  # occurs in the file; the first occurrence is replaced
    new: str
    invisible: str = ""  # why no emulation can see it


class Verdict(NamedTuple):
    name: str
    caught: str  # the build and what it said; empty: not caught
    invisible: bool


T, F, B, S, P, R = "tiles.cuh", "forward.cuh", "backward.cuh", "statistics.cuh", "positive.cuh", "prepare.cuh"
C, OPS, L, D = "class_sums.cuh", "operations.cu", "plan.h", "plain.cuh"
FORWARD_WAIT = "      gpu::cp_async_wait<C::STAGES - 2>();\n      __syncthreads();"
RESIDENT_WAIT = "    gpu::cp_async_wait<0>();\n    __syncthreads();"
MUTANTS = [
    # asynchronous copies and barriers
    Mutant("forward: no barrier between wait and use", F, FORWARD_WAIT, FORWARD_WAIT.split("\n")[0]),
    Mutant("forward: one step too few waited for", F, "wait<C::STAGES - 2>", "wait<C::STAGES - 1>"),
    Mutant("forward: no commit", F, "    gpu::cp_async_commit();", "    if (false) gpu::cp_async_commit();"),
    Mutant("forward: no barrier before the exchange is read", F, "  __syncthreads();\n  if (warp_n == 0", "  if (warp_n == 0"),
    Mutant("forward: stage not advanced", F, "if (++stage == C::STAGES) stage = 0;", "stage = 0;"),
    Mutant("forward: last slice left out", F, "return (chunks + C::CH - 1) / C::CH;", "return chunks < C::CH ? 1 : chunks / C::CH;"),
    Mutant("forward: too little shared memory", F, "+ size_t(slots) * sizeof", "+ size_t(slots) * sizeof(uint4) + 0 * sizeof"),
    Mutant("resident backward: no barrier", B, RESIDENT_WAIT, RESIDENT_WAIT.split("\n")[0]),
    Mutant("resident backward: loads the buffer in use", B, "s->cols[tile % 2][k], pairs.cols", "s->cols[(tile + 1) % 2][k], pairs.cols"),
    Mutant("streamed backward: no barrier in the second product", B, "        gpu::cp_async_wait<0>();\n        __syncthreads();", "        gpu::cp_async_wait<0>();"),
    Mutant("streamed backward: no barrier in the first product", B, "      gpu::cp_async_wait<0>();\n      __syncthreads();", "      gpu::cp_async_wait<0>();"),
    Mutant("streamed backward: one coefficient buffer", B, "s->coefficients[load_tile % 2]", "s->coefficients[0]"),
    Mutant("staging: no barrier before it overwrites the tiles", B, "  __syncthreads();          // what stood", "  // what stood"),
    Mutant("staging: copies still in flight", B, "  gpu::cp_async_wait<0>();  // a block", "  // a block"),
    Mutant("staging: no __syncwarp before reading", B, "    __syncwarp();\n#pragma unroll 1", "#pragma unroll 1"),
    Mutant("plain: no barrier before the slice is overwritten", D, "    __syncthreads();  // the last slice has been read", ""),
    Mutant("class sums: no barrier before the sum is overwritten", C, "      __syncthreads();  // the last sum has been read\n", ""),
    # edges
    Mutant("row guard on load missing", T, "const bool valid = row0 + r < x.count && chunk0", "const bool valid = chunk0"),
    Mutant("chunk guard on load missing", T, "row0 + r < x.count && chunk0 + c < x.chunks", "row0 + r < x.count"),
    Mutant("row guard on store missing (forward)", F, "      if (row < pairs.rows.count) {", "      {"),
    Mutant("row guard on store missing (backward)", B, "if (row < out.rows && d < out.width)", "if (d < out.width)"),
    Mutant("width guard on store missing", B, "if (row < out.rows && d + 1 < out.width)", "if (row < out.rows)"),
    Mutant("padding of the copy not zero", R, "d0 + i < width ? to_float(row[d0 + i]) : 0.f", "to_float(row[d0 + i])"),
    Mutant("coefficients not padded", L, "divide_up(m, kBackwardColumns) * kBackwardColumns * 8", "m * 8"),
    # masks
    Mutant("tail columns counted", T, "return col < pairs.cols.count && col != self", "return col != self"),
    Mutant("tail tile taken for uniform", T, "    if (c1 > pairs.cols.count) return Kind::mixed;\n", ""),
    Mutant("self not left out", T, "col < pairs.cols.count && col != self &&", "col < pairs.cols.count &&"),
    Mutant("column's self not left out", T, " && !(pairs.col_self && pairs.col_self[col] == row)", ""),
    Mutant("class range one short", T, "return col >= begin && col < end;", "return col >= begin && col + 1 < end;"),
    Mutant("uniform-different misjudged at the edge", T, "c1 <= begin_min ||", "c1 <= begin_max ||"),
    Mutant("uniform-same misjudged", T, "no_self && c0 >= begin_max && c1 <= end_min", "no_self && c0 >= begin_min && c1 <= end_max"),
    Mutant("uniform-same ignores self", T, "pairs.one_set ? c1 <= row0 || c0 >= row1 :", "pairs.one_set ? true :"),
    Mutant("within-class visit ends early", T, "(high.y + BN - 1) / BN : first", "high.y / BN : first"),
    Mutant("splits overlap", T, "tiles * (split + 1) / splits", "tiles * (split + 2) / splits"),
    Mutant("upper bound is a lower bound", R, "label_bound<true>(cols, label)", "label_bound<false>(cols, label)"),
    Mutant("self in the wrong numbering", R, ": inverse[j];", ": int(j);"),
    # fragments and layout
    Mutant("A fragment's address map", T, "a_row + 16 * m + (lane & 15)", "a_row + 16 * m + (lane & 7) + (lane >> 4 << 3)"),
    Mutant("B fragment's address map", T, "(lane & 7) + ((lane >> 4) << 3);", "(lane & 7) + (((lane >> 3) & 1) << 3);"),
    Mutant("swizzle forgotten on one side", T, "&b[part][r][swizzle<CH>(r, 2 * k + ((lane >> 3) & 1))]", "&b[part][r][2 * k + ((lane >> 3) & 1)]"),
    Mutant("no swizzle at all", T, "CH == 8 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3)", "CH ? chunk : row", "bank conflicts cost time only"),
    Mutant("weights packed into the wrong registers", B, "[2 * (j % 2) + h]", "[(j % 2) + 2 * h]"),
    Mutant("transposed address map", B, "swizzle<CH>(r, c + (lane >> 4))", "swizzle<CH>(r, c + ((lane >> 3) & 1))"),
    Mutant("smallest product of the split left out", T, "int order = PARTS - 1; order >= 0", "int order = PARTS - 2; order >= 0"),
    Mutant("remainder of the split not taken", R, "x[e] -= F::to(F::from(x[e]))", "x[e] -= 0.f"),
    # numbers
    Mutant("running maximum: no rescale", S, "total *= shrink, carry *= shrink, top = new_top;", "top = new_top;"),
    Mutant("empty sum measured from -inf", S, "return top == -INFINITY ? 0.f : top;", "return top;"),
    Mutant("masked before the exponential", S, "sum_n += is_counted && !is_same ? e : 0.f;", "sum_n += e * float(is_counted && !is_same);"),
    Mutant("quad merge one step short", S, "for (int o = 1; o < 4; o *= 2)", "for (int o = 1; o < 2; o *= 2)"),
    Mutant("absent coefficient measured from 0", T, "return {0.f, INFINITY};", "return {0.f, -INFINITY};"),
    Mutant("an anchor without negatives is not left out", R, "    if (s != -INFINITY)\n", ""),
    Mutant("gradient unit not undone", B, "ldexpf(*scale, gradient_exponent(*largest))", "ldexpf(*scale, -13)"),
    Mutant("16-bit weights in the unit of the loss", T, "  return (e > -100 ? e : -100) - 13;", "  return 13;"),
    Mutant("sigmoid of the wrong sign", P, "fmaf(s, scale, -reference)", "fmaf(-s, scale, reference)"),
    Mutant("epsilon left out of the gradient", R, "(s + epsilon) * kLog2e", "s * kLog2e"),
    Mutant("tree: a level skipped", C, "for (int level = 0; lo < hi; ++level)", "for (int level = 0; lo < hi; level += 2)"),
    Mutant("tree: upper end dropped", C, "ends += entry(level, --hi, d)", "--hi"),
    Mutant("own row not taken from the class sum", C, "* (sum[d - d0] - (own >= 0 ? candidates.row(own, d) : A(0)))", "* sum[d - d0]"),
    Mutant("gradient written, not added", B, "width + d] += sum * unit", "width + d] = sum * unit"),
    Mutant("merged gradient written, not added", B, "% out.width] += sum", "% out.width] = sum"),
    Mutant("plain gradient written, not added", D, "* k + x] += *pairs.scale", "* k + x] = *pairs.scale"),
    Mutant("gradient of the class sums written, not added", C, "plain.width + d] += *scale", "plain.width + d] = *scale"),
    Mutant("splits not merged", OPS, "if (grad_n && splits > 1)", "if (grad_n && splits > 2)"),
    Mutant("32-bit row offset", T, "const int64_t row = int64_t(part) * x.count + row0 + r;", "const int row = part * x.count + row0 + r;", "needs 2^31 chunks"),
]  # fmt: skip

# Files that decide which kernels a case runs; f16 and the two-part split share every line with these.
UNITS = ["operations", "forward_bf16", "forward_f32x3", "backward_bf16", "backward_f32x3"]
CASES = ["bf16", "f32x3", "f64"]
LARGE_CASES = ["large-bf16"]  # slow, so only for what the others miss
SANITIZER_CASES = ["bf16-candidates", "bf16-long", "f32x3-own", "f64-own"]


# Which units a file's bug can reach; all of them, and the driver, where it is not named.
REACHED = {F: ("forward",), B: ("backward", "operations"), R: ("operations",), C: ("operations",),
           OPS: ("operations",), D: ("operations",)}  # fmt: skip


def flags_of(kind: str) -> list[str]:
    return ["-O0" if flag == "-O1" else flag for flag in build.FLAGS[kind]]


_baseline_lock = threading.Lock()


@functools.cache
def _baseline(kind: str) -> dict[str, Path]:
    folder = Path(tempfile.mkdtemp(prefix="pysupcon-mutants-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sources = [*(build.KERNELS / f"{unit}.cu" for unit in UNITS), build.HERE / "emulate.cpp"]
    objects = build.compile_objects(sources, flags_of(kind), folder, build.KERNELS, jobs=2)
    return {source.stem: target for source, target in zip(sources, objects, strict=True)}


def baseline(kind: str) -> dict[str, Path]:
    """The objects without any bug: what a bug cannot reach is not compiled again."""
    with _baseline_lock:
        return _baseline(kind)


def noticed(program: Path, cases: list[str], order: str = "forward") -> str:
    """What the emulator said against the program; empty if nothing."""
    try:
        done = build.run(program, *cases, order=order, timeout=900)
    except subprocess.TimeoutExpired:
        return "does not end"
    if done.returncode == 0:
        return ""
    text = done.stdout + done.stderr
    for pattern in (
        r"data race",
        r"AddressSanitizer: [\w-]+",
        r"runtime error: .{0,30}",
        r"EXCEPTION: .{0,40}",
    ):
        if match := re.search(pattern, text):
            return match[0].replace("EXCEPTION: ", "")
    return "wrong result" if "FAIL" in text else f"exit status {done.returncode}"


def judge(mutant: Mutant) -> Verdict:
    with tempfile.TemporaryDirectory() as folder:
        kernels = Path(folder) / "cuda"
        shutil.copytree(build.KERNELS, kernels)
        if mutant.old:
            path = kernels / mutant.file
            text = path.read_text()
            if mutant.old not in text:
                raise LookupError(f"mutant {mutant.name!r}: {mutant.file} no longer contains {mutant.old!r}")
            path.write_text(text.replace(mutant.old, mutant.new, 1))
        reached = REACHED.get(mutant.file, ("",))
        sources = [kernels / f"{unit}.cu" for unit in UNITS if unit.startswith(reached)]
        if reached == ("",):
            sources.append(build.HERE / "emulate.cpp")
        attempts = [("plain", CASES, "forward"), ("plain", CASES, "reverse"),
                    ("plain", LARGE_CASES, "forward"),
                    ("asan", SANITIZER_CASES, "forward"), ("tsan", SANITIZER_CASES, "forward")]  # fmt: skip
        for kind, cases, order in attempts:
            program = Path(folder) / kind
            if not program.exists():
                flags = flags_of(kind)
                compiled = build.compile_objects(sources, flags, Path(folder), kernels, jobs=1)
                mine = {source.stem: target for source, target in zip(sources, compiled, strict=True)}
                objects = list({**baseline(kind), **mine}.values())
                link = [
                    "-no-pie",
                    "-Wl,--unresolved-symbols=ignore-all,-z,lazy",
                ]  # the units left out are never called
                subprocess.run(["g++", *flags, *link, *map(str, objects), "-o", str(program)], check=True)
            if words := noticed(program, cases, order):
                how = f"{kind}{' large' if cases == LARGE_CASES else ''}{'' if order == 'forward' else ' ' + order}"
                return Verdict(mutant.name, f"{how}: {words}", bool(mutant.invisible))
    return Verdict(mutant.name, "", bool(mutant.invisible))


def main() -> None:
    wanted = sys.argv[1:]
    control = Mutant("none (control)", T, "", "")
    chosen = [m for m in [control, *MUTANTS] if not wanted or any(word in m.name for word in wanted)]
    with ThreadPoolExecutor(2) as pool:
        for mutant, verdict in zip(chosen, pool.map(judge, chosen), strict=True):
            note = f" ({mutant.invisible})" if mutant.invisible else ""
            print(f"| {mutant.name}{note} | {verdict.caught or '-'} |", flush=True)


if __name__ == "__main__":
    main()
