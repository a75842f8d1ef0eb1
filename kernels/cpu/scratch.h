// Working memory that belongs to a thread and is kept from call to call, so that a kernel that runs a thousand times
// a second neither allocates nor faults in fresh pages. Each slot grows to the largest request it has seen; the
// kernels size their requests to a core's second-level cache (kScratchBudget), so a thread keeps about that much.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <array>
#include <cstddef>
#include <cstdint>

namespace tinytl::cpu {

// What one thread's rows may take, leaving the rest of a common 1 MiB cache to weights and to the tensors that
// stream through.
constexpr int64_t kScratchBudget = 384 * 1024;

enum ScratchSlot : int { kRing, kRows, kOperand, kOffsets, kSums, kImages, kNumSlots };

// At least `count` uninitialised elements, aligned to 64 bytes, until the same thread asks for the same slot again.
template <class T>
T* scratch(ScratchSlot slot, int64_t count) {
  struct Buffer {
    at::DataPtr data;
    size_t bytes = 0;
  };
  static thread_local std::array<Buffer, kNumSlots> buffers;
  Buffer& buffer = buffers[slot];
  const size_t bytes = static_cast<size_t>(count) * sizeof(T);
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
  return static_cast<T*>(buffer.data.get());
}

} // namespace tinytl::cpu
