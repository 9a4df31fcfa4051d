// What the pair kernels need to know about the rows, made on the device in one launch: a label-sorted 16-bit
// copy, every row's range of same-class columns, the coefficients of the gradient, and whether rows, orders
// and indices are what they should be (verdicts.cuh). O(N D) work.
#pragma once
#include "launch.h"
#include "tiles.cuh"
#include "verdicts.cuh"

namespace pysupcon::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
template <class In>
struct Wide {  // of sums, and of statistics
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

// A launch works through lists one after the other, a thread an item, no block in two of them. True for the
// blocks of the next list, whose item is then `item`, perhaps past its end; `block` counts the blocks left.
__device__ __forceinline__ bool takes(int64_t& block, int64_t items, int64_t& item) {
  const int64_t blocks = divide_up(items, kThreads);
  item = block * kThreads + threadIdx.x;
  if (block < blocks) return true;
  block -= blocks;
  return false;
}

// The same for lists whose blocks leave a verdict: at most kVerdictBlocks of them, `step` items apart.
__device__ __forceinline__ bool takes(int64_t& block, int64_t items, int64_t& item, int64_t& step) {
  const int64_t blocks = verdict_blocks(items);
  item = block * kThreads + threadIdx.x, step = blocks * kThreads;
  if (block < blocks) return true;
  block -= blocks;
  return false;
}

// Whether eight numbers of a row are finite, and so small that no similarity in powers of two exceeds
// kMostBits and no sum of up to 2^31 products overflows: no product of two rows exceeds the larger of their
// squares, which is at most `chunks` times that of eight numbers.
constexpr double kMostBits = 1e15;  // beyond, a statistic has no digit left that an exponent needs
template <class A>
__device__ __forceinline__ bool usable(const A (&x)[8], A scale, int chunks) {
  const A most = sizeof(A) == 8 ? A(0x1p990) : A(0x1p94);
  A square = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) square += x[i] * x[i];
  square *= A(chunks);
  return scale > 0 && square < most && square * scale * A(kLog2e) < A(kMostBits);  // false for NaN
}

// Chunk `at` of part 0 of the sorted copy (see Operand) and its place in the other parts. Returns usable().
template <class In, class F, int PARTS, int CH>
__device__ __forceinline__ bool gather_chunk(uint4* out, int64_t part_size, const Rows& rows, int width,
                                             int slices, float scale, int64_t at) {
  const int slot = int(at % CH), r = int(at / CH % kUnitRows);
  const int64_t unit = at / (CH * kUnitRows), row = unit / slices * kUnitRows + r;
  const int d0 = (int(unit % slices) * CH + swizzle<CH>(r, slot)) * 8;
  float x[8] = {};
  if (row < rows.count) {
    const In* from = static_cast<const In*>(rows.data) + place_of(rows.order, row, rows.count) * rows.stride;
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = d0 + i < width ? to_float(from[d0 + i]) : 0.f;
  }
  const bool fine = usable(x, scale, (width + 7) / 8);
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      packed[i] = F::pack(x[2 * i], x[2 * i + 1]);
#pragma unroll
      for (int e = 2 * i; part + 1 < PARTS && e < 2 * i + 2; ++e) x[e] -= F::to(F::from(x[e]));
    }
    out[part * part_size + at] = {packed[0], packed[1], packed[2], packed[3]};
  }
  return fine;
}

// Double precision has no copy: chunk `at` of the rows as they lie.
static __device__ __forceinline__ bool look_at_chunk(const Rows& rows, int width, double scale, int64_t at) {
  const int chunks = (width + 7) / 8, d0 = int(at % chunks) * 8;
  const double* from = static_cast<const double*>(rows.data) + at / chunks * rows.stride;
  double x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = d0 + i < width ? from[d0 + i] : 0.;
  return usable(x, scale, chunks);
}

// A broken order may hold a row twice.
static __global__ void invert_order(int* inverse, const int64_t* order, int count) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) gpu::store_one_of(&inverse[place_of(order, i, count)], i);
}

// The first of the sorted rows [lo, hi) whose key is >= key (UPPER: > key).
template <bool UPPER>
__device__ __forceinline__ int bound(const int64_t* keys, const int64_t* order, int64_t count, int lo, int hi,
                                     int64_t key) {
  while (lo < hi) {
    const int mid = lo + (hi - lo) / 2;
    const int64_t k = keys[place_of(order, mid, count)];
    if (UPPER ? k <= key : k < key)
      lo = mid + 1;
    else
      hi = mid;
  }
  return lo;
}

