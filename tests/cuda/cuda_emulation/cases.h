// The emulated cases: small shapes, each with its purpose, and a few large ones, named "large-...".
#pragma once
#include <string>
#include <vector>

#include "launch.h"

namespace emulation {

using pysupcon::cuda::Dtype;

enum class Form {
  one_set,
  candidates,
  own_rows
};  // the three forms of pysupcon/pairs/ops.py; own_rows: candidate_... given

struct Case {
  std::string name;
  Dtype dtype;
  int parts, anchors, candidates, width, classes;
  Form form = Form::one_set;
  double temperature = 0.2;
  int multiprocessors = 1;  // more of them cut the columns into splits
  int padding = 0;          // elements between rows
  bool negatives = true, positives = true;
  double row_norm = 1;
  int shared_memory = 228 << 10;  // of a multiprocessor; 100 << 10 holds one wide block of the backward
  int triangular_rows = 1 << 30;  // from so many rows on the forward visits half of the pairs
  double mean = 0;                // of the numbers of a row, beside a deviation of 1, before it is normalised
  double epsilon = 0.3;           // of positive_softplus
  double length_bar = 0;          // where set: how much shorter or longer than right a gradient may be
  bool of_candidates = true;      // Form::candidates: their gradient is asked for
  bool instances = false;         // rows of a class are of several instances
  bool sums = true;               // the sums of the positives have upstream gradients
  double other_gradients = 1;     // factor of the upstream gradients of all but positive_sum
  // Candidates have weights between 10^-weights and 10^weights; one in `weightless` has the weight 0, if set.
  double weights = 0;
  int weightless = 0;
  // If set, see converged.h: classes of `copies` nearly equal rows; the allowed error of the loss and of the
  // gradient, as a multiple of the error of a dense float32 evaluation.
  int copies = 0;
  double loss_bar = 0, gradient_bar = 0;
};

inline std::vector<Case> all_cases() {
  std::vector<Case> all;
  struct Format {
    const char* name;
    Dtype dtype;
    int parts;
  };
  const Format formats[] = {{"bf16", Dtype::bf16, 1}, {"f16", Dtype::f16, 1},   {"f32x1", Dtype::f32, 1},
                            {"f32x2", Dtype::f32, 2}, {"f32x3", Dtype::f32, 3}, {"f64", Dtype::f64, 1}};
  for (const Format& f : formats) {
    const auto add = [&](const char* name, int m, int n, int width, int classes) -> Case& {
      all.push_back({std::string(f.name) + "-" + name, f.dtype, f.parts, m, n, width, classes});
      return all.back();
    };
    add("tiles", 150, 0, 70, 3).padding = 2;  // all kinds of tile, ragged everywhere, odd chunk, strided rows
    add("long", 70, 0, 300, 5).multiprocessors = 2;    // streamed slices, two shares of the gradient
    Case& c = add("candidates", 66, 140, 20, 4);       // two sets, some anchors among the candidates
    c.form = Form::candidates, c.multiprocessors = 3;  // splits on both sides
    Case& own = add("own-rows", 40, 131, 9, 3);        // every anchor is a candidate too; exactly two splits
    own.form = Form::own_rows, own.multiprocessors = 2;
    add("within", 130, 0, 33, 4).negatives = false;  // cNCE: same-class columns only
    // instances, in all forms; their numbers repeat from class to class
    Case& views = add("views", 150, 0, 70, 3);
    views.instances = true, views.multiprocessors = 3;
    Case& queue = add("views-candidates", 66, 140, 20, 4);
    queue.form = Form::candidates, queue.instances = true, queue.multiprocessors = 3;
    Case& gathered = add("views-own-rows", 40, 131, 9, 3);
    gathered.form = Form::own_rows, gathered.instances = true;
    // weights of candidates, in all forms and schedules
    const auto weigh = [&](const char* name, int m, int n, int width, int classes, double weights) -> Case& {
      Case& c = add(name, m, n, width, classes);
      c.weights = weights, c.weightless = 7, c.multiprocessors = 3;
      return c;
    };
    weigh("weights", 150, 0, 70, 3, 1).instances = true;
    weigh("weights-wide", 150, 0, 70, 3, 20).padding = 2;
    weigh("weights-long", 70, 0, 300, 5, 1);
    weigh("weights-candidates", 66, 140, 20, 4, 20).form = Form::candidates;
    weigh("weights-own-rows", 40, 131, 9, 3, 1).form = Form::own_rows;
    Case& wide = weigh("weights-own-rows-wide", 40, 131, 9, 3, 20);
    wide.form = Form::own_rows, wide.instances = true;
  }
  const Format f = formats[0], x3 = formats[4];
  const auto extra = [&](const char* name, const Format& k, int m, int n, int width, int classes) -> Case& {
    all.push_back({std::string(k.name) + "-" + name, k.dtype, k.parts, m, n, width, classes});
    return all.back();
  };
  extra("one-row", x3, 1, 0, 8, 1);      // no pair at all
  extra("two-rows", x3, 2, 0, 1, 1);     // one pair, width 1
  extra("tile", x3, 128, 0, 16, 2);      // exactly a tile
  extra("tile+1", x3, 129, 0, 32, 129);  // no positives anywhere
  extra("one-class", x3, 257, 0, 8, 1);  // no negatives anywhere; tiles without any self
  extra("splits", x3, 300, 0, 16, 4).multiprocessors = 9;
  extra("cold", x3, 96, 0, 24, 4).temperature = 0.005;
  extra("cold", f, 96, 0, 24, 4).temperature = 0.005;
  extra("negatives-only", x3, 90, 0, 16, 3).positives = false;
  extra("no-sums", x3, 90, 0, 16, 3).sums = false;  // p alone has an upstream gradient
  // SupCon that has converged: the gradient of positive_sum exceeds the others by more than f16 can hold
  for (const Format& k : {f, formats[1], x3}) extra("sums-only", k, 90, 0, 16, 3).other_gradients = 1e-20;
  extra("apart", f, 150, 0, 70, 150);                  // every row a class of its own
  Case& nothing = extra("nothing", x3, 40, 0, 16, 3);  // neither n nor p is asked for
  nothing.negatives = nothing.positives = false;
  Case& e = extra("no-candidates", x3, 5, 0, 8, 2);  // an empty queue
  e.form = Form::candidates;
  extra("no-candidates", f, 5, 0, 8, 2).form = Form::candidates;  // rows are loaded that nothing waits for
  Case& big = extra("unnormalised", x3, 80, 0, 40, 4);
  big.row_norm = 30, big.temperature = 10;
  extra("resident", f, 70, 0, 250, 3);  // rows of four slices stay on chip in the forward
  extra("wide", f, 300, 0, 70, 3).shared_memory = 100 << 10;  // row blocks of 256
  for (const int rows :
       {300, 400}) {  // an odd and an even number of row blocks; several runs, one row ragged
    const std::string name = "triangle-" + std::to_string(rows);
    Case& triangle = extra(name.c_str(), f, rows, 0, 70, 4);
    triangle.triangular_rows = 1, triangle.multiprocessors = rows / 100;
  }
  // tiles of one class above the diagonal; the first class has half of the rows
  Case& skipped = extra("triangle-two-classes", f, 700, 0, 16, 2);
  skipped.triangular_rows = 1, skipped.positives = false;
  Case& one_sum = extra("triangle-apart", formats[1], 257, 0, 16, 257);  // no positives
  one_sum.positives = false, one_sum.triangular_rows = 1;
  Case& cold =
      extra("triangle-cold", f, 150, 0, 24, 150);  // no common reference: all is left to the other kernel
  cold.positives = false, cold.triangular_rows = 1, cold.temperature = 0.005;
  Case& fine = extra("triangle-fine", f, 260, 0, 24, 130);  // the largest reference that is allowed
  fine.positives = false, fine.triangular_rows = 1, fine.temperature = 0.03, fine.multiprocessors = 2;
  Case& coarse =
      extra("triangle-coarse", f, 20, 0, 128, 20);  // sums so small that the integers are too coarse
  coarse.positives = false, coarse.triangular_rows = 1, coarse.temperature = 0.03;
  Case& opposite = extra("triangle-opposite", f, 3, 0, 1, 3);  // the row of the other sign: an integer of 0
  opposite.positives = false, opposite.triangular_rows = 1, opposite.temperature = 0.03;
  Case& wide = extra("wide-runs", f, 520, 0, 70, 3);  // the same, each shared by two runs
  wide.shared_memory = 100 << 10, wide.multiprocessors = 2;
  extra("two-slices", f, 140, 0, 65, 3);
  extra("one-slice", f, 140, 0, 64, 3);
  // weights: row blocks of 256; no class with two rows; no candidate at all; far apart in every way
  Case& blocks = extra("weights-blocks", f, 300, 0, 70, 3);
  blocks.shared_memory = 100 << 10, blocks.weights = 2;
  extra("weights-apart", f, 150, 0, 70, 150).weights = 2;
  Case& none = extra("weights-none", x3, 120, 0, 16, 3);
  none.weights = 1, none.weightless = 1;
  Case& distant = extra("weights-cold", x3, 120, 0, 16, 30);
  distant.weights = 30, distant.weightless = 5, distant.temperature = 0.005;
  extra("one-class", f, 257, 0, 8, 1);  // one exponential a pair, columns of the same class
  for (const Format& k : {f, x3}) {
    extra("short-runs", k, 300, 0, 40, 4).multiprocessors =
        k.parts == 1 ? 3 : 8;  // row blocks that three and more runs share
    extra("long-runs", k, 520, 0, 8, 3).multiprocessors = k.parts == 1 ? 1 : 2;  // runs of three row blocks
    extra("empty-parts", k, 300, 0, 8, 30).multiprocessors = 8;  // softplus: most runs see no column
  }
  Case& shares = extra("shares", f, 150, 0, 300, 3);  // two shares of a gradient whose row blocks are shared
  shares.multiprocessors = 6;
  Case& both = extra("both-ways", f, 200, 140, 20, 4);  // row blocks are shared in both directions
  both.form = Form::candidates, both.multiprocessors = 4;
  extra("far-apart", f, 140, 0, 12, 60).temperature = 0.01;  // statistics further than 2^60 apart
  extra("near", f, 300, 0, 70, 3);                           // nearer: one exponential a pair
  for (int i = 0; i < 6; ++i) {  // only the candidates' lie that far apart: which, is up to the numbers drawn
    const std::string name = "far-candidates-" + std::to_string(i);
    Case& far = extra(name.c_str(), f, 1, 30, 4, 12);
    far.form = Form::own_rows, far.temperature = 0.005, far.negatives = false;
  }
  // more anchors than a block scans for the extremes itself
  extra("many-anchors", f, 16400, 6, 4, 2).form = Form::candidates;
  // whole tiles of positives are neither loaded nor multiplied, in every schedule
  extra("two-classes", f, 420, 0, 20, 2).multiprocessors = 2;
  extra("two-classes", x3, 420, 0, 20, 2).multiprocessors = 3;
  extra("two-classes-wide", f, 420, 0, 140, 2);

  // Nearly equal views: the loss and its gradient are small differences of large numbers. Two parts represent
  // fp32 rows only to 2^-17; similarities of 16-bit rows are summed inside the tensor core.
  for (const Format& k : formats)
    for (const int copies : {2, 8})
      for (const double temperature : {0.02, 0.1}) {
        if (k.dtype == Dtype::f32 && k.parts == 1) continue;  // rows rounded to 2^-9 do not nearly agree
        const std::string name = "converged-" + std::to_string(copies) + (temperature < 0.05 ? "-cold" : "");
        Case& c = extra(name.c_str(), k, 128, 0, 128, 128 / copies);
        c.copies = copies, c.temperature = temperature;
        const bool two_parts = k.dtype == Dtype::f32 && k.parts == 2;
        c.loss_bar = two_parts ? 20 : 2;
        c.gradient_bar = two_parts ? 30 : k.dtype == Dtype::f32 ? 2 : 3;
      }

  // Tensor cores truncate when they add to a large sum.
  for (const Format& k : {formats[0], formats[1]}) {
    const bool bf16 = k.dtype == Dtype::bf16;
    const auto large = [&](const char* name, int m, int n, int width) -> Case& {
      all.push_back({std::string("large-") + k.name + "-" + name, k.dtype, k.parts, m, n, width, 3});
      return all.back();
    };
    // Few anchors against many candidates with a common mean: a gradient that is summed over all columns
    // inside the tensor core is too small (bf16: by 1e-4 and more), while the rounding of the weights to 16
    // bits averages out (to 7e-6). epsilon keeps the sigmoids away from 1, where all would round equally.
    Case& columns = large("columns", 16, bf16 ? 1 << 16 : 1 << 15, 16);
    columns.form = Form::candidates, columns.of_candidates = false;
    columns.temperature = 0.5, columns.mean = 0.3, columns.epsilon = -10;
    columns.length_bar = bf16 ? 2e-5 : 7e-6;
    // Wide rows, similarities near 0.9: a similarity summed over all slices inside the tensor core is too
    // small by 1e-5, times 100 for the temperature. The rounding of the weights of 64 columns leaves 2e-5
    // (bf16).
    Case& rows = large("rows", 64, 0, 4096);
    rows.temperature = 0.01, rows.mean = 10. / 3, rows.length_bar = 1.2e-4;
  }
  return all;
}

}  // namespace emulation
