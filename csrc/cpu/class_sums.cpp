// The sum of an anchor's similarities to its positives needs no pair, equation (4): class by class, in
// parallel.
#include <vector>

#include "cpu/select.h"
#include "cpu/threads.h"

namespace pysupcon::cpu {
namespace {

std::vector<ClassRun> class_runs(const Problem& q) {
  const Side &a = q.anchors, &c = q.candidates;
  std::vector<ClassRun> runs;
  int64_t at = 0;
  for (int64_t i = 0; i < a.count;) {
    ClassRun run{i, i, 0, 0};
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

template <class Visit>
void visit_classes(const Problem& q, const Threads& threads, const Visit& visit) {
  const std::vector<ClassRun> runs = class_runs(q);
  const size_t bytes = pair_kernels().class_scratch_bytes(q);
  parallel(threads, static_cast<int64_t>(runs.size()), [&](int64_t first, int64_t last) {
    void* scratch = thread_scratch(bytes);
    for (int64_t r = first; r < last; ++r) visit(runs[r], scratch);
  });
}

}  // namespace

void positive_sum(const Problem& q, const Threads& threads, double* total) {
  const auto sum = pair_kernels().class_sum;
  visit_classes(q, threads, [&](const ClassRun& run, void* scratch) { sum(q, run, total, scratch); });
}

void positive_sum_backward(const Problem& q, const Threads& threads, const double* w_anchors,
                           const double* w_candidates, const Gradients& gradients) {
  const auto backward = pair_kernels().class_sum_backward;
  const double* other = q.self ? w_anchors : w_candidates;
  visit_classes(q, threads, [&](const ClassRun& run, void* scratch) {
    backward(q, run, w_anchors, other, gradients, scratch);
  });
}

}  // namespace pysupcon::cpu
