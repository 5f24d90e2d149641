// How work is shared out.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace memdense {

// One for each unit, and at most one a thread.
inline int64_t worker_count(int64_t units, int64_t threads = torch::stable::get_num_threads()) {
  return std::clamp<int64_t>(units, 1, threads);
}

// A fixed share of `units` for each of `count` workers: the same number of threads gives the same
// shares, and with partial results taken in order the same bits.
struct Workers {
  int64_t units, count;

  explicit Workers(int64_t units) : Workers(units, worker_count(units)) {}
  Workers(int64_t units, int64_t count) : units(units), count(count) {}

  int64_t first(int64_t worker) const { return units * worker / count; }

  // f(worker, first unit, last unit)
  template <typename F>
  void run(const F& f) const {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w) f(w, first(w), first(w + 1));
    });
  }
};

}  // namespace memdense
