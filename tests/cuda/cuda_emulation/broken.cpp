// The operators of csrc/cuda on broken operands: non-finite numbers at any place, rows or a scale whose
// similarities overflow, and invalid orders or indices. Every result of every operator must be NaN, and the
// address sanitizer must report no invalid access.
//   broken              all shapes;   broken NAME...   the shapes whose name starts with a NAME
//   broken -order ...   only the broken orders and indices, which determine the memory accesses
#include <functional>
#include <limits>

#include "oracle.h"

using namespace emulation;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Sizes {
  const char* name;
  Dtype dtype;
  int parts, anchors, candidates, width;
  Form form;
  int multiprocessors = 2, triangular_rows = 1 << 30, shared_memory = 228 << 10;
};
const Sizes shapes[] = {
    {"bf16", Dtype::bf16, 1, 70, 0, 20, Form::one_set},
    {"bf16-triangle", Dtype::bf16, 1, 300, 0, 20, Form::one_set, 2, 1},
    {"bf16-wide", Dtype::bf16, 1, 70, 0, 20, Form::one_set, 2, 1 << 30, 100 << 10},
    {"bf16-runs", Dtype::bf16, 1, 130, 300, 20, Form::candidates, 7},
    {"bf16-streamed", Dtype::bf16, 1, 70, 90, 300, Form::own_rows},
    {"f16", Dtype::f16, 1, 70, 90, 20, Form::candidates},
    {"f32x1", Dtype::f32, 1, 70, 0, 20, Form::one_set},
    {"f32x2", Dtype::f32, 2, 70, 90, 20, Form::own_rows},
    {"f32x3", Dtype::f32, 3, 70, 90, 150, Form::candidates},
    {"f32x3-runs", Dtype::f32, 3, 300, 0, 20, Form::one_set, 7},
    {"f64", Dtype::f64, 1, 70, 90, 20, Form::candidates},
    {"f64-own", Dtype::f64, 1, 70, 0, 20, Form::one_set},
};

struct Set {
  int count;
  std::vector<double> x;
  std::vector<int64_t> labels, instances, order;
  std::vector<double> log_weights{};  // empty: none
};

// The operands of a call, before they are copied into buffers of exactly their size.
struct Operands {
  Set anchors, candidates;  // the second is empty for Form::one_set
  std::vector<int64_t> self_index;
  double scale = 5;

  Set& side(int k) { return k ? candidates : anchors; }
};

void sort(Set& s) {
  s.order.resize(size_t(s.count));
  std::iota(s.order.begin(), s.order.end(), 0);
  std::stable_sort(s.order.begin(), s.order.end(), [&](int64_t i, int64_t j) {
    return std::pair(s.labels[size_t(i)], s.instances[size_t(i)]) <
           std::pair(s.labels[size_t(j)], s.instances[size_t(j)]);
  });
}

Operands good(const Sizes& shape) {
  std::mt19937 rng(7);
  std::normal_distribution<double> normal;
  const auto make = [&](int count, int64_t lonely) {
    Set s{count, {}, {}, {}, {}};
    for (int i = 0; i < count * shape.width; ++i) s.x.push_back(normal(rng) / std::sqrt(shape.width));
    // first, middle and last row have no positive: no sum over positives visits them
    for (int i = 0; i < count; ++i)
      s.labels.push_back(i == 0 || i == count / 2 || i == count - 1 ? lonely - i : 7 + i % 3),
          s.instances.push_back(i % 2 - 7);
    sort(s);
    return s;
  };
  Operands o{make(shape.anchors, -100), {}, {}};
  if (shape.form == Form::one_set) return o;
  o.candidates = make(shape.candidates, -1000);
  for (int i = 0; i < shape.anchors; ++i) o.self_index.push_back(i % 3 ? i : -1);
  for (int i = 0; i < shape.anchors; ++i)
    if (i % 3) o.candidates.labels[size_t(i)] = o.anchors.labels[size_t(i)];
  sort(o.candidates);
  return o;
}

// One call of every operator. Backward operators get the statistics of the unbroken operands.
class Calls {
 public:
  explicit Calls(const Sizes& shape)
      : shape_(shape), gradient_(shape.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32) {}

