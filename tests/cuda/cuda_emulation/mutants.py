# ruff: noqa: E501  a mutant is a line of a table
"""Mutation tests of csrc/cuda: injects one bug at a time and reports which build of the emulator detects it.

    python tests/cuda/cuda_emulation/mutants.py [NAME...]

prints a table of the mutants whose name contains a NAME. The builds are tried in this order until one detects
the bug: plain, reverse order, broken operands, large cases, address sanitizer, thread sanitizer. Bugs in the
handling of broken operands are tried on broken operands only. Bugs marked invisible change only the speed or
need sizes that are too large for emulation; they are listed to show that they are not covered.
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
    invisible: str = ""  # why the emulation cannot detect it

    @property
    def broken(self) -> bool:
        """Whether the bug changes results of broken operands only."""
        return self.name.startswith(
            ("verdicts:", "broken place", "a negative place", "order:", "self_index:", "rows:")
        )


class Verdict(NamedTuple):
    name: str
    caught: str  # the build and its error; empty: not detected
    invisible: bool


T, F, B, S, P, R = "tiles.cuh", "forward.cuh", "backward.cuh", "statistics.cuh", "positive.cuh", "prepare.cuh"
SP, V, OPS, L, D, U = "softplus.cuh", "verdicts.cuh", "operations.cu", "plan.h", "plain.cuh", "runs.cuh"
RF, TF = "resident.cuh", "triangular.cuh"
LANDED = "__syncthreads();  // all copies have landed"
WAIT = "gpu::cp_async_wait<0>();\n"
FRESH_SLICE = """    float fresh[MT][2][4];
    multiply_columns<F>(fresh, af, b[0], b_row + 8 * n, lane, true);
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int i = 0; i < 8; ++i) acc[m][n + i / 4][i % 4] += fresh[m][i / 4][i % 4];
"""
KEPT_SLICE = """    float sum[MT][2][4];
    for (int m = 0; m < MT; ++m)
      for (int i = 0; i < 8; ++i) sum[m][i / 4][i % 4] = acc[m][n + i / 4][i % 4];
    multiply_columns<F>(sum, af, b[0], b_row + 8 * n, lane, false);
    for (int m = 0; m < MT; ++m)
      for (int i = 0; i < 8; ++i) acc[m][n + i / 4][i % 4] = sum[m][i / 4][i % 4];
