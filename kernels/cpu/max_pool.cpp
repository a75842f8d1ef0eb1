// Max pooling over channels_last tensors: y = max over the window, and the winner's position in it, i * kw + j.
//
// Positions: uint8. Windows of up to 16 values: (N, H', W', ceil(C / 2)), channel 2 j in the low nibble of byte j, the
// nibble after an odd last channel 0; of up to 256: a byte a channel, (N, H', W', C).
// Ties and NaN as in PyTorch: the first maximum wins, a NaN beats everything and a later NaN an earlier one.
//
// While a window is walked its winners are int32 lanes beside the float lanes of the maxima, moved by the same
// comparison; they are narrowed once a window. The backward gathers: a task owns rows of dx and reads the windows that
// reach them, so that no two threads add to one value and the order of the additions is fixed. It widens the positions
// of a window to int32 lanes again, and one comparison selects the gradients.
#include "pool_window.h"

#include <limits>

namespace tinytl::cpu {
namespace {

using Places = at::vec::Vectorized<int32_t>; // positions, one a lane
static_assert(Places::size() == kLanes);

// Bytes that the forward prefetches ahead along each row of its windows. A pixel is some 200 instructions, so the
// processor's own look-ahead spans only the next pixel or two. 3x3, stride 2, at (8, 64, 112, 112): 2.2 ms become 1.4.
constexpr int64_t kAhead = 1536;

enum class Storage { none, nibbles, bytes };

// Bytes that hold the positions of a number of channels.
template <Storage STORAGE>
constexpr int64_t position_bytes(int64_t channels) {
  return STORAGE == Storage::nibbles ? (channels + 1) >> 1 : channels;
}

Storage storage_for(const PoolShape& s, at::IntArrayRef kernel_size) {
  const int64_t taps = s.kernel[0] * s.kernel[1];
  TORCH_CHECK(
      taps <= 256,
      "kernel_size: expected at most 256 values a window, whose position fits in a byte, got ",
      kernel_size);
  return taps <= 16 ? Storage::nibbles : Storage::bytes;
}

// Calls body with the storage as a constant.
template <class Body>
void with_storage(Storage storage, const Body& body) {
  switch (storage) {
    case Storage::none:
      return body(std::integral_constant<Storage, Storage::none>());
    case Storage::nibbles:
      return body(std::integral_constant<Storage, Storage::nibbles>());
    case Storage::bytes:
      return body(std::integral_constant<Storage, Storage::bytes>());
  }
}

// Where value is greater than best, or NaN: best = value and winner = place.
TINYTL_INLINE void challenge(Vec& best, Places& winner, Vec value, Places place) {
#if defined(CPU_CAPABILITY_AVX512)
  const __mmask16 number = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
  const __mmask16 loses = _mm512_mask_cmp_ps_mask(number, value, best, _CMP_NGT_UQ);
  best = _mm512_mask_mov_ps(value, loses, best);
  winner = _mm512_mask_mov_epi32(place, loses, winner);
#else
  const Vec wins = (value > best) | (value != value);
  best = Vec::blendv(best, value, wins);
  winner = Places::blendv(winner, place, at::vec::cast<int32_t>(wins));
#endif
}

// sum + value in the lanes where winner == place. A select, so that an infinite gradient stays in its own lane; by a
// vector of bits, because with an AVX-512 mask the compiler folds the load into the masked addition, which then waits
// for the comparison: three times slower where the gradient is not in L1 (Zen 5).
TINYTL_INLINE Vec add_where(Vec sum, Vec value, Places winner, Places place) {
  return sum + (value & at::vec::cast<float>(winner == place));
}

// The positions of one group to kGroup or, for nibbles, kGroup / 2 bytes.
template <Storage STORAGE>
TINYTL_INLINE void narrow(uint8_t* target, const Places* winners) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (STORAGE == Storage::nibbles) {
    // A pair of channels is one 64-bit lane: the odd one's nibble moves down beside the even one's.
    const __m512i pairs = _mm512_or_si512(winners[0], _mm512_srli_epi64(winners[0], 28));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(target), _mm512_cvtepi64_epi8(pairs));
  } else {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm512_cvtepi32_epi8(winners[0]));
  }
#else
  int32_t lanes[kGroup];
  for (int v = 0; v < kGroupVecs; ++v) {
    winners[v].store(lanes + v * kLanes);
  }
  for (int i = 0; i < position_bytes<STORAGE>(kGroup); ++i) {
    target[i] = static_cast<uint8_t>(
        STORAGE == Storage::nibbles ? lanes[2 * i] | lanes[2 * i + 1] << 4 : lanes[i]);
  }
#endif
}