// Partial maxima of |x|^2; infinity, which no reference allows, where a row is not finite. Grid
// (kExtremeBlocks).
template <class In, class F>
__global__ void __launch_bounds__(kThreads) find_norms(float* norms, Rows rows, int width) {
  __shared__ float warps[8];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float top = 0.f;
  for (int64_t i = int64_t(blockIdx.x) * 8 + warp; i < rows.count; i += int64_t(kExtremeBlocks) * 8) {
    const In* row = static_cast<const In*>(rows.data) + i * rows.stride;
    float square = 0.f;
    for (int d = lane; d < width; d += 32) {
      const float x = F::to(F::from(to_float(row[d])));
      square = fmaf(x, x, square);
    }
#pragma unroll
    for (int o = 16; o; o /= 2) square += __shfl_xor_sync(~0u, square, o);
    top = fmaxf(top, square == square ? square : INFINITY);  // fmaxf alone forgets a NaN
  }
  if (lane == 0) warps[warp] = top;
  __syncthreads();
  for (int i = 0; i < 8; ++i) top = fmaxf(top, warps[i]);
  if (threadIdx.x == 0) norms[blockIdx.x] = top;
}

// Sorted rows' classes on the other side, and which column a row is.
struct Ranges {
  int2* range;           // [rows]; null: not wanted
  int2* instance_range;  // [rows] or null
  int* self;             // [rows] or null
  Rows rows, cols;
  const int64_t* self_index;  // [rows], in the caller's order
  const int* inverse;         // [cols] sorted place of a column

  __device__ __forceinline__ int64_t count() const { return range ? rows.count : 0; }
  // Returns whether the row's index into the columns is one, or -1.
  __device__ __forceinline__ bool find(int64_t i) const {
    if (!range) return true;
    const int64_t at = place_of(rows.order, i, rows.count);
    const auto find_in = [&](const int64_t* keys, int2 in, int64_t key) {
      return int2{bound<false>(keys, cols.order, cols.count, in.x, in.y, key),
                  bound<true>(keys, cols.order, cols.count, in.x, in.y, key)};
    };
    const int2 found = find_in(cols.labels, {0, int(cols.count)}, rows.labels[at]);
    range[i] = found;
    if (instance_range) instance_range[i] = find_in(cols.instances, found, rows.instances[at]);
    if (!self) return true;
    const int64_t j = self_index[at];
    self[i] = is_place(j, cols.count) ? inverse[j] : -1;
    return j >= -1 && j < cols.count;
  }
};

// Whether place i of the order holds a row, and labels, then instances, do not fall to the next one.
__device__ __forceinline__ bool ordered(const Rows& rows, int64_t i) {
  const int64_t here = rows.order[i];
  if (!is_place(here, rows.count)) return false;
  if (i + 1 == rows.count) return true;
  const int64_t next = rows.order[i + 1];
  if (!is_place(next, rows.count)) return false;
  const int64_t label = rows.labels[here], next_label = rows.labels[next];
  if (label != next_label) return label < next_label;
  return !rows.instances || rows.instances[here] <= rows.instances[next];
}

// One kind of statistic of one side's anchors with its upstream gradients, in the caller's order.
struct Upstream {
  const double *statistic, *gradient;
  const double *constant, *of_instance;  // of positives: of their sums; null: there is none
  const int64_t* order;
  int64_t count;
  float2 *power, *rest;  // [count padded to kUnitRows], see Coefficients; power null: nothing to do
  float* instance;

  __device__ __forceinline__ int64_t padded() const {
    return power ? divide_up(count, kUnitRows) * kUnitRows : 0;
  }
};
struct Upstreams {
  Upstream of[4];  // n and p of the anchors, n and p of the candidates
  double epsilon;  // added to the statistics
  bool softplus;   // the sigmoids need the statistic itself
  bool one;        // whether the kernel knows what to do with one reference
  float4* parts;   // [kExtremeBlocks] of find_extremes; null: every block looks for itself
  Extremes* extremes;
};