  // The number of results, and how many of them are NaN.
  struct Tally {
    size_t values = 0, nans = 0;
  };
  Tally run(const Operands& o) {
    keep(o);
    Tally tally;
    const int m = shape_.anchors, n = shape_.candidates;
    for (const auto& [negatives, positives] :
         {std::pair{true, true}, std::pair{false, true}, std::pair{true, false}}) {
      Problem p = problem(Operation::pair_stats);
      p.negatives = negatives, p.positives = positives;
      Buffer out_n(8 * size_t(m)), out_p(8 * size_t(m)), sum(8 * size_t(m)), of_instance(8 * size_t(m));
      p.out_n = doubles(out_n), p.out_p = doubles(out_p);
      p.out_positive_sum = doubles(sum), p.out_instance_sum = doubles(of_instance);
      finish(p, {&out_n, &out_p, &sum, &of_instance}, {}, tally);
    }
    {
      Problem p = problem(Operation::positive_softplus);
      Buffer out(8 * size_t(m));
      p.n = constant(m, 2), p.out_n = doubles(out);
      finish(p, {&out}, {}, tally);
    }
    for (const Operation op : {Operation::pair_stats_backward, Operation::positive_softplus_backward}) {
      const bool softplus = op == Operation::positive_softplus_backward;
      Problem p = problem(op);
      p.n = constant(m, 2), p.grad_n = constant(m, 1e-3);
      if (!softplus)
        p.p = constant(m, 2), p.grad_p = constant(m, -2e-3), p.grad_positive_sum = constant(m, 3e-3),
        p.grad_instance_sum = constant(m, 1e-3);
      if (shape_.form == Form::own_rows) {
        p.candidate_n = constant(n, 2), p.candidate_grad_n = constant(n, 1e-3);
        if (!softplus)
          p.candidate_p = constant(n, 2), p.candidate_grad_p = constant(n, -2e-3),
          p.candidate_grad_positive_sum = constant(n, 3e-3),
          p.candidate_grad_instance_sum = constant(n, 1e-3);
      }
      Buffer grad_x(gradient_bytes(m)), grad_n(8 * size_t(m)), grad_candidates(gradient_bytes(n));
      memset(grad_x.data, 0, grad_x.bytes), memset(grad_candidates.data, 0, grad_candidates.bytes);
      std::vector<const Buffer*> gradients{&grad_x}, statistics;
      p.grad_x = grad_x.data;
      if (shape_.form == Form::candidates)
        p.grad_candidates = grad_candidates.data, gradients.push_back(&grad_candidates);
      if (softplus) p.out_grad_n = doubles(grad_n), statistics.push_back(&grad_n);
      finish(p, statistics, gradients, tally);
    }
    return tally;
  }

 private:
  const Sizes& shape_;
  const Dtype gradient_;
  Shared data_[2], labels_[2], instances_[2], order_[2], log_weights_, self_, scale_;
  std::vector<Shared> constants_;