"""
NEXT_ROW_BLOCK = (
    "    block = s->bounds.row_block;  // not kept in a register meanwhile\n    __syncthreads();\n"
)
AFTER_RESIDENT = "  }\n}\n\n// Slices pass"
AFTER_STREAMED = "  }\n}\n\ntemplate <class C, class Weights>\ncudaError_t"
MUTANTS = [
    # asynchronous copies and barriers
    Mutant("resident forward: no barrier between wait and use", F, f"      {WAIT}      {LANDED}", f"      {WAIT}      // "),
    Mutant("resident forward: no commit", F, "      gpu::cp_async_commit();\n", "      if (false) gpu::cp_async_commit();\n"),
    Mutant("resident forward: loads the buffer in use", F, "s->cols[tile % 2][k], pairs.cols", "s->cols[(tile + 1) % 2][k], pairs.cols"),
    Mutant("resident forward: exchange over a tile in use", F, "    __syncthreads();  // the last tile has been read\n", ""),
    Mutant("resident forward: no barrier before the exchange is read", F, "    __syncthreads();\n    hand_over<C::BM", "    hand_over<C::BM"),
    Mutant("resident forward: tiles over an exchange in use", F, "    __syncthreads();  // the bounds are there, and the last row block's exchange has been read\n", ""),
    Mutant("streamed forward: no barrier between wait and use", F, f"wait<C::STAGES - 2>();\n        {LANDED}", "wait<C::STAGES - 2>();\n        // "),
    Mutant("streamed forward: one step too few waited for", F, "wait<C::STAGES - 2>", "wait<C::STAGES - 1>"),
    Mutant("streamed forward: no commit", F, "gpu::cp_async_commit();  // one group", "if (false) gpu::cp_async_commit();  // one group"),
    Mutant("streamed forward: exchange over a slice in use", F, "    __syncthreads();          // the last slice has been read\n", ""),
    Mutant("streamed forward: no barrier before the exchange is read", F, "    __syncthreads();\n    static_assert", "    static_assert"),
    Mutant("streamed forward: slices over an exchange in use", F, "    __syncthreads();  // the exchange has been read\n", ""),
    Mutant("streamed forward: stage not advanced", F, "if (++stage == C::STAGES) stage = 0;", "stage = 0;"),
    Mutant("streamed forward: too little shared memory", F, "size_t(slots) * sizeof(Shared::rows[0])", "size_t(slots) * sizeof(uint4)"),
    Mutant("last slice left out", L, "return divide_up(p.width, copy_parts(p) == 1 ? 64 : 32);", "return p.width < 64 ? 1 : p.width / (copy_parts(p) == 1 ? 64 : 32);"),
    Mutant("resident backward: no barrier", B, f"      {WAIT}      {LANDED}", f"      {WAIT}      // "),
    Mutant("resident backward: loads the buffer in use", B, "s->cols[tile % 2][k], pairs.cols", "s->cols[(tile + 1) % 2][k], pairs.cols"),
    Mutant("resident backward: bounds over those in use", B, NEXT_ROW_BLOCK + AFTER_RESIDENT, NEXT_ROW_BLOCK.split(";")[0] + ";\n" + AFTER_RESIDENT),
    Mutant("streamed backward: bounds over those in use", B, NEXT_ROW_BLOCK + AFTER_STREAMED, NEXT_ROW_BLOCK.split(";")[0] + ";\n" + AFTER_STREAMED),
    Mutant("resident backward: bounds read before they are there", B, "    __syncthreads();  // the bounds are there\n", ""),
    Mutant("resident backward: copies still in flight", B, "    gpu::cp_async_wait<0>();  // a block", "    // a block"),
    Mutant("streamed backward: no barrier in the second product", B, f"          {WAIT}          __syncthreads();", f"          {WAIT}"),
    Mutant("streamed backward: no barrier in the first product", B, f"        {WAIT}        {LANDED}", f"        {WAIT}        // "),
    Mutant("streamed backward: one coefficient buffer", B, "load_step = 0, load_columns ^= 1, load_tile", "load_step = 0, load_tile"),
    Mutant("staging: no barrier before it overwrites the tiles", B, "  __syncthreads();  // what stood here has been read\n", ""),
    Mutant("staging: no __syncwarp before reading", B, "      __syncwarp();\n#pragma unroll 1", "#pragma unroll 1"),
    Mutant("staging: no __syncwarp before overwriting", B, "      __syncwarp();  // the tile has been read\n", ""),
    Mutant("staging: place() on one side only", B, "staging.grad[warp][r][Staging<C>::place(r, pair)]", "staging.grad[warp][r][pair]"),
    Mutant("plain: no barrier before the slice is overwritten", D, "    __syncthreads();  // the last slice has been read", ""),
    # edges
    Mutant("padding of the copy's rows not zero", R, "d0 + i < width ? to_float(from[d0 + i]) : 0.f", "to_float(from[d0 + i])"),
    Mutant("padding rows of the copy not a number", R, "  float x[8] = {};", "  float x[8] = {NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN};"),
    Mutant("padding rows of the copy read", R, "  if (row < rows.count) {\n    const In* from", "  {\n    const In* from"),
    Mutant("a copy of too few rows", R, "unit / slices * kUnitRows + r", "unit / slices * (kUnitRows - 1) + r"),
    Mutant("coefficients not padded", L, "padded = divide_up(rows, kUnitRows) * kUnitRows;", "padded = rows;"),
    Mutant("row guard on store missing (forward, whole)", F, "if (own && row < rows) Epilogue", "if (own) Epilogue"),
    Mutant("row guard on store missing (forward, merged)", F, "|| !own || row >= rows) return;", "|| !own) return;"),
    Mutant("row guard on store missing (backward)", B, "        if (row >= out.rows) continue;\n", ""),
    Mutant("width guard on store missing", B, "if (d + 1 < out.width) to[1]", "to[1]"),
    # masks
    Mutant("tail columns counted", T, "return col < pairs.cols.count && col != self", "return col != self"),
    Mutant("tail tile taken for uniform", T, "    if (c1 > pairs.cols.count) return Kind::mixed;\n", ""),
    Mutant("self not left out", T, "col < pairs.cols.count && col != self &&", "col < pairs.cols.count &&"),
    Mutant("column's self not left out", T, " && !(pairs.col_self && pairs.col_self[col] == row)", ""),
    Mutant("class range one short", T, "return col >= begin && col < end;", "return col >= begin && col + 1 < end;"),
    Mutant("uniform-different misjudged at the edge", T, "c1 <= begin_min ||", "c1 <= begin_max ||"),
    Mutant("uniform-same misjudged", T, "no_self && c0 >= begin_max && c1 <= end_min", "no_self && c0 >= begin_min && c1 <= end_max"),
    Mutant("uniform-same ignores self", T, "pairs.one_set ? c1 <= row0 || c0 >= row1 :", "pairs.one_set ? true :"),
    Mutant("within-class visit ends early", T, "(high.y + BN - 1) / BN : 0", "high.y / BN : 0"),
    Mutant("within-class visit starts late", T, "max(first, low.x / BN)", "max(first, (low.x + BN - 1) / BN)"),
    Mutant("upper bound is a lower bound", R, "bound<true>(keys, cols.order", "bound<false>(keys, cols.order"),
    Mutant("self in the wrong numbering", R, "? inverse[j] : -1", "? int(j) : -1"),
    # runs and parts
    Mutant("a part in the wrong place", U, "2 * run + (row_block != first_row_block(runs, run))", "2 * run"),
    Mutant("runs of a row block: the last left out", U, "((origin + runs.tiles) * runs.blocks - 1)", "((origin + runs.tiles - 1) * runs.blocks - 1)"),
    Mutant("runs of a row block: the first left out", U, "((origin + 1) * runs.blocks - 1) / runs.units", "((origin + 2) * runs.blocks - 1) / runs.units"),
    Mutant("the last but one to arrive merges", U, "== runs.y - runs.x;", "== runs.y - runs.x - 1;"),
    Mutant("a segment ends early", U, "min(run_begin(runs, run + 1) - origin, int64_t(runs.tiles))", "min(run_begin(runs, run + 1) - origin, int64_t(runs.tiles) - 1)"),
    Mutant("a segment starts late", U, "max(run_begin(runs, run) - origin, int64_t(0))", "max(run_begin(runs, run) - origin, int64_t(1))"),
    Mutant("arrivals not cleared", R, "p.arrivals[i] = 0;", "p.arrivals[i] = p.arrivals[i];"),
    Mutant("arrivals of the second launch are those of the first", L, "      next += runs.cut() ? int64_t(runs.row_blocks) * shape.shares : 0;\n", ""),
    Mutant("no barrier before a part counts as written", U, "  __syncthreads();  // every thread's part is written\n", "", "blocks run one after the other"),
    Mutant("no fence before a part counts as written", U, "  __threadfence();\n  __syncthreads();", "  __syncthreads();", "blocks run one after the other"),
    Mutant("forward: a row block's first part not merged", F, "for (int run = sharing.x; run", "for (int run = sharing.x + 1; run"),
    Mutant("backward: a row block's first part not merged", B, "for (int run = sharing.x; run", "for (int run = sharing.x + 1; run"),
    Mutant("backward: an empty part merged", B, "      if (!visits(segment(runs, run, bounds.row_block))) continue;\n", ""),
    Mutant("backward: own part merged twice", B, "[i % C::CH][e] = 0.f;", "[i % C::CH][e] += 0.f;"),
    Mutant("backward: parts overwrite each other in the sum", B, "g[0] += v.x,", "g[0] = v.x,"),
    Mutant("backward: parts of all shares in one place", B, "(int64_t(part) * gridDim.z + share) * SIZE", "int64_t(part) * gridDim.z * SIZE"),
    Mutant("softplus: own sigmoids merged twice", B, "    weights.clear();\n", ""),
    Mutant("softplus: sigmoids of a part not kept", B, "if (share == 0) weights.keep(", "if (false) weights.keep("),
    Mutant("softplus: sigmoids of parts overwrite each other", SP, "sigmoids[i] += gpu::load_l2", "sigmoids[i] = gpu::load_l2"),
    # half of the pairs
    Mutant("triangular: no barrier between wait and use", TF, "      __syncthreads();  // copies and columns have landed", "      // "),
    Mutant("triangular: loads the buffer in use", TF, "s->cols[tile % 2][k], pairs.cols", "s->cols[(tile + 1) % 2][k], pairs.cols"),
    Mutant("triangular: the last tile's columns left out", TF, "    add_columns(last - 1);\n", ""),
    Mutant("triangular: columns of the diagonal block counted twice", TF, "tile * C::BN < row0 + C::BM || ", ""),
    Mutant("triangular: one warp's columns left out", TF, "for (int w = 0; w < C::WARPS; ++w)", "for (int w = 1; w < C::WARPS; ++w)"),
    Mutant("triangular: lanes exchange the wrong halves", TF, "upper ? columns[k] : columns[k + HALF]", "upper ? columns[k + HALF] : columns[k]"),
    Mutant("triangular: a run goes on past its end", TF, "first + triangle.run_begin(int(blockIdx.x) + 1) - unit));", "first + triangle.run_begin(int(blockIdx.x) + 1) - unit + 1));"),
    Mutant("triangular: a mixed tile without its mask", TF, "e = mask.counts(pairs, col) && !mask.same(col) ? e : 0.f;", ""),
    Mutant("triangular: sums too small for integers are used", TF, "static_cast<unsigned long long>(triangle.row_blocks + 8) << 19", "0ull"),
    Mutant("triangular: used whatever the norms", TF, "kMostReference = 50.f", "kMostReference = 1e9f"),
    Mutant("triangular: reference not added again", TF, "(double(reference) - double(bits))", "(-double(bits))"),
    # fragments and layout
    Mutant("resident backward: A fragment's address map", T, "const int ar = lane & 15,", "const int ar = (lane & 7) + (lane >> 4 << 3),"),
    Mutant("several parts: A fragment's address map", T, "a_row + 16 * m + (lane & 15)", "a_row + 16 * m + (lane & 7) + (lane >> 4 << 3)"),
    Mutant("streamed, one part: A fragment's address map", T, "const int r = lane & 15, from = swizzle<CH>(r, lane >> 4);", "const int r = lane & 15, from = swizzle<CH>(r, lane >> 3 & 1);"),
    Mutant("resident forward: A fragment's rows", RF, "16 * m + g + 8 * (i % 2)", "16 * m + g + 8 * (i / 2)"),
    Mutant("resident forward: A fragment's swizzle", RF, "swizzle<CH>(row, 2 * k + i / 2)", "2 * k + i / 2"),
    Mutant("B fragment's address map", T, "(lane & 7) + ((lane >> 4) << 3);", "(lane & 7) + (((lane >> 3) & 1) << 3);"),
    Mutant("swizzle forgotten on one side", T, "from = swizzle<CH>(r, (lane >> 3) & 1);", "from = (lane >> 3) & 1;"),
    Mutant("always the first pair of chunks", T, "return from ^ (2 * k);", "return from;"),
    Mutant("D = A B^T starts again within a slice", T, "multiply<F>(acc[m][half], a[k][m], bh, first && k == 0)", "multiply<F>(acc[m][half], a[k][m], bh, first)"),
    Mutant("D = A B^T never starts", T, "  if (first)\n    F::mma_first", "  if (false)\n    F::mma_first"),
    Mutant("swizzle of the copy forgotten", R, "CH + swizzle<CH>(r, slot)) * 8", "CH + slot) * 8"),
    Mutant("no swizzle at all", T, "CH == 8 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3)", "CH ? chunk : row", "bank conflicts cost time only"),
    Mutant("always the first slice", T, "x.slices + slice) * UNIT", "x.slices) * UNIT"),
    Mutant("always the first half of a unit", T, " + row0 % kUnitRows * CH;", ";"),
    Mutant("weights packed into the wrong registers", T, "[2 * (j % 2) + h]", "[(j % 2) + 2 * h]"),
    Mutant("transposed address map", B, "const int r = lane & 15, from = swizzle<CH>(r, lane >> 4);", "const int r = lane & 15, from = swizzle<CH>(r, lane >> 3 & 1);"),
    Mutant("similarities: smallest product of the split left out", T, "int order = PARTS - 1; order >= 0", "int order = PARTS - 2; order >= 0"),
    Mutant("gradient: smallest product of the split left out", B, "int order = PARTS - 1; order >= 0", "int order = PARTS - 2; order >= 0"),
    Mutant("remainder of the rows' split not taken", R, "x[e] -= F::to(F::from(x[e]))", "x[e] -= 0.f"),
    Mutant("remainder of the weights' split not taken", T, "even -= F::to(F::from(even)), odd", "even -= 0.f, odd"),
    # numbers
    Mutant("gradient accumulated inside the tensor core", B, "multiply<F>(sum[m][half], w[part][m][k], bh, k == 0 && part == WEIGHT_PARTS - 1);", "F::mma(grad[m][c + half], w[part][m][k], bh), memset(sum[m][half], 0, 16);"),
    Mutant("similarities of all slices accumulated inside the tensor core", T, FRESH_SLICE, KEPT_SLICE),
    Mutant("running maximum: no rescale", S, "total *= shrink, carry *= shrink, top = new_top;", "top = new_top;"),
    Mutant("empty sum measured from -inf", S, "return top == -INFINITY ? 0.f : top;", "return top;"),
    Mutant("masked before the exponential", S, "sum += counts >> c & 1 ? e : 0.f;", "sum += e * float(counts >> c & 1);"),
    Mutant("quad merge one step short", S, "for (int o = 1; o < 4; o *= 2)", "for (int o = 1; o < 2; o *= 2)"),
    Mutant("absent coefficient measured from 0", T, "return {0.f, INFINITY};", "return {0.f, -INFINITY};"),
    Mutant("coefficients of columns that are no anchors not cleared", B, "dst.power[tile][i] = absent(), ", ""),
    Mutant("an anchor without negatives is not left out", R, "if (i < u.count && u.statistic[at] != -INFINITY) {", "if (i < u.count) {"),
    Mutant("extremes without those of the candidates", R, "for (int k = 0; k < 4; ++k) {\n    const Upstream& u = upstreams.of[k];\n    if", "for (int k = 0; k < 2; ++k) {\n    const Upstream& u = upstreams.of[k];\n    if"),
    Mutant("extremes of large batches: only the first rows", R, "scan(upstreams, first, int64_t(kExtremeBlocks) * kThreads)", "scan(upstreams, first, int64_t(1) << 40)", "needs more than 65,536 rows"),
    Mutant("one reference however far statistics lie apart", R, "kSpread = 60.f", "kSpread = 1e9f"),
    Mutant("one reference: not subtracted in the coefficient", R, "exp2(double(whole) - bits)", "exp2(double(whole))"),
    Mutant("one reference: coefficients keep their own", R, "exp2(double(whole) - bits)), whole}", "exp2(double(whole) - bits)), float(rint(bits))}"),
    Mutant("one exponential in a mixed tile", S, "return kind == Kind::different && bounds.reference < INFINITY;", "return bounds.reference < INFINITY;"),
    Mutant("one exponential: the column's share left out", S, "-reference)) * (row + col);", "-reference)) * row;"),
    Mutant("one exponential: the column's neighbour", S, "odd = cols.power[8 * j + 1].x;", "odd = cols.power[8 * j].x;"),
    Mutant("gradient unit not undone", B, "ldexpf(scale->natural, gradient_exponent(extremes->largest))", "ldexpf(scale->natural, -13)"),
    Mutant("16-bit weights in the unit of the loss", T, "  return (e > -100 ? e : -100) - 13;", "  return 13;"),
    Mutant("sigmoid of the wrong sign", SP, "fmaf(sim, scale, -reference)", "fmaf(-sim, scale, reference)"),
    Mutant("epsilon left out of the gradient", R, "(u.statistic[at] + all.epsilon) * kLog2e", "u.statistic[at] * kLog2e"),
    Mutant("gradient written, not added", B, "to[0] += g.x * factor", "to[0] = g.x * factor"),
    Mutant("plain gradient written, not added", D, "* k + x] += *pairs.scale", "* k + x] = *pairs.scale"),
    Mutant("32-bit offset of a unit", T, "x.data + (int64_t(row0 / kUnitRows) * x.slices + slice) * UNIT", "x.data + (row0 / kUnitRows * x.slices + slice) * UNIT", "needs 2^31 chunks"),
    # positives in passes of their own
    Mutant("positives: what the whole reference rounds away left out", P, "gpu::exp2_fast(t - rest.y)", "gpu::exp2_fast(t)"),
    Mutant("positives: the constant of the columns left out", P, "weight(sim, cols.power[at], cols.rest[at],", "weight(sim, cols.power[at], float2{0.f, cols.rest[at].y},"),
    Mutant("positives: the instance's part left out of the weights", P, "if (instance.same(col)) g += of_instance", "if (instance.same(col)) g += 0.f * of_instance"),
    Mutant("positives: every positive is of the instance", P, "return col >= begin && col < end; }\n};\n\n// Until", "return end > begin; }\n};\n\n// Until"),
    Mutant("positives: exponentials from another reference than the sums", P, ": p[i].raise(top, scale);", ": p[i].raise(top * scale);"),
    Mutant("positives: what a product rounds away not added", P, "add(product, fmaf(float(count), x, -product) + rest);", "add(product, rest);"),
    Mutant("positives: sums of other runs dropped", P, "a.sum + b.sum,", "a.sum,"),
    Mutant("positives: statistics rounded before the scale", P, "args.sum[at] = whole.sum * unit;", "args.sum[at] = double(float(whole.sum)) * unit;"),
    Mutant("positives: a weight of one 16-bit number", B, "C::PARTS == 1 && Weights::POSITIVES ? 2 : C::PARTS", "C::PARTS"),
    Mutant("products of parts not symmetric", T, "multiply<F>(other, a[order - part][m], low, true);", "for (int i = 0; i < 4; ++i) other[i] = one[i], one[i] = 0.f;\n      multiply<F>(other, a[order - part][m], low, false);"),
    Mutant("instances searched in all columns", R, "find_in(cols.instances, found, rows.instances[at])", "find_in(cols.instances, {0, int(cols.count)}, rows.instances[at])"),
    Mutant("sums have no upstream gradient", OPS, "             p.positives ? p.grad_positive_sum : nullptr,\n", "             nullptr,\n"),
    Mutant("the unit of the gradient forgets the sums'", R, "if (u.constant) raise(u.constant[i]);", ""),
    Mutant("tiles of positives not skipped by the negatives", T, "return no_self && c0 >= begin_max && c1 <= end_min ? Kind::same : Kind::mixed;", "return no_self && c0 >= begin_max && c1 <= end_min ? Kind::different : Kind::mixed;"),
    Mutant("tiles of positives are not skipped among the negatives (resident)", F, "      if (kind == Epilogue::SKIPPED) continue;\n", "", "the masks find the same; costs time only"),
    Mutant("streamed forward: tiles that are skipped are loaded", F, "load_k = 0, load_tile = next_tile(load_tile + 1)", "load_k = 0, ++load_tile"),
    Mutant("streamed backward: tiles that are skipped are loaded", B, "load_columns ^= 1, load_tile = next_tile(load_tile + 1)", "load_columns ^= 1, ++load_tile"),
    Mutant("streamed backward: starts with a tile that is skipped", B, "int load_tile = next_tile(visit.first)", "int load_tile = visit.first"),
    Mutant("what is not asked for is not filled", R, "p.unasked[k][i] = k < 2 ? -INFINITY : 0.;", ";"),
    Mutant("parts of positives: not rescaled in units of the similarity", P, "pairs.col_bias ? 1.f : pairs.scale->base2),", "1.f),"),
    Mutant("sums of positives: the rounding errors dropped", P, "low += ((high - (sum - added)) + (x - added)) + rest;", "low += rest;"),
    Mutant("sums of positives: the reference left out", P, "sum[i].add(__popc(counts), ref, rest);", "sum[i].add(0, ref, rest);"),
    Mutant("sums of positives: a part's lower digits dropped", P, "return {high, float(x - double(high))};", "return {high, 0.f};"),
    Mutant("sums of instances: all of the class", P, "uint32_t(is_counted && instance.same(col)) << c", "uint32_t(is_counted) << c"),
    Mutant("sums of instances: with the row itself", P, "uint32_t(is_counted && instance.same(col)) << c", "uint32_t(instance.same(col)) << c"),
    Mutant("range of instances: that of the class", R, "find_in(cols.instances, found, rows.instances[at])", "found"),
    Mutant("gradient of positives: the row's constant left out", P, "weight(sim, power, rest,", "weight(sim, power, float2{0.f, rest.y},"),
    Mutant("gradient of positives: the reference is not whole", R, "power = {in_units(gradient), float(rint(bits))};", "power = {in_units(gradient), float(bits)};"),
    Mutant("gradient of positives: instances ignored", P, "if (instance.same(col)) g +=", "g +="),
    Mutant("gradient of positives: the column's instance left out", P, "g += of_instance + cols.instance[at];", "g += of_instance;"),
    Mutant("gradient of positives: the row's instance left out", P, "g += of_instance + cols.instance[at];", "g += cols.instance[at];"),
    Mutant("gradient of positives: with the row itself", P, "v[e] = all || (mask.same(col) && mask.counts(pairs, col)) ? g : 0.f;", "v[e] = all || mask.same(col) ? g : 0.f;"),
    Mutant("constants of columns that are no anchors not cleared", B, "dst.rest[tile][i] = {0.f, 0.f}, ", ""),
    Mutant("constants of columns not loaded", B, "else if (POSITIVES && i < 2 * COPIES)", "else if (false && i < 2 * COPIES)"),
    # weights of candidates
    Mutant("weights: unused in the forward", S, "e % 2 ? bias.y : bias.x", "0.f"),
    Mutant("weights: the neighbour's in the forward", S, "e % 2 ? bias.y : bias.x", "bias.x"),
    Mutant("weights: the scale counted twice", S, "pairs_.col_bias ? 1.f : pairs_.scale->base2", "pairs_.scale->base2"),
    Mutant("weights: those of the rows unused (negatives)", S, "fmaf(sim, scale, row_bias) - col.y", "sim * scale - col.y"),
    Mutant("weights: those of the columns unused (negatives)", S, "fmaf(sim, scale, col_bias) - row.y", "sim * scale - row.y"),
    Mutant("weights: rows and columns exchanged", OPS, "within, w.anchor_bias, w.candidate_bias, scale", "within, w.candidate_bias, w.anchor_bias, scale"),
    Mutant("weights: of the candidates as anchors of themselves", OPS, "within, w.candidate_bias, w.anchor_bias, scale", "within, w.anchor_bias, w.candidate_bias, scale"),
    Mutant("weights: one exponential", OPS, "parts == 1 && !weighted(p)", "parts == 1"),
    Mutant("weights: half of the pairs", L, "resident(p) && !weighted(p) &&", "resident(p) &&"),
    Mutant("weights: of positives unused in the forward", P, "fmaf(sim, scale, pairs.col_bias[col]) - biased_ref", "sim * scale - biased_ref"),
    Mutant("weights: the largest without a weight", P, "BIASED ? p[i].raise(biased_top) : 0.f", "BIASED ? p[i].raise(top * scale) : 0.f"),
    Mutant("weights: the sums measured from the exponentials' reference", P, "BIASED ? LogSum::reference(top) :", "BIASED ? p[i].top :"),
    Mutant("weights: the unit of p", P, "(pairs.col_bias ? kLn2 : unit)", "unit"),
    Mutant("weights: of the columns unused (positives)", P, "weight(sim, power, rest, BIASED ? pairs.col_bias[col] : 0.f)", "weight(sim, power, rest, 0.f)"),
    Mutant("weights: of the rows unused (positives)", P, "BIASED ? pairs.row_bias[mask.row] : 0.f", "0.f"),
    Mutant("weights: unused in softplus", SP, "return log_weight + softplus(x - log_weight);", "return softplus(x - log_weight);"),
    Mutant("weights: of 0 in softplus", SP, "    if (bias == -INFINITY) return x == -INFINITY ? 0.f : x;\n", ""),
    Mutant("weights: of the rows unused (sigmoid)", SP, "BIASED ? pairs.row_bias[mask.row] : 0.f", "0.f"),
    Mutant("weights: of the columns unused (sigmoid)", SP, "BIASED ? pairs.col_bias[col0 + at] : 0.f", "0.f"),
    Mutant("weights: in the caller's order", R, "log_weights[place_of(rows.order, i, rows.count)]", "log_weights[i]"),
    Mutant("weights: natural logarithms", R, "float(log_weight * kLog2e)", "float(log_weight)"),
    Mutant("weights: rows and columns exchanged (double)", D, "row, sim, pairs.col_log_weight(col0 + x)", "row, sim, pairs.row_log_weight(row)"),
    Mutant("weights: of 0 in softplus (double)", D, "  if (y == -INFINITY) return x == -INFINITY ? 0. : x;\n", ""),
    # broken operands
    Mutant("verdicts: any log weight", R, "return fabs(log_weight) <= kMostLogWeight || log_weight == -INFINITY;", "return true;"),
    Mutant("verdicts: only the first is read", V, "i < verdicts.count;", "i < 1;"),
    Mutant("verdicts: not stored", R, "verdicts[blockIdx.x] = all;", "verdicts[blockIdx.x] = 0;"),
    Mutant("verdicts: the first result alone is NaN", V, "for (int k = 0; k < 4; ++k) spoil(", "for (int k = 0; k < 1; ++k) spoil("),
    Mutant("verdicts: gradients stay (resident)", B, "    spoil(out.data, int64_t(out.rows) * out.width, int(threadIdx.x), C::THREADS);\n", ""),
    Mutant("verdicts: gradients stay (double)", D, "    spoil(grad, pairs.rows.count * pairs.width, thread, kPlain * kPlain);\n", ""),
    Mutant("verdicts: the resident forward does not ask", F, "  if (any_broken(pairs.verdicts, int(threadIdx.x), C::THREADS)) {", "  if (false) {"),
    Mutant("broken place followed", V, "  return is_place(at, count) ? at : 0;", "  return at;"),
    Mutant("broken place followed: binary search", R, "keys[place_of(order, mid, count)]", "keys[order[mid]]"),
    Mutant("broken place followed: coefficients", R, "place_of(u.order, i, u.count)", "u.order[i]"),
    Mutant("broken place followed: inverse", R, "&inverse[place_of(order, i, count)]", "&inverse[order[i]]"),
    Mutant("a negative place taken for one", V, "return uint64_t(at) < uint64_t(count);", "return at < count;"),
    Mutant("order: not looked at", R, "fine &= ordered(rows, i) & p.ranges[k].find(i)", "fine &= p.ranges[k].find(i)"),
    Mutant("order: labels may fall", R, "if (label != next_label) return label < next_label;", "if (label != next_label) return true;"),
    Mutant("order: instances may fall", R, "return !rows.instances || rows.instances[here] <= rows.instances[next];", "return true;"),
    Mutant("order: a row may occur twice", R, "hash(side + place_of(rows.order, i, rows.count)) - hash(side + i);", "0;"),
    Mutant("order: sides share their hashes", R, "side = Verdict(k) << 32;", "side = 0;"),
    Mutant("verdicts: one warp of eight", V, "for (int i = 0; i < threads / 32; ++i) all", "for (int i = 0; i < 1; ++i) all"),
    Mutant("verdicts: a sum of hashes forgets what is broken", V, "| ((a | b) & kBroken);", "| 0;"),
    Mutant("self_index: anything negative", R, "return j >= -1 && j < cols.count;", "return j < cols.count;"),
    Mutant("self_index: anything large", R, "return j >= -1 && j < cols.count;", "return j >= -1;"),
    Mutant("rows: a scale of any sign", R, "return scale > 0 && square", "return square"),
    Mutant("rows: a similarity may be too large", R, " && square * scale * A(kLog2e) < A(kMostBits)", ""),
    Mutant("rows: a sum of products may overflow", R, "square < most && ", ""),
    Mutant("rows: seven numbers of eight", R, "for (int i = 0; i < 8; ++i) square", "for (int i = 0; i < 7; ++i) square"),
]  # fmt: skip

# Files that decide which kernels a case runs; f16 and the two-part split share every line with these. The f16
# kernels come without the bug, for what overflows in that format only; they come last, so that no inline
# function is taken from them.
UNITS = ["operations", "forward_bf16", "forward_f32x3", "backward_bf16", "backward_f32x3"]
F16_UNITS = ["forward_f16", "backward_f16"]
CASES = ["bf16", "f32x3", "f64", "f16-sums-only"]
LARGE_CASES = ["large-bf16"]  # slow, so only for what the others miss
SANITIZER_CASES = ["bf16-candidates", "bf16-long", "f32x3-own", "f64-own"]
BROKEN_SHAPES = ["bf16-runs", "bf16-streamed", "f32x3-runs", "f64"]
DRIVERS = ["emulate.cpp", "broken.cpp"]


# Which units a file's bug can reach; all of them, and the driver, where it is not named.
# (The linker takes an inline function from any unit that has it, so all that have it are compiled again.)
KERNEL_UNITS = ("forward", "backward", "operations")
REACHED = {**dict.fromkeys((F, RF, TF), ("forward",)), B: ("backward", "operations"), **dict.fromkeys((T, U, V, S, SP, P), KERNEL_UNITS),
           **dict.fromkeys((R, OPS, D), ("operations",))}  # fmt: skip


def flags_of(kind: str) -> list[str]:
    return ["-O0" if flag == "-O1" else flag for flag in build.FLAGS[kind]]


_baseline_lock = threading.Lock()


@functools.cache
def _baseline(kind: str) -> dict[str, Path]:
    folder = Path(tempfile.mkdtemp(prefix="pysupcon-mutants-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sources = [build.KERNELS / f"{unit}.cu" for unit in UNITS]
    sources += [build.HERE / name for name in DRIVERS]
    sources += [build.KERNELS / f"{unit}.cu" for unit in F16_UNITS]
    objects = build.compile_objects(sources, flags_of(kind), folder, build.KERNELS, jobs=2)
    return {source.stem: target for source, target in zip(sources, objects, strict=True)}


def baseline(kind: str) -> dict[str, Path]:
    """The objects without a bug. Objects that a bug does not affect are not compiled again."""
    with _baseline_lock:
        return _baseline(kind)


def detected(program: Path, cases: list[str], order: str = "forward") -> str:
    """The error that the emulator reports; empty if there is none."""
    try:
        done = build.run(program, *cases, order=order, timeout=900)
    except subprocess.TimeoutExpired:
        return "timeout"
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
            sources += [build.HERE / name for name in DRIVERS]
        broken = [
            ("broken", "plain", BROKEN_SHAPES, "forward"),
            ("broken", "asan", BROKEN_SHAPES[-1:], "forward"),
        ]
        attempts = [("emulate", "plain", CASES, "forward"), ("emulate", "plain", CASES, "reverse"), broken[0],
                    ("emulate", "plain", LARGE_CASES, "forward"), ("emulate", "asan", SANITIZER_CASES, "forward"), broken[1],
                    ("emulate", "tsan", SANITIZER_CASES, "forward")]  # fmt: skip
        if mutant.broken:
            attempts = broken
        compiled: dict[str, dict[str, Path]] = {}
        for driver, kind, cases, order in attempts:
            program = Path(folder) / f"{driver}-{kind}"
            if not program.exists():
                flags = flags_of(kind)
                if kind not in compiled:
                    targets = build.compile_objects(sources, flags, Path(folder), kernels, jobs=1)
                    compiled[kind] = {s.stem: target for s, target in zip(sources, targets, strict=True)}
                others = {Path(name).stem for name in DRIVERS} - {driver}
                mine = {**baseline(kind), **compiled[kind]}
                objects = [target for stem, target in mine.items() if stem not in others]
                link = [
                    "-no-pie",
                    "-Wl,--unresolved-symbols=ignore-all,-z,lazy",
                ]  # missing units are never called
                subprocess.run(["g++", *flags, *link, *map(str, objects), "-o", str(program)], check=True)
            if error := detected(program, cases, order):
                how = kind + " large" * (cases == LARGE_CASES) + " broken" * (driver == "broken")
                how += "" if order == "forward" else f" {order}"
                return Verdict(mutant.name, f"{how}: {error}", bool(mutant.invisible))
    return Verdict(mutant.name, "", bool(mutant.invisible))


def sample() -> list[Mutant]:
    """The mutants of the slow test: every fifth one (all of them take more than an hour), and the two bugs that only
    the large cases detect."""
    large = [mutant for mutant in MUTANTS if mutant.name.endswith("inside the tensor core")]
    visible = [mutant for mutant in MUTANTS if not mutant.invisible and mutant not in large]
    return [*large, *visible[::5]]


def main() -> None:
    wanted = sys.argv[1:]
    control = Mutant("none (control)", T, "", "")
    chosen = [m for m in [control, *MUTANTS] if not wanted or any(name in m.name for name in wanted)]
    with ThreadPoolExecutor(2) as pool:
        for mutant, verdict in zip(chosen, pool.map(judge, chosen), strict=True):
            note = f" ({mutant.invisible})" if mutant.invisible else ""
            print(f"| {mutant.name}{note} | {verdict.caught or '-'} |", flush=True)


if __name__ == "__main__":
    main()