// The inverse.
template <Storage STORAGE>
TINYTL_INLINE void widen(const uint8_t* source, Places* winners) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (STORAGE == Storage::nibbles) {
    const __m512i pairs = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)));
    winners[0] = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi64(pairs, 28)), _mm512_set1_epi32(15));
  } else {
    winners[0] = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (STORAGE == Storage::nibbles) {
    int32_t bytes;
    std::memcpy(&bytes, source, sizeof(bytes));
    const __m256i pairs = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes));
    winners[0] = _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi64(pairs, 28)), _mm256_set1_epi32(15));
  } else {
    winners[0] = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)));
  }
#else
  int32_t lanes[kGroup];
  for (int i = 0; i < position_bytes<STORAGE>(kGroup); ++i) {
    if constexpr (STORAGE == Storage::nibbles) {
      lanes[2 * i] = source[i] & 15;
      lanes[2 * i + 1] = source[i] >> 4;
    } else {
      lanes[i] = source[i];
    }
  }
  for (int v = 0; v < kGroupVecs; ++v) {
    winners[v] = Places::loadu(lanes + v * kLanes);
  }
#endif
}

// The positions of a block to those of its pixel.
template <Storage STORAGE, class Block>
TINYTL_INLINE void store_positions(uint8_t* target, const Block& block, const Places* winners) {
  constexpr int64_t GROUP_BYTES = position_bytes<STORAGE>(kGroup);
  if constexpr (Block::WHOLE) {
    TINYTL_UNROLL
    for (int g = 0; g < Block::GROUPS; ++g) {
      narrow<STORAGE>(target + g * GROUP_BYTES, winners + g * kGroupVecs);
    }
  } else {
    uint8_t bytes[GROUP_BYTES];
    narrow<STORAGE>(bytes, winners);
    if (STORAGE == Storage::nibbles && block.count % 2 == 1) {
      bytes[block.count / 2] &= 15;
    }
    std::memcpy(target, bytes, position_bytes<STORAGE>(block.count));
  }
}

template <Storage STORAGE, class Block>
TINYTL_INLINE void load_positions(const uint8_t* source, const Block& block, Places* winners) {
  constexpr int64_t GROUP_BYTES = position_bytes<STORAGE>(kGroup);
  if constexpr (Block::WHOLE) {
    TINYTL_UNROLL
    for (int g = 0; g < Block::GROUPS; ++g) {
      widen<STORAGE>(source + g * GROUP_BYTES, winners + g * kGroupVecs);
    }
  } else {
    uint8_t bytes[GROUP_BYTES] = {};
    std::memcpy(bytes, source, position_bytes<STORAGE>(block.count));
    widen<STORAGE>(bytes, winners);
  }
}

template <class T, Storage STORAGE>
void forward(const PoolShape& s, const T* source, T* target, uint8_t* positions) {
  const std::vector<Span> row_spans = window_spans(s, 0), column_spans = window_spans(s, 1);
  const int64_t row_values = s.out_width * s.channels * s.kernel[0] * s.kernel[1];
  for_rows(s.batch, s.out_height, row_values, [&](int64_t image, int64_t row) {
    const int64_t channels = s.channels;
    const int64_t bytes = position_bytes<STORAGE>(channels);
    const int64_t row_step = s.dilation[0] * s.width * channels;
    const int64_t column_step = s.dilation[1] * channels;
    const int64_t kernel_width = s.kernel[1];
    const Span rows = row_spans[row];
    for (int64_t column = 0; column < s.out_width; ++column) {
      const Span columns = column_spans[column];
      const T* tap_0 = source + ((image * s.height + rows.start) * s.width + columns.start) * channels;
      const int64_t pixel = (image * s.out_height + row) * s.out_width + column;
      for_channel_blocks(channels, [&](auto block) TINYTL_LAMBDA_INLINE {
        Vec best[block.VECS];
        Places winner[block.VECS];
        TINYTL_UNROLL
        for (int v = 0; v < block.VECS; ++v) {
          best[v] = Vec(-std::numeric_limits<float>::infinity());
          winner[v] = Places(static_cast<int32_t>(rows.begin * kernel_width + columns.begin));
        }
        for (int64_t i = rows.begin; i < rows.end; ++i) {
          for (int64_t j = columns.begin; j < columns.end; ++j) {
            const T* from = tap_0 + i * row_step + j * column_step + block.start;
            const Places place(static_cast<int32_t>(i * kernel_width + j));
            TINYTL_UNROLL
            for (int v = 0; v < block.VECS; ++v) {
              __builtin_prefetch(from + v * kLanes + kAhead / sizeof(T));
              if constexpr (STORAGE == Storage::none) {
                best[v] = at::vec::maximum(best[v], block.load(from, v));
              } else {
                challenge(best[v], winner[v], block.load(from, v), place);
              }
            }
          }
        }
        TINYTL_UNROLL
        for (int v = 0; v < block.VECS; ++v) {
          block.store(target + pixel * channels + block.start, v, best[v]);
        }
        if constexpr (STORAGE != Storage::none) {
          store_positions<STORAGE>(
              positions + pixel * bytes + position_bytes<STORAGE>(block.start), block, winner);
        }
      });
    }
  });
}

