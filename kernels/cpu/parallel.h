// Tasks shared out as threads become free.
//
// at::parallel_for gives every thread its share beforehand, and a call lasts as long as its slowest thread: one that
// another process interrupts, or one on a slow core of a machine that has two kinds. Here a thread that has done its
// share goes on with the others'. It begins with the same share of every call, so that what it wrote in one, rows of
// pixels or images, is in its cache in the next. Who computes a task is chance; what is computed is not, so that
// results stay the same as long as a task's own do not depend on the thread.
#pragma once

#include "vector.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace tinytl::cpu {

// More threads than this begin with the same shares.
constexpr int64_t kMaxShares = 64;

// Neighbouring tasks, taken from the first on; on a cache line of its own.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

// Calls body(task) for tasks [0, count).
template <class Body>
void parallel_tasks(int64_t count, const Body& body) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  const int64_t num_shares = std::min(threads, kMaxShares);
  std::array<Share, kMaxShares> shares;
  for (int64_t s = 0; s < num_shares; ++s) {
    shares[s].next.store(count * s / num_shares, std::memory_order_relaxed);
    shares[s].end = count * (s + 1) / num_shares;
  }
  at::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    for (int64_t i = 0; i < num_shares; ++i) {
      Share& share = shares[(thread + i) % num_shares];
      const auto take = [&] { return share.next.fetch_add(1, std::memory_order_relaxed); };
      for (int64_t task = take(); task < share.end; task = take()) {
        body(task);
      }
    }
  });
}

// Work in pieces that do not depend on each other: run(task) for tasks [0, count).
struct Tasks {
  int64_t count = 0;
  std::function<void(int64_t)> run;
};

// All of it, whatever comes first: threads wait for each other once.
inline void parallel_tasks(const std::vector<Tasks>& lists) {
  int64_t count = 0;
  for (const Tasks& list : lists) {
    count += list.count;
  }
  parallel_tasks(count, [&](int64_t task) {
    for (const Tasks& list : lists) {
      if (task < list.count) {
        return list.run(task);
      }
      task -= list.count;
    }
  });
}

// Calls body(stage, item) for stages [0, stages) of each of `items` items: those of one item in order, and nobody waits
// until a stage is complete. A thread goes through the stages with its own share of the items, the furthest behind
// first, so that what a stage reads (its weights) is read for all of them while it is in cache; then it helps with the
// others'.
template <class Body>
void parallel_stages(int64_t items, int64_t stages, const Body& body) {
  struct alignas(64) Item {
    std::atomic<int64_t> next{0}; // stage
    std::atomic<bool> taken{false};
  };
  std::vector<Item> all(items);
  std::atomic<int64_t> left{stages > 0 ? items : 0};
  std::atomic<bool> failed{false};
  // The item of [begin, end) that is furthest behind, taken for the caller; `end` where all are taken or done.
  const auto take = [&](int64_t begin, int64_t end) {
    for (;;) {
      int64_t found = end, least = stages;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t stage = all[i].next.load(std::memory_order_relaxed);
        if (stage < least && !all[i].taken.load(std::memory_order_relaxed)) {
          found = i, least = stage;
        }
      }
      if (found == end || !all[found].taken.exchange(true, std::memory_order_acquire)) {
        return found;
      }
    }
  };
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), items);
  at::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    const int64_t own = items * thread / threads, own_end = items * (thread + 1) / threads;
    while (left.load(std::memory_order_acquire) > 0 && !failed.load(std::memory_order_relaxed)) {
      int64_t i = take(own, own_end);
      if (i == own_end) {
        i = take(0, items);
        if (i == items) {
          std::this_thread::yield();
          continue;
        }
      }
      Item& item = all[i];
      const int64_t stage = item.next.load(std::memory_order_relaxed);
      if (stage < stages) { // else the thread that had it has just done its last one
        try {
          body(stage, i);
        } catch (...) {
          failed.store(true, std::memory_order_relaxed);
          throw;
        }
        item.next.store(stage + 1, std::memory_order_relaxed);
        if (stage + 1 == stages) {
          left.fetch_sub(1, std::memory_order_release);
        }
      }
      item.taken.store(false, std::memory_order_release);
    }
  });
}

// body(begin, end) for pieces of `grain` of [0, end), as tasks.
template <class Body>
Tasks pieces_of(int64_t end, int64_t grain, const Body& body) {
  return {ceil_div(end, grain), [=](int64_t task) { body(task * grain, std::min((task + 1) * grain, end)); }};
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
  parallel_tasks({pieces_of(end - begin, piece, [&](int64_t first, int64_t last) { body(begin + first, begin + last); })});
}

} // namespace tinytl::cpu
