// Workers that share the parts and pairs of a pass, and the scratch memory of each thread.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/schedule.h"

namespace pysupcon::cpu {

// The workers of one pass, which is one parallel region. The region has no barrier: a worker waits only for
// work that another worker has begun, never for a thread that the system has not started yet. One worker
// alone can finish the pass.
class Team {
 public:
  Team(const Threads& threads, int64_t workers) : threads_(threads), workers_(workers) {}

  // Calls body(worker) for each worker. If a body throws, the other workers stop, and run() rethrows.
  template <class Body>
  void run(const Body& body) {
    const auto guarded = [&](int64_t first, int64_t last) {
      try {
        for (int64_t worker = first; worker < last; ++worker) body(worker);
      } catch (...) {
        stop();
        throw;
      }
    };
    if (workers_ == 1) return guarded(0, 1);
    threads_.run(workers_, const_cast<void*>(static_cast<const void*>(&guarded)),
                 [](void* b, int64_t first, int64_t last) {
                   (*static_cast<const decltype(guarded)*>(b))(first, last);
                 });
    waited_ += std::chrono::steady_clock::now() - left_;
  }

  // How long the calling thread has waited for the other workers.
  double waited_seconds() const { return std::chrono::duration<double>(waited_).count(); }

  // The workers share part(k) for each k below count; then one worker calls last(). Every worker calls
  // share(), which returns when last() is done.
  template <class Part, class Last>
  void share(int64_t count, const Part& part, const Last& last) {
    std::unique_lock lock(mutex_, std::defer_lock);
    acquire(lock);
    while (next_part_ < count && !stopped_) {
      const int64_t mine = next_part_++;
      lock.unlock();
      part(mine);
      acquire(lock);
      ++parts_done_;
    }
    if (parts_done_ == count && !last_begun_ && !stopped_) {
      last_begun_ = true;
      lock.unlock();
      last();
      acquire(lock);
      shared_ = true;
      announce();
    }
    while (!shared_ && !stopped_) wait(lock);
  }

  // The workers share the pairs of all groups. Every worker calls visit() with the same schedule, which calls
  // visit(pair, next): `next` is the pair that this worker probably visits next, or {-1, -1}. Two groups that
  // add to the same rows run one after the other, in the order of the schedule.
  template <class Visit>
  void visit(Schedule& schedule, int64_t worker, const Visit& visit) {
    const bool caller = std::this_thread::get_id() == caller_;
    Task task, upcoming;
    for (bool more = take(schedule, worker, nullptr, task, upcoming); more;) {
      const BlockPair then = upcoming.group.a < 0 ? BlockPair{-1, -1} : schedule.first_pair(upcoming.group);
      schedule.each_pair(task.group, [&](const BlockPair& pair, const BlockPair* next) {
        visit(pair, next ? *next : then);
        if (caller) check();
      });
      more = take(schedule, worker, &task, task, upcoming);
    }
    if (caller) left_ = std::chrono::steady_clock::now();
  }

 private:
  // A group, with the number of earlier groups in the schedule that add to its set a, and to its set b.
  struct Task {
    Group group{-1, -1};
    int64_t before_a = 0, before_b = 0;
    int64_t owner = 0;  // the worker that prefers this place of the round
  };

  // Finishes the group `done` (null: none) and takes a group whose earlier groups are finished, into `task`.
  // It takes the first such group that this worker owns, whose blocks are probably in its cache, or else the
  // first of all. Waits if there is none yet; returns false if no group is left. `upcoming`: the group that
  // the worker probably takes next.
  bool take(Schedule& schedule, int64_t worker, const Task* done, Task& task, Task& upcoming) {
    std::unique_lock lock(mutex_, std::defer_lock);
    acquire(lock);
    if (done) finish(schedule, *done);
    for (;;) {
      fill(schedule);
      if (stopped_ || pending_.empty()) return false;
      auto found = pending_.end();
      for (auto at = pending_.begin(); at != pending_.end(); ++at) {
        if ((found != pending_.end() && at->owner != worker) || !ready(schedule, *at)) continue;
        found = at;
        if (at->owner == worker) break;
      }
      if (found != pending_.end()) {
        task = *found;
        pending_.erase(found);
        const auto next = std::find_if(pending_.begin(), pending_.end(),
                                       [&](const Task& other) { return other.owner == worker; });
        upcoming = next == pending_.end() ? Task{} : *next;
        return true;
      }
      wait(lock);
    }
  }

