// The sum of an anchor's similarities to its positives needs no pair: with the class sum C_y = sum_{y_j = y} c_j it is
// scale x_i . (C_{y_i} - own), equation (4). Double throughout: the class sum of a million rows loses nothing.
#include <vector>

#include "cpu/rows.h"

namespace pysupcon::cpu {
namespace {

struct Run {
  int64_t first_anchor, last_anchor, first_candidate, last_candidate;  // positions of one class on both sides
};

std::vector<Run> class_runs(const Problem& q) {
  const Side &a = q.anchors, &c = q.candidates;
  std::vector<Run> runs;
  int64_t at = 0;
  for (int64_t i = 0; i < a.count;) {
    Run run{i, i, 0, 0};
    while (run.last_anchor < a.count && a.cls[run.last_anchor] == a.cls[i]) ++run.last_anchor;
    while (at < c.count && c.cls[at] < a.cls[i]) ++at;
    run.first_candidate = at;
    while (at < c.count && c.cls[at] == a.cls[i]) ++at;
    run.last_candidate = at;
    i = run.last_anchor;
    runs.push_back(run);
  }
  return runs;
}

int64_t own_position(const Problem& q, int64_t anchor) {
  return q.self ? anchor : q.self_position ? q.self_position[anchor] : -1;
}

// sum += factor(row) * row, over positions [first, last)
template <class Factor>
void add_rows(std::vector<double>& sum, std::vector<double>& row, const Problem& q, const Side& side, int64_t first,
              int64_t last, const Factor& factor) {
  for (int64_t at = first; at < last; ++at) {
    const int64_t r = side.order[at];
    const double f = factor(r);
    if (f == 0) continue;
    read_row(row.data(), q.type, side, r, q.dim);
    for (int64_t k = 0; k < q.dim; ++k) sum[k] += f * row[k];
  }
}

template <class T>
void backward(const Problem& q, const Threads& threads, const double* w, const double* w_candidates, T* grad_x, T* grad_c) {
  const std::vector<Run> runs = class_runs(q);
  const double* other = q.self ? w : w_candidates;
  parallel(threads, static_cast<int64_t>(runs.size()), [&](int64_t first, int64_t last) {
    std::vector<double> sum(q.dim), weighted(q.dim), row(q.dim);
    for (int64_t r = first; r < last; ++r) {
      const Run& run = runs[r];
      if (grad_x) {  // scale (w_i (C - own) + sum_j w_j c_j - w_own own)
        sum.assign(q.dim, 0);
        weighted.assign(q.dim, 0);
        const auto one = [](int64_t) { return 1.0; };
        add_rows(sum, row, q, q.candidates, run.first_candidate, run.last_candidate, one);
        const auto weight = [&](int64_t j) { return other[j]; };
        if (other) add_rows(weighted, row, q, q.candidates, run.first_candidate, run.last_candidate, weight);
        for (int64_t i = run.first_anchor; i < run.last_anchor; ++i) {
          const int64_t at = q.anchors.order[i], own = own_position(q, i);
          double own_factor = 0;
          if (own >= 0) {
            const int64_t own_row = q.candidates.order[own];
            read_row(row.data(), q.type, q.candidates, own_row, q.dim);
            own_factor = w[at] + (other ? other[own_row] : 0);
          }
          for (int64_t k = 0; k < q.dim; ++k) {
            const double own_part = own >= 0 ? own_factor * row[k] : 0;
            grad_x[at * q.dim + k] += static_cast<T>(q.scale * (w[at] * sum[k] + weighted[k] - own_part));
          }
        }
      }
      if (grad_c) {  // scale (sum_i w_i x_i - those whose own row it is)
        weighted.assign(q.dim, 0);
        const auto weight = [&](int64_t i) { return w[i]; };
        add_rows(weighted, row, q, q.anchors, run.first_anchor, run.last_anchor, weight);
        for (int64_t j = run.first_candidate; j < run.last_candidate; ++j) {
          T* to = grad_c + q.candidates.order[j] * q.dim;
          for (int64_t k = 0; k < q.dim; ++k) to[k] += static_cast<T>(q.scale * weighted[k]);
        }
        for (int64_t i = run.first_anchor; i < run.last_anchor; ++i) {
          const int64_t at = q.anchors.order[i], own = own_position(q, i);
          if (own < 0) continue;
          read_row(row.data(), q.type, q.anchors, at, q.dim);
          T* to = grad_c + q.candidates.order[own] * q.dim;
          for (int64_t k = 0; k < q.dim; ++k) to[k] -= static_cast<T>(q.scale * w[at] * row[k]);
        }
      }
    }
  });
}

}  // namespace

void positive_sum(const Problem& q, const Threads& threads, double* total) {
  const std::vector<Run> runs = class_runs(q);
  parallel(threads, static_cast<int64_t>(runs.size()), [&](int64_t first, int64_t last) {
    std::vector<double> sum(q.dim), row(q.dim), own_row(q.dim);
    for (int64_t r = first; r < last; ++r) {
      const Run& run = runs[r];
      sum.assign(q.dim, 0);
      add_rows(sum, row, q, q.candidates, run.first_candidate, run.last_candidate, [](int64_t) { return 1.0; });
      for (int64_t i = run.first_anchor; i < run.last_anchor; ++i) {
        const int64_t at = q.anchors.order[i], own = own_position(q, i);
        read_row(row.data(), q.type, q.anchors, at, q.dim);
        double value = dot(row.data(), sum.data(), q.dim);
        if (own >= 0) {
          read_row(own_row.data(), q.type, q.candidates, q.candidates.order[own], q.dim);
          value -= dot(row.data(), own_row.data(), q.dim);
        }
        total[at] = q.scale * value;
      }
    }
  });
}

void positive_sum_backward(const Problem& q, const Threads& threads, const double* w_anchors, const double* w_candidates,
                           const Gradients& g) {
  if (q.type == Type::f64)
    backward(q, threads, w_anchors, w_candidates, static_cast<double*>(g.anchors), static_cast<double*>(g.candidates));
  else
    backward(q, threads, w_anchors, w_candidates, static_cast<float*>(g.anchors), static_cast<float*>(g.candidates));
}

}  // namespace pysupcon::cpu
