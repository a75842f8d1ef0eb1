// Work shared out by parallel.h, of which ThreadSanitizer sees every step: test_parallel.py puts plain threads in the
// place of ATen's, whose run-time library it knows nothing of.
#include "parallel.h"

#include <cstdio>
#include <random>
#include <stdexcept>

using namespace tinytl::cpu;

namespace {

// Some work that takes a different time for every piece.
void work(int64_t piece) {
  volatile int64_t left = piece * 2654435761 % 1024;
  while (left > 0) {
    left = left - 1;
  }
}

// Every item through all stages in order; what a stage leaves in its item's place is what the next one finds there.
bool stages_in_order(int64_t items, int64_t stages, int64_t wave) {
  Waves waves(items, wave);
  std::vector<int64_t> left_in_place(waves.places(), -1), through(items);
  std::vector<char> wrong(items);
  parallel_stages(waves, stages, [&](int64_t stage, int64_t item) {
    const int64_t place = waves.place()[item];
    if (place < 0 || place >= waves.places() || through[item] != stage ||
        (stage > 0 && left_in_place[place] != item * stages + stage - 1)) {
      wrong[item] = 1;
      return;
    }
    left_in_place[place] = item * stages + stage;
    work(item * stages + stage);
    through[item] = stage + 1;
  });
  for (int64_t i = 0; i < items; ++i) {
    if (wrong[i] || through[i] != (items > 0 ? stages : 0)) {
      return false;
    }
  }
  return true;
}

bool every_task_once(int64_t count) {
  std::vector<int64_t> times(count);
  parallel_tasks(count, [&](int64_t task) {
    work(task);
    ++times[task];
  });
  return std::all_of(times.begin(), times.end(), [](int64_t n) { return n == 1; });
}

bool failure_ends_all(int64_t items, int64_t stages, int64_t wave) {
  Waves waves(items, wave);
  try {
    parallel_stages(waves, stages, [&](int64_t stage, int64_t item) {
      work(item);
      if (item == items / 2 && stage == stages - 1) {
        throw std::runtime_error("on purpose");
      }
    });
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

} // namespace

int main() {
  std::mt19937 random(7);
  const auto below = [&](int64_t end) { return static_cast<int64_t>(random() % end); };
  for (int round = 0; round < 600; ++round) {
    at::threads = 1 + below(6);
    const int64_t items = below(20), stages = 1 + below(5), wave = 1 + below(4);
    if (!stages_in_order(items, stages, wave) || !every_task_once(items) ||
        (items > 0 && !failure_ends_all(items, stages, wave))) {
      std::printf("threads %d items %ld stages %ld wave %ld\n", at::threads, long(items), long(stages), long(wave));
      return 1;
    }
  }
}