  // Moves groups from the schedule to pending_: enough for every worker to find one that may start although
  // running groups block others.
  void fill(Schedule& schedule) {
    if (given_.empty()) given_.resize(schedule.resources()), finished_.resize(schedule.resources());
    const size_t wanted = 32 + 4 * workers_;
    while (pending_.size() < wanted) {
      const auto group = schedule.next();
      if (!group) return;
      const auto [a, b] = schedule.resources(*group);
      const auto owner = static_cast<int64_t>(group->place * static_cast<double>(workers_));
      const Task task{*group, given_[a], given_[b], owner};
      ++given_[a];
      if (b != a) ++given_[b];
      pending_.push_back(task);
    }
  }
  bool ready(const Schedule& schedule, const Task& task) const {
    const auto [a, b] = schedule.resources(task.group);
    return finished_[a] == task.before_a && finished_[b] == task.before_b;
  }
  void finish(const Schedule& schedule, const Task& task) {
    const auto [a, b] = schedule.resources(task.group);
    ++finished_[a];
    if (b != a) ++finished_[b];
    announce();
  }

  // Tries for a moment before it sleeps: workers often finish at the same time, and they hold the mutex for
  // less time than sleeping and waking take.
  static void acquire(std::unique_lock<std::mutex>& lock) {
    for (int tries = 0; tries < 1000; ++tries)
      if (lock.try_lock()) return;
    lock.lock();
  }

  // Makes the waiting workers look for work again. The caller holds the mutex.
  void announce() {
    changes_.fetch_add(1, std::memory_order_relaxed);
    if (waiting_) changed_.notify_all();
  }

  // Waits for announce(): spins for kSpin, then sleeps.
  void wait(std::unique_lock<std::mutex>& lock) {
    const auto start = std::chrono::steady_clock::now();
    const int64_t before = changes_.load(std::memory_order_relaxed);
    lock.unlock();
    while (changes_.load(std::memory_order_relaxed) == before &&
           std::chrono::steady_clock::now() - start < kSpin) {
    }
    acquire(lock);
    if (changes_.load(std::memory_order_relaxed) == before) {
      ++waiting_;
      changed_.wait(lock);
      --waiting_;
    }
    if (std::this_thread::get_id() == caller_) waited_ += std::chrono::steady_clock::now() - start;
  }

  void stop() {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
    announce();
  }

  // Runs pending signal handlers, at most every 100 ms. Only the calling thread may do so: Python handles
  // signals in its main thread.
  void check() {
    if (!threads_.check) return;
    const auto now = std::chrono::steady_clock::now();
    if (now - checked_ < std::chrono::milliseconds(100)) return;
    checked_ = now;
    threads_.check();
  }

  const Threads& threads_;
  const int64_t workers_;
  const std::thread::id caller_ = std::this_thread::get_id();
  static constexpr std::chrono::microseconds kSpin{50};
  std::chrono::steady_clock::time_point checked_ = std::chrono::steady_clock::now();
  std::chrono::steady_clock::time_point left_ = checked_;  // when the caller found no more groups
  std::chrono::steady_clock::duration waited_{};

  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopped_ = false, last_begun_ = false, shared_ = false;
  int64_t next_part_ = 0, parts_done_ = 0;
  int64_t waiting_ = 0;                    // workers that sleep in wait()
  std::atomic<int64_t> changes_ = 0;       // calls of announce()
  std::deque<Task> pending_;               // groups that no worker has taken, in the order of the schedule
  std::vector<int64_t> given_, finished_;  // per set: groups moved to pending_, groups finished
};

// Scratch memory of one worker during a pass. The thread keeps it for its next pass: otherwise the system
// would map some hundred kilobytes again in each pass. A signal handler may run a pass inside a pass; the
// inner pass gets other memory.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : buffer_(std::move(kept())) {
    if (buffer_.bytes >= bytes) return;
    buffer_ = {};
    buffer_.memory.reset(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096));
    if (!buffer_.memory) throw std::bad_alloc();
    buffer_.bytes = bytes;
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { kept() = std::move(buffer_); }

  void* data() const { return buffer_.memory.get(); }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  struct Buffer {
    std::unique_ptr<void, Free> memory;
    size_t bytes = 0;
    Buffer() = default;
    Buffer(Buffer&& other) noexcept : memory(std::move(other.memory)), bytes(std::exchange(other.bytes, 0)) {}
    Buffer& operator=(Buffer&& other) noexcept {
      memory = std::move(other.memory);
      bytes = std::exchange(other.bytes, 0);
      return *this;
    }
  };
  static Buffer& kept() {
    thread_local Buffer buffer;
    return buffer;
  }
  Buffer buffer_;
};

}  // namespace pysupcon::cpu