// (largest |gradient|, highest and lowest statistic), none of them NaN or infinite: such values spoil what
// they touch only.
__device__ __forceinline__ float4 no_extremes() { return {0.f, -INFINITY, INFINITY, 0.f}; }
__device__ __forceinline__ float4 wider(const float4& a, const float4& b) {
  return {fmaxf(a.x, b.x), fmaxf(a.y, b.y), fminf(a.z, b.z), 0.f};
}
__device__ __forceinline__ float4 scan(const Upstreams& upstreams, int64_t first, int64_t step) {
  float4 found = no_extremes();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const Upstream& u = upstreams.of[k];
    if (!u.power) continue;
    const auto raise = [&](double gradient) {
      const float g = fabsf(float(gradient));
      if (g < INFINITY) found.x = fmaxf(found.x, g);
    };
#pragma unroll 4
    for (int64_t i = first; i < u.count; i += step) {
      raise(u.gradient[i]);
      if (u.constant) raise(u.constant[i]);
      if (u.of_instance) raise(u.of_instance[i]);
      if (u.rest) continue;  // positives have references of their own
      const float s = float(u.statistic[i]);
      if (fabsf(s) < INFINITY) found.y = fmaxf(found.y, s), found.z = fminf(found.z, s);
    }
  }
  return found;
}
// Over the block; every thread gets it. A maximum does not depend on the order.
__device__ __forceinline__ float4 over_block(float4 mine) {
  __shared__ float4 warps[kThreads / 32];
#pragma unroll
  for (int o = 16; o; o /= 2)
    mine = wider(mine, {__shfl_xor_sync(~0u, mine.x, o), __shfl_xor_sync(~0u, mine.y, o),
                        __shfl_xor_sync(~0u, mine.z, o), 0.f});
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
  __syncthreads();
  float4 all = warps[0];
  for (int i = 1; i < kThreads / 32; ++i) all = wider(all, warps[i]);
  return all;
}

// Large batches: grid (kExtremeBlocks).
static __global__ void find_extremes(Upstreams upstreams) {
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const float4 found = over_block(scan(upstreams, first, int64_t(kExtremeBlocks) * kThreads));
  if (threadIdx.x == 0) upstreams.parts[blockIdx.x] = found;
}

// One reference r, not below the highest statistic, serves all negatives where none lies 2^kSpread below it:
// r exceeds every similarity that a statistic counted; a term that underflows beside r is below 2^-64 of any
// anchor's sum; and no upstream gradient overflows when it is multiplied by 2^(r - statistic). (Equations (6)
// and (9).)
constexpr float kSpread = 60.f;
static_assert(kExtremeBlocks == kThreads, "a block reads them all at once");

__device__ __forceinline__ Extremes judge(const Upstreams& upstreams) {
  const float4 found =
      over_block(upstreams.parts ? upstreams.parts[threadIdx.x] : scan(upstreams, threadIdx.x, kThreads));
  constexpr float log2e = float(kLog2e);
  const bool one = upstreams.one && found.y >= found.z && (found.y - found.z) * log2e <= kSpread;
  return {found.x, one ? ceilf(found.y * log2e) : INFINITY, found.y, found.z};
}

// Whole references, and what they round away put where no digit is lost: into f, in double, or into l.
__device__ __forceinline__ void pack_coefficients(const Upstream& u, const Upstreams& all,
                                                  const Extremes& extremes, int64_t i) {
  float2 power = absent(), rest{0.f, 0.f};
  float instance = 0.f;
  const int64_t at = i < u.count ? place_of(u.order, i, u.count) : 0;
  const int unit = -gradient_exponent(extremes.largest);
  const auto in_units = [&](double x) { return float(ldexp(x, unit)); };
  if (i < u.count && u.rest) {  // the sums have no weights: they count where all weights are 0, too
    rest.x = u.constant ? in_units(u.constant[at]) : 0.f;
    instance = u.of_instance ? in_units(u.of_instance[at]) : 0.f;
  }
  if (i < u.count && u.statistic[at] != -INFINITY) {
    const double bits = (u.statistic[at] + all.epsilon) * kLog2e, gradient = u.gradient[at];
    const float whole = extremes.reference < INFINITY ? extremes.reference : float(rint(bits));
    if (u.rest) {
      power = {in_units(gradient), float(rint(bits))};
      rest.y = float(bits - double(power.y));
    } else if (all.softplus) {
      power = {in_units(gradient), float(bits)};
    } else {
      power = {in_units(gradient * exp2(double(whole) - bits)), whole};
    }
  }
  u.power[i] = power;
  if (u.rest) u.rest[i] = rest;
  if (u.instance) u.instance[i] = instance;
}

// The log weights of one side's rows as candidates of others.
constexpr double kMostLogWeight = 1e14;  // as kMostBits
struct Biases {
  float* bias;                // [count], see Pairs; null: not wanted
  const double* log_weights;  // [count], in the caller's order; null: all are 0

  // Returns whether sorted row i has a log weight that is -inf or between the limits.
  __device__ __forceinline__ bool store(const Rows& rows, int64_t i) const {
    if (!bias && !log_weights) return true;
    const double log_weight = log_weights ? log_weights[place_of(rows.order, i, rows.count)] : 0.;
    if (bias) bias[i] = float(log_weight * kLog2e);
    return fabs(log_weight) <= kMostLogWeight || log_weight == -INFINITY;
  }
};

