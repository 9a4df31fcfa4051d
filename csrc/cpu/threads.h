// Threads of the caller's, and memory of a thread's own.
#pragma once
#include <cstdlib>
#include <new>

#include "cpu/kernels.h"

namespace pysupcon::cpu {

// body(first, last) over parts of [0, count)
template <class Body>
void parallel(const Threads& threads, int64_t count, const Body& body) {
  if (count <= 0) return;
  threads.run(count, const_cast<Body*>(&body),
              [](void* b, int64_t first, int64_t last) { (*static_cast<const Body*>(b))(first, last); });
}

// A thread keeps its scratch for the next call: some hundred kilobytes that would otherwise be mapped anew
// each time.
inline void* thread_scratch(size_t bytes) {
  struct Buffer {
    void* memory = nullptr;
    size_t bytes = 0;
    ~Buffer() { std::free(memory); }
  };
  thread_local Buffer buffer;
  if (buffer.bytes < bytes) {
    std::free(buffer.memory);
    buffer.bytes = 0;
    buffer.memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    if (!buffer.memory) throw std::bad_alloc();
    buffer.bytes = bytes;
  }
  return buffer.memory;
}

}  // namespace pysupcon::cpu