  size_t gradient_bytes(int count) const { return size_t(count * shape_.width) * size_of(gradient_); }
  static double* doubles(Buffer& b) { return reinterpret_cast<double*>(b.data); }
  static const int64_t* integers(const Shared& b) { return reinterpret_cast<const int64_t*>(b->data); }
  static Shared hold(const std::vector<int64_t>& v) {
    auto b = std::make_shared<Buffer>(8 * v.size());
    if (!v.empty()) memcpy(b->data, v.data(), 8 * v.size());
    return b;
  }
  Shared numbers(const std::vector<double>& v, Dtype t) const {
    auto b = std::make_shared<Buffer>(v.size() * size_of(t));
    for (size_t i = 0; i < v.size(); ++i) put(*b, t, i, v[i]);
    return b;
  }
  const double* constant(int count, double value) {
    constants_.push_back(numbers(std::vector<double>(size_t(count), value), Dtype::f64));
    return doubles(*constants_.back());
  }
  void keep(const Operands& o) {
    constants_.clear();
    for (int k = 0; k < 2; ++k) {
      const Set& s = k ? o.candidates : o.anchors;
      data_[k] = numbers(s.x, shape_.dtype);
      labels_[k] = hold(s.labels), instances_[k] = hold(s.instances), order_[k] = hold(s.order);
    }
    const std::vector<double>& weights =
        (shape_.form == Form::one_set ? o.anchors : o.candidates).log_weights;
    log_weights_ = weights.empty() ? nullptr : numbers(weights, Dtype::f64);
    self_ = hold(o.self_index), scale_ = numbers({o.scale}, Dtype::f64);
  }
  Rows rows(int k) const {
    return {data_[k]->data,      k ? shape_.candidates : shape_.anchors,
            shape_.width,        integers(labels_[k]),
            integers(order_[k]), integers(instances_[k])};
  }
  Problem problem(Operation op) const {
    Problem p{};
    p.operation = op, p.dtype = shape_.dtype, p.parts = shape_.parts;
    p.multiprocessors = shape_.multiprocessors, p.shared_memory = shape_.shared_memory;
    p.triangular_rows = shape_.triangular_rows, p.width = shape_.width;
    p.one_set = shape_.form == Form::one_set;
    p.anchors = rows(0), p.candidates = rows(p.one_set ? 0 : 1);
    if (!p.one_set) p.self_index = integers(self_);
    if (log_weights_) (p.one_set ? p.log_weights : p.candidate_log_weights) = doubles(*log_weights_);
    p.scale = doubles(*scale_), p.epsilon = 0.3, p.negatives = p.positives = true;
    return p;
  }
  void finish(Problem& p, const std::vector<const Buffer*>& statistics,
              const std::vector<const Buffer*>& gradients, Tally& tally) const {
    const Buffer workspace(size_t(pysupcon_cuda_workspace_bytes(&p)));
    p.workspace = workspace.data;
    if (const char* error = pysupcon_cuda_run(&p)) throw std::runtime_error(error);
    if (cudaDeviceSynchronize() != cudaSuccess) throw std::runtime_error("the device failed");
    const auto count = [&](const Buffer& b, Dtype t) {
      for (size_t i = 0; i < b.bytes / size_of(t); ++i, ++tally.values)
        tally.nans += std::isnan(get(b, t, i));
    };
    for (const Buffer* b : statistics) count(*b, Dtype::f64);
    for (const Buffer* b : gradients) count(*b, gradient_);
  }
};

std::string number(double x) {
  char text[32];
  snprintf(text, sizeof text, "%g", x);
  return text;
}

// Prefix of the names of changes that must not change a result.
const std::string kFine = "(fine) ";

struct Break {
  std::string what;
  std::function<void(Operands&)> apply;
};

