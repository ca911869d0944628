// One loop shared between the calling thread and XLA's own pool of threads.
//
// Invariants: every item runs exactly once; the call returns when all have run. Items are claimed one by one, and the caller claims too,
// so a pool whose threads are all busy (or all waiting here) costs time but never a deadlock: who waits, waits only for items that run.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace novajax {

struct Items {
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
};

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Calls run(item) for item in [0, count), on at most one thread for each `least` items.
template <typename Run>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t count, int64_t least, const Run& run) {
  const int64_t threads = std::min<int64_t>(pool.num_threads(), count / std::max<int64_t>(1, least));
  if (threads <= 1) {
    for (int64_t item = 0; item < count; ++item) run(item);
    return;
  }
  auto items = std::make_shared<Items>();
  // A helper that starts late finds nothing left; only then may `run` be gone, and it is not called.
  auto work = [items, count, &run]() {
    for (int64_t item; (item = items->next.fetch_add(1)) < count;) {
      run(item);
      items->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t helper = 1; helper < threads; ++helper) pool.Schedule([work]() { work(); });
  work();
  for (int spins = 0; items->done.load(std::memory_order_acquire) < count; ++spins) {
    if (spins < 20000) {
      Pause();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace novajax
