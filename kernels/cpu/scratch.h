// Working memory that belongs to a thread and is kept from call to call, so that a kernel that runs a thousand times
// a second neither allocates nor faults in fresh pages. Each slot grows to the largest request it has seen; the
// kernels size their requests to a core's second-level cache (kScratchBudget), so a thread keeps about that much.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace tinytl::cpu {

// What one thread's rows may take, leaving the rest of a common 1 MiB cache to weights and to the tensors that
// stream through.
constexpr int64_t kScratchBudget = 384 * 1024;

// Pieces that a task uses beside each other. The rows that it works on, its largest, are one piece for all kernels: no
// two are at work in a thread at once.
enum ScratchSlot : int { kRows, kOperand, kOffsets, kSums, kGradient, kNumSlots };

// What the kernels have asked for since the count was begun anew: every thread's largest request of each slot. It is
// what a process that runs nothing else keeps, whatever ran in this one before.
struct ScratchCount {
  std::atomic<int64_t> bytes{0};
  std::atomic<uint64_t> beginning{0}; // changes when the count is begun anew
};
inline ScratchCount scratch_count;

// At least `bytes` uninitialised bytes, aligned to 64, until the same thread asks for the same slot again.
inline void* scratch_bytes(ScratchSlot slot, size_t bytes) {
  struct Buffer {
    at::DataPtr data;
    size_t bytes = 0;
    size_t asked = 0; // largest request since `beginning`
    uint64_t beginning = 0;
  };
  static thread_local std::array<Buffer, kNumSlots> buffers;
  Buffer& buffer = buffers[slot];
  if (const uint64_t beginning = scratch_count.beginning.load(std::memory_order_relaxed); buffer.beginning != beginning) {
    buffer.beginning = beginning;
    buffer.asked = 0;
  }
  if (bytes > buffer.asked) {
    scratch_count.bytes.fetch_add(static_cast<int64_t>(bytes - buffer.asked), std::memory_order_relaxed);
    buffer.asked = bytes;
  }
#if defined(__SANITIZE_ADDRESS__)
  constexpr bool fits = false; // exactly what was asked for, so that a step beyond it is seen
#else
  const bool fits = buffer.data && buffer.bytes >= bytes;
#endif
  if (!fits) {
    buffer.data = at::DataPtr();
    buffer.data = c10::GetCPUAllocator()->allocate(bytes);
    buffer.bytes = bytes;
  }
  return buffer.data.get();
}

// The same for `count` elements.
template <class T>
T* scratch(ScratchSlot slot, int64_t count) {
  return static_cast<T*>(scratch_bytes(slot, static_cast<size_t>(count) * sizeof(T)));
}

} // namespace tinytl::cpu