std::vector<Break> breaks(const Sizes& shape) {
  std::vector<Break> all;
  const int sides = shape.form == Form::one_set ? 1 : 2;
  for (int k = 0; k < sides; ++k) {
    const std::string side = k ? " of the candidates" : " of the anchors";
    const int count = k ? shape.candidates : shape.anchors, width = shape.width;
    const auto add = [&](const std::string& what, const std::function<void(Set&)>& apply) {
      all.push_back({what + side, [k, apply](Operands& o) { apply(o.side(k)); }});
    };
    for (const int row : {0, count / 2, 1, count - 1})  // row 1 has positives, the others have none
      for (const int d : {0, width / 2, width - 1})
        for (const double value : {kNan, kInfinity, -kInfinity})
          add("number " + std::to_string(d) + " of row " + std::to_string(row) + " " + number(value),
              [=](Set& s) { s.x[size_t(row * width + d)] = value; });
    if (shape.dtype != Dtype::f16)
      for (const double sign : {-1., 1.})
        add("an enormous row", [=](Set& s) {
          for (int d = 0; d < width; ++d)
            s.x[size_t(width + d)] = sign * (shape.dtype == Dtype::f64 ? 1e160 : 1e20);
        });
    for (const int i : {0, count / 2, count - 1}) {
      const std::string place = "place " + std::to_string(i) + " of the order ";
      for (const int64_t wrong : {int64_t(count), int64_t(1) << 40, INT64_MAX, int64_t(-1), INT64_MIN})
        add(place + std::to_string(wrong), [=](Set& s) { s.order[size_t(i)] = wrong; });
      add(place + "twice", [=](Set& s) { s.order[size_t(i)] = s.order[size_t(i ? i - 1 : 1)]; });
    }
    add("first row twice, last row missing in the order", [](Set& s) { s.order.back() = s.order.front(); });
    add("row 7 in the place of row 1", [](Set& s) {  // the same label: labels rise nevertheless
      *std::find(s.order.begin(), s.order.end(), 1) = 7;
    });
    add("all places 0 in the order", [](Set& s) { std::fill(s.order.begin(), s.order.end(), 0); });
    add("reversed order", [](Set& s) { std::reverse(s.order.begin(), s.order.end()); });
    add("identity as the order", [](Set& s) { std::iota(s.order.begin(), s.order.end(), 0); });
    add(kFine + "an order that is not stable", [](Set& s) {
      std::swap(*std::find(s.order.begin(), s.order.end(), 1), *std::find(s.order.begin(), s.order.end(), 7));
    });
    // Of candidates. The statistics stay as they are, and a larger weight would overflow float16.
    for (const int row : {0, count / 2, 1})
      for (const double value : {kNan, kInfinity, 1e15, -1e15, -kInfinity, -30., 3.})
        if (k == sides - 1)
          add((std::abs(value) < 1e14 || value == -kInfinity ? kFine : "") + "log weight " + number(value) +
                  " of row " + std::to_string(row),
              [=](Set& s) { s.log_weights.assign(size_t(count), -1.), s.log_weights[size_t(row)] = value; });
    add("a label changed after the sort", [](Set& s) { s.labels[1] = INT64_MIN; });
    add("an instance changed after the sort", [](Set& s) { s.instances[1] = 5; });
    if (shape.dtype != Dtype::f16)  // no similarity overflows, a sum of products does
      all.push_back({"long rows, a small scale" + side, [=](Operands& o) {
                       for (int d = 0; d < width; ++d)
                         o.side(k).x[size_t(width + d)] = shape.dtype == Dtype::f64 ? 1e150 : 1e15;
                       o.scale = shape.dtype == Dtype::f64 ? 1e-290 : 1e-20;
                     }});
  }
  if (sides == 2)  // each order has the row twice that the other lacks
    all.push_back({"rows 1 and 7 exchanged between the orders", [](Operands& o) {
                     *std::find(o.anchors.order.begin(), o.anchors.order.end(), 1) = 7;
                     *std::find(o.candidates.order.begin(), o.candidates.order.end(), 7) = 1;
                   }});
  for (const double scale : {kNan, kInfinity, -kInfinity, 0., -5., 1e308, 3e38, 1e16})
    all.push_back({"scale " + number(scale), [=](Operands& o) { o.scale = scale; }});
  for (const int i : {0, shape.anchors / 2, shape.anchors - 1})
    for (const int64_t wrong : {int64_t(shape.candidates), INT64_MAX, int64_t(-2), INT64_MIN})
      if (sides == 2)
        all.push_back(
            {"self_index " + std::to_string(wrong), [=](Operands& o) { o.self_index[size_t(i)] = wrong; }});
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  const bool places_only = argc > 1 && !strcmp(argv[1], "-order");
  if (places_only) --argc, ++argv;
  bool bad = false;
  int ran = 0;
  for (const Sizes& shape : shapes) {
    bool wanted = argc < 2;
    for (int i = 1; i < argc; ++i) wanted |= !strncmp(shape.name, argv[i], strlen(argv[i]));
    if (!wanted) continue;
    Calls calls(shape);
    std::vector<Break> list;
    for (const Break& b : breaks(shape))
      if (!places_only || b.what.find("order") != std::string::npos ||
          b.what.find("self_index") != std::string::npos)
        list.push_back(b);
    const auto judge = [&](const std::string& what, const Operands& o, bool broken) {
      ++ran;
      try {
        const Calls::Tally t = calls.run(o);
        if (t.values && t.nans == (broken ? t.values : 0)) return;
        printf("FAIL %s, %s: %zu of %zu results are NaN\n", shape.name, what.c_str(), t.nans, t.values);
      } catch (const std::exception& e) {
        printf("EXCEPTION: %s, %s: %s\n", shape.name, what.c_str(), e.what());
      }
      bad = true;
    };
    judge("nothing broken", good(shape), false);
    for (const Break& b : list) {
      Operands o = good(shape);
      b.apply(o);
      judge(b.what, o, b.what.compare(0, kFine.size(), kFine) != 0);
    }
    printf("%-16s %4zu ways to break\n", shape.name, list.size());
    fflush(stdout);
  }
  printf("%d calls of every operator\n%s\n", ran, bad || !ran ? "FAIL" : "PASS");
  return bad || !ran;
}
