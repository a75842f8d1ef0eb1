// Tasks shared out as threads become free.
//
// at::parallel_for gives every thread its share beforehand, and a call lasts as long as its slowest thread: one that
// another process interrupts, or one on a slow core of a machine that has two kinds. Here a thread takes the next piece
// when it has done the last. Who computes a piece is chance; what is computed is not, so that results stay the same as
// long as a piece's own do not depend on the thread.
#pragma once

#include "vector.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

namespace tinytl::cpu {

// Calls body(task) for tasks [0, count).
template <class Body>
void parallel_tasks(int64_t count, const Body& body) {
  std::atomic<int64_t> next{0};
  const auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), count), 1, [&](int64_t, int64_t) {
    for (int64_t task = take(); task < count; task = take()) {
      body(task);
    }
  });
}

// Pieces that a thread takes, about, where the work can be cut as finely as one likes.
constexpr int64_t kPiecesPerThread = 4;

// Into how many pieces work is cut of which `most` would be worth a task: a function of the number of threads, so that
// sums over pieces come out the same at a given one.
inline int64_t piece_count(int64_t most) {
  return std::max<int64_t>(std::min<int64_t>(at::get_num_threads() * kPiecesPerThread, most), 1);
}

// Calls body(begin, end) for pieces of [begin, end) of at least `grain`.
template <class Body>
void parallel_pieces(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  const int64_t piece = std::max(grain, ceil_div(end - begin, piece_count(end - begin)));
  parallel_tasks(ceil_div(end - begin, piece), [&](int64_t p) {
    body(begin + p * piece, std::min(begin + (p + 1) * piece, end));
  });
}

} // namespace tinytl::cpu