template <class T, Storage STORAGE>
void backward(const PoolShape& s, const T* source, const uint8_t* positions, T* target) {
  const Covers row_covers(s, 0), column_covers(s, 1);
  for_rows(s.batch, s.height, s.width * s.channels * 4, [&](int64_t image, int64_t row) {
    const int64_t channels = s.channels;
    const int64_t bytes = position_bytes<STORAGE>(channels);
    const int64_t kernel_width = s.kernel[1];
    const auto *rows = row_covers.begin(row), *rows_end = row_covers.end(row);
    for (int64_t column = 0; column < s.width; ++column) {
      const auto *columns = column_covers.begin(column), *columns_end = column_covers.end(column);
      T* pixel = target + ((image * s.height + row) * s.width + column) * channels;
      for_channel_blocks(channels, [&](auto block) TINYTL_LAMBDA_INLINE {
        Vec sum[block.VECS];
        TINYTL_UNROLL
        for (int v = 0; v < block.VECS; ++v) {
          sum[v] = Vec(0.f);
        }
        for (const auto* r = rows; r != rows_end; ++r) {
          const int64_t window_row = (image * s.out_height + r->window) * s.out_width;
          const T* gradients = source + window_row * channels + block.start;
          const uint8_t* winners = positions + window_row * bytes + position_bytes<STORAGE>(block.start);
          const int64_t row_place = r->tap * kernel_width;
          for (const auto* q = columns; q != columns_end; ++q) {
            const Places place(static_cast<int32_t>(row_place + q->tap));
            Places winner[block.VECS];
            load_positions<STORAGE>(winners + q->window * bytes, block, winner);
            TINYTL_UNROLL
            for (int v = 0; v < block.VECS; ++v) {
              sum[v] = add_where(sum[v], block.load(gradients + q->window * channels, v), winner[v], place);
            }
          }
        }
        TINYTL_UNROLL
        for (int v = 0; v < block.VECS; ++v) {
          block.store(pixel + block.start, v, sum[v]);
        }
      });
    }
  });
}

} // namespace

std::tuple<at::Tensor, at::Tensor> max_pool2d_forward(
    const at::Tensor& x,
    at::IntArrayRef kernel_size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    bool ceil_mode,
    bool needs_positions) {
  const PoolShape s(x.sizes(), kernel_size, stride, padding, dilation, ceil_mode);
  const Storage storage = needs_positions ? storage_for(s, kernel_size) : Storage::none;
  const at::Tensor input = in_channels_last(x);
  at::Tensor out =
      empty_tensor({s.batch, s.channels, s.out_height, s.out_width}, x.options(), at::MemoryFormat::ChannelsLast);
  at::Tensor positions = empty_tensor({0}, x.options().dtype(at::kByte));
  with_storage(storage, [&](auto constant) {
    constexpr Storage STORAGE = decltype(constant)::value;
    if constexpr (STORAGE != Storage::none) {
      positions.resize_({s.batch, s.out_height, s.out_width, position_bytes<STORAGE>(s.channels)});
    }
    with_storage_type(x.scalar_type(), "input", [&](auto zero) {
      using T = decltype(zero);
      forward<T, STORAGE>(s, input.data_ptr<T>(), out.data_ptr<T>(), positions.data_ptr<uint8_t>());
    });
  });
  return {out, positions};
}

at::Tensor max_pool2d_backward(
    const at::Tensor& grad_output,
    const at::Tensor& positions,
    at::IntArrayRef input_size,
    at::IntArrayRef kernel_size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    bool ceil_mode) {
  const PoolShape s(input_size, kernel_size, stride, padding, dilation, ceil_mode);
  check_size(
      grad_output, "grad_output", {s.batch, s.channels, s.out_height, s.out_width}, grad_output.scalar_type());
  TORCH_CHECK(positions.is_contiguous(), "positions: expected a contiguous tensor, as the forward returns it");
  const at::Tensor grad = in_channels_last(grad_output);
  at::Tensor grad_input = empty_tensor(input_size, grad.options(), at::MemoryFormat::ChannelsLast);
  with_storage(storage_for(s, kernel_size), [&](auto constant) {
    constexpr Storage STORAGE = decltype(constant)::value;
    if constexpr (STORAGE != Storage::none) {
      check_size(
          positions,
          "positions",
          {s.batch, s.out_height, s.out_width, position_bytes<STORAGE>(s.channels)},
          at::kByte);
      with_storage_type(grad.scalar_type(), "grad_output", [&](auto zero) {
        using T = decltype(zero);
        backward<T, STORAGE>(s, grad.data_ptr<T>(), positions.data_ptr<uint8_t>(), grad_input.data_ptr<T>());
      });
    }
  });
  return grad_input;
}

} // namespace tinytl::cpu
