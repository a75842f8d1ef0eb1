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
#include <utility>
#include <vector>

namespace tinytl::cpu {

// More threads than this begin with the same shares.
constexpr int64_t kMaxShares = 64;

// Neighbouring tasks, taken from the first on; on a cache line of its own.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

// Cuts [0, items) into `count` shares of nearly equal length.
inline void share_out(int64_t items, Share* shares, int64_t count) {
  for (int64_t s = 0; s < count; ++s) {
    shares[s].next.store(items * s / count, std::memory_order_relaxed);
    shares[s].end = items * (s + 1) / count;
  }
}

// Calls body(task) for tasks [0, count).
template <class Body>
void parallel_tasks(int64_t count, const Body& body) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  const int64_t num_shares = std::min(threads, kMaxShares);
  std::array<Share, kMaxShares> shares;
  share_out(count, shares.data(), num_shares);
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

// Items on their way through stages: a share for every thread, of which it has a wave of so many under way at a time. An
// item that is under way has a place, of which there are as many as can be under way at once.
class Waves {
 public:
  Waves(int64_t items, int64_t wave)
      : shares_(std::min<int64_t>(at::get_num_threads(), items)),
        wave_(std::min(wave, ceil_div(items, std::max<int64_t>(shares_, 1)))),
        places_(items) {}
  int64_t items() const {
    return static_cast<int64_t>(places_.size());
  }
  int64_t shares() const {
    return shares_;
  }
  int64_t wave() const {
    return wave_;
  }
  int64_t places() const {
    return shares_ * wave_;
  }
  // Of each item, once it is under way.
  int64_t* place() {
    return places_.data();
  }

 private:
  int64_t shares_, wave_;
  std::vector<int64_t> places_;
};

// Where an item is under way, on a cache line of its own.
struct alignas(64) Place {
  static constexpr int64_t kFree = -1;
  std::atomic<int64_t> item{kFree}, stage{0}; // its next one
  std::atomic<bool> taken{false}; // by a thread that is at it
};

// Calls body(stage, item) for stages [0, stages) of each item: those of one item in order, and nobody waits until a stage
// is complete. A thread goes through the stages with a wave of its share, the item that is furthest behind first, so that
// what a stage reads (its weights) is read for all of them while it is in cache. When its share is done it begins others'
// items, and when all have begun it helps with those.
template <class Body>
void parallel_stages(Waves& waves, int64_t stages, const Body& body) {
  const int64_t items = stages > 0 ? waves.items() : 0, count = waves.shares(), wave = waves.wave();
  std::vector<Share> shares(count);
  std::vector<Place> places(waves.places());
  share_out(items, shares.data(), count);
  std::atomic<int64_t> left{items};
  std::atomic<bool> failed{false};

  // Begins an item of a share in a place of the caller's, if there is one left.
  const auto begin = [&](int64_t share, int64_t place) {
    const int64_t item = shares[share].next.fetch_add(1, std::memory_order_relaxed);
    if (item >= shares[share].end) {
      return false;
    }
    waves.place()[item] = place;
    places[place].stage.store(0, std::memory_order_relaxed);
    places[place].item.store(item, std::memory_order_release);
    return true;
  };
  const auto begin_wave = [&](int64_t thread) {
    int64_t begun = 0;
    while (begun < wave && begin(thread, thread * wave + begun)) {
      ++begun;
    }
    for (int64_t i = 1; begun == 0 && i < count; ++i) {
      begun += begin((thread + i) % count, thread * wave);
    }
  };
  const auto none_under_way = [&](int64_t thread) {
    const auto first = places.begin() + thread * wave;
    return std::all_of(first, first + wave, [](const Place& place) {
      return place.item.load(std::memory_order_acquire) == Place::kFree;
    });
  };
  // The place of a thread's whose item is furthest behind, taken for the caller; null where all are taken or free.
  const auto take = [&](int64_t thread) -> Place* {
    for (;;) {
      Place* found = nullptr;
      int64_t least = stages;
      for (int64_t p = thread * wave; p < (thread + 1) * wave; ++p) {
        if (places[p].item.load(std::memory_order_acquire) == Place::kFree || places[p].taken.load(std::memory_order_relaxed)) {
          continue;
        }
        const int64_t stage = places[p].stage.load(std::memory_order_relaxed);
        if (stage < least) {
          found = &places[p], least = stage;
        }
      }
      if (found == nullptr) {
        return nullptr;
      }
      if (!found->taken.exchange(true, std::memory_order_acquire)) {
        if (found->item.load(std::memory_order_acquire) != Place::kFree) {
          return found;
        }
        found->taken.store(false, std::memory_order_release); // another thread has just done its last stage
      }
    }
  };
  at::parallel_for(0, count, 1, [&](int64_t thread, int64_t) {
    while (left.load(std::memory_order_acquire) > 0 && !failed.load(std::memory_order_relaxed)) {
      if (none_under_way(thread)) {
        begin_wave(thread);
      }
      Place* place = nullptr;
      for (int64_t i = 0; place == nullptr && i < count; ++i) {
        place = take((thread + i) % count);
      }
      if (place == nullptr) {
        std::this_thread::yield();
        continue;
      }
      const int64_t stage = place->stage.load(std::memory_order_relaxed);
      try {
        body(stage, place->item.load(std::memory_order_relaxed));
      } catch (...) {
        failed.store(true, std::memory_order_relaxed);
        throw;
      }
      place->stage.store(stage + 1, std::memory_order_relaxed);
      if (stage + 1 == stages) {
        place->item.store(Place::kFree, std::memory_order_release);
        left.fetch_sub(1, std::memory_order_release);
      }
      place->taken.store(false, std::memory_order_release);
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