struct Preparation {
  Rows sides[2];  // anchors; candidates where they are others, else none
  uint4* copies[2];
  int64_t part_size[2];  // chunks of a part of the copy, or of the rows where there is none
  int width, slices;
  Ranges ranges[2];
  Upstreams upstreams;
  Biases biases[2];
  const double* scale;
  Scale* scale_out;
  int* arrivals;
  int64_t arrival_count;
  unsigned long long* sums;  // of the triangular forward
  int64_t sum_count;
  Verdict* verdicts;   // of the first blocks, which have rows and orders
  double* unasked[4];  // n, p and the sums, where pair_stats was not asked for them; [fill_count]
  int64_t fill_count;
};

// How many blocks of prepare() leave a verdict.
inline int verdict_blocks_of(const Preparation& p) {
  int64_t sum = 0;
  for (int k = 0; k < 2; ++k) sum += verdict_blocks(p.part_size[k]) + verdict_blocks(p.sides[k].count);
  return int(sum);
}

__device__ __forceinline__ void leave_verdict(Verdict* verdicts, bool fine, Verdict rest = 0) {
  const Verdict all = join_block((rest & ~kBroken) | (fine ? 0 : kBroken), int(threadIdx.x), kThreads);
  if (threadIdx.x == 0) verdicts[blockIdx.x] = all;
}

// How many blocks prepare() needs.
inline int64_t preparation_blocks(const Preparation& p) {
  const auto blocks = [](int64_t items) { return divide_up(items, kThreads); };
  int64_t sum = verdict_blocks_of(p) + blocks(p.arrival_count) + blocks(p.sum_count) + blocks(p.fill_count);
  for (const Upstream& u : p.upstreams.of)
    if (u.power) sum += blocks(divide_up(u.count, kUnitRows) * kUnitRows);
  return sum;
}

// PARTS 0: no copy, for kernels that read the rows in place, in double. Four blocks a multiprocessor: left to
// itself nvcc takes 32 registers, and spills.
template <class In, class F, int PARTS>
__global__ void __launch_bounds__(kThreads, 4) prepare(const __grid_constant__ Preparation p) {
  constexpr int CH = PARTS == 1 ? 8 : 4;
  int64_t block = blockIdx.x, i, step;
  if (p.scale_out && blockIdx.x == 0 && threadIdx.x == 0)
    *p.scale_out = {float(*p.scale), float(*p.scale * kLog2e)};
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const Rows& rows = p.sides[k];
    if (takes(block, p.part_size[k], i, step)) {
      const auto scale = static_cast<typename Wide<In>::type>(*p.scale);
      bool fine = true;
      for (; i < p.part_size[k]; i += step) {
        if constexpr (PARTS == 0)
          fine &= look_at_chunk(rows, p.width, scale, i);
        else
          fine &=
              gather_chunk<In, F, PARTS, CH>(p.copies[k], p.part_size[k], rows, p.width, p.slices, scale, i);
      }
      leave_verdict(p.verdicts, fine);
      return;
    }
    if (takes(block, rows.count, i, step)) {
      bool fine = true;
      Verdict rest = 0;
      const Verdict side = Verdict(k) << 32;  // what one side lacks the other must not make up for
      for (; i < rows.count; i += step) {
        fine &= ordered(rows, i) & p.ranges[k].find(i) & p.biases[k].store(rows, i);
        rest += hash(side + place_of(rows.order, i, rows.count)) - hash(side + i);
      }
      leave_verdict(p.verdicts, fine, rest);
      return;
    }
  }
  bool first = true;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const Upstream& u = p.upstreams.of[k];
    if (takes(block, u.padded(), i)) {
      const Extremes extremes = judge(p.upstreams);
      if (first && i == 0) *p.upstreams.extremes = extremes;
      if (i < u.padded()) pack_coefficients(u, p.upstreams, extremes, i);
      return;
    }
    first = first && !u.power;
  }
  if (takes(block, p.arrival_count, i)) {
    if (i < p.arrival_count) p.arrivals[i] = 0;
    return;
  }
  if (takes(block, p.sum_count, i)) {
    if (i < p.sum_count) p.sums[i] = 0;
    return;
  }
  if (takes(block, p.fill_count, i) && i < p.fill_count)
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (p.unasked[k]) p.unasked[k][i] = k < 2 ? -INFINITY : 0.;
}

}  // namespace pysupcon::cuda
