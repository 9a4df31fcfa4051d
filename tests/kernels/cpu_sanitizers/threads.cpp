// Runs the passes with real threads, under the thread sanitizer.
//
//   threads results    every entry point gives the same bits with 1, 2, 3 and 5 threads that start late
//   threads stop       an exception of Threads::check ends the pass and reaches the caller
//   threads nested     Threads::check may run a pass itself, as a handler of a signal does
//   threads partners   a partner that keeps the caller waiting is left out, and tried again later
#include <chrono>
#include <cstdio>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/partners.h"
#include "rows.h"

using namespace pysupcon::cpu;

namespace {

int64_t wanted_threads = 1;
int64_t thread_count() { return wanted_threads; }

// Like at::parallel_for: the calling thread gets the first part, and the first exception is thrown at the
// end.
void run_threads(int64_t count, void* context, void (*body)(void*, int64_t, int64_t)) {
  std::vector<std::thread> threads;
  std::vector<std::exception_ptr> errors(count);
  const auto part = [&](int64_t k) {
    std::this_thread::sleep_for(std::chrono::microseconds(k ? 700 * (count - k) : 0));
    try {
      body(context, k, k + 1);
    } catch (...) {
      errors[k] = std::current_exception();
    }
  };
  for (int64_t k = 1; k < count; ++k) threads.emplace_back(part, k);
  part(0);
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
}

// Bytes of all results of all entry points.
std::vector<char> results(Type type, double size, bool candidates, const Threads& threads) {
  const int64_t m = 600, n = candidates ? 400 : m, dim = 8;
  const Rows a(type, m, dim, 11, size, 1), b(type, n, dim, 11, size, 2);
  Problem q;
  q.type = type, q.dim = dim, q.scale = 2, q.self = !candidates;
  q.anchors = a.side(true), q.candidates = (candidates ? b : a).side(true);
  std::vector<double> stats(4 * m), ones(m, 1. / m), total(m), grad_n(m);
  const size_t bytes = type == Type::f64 ? 8 : 4;
  std::vector<char> gx(m * dim * bytes), gc(n * dim * bytes), all;
  const auto keep = [&](const auto& values) {
    const char* first = reinterpret_cast<const char*>(values.data());
    all.insert(all.end(), first, first + values.size() * sizeof(values[0]));
  };
  double* s = stats.data();
  pair_stats(q, threads, {s, s + m, s + 2 * m, s + 3 * m});
  keep(stats);
  const Gradients g{gx.data(), candidates ? gc.data() : nullptr};
  pair_stats_backward(q, threads, {s, s + m, ones.data(), ones.data(), ones.data(), ones.data()}, {}, g);
  q.negatives = false;
  positive_softplus(q, threads, s, 0.25, total.data());
  positive_softplus_backward(q, threads, {s, ones.data()}, {}, 0.25, g, grad_n.data());
  for (const auto* values : {&total, &grad_n}) keep(*values);
  for (const auto* values : {&gx, &gc}) keep(*values);
  return all;
}

int same_results() {
  const Threads threads{thread_count, run_threads};
  int cases = 0;
  for (const Type type : {Type::f32, Type::f64})
    for (const double size : {0.1, 30.})
      for (const bool candidates : {false, true}) {
        wanted_threads = 1;
        const std::vector<char> expected = results(type, size, candidates, threads);
        for (const int64_t count : {2, 3, 5}) {
          wanted_threads = count;
          if (results(type, size, candidates, threads) != expected) {
            std::printf("other bits with %d threads\n", int(count));
            return 1;
          }
          ++cases;
        }
      }
  std::printf("%d cases\n", cases);
  return 0;
}

int stops() {
  const Threads threads{thread_count, run_threads, [] { throw std::runtime_error("a signal"); }};
  wanted_threads = 3;
  const Rows a(Type::f32, 6000, 64, 1, 0.1, 1);
  Problem q;
  q.dim = 64, q.self = true;
  q.anchors = q.candidates = a.side(false);
  std::vector<double> stats(3 * 6000);
  try {
    pair_stats(q, threads, {stats.data(), stats.data() + 6000, stats.data() + 12000, nullptr});
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return 0;
  }
  return 1;
}

// Logsumexp over the candidates of another class, of anchors that fill one block: the block stays in the
// scratch.
std::vector<double> of_one_block(unsigned seed, int64_t candidates, const Threads& threads) {
  const Rows a(Type::f32, 60, 64, 2, 0.1, seed), b(Type::f32, candidates, 64, 2, 0.1, seed + 1);
  Problem q;
  q.dim = 64, q.anchors = a.side(false), q.candidates = b.side(false);
  std::vector<double> stats(3 * 60);
  pair_stats(q, threads, {stats.data(), stats.data() + 60, stats.data() + 120, nullptr});
  return stats;
}

int nested() {
  static int passes = 0;
  const auto inner = [] {
    ++passes;
    of_one_block(7, 100, {thread_count, run_threads});
  };
  wanted_threads = 1;
  const std::vector<double> expected = of_one_block(1, 200'000, {thread_count, run_threads});
  if (of_one_block(1, 200'000, {thread_count, run_threads, inner}) != expected || !passes) return 1;
  std::printf("the same\n");
  return 0;
}

// How many of `passes` of N rows get a partner that always keeps the caller waiting so long.
int with_partner(Partners& partners, int64_t rows, double waited_seconds, int passes) {
  const Rows a(Type::f32, rows, 128, 10, 1, 1);
  Plan plan;
  Problem& q = plan.problem;
  q.dim = 128, q.self = true;
  q.anchors = q.candidates = a.side(false);
  plan.block = 64;
  const Schedule schedule(plan);
  wanted_threads = 2;
  int count = 0;
  for (int k = 0; k < passes; ++k)
    if (partners.choose(q, 1, schedule, {thread_count, run_threads}) > 1) {
      partners.note(waited_seconds);
      ++count;
    }
  return count;
}

int partners() {
  Partners partners;
  const int on_time = with_partner(partners, 256, 10e-6, 300);
  const int late = with_partner(partners, 256, 5e-3, 300);   // 4 to learn it, and one that tries again
  const int large = with_partner(partners, 8192, 5e-3, 10);  // saves more than it waits
  const int again = with_partner(partners, 256, 10e-6, 600);
  const int tiny = with_partner(partners, 16, 0, 10);
  std::printf("%d %d %d %d %d\n", on_time, late, large, again, tiny);
  return 0;
}

}  // namespace

int main(int, char** arguments) {
  const std::string mode = arguments[1];
  return mode == "results"  ? same_results()
         : mode == "stop"   ? stops()
         : mode == "nested" ? nested()
                            : partners();
}
