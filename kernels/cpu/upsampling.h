// Bilinear upsampling (align_corners=False), added to something, and its adjoint:
//
//     add        out[r, q] = main[r, q] + sum over 2 x 2 neighbours of weight * branch
//     adjoint    dbranch = (row weights)^T (column weights)^T dout
//
// main and out are channels_last; where the branch lies is its reader's and its writer's affair. The adjoint is a
// gather: a task owns rows of dbranch. Both work on one weighted sum of rows, float32 in scratch, and then weigh its
// columns.
#pragma once

#include "common.h"
#include "parallel.h"

#include <vector>

namespace tinytl::cpu {

// Interpolation along one side: out position o reads low[o] with 1 - weight[o] and high[o] with weight[o].
struct Axis {
  std::vector<int64_t> low, high;
  std::vector<float> weight;

  Axis(int64_t in, int64_t out) : low(out), high(out), weight(out) {
    const float scale = static_cast<float>(in) / static_cast<float>(out);
    for (int64_t o = 0; o < out; ++o) {
      const float source = std::max((static_cast<float>(o) + 0.5f) * scale - 0.5f, 0.f);
      low[o] = std::min(static_cast<int64_t>(source), in - 1);
      high[o] = std::min(low[o] + 1, in - 1);
      weight[o] = std::min(std::max(source - static_cast<float>(low[o]), 0.f), 1.f);
    }
  }
  // low and high grow with o: the out positions that read `i` are neighbours, [begin, end).
  int64_t begin(int64_t i) const {
    return std::lower_bound(high.begin(), high.end(), i) - high.begin();
  }
  int64_t end(int64_t i) const {
    return std::upper_bound(low.begin(), low.end(), i) - low.begin();
  }
  // How much of `i` out position o takes.
  float share(int64_t o, int64_t i) const {
    return (low[o] == i ? 1.f - weight[o] : 0.f) + (high[o] == i ? weight[o] : 0.f);
  }
};

// The same seen from the other side: in position i is read by count[i] out positions from first[i] on.
struct Readers {
  std::vector<int64_t> first, count;
  std::vector<float> all_shares;
  int64_t most = 0;

  Readers(const Axis& axis, int64_t in) : first(in), count(in) {
    for (int64_t i = 0; i < in; ++i) {
      first[i] = axis.begin(i);
      count[i] = axis.end(i) - first[i];
      most = std::max(most, count[i]);
    }
    all_shares.resize(in * most);
    for (int64_t i = 0; i < in; ++i) {
      for (int64_t j = 0; j < count[i]; ++j) {
        all_shares[i * most + j] = axis.share(first[i] + j, i);
      }
    }
  }
  at::ArrayRef<float> shares(int64_t i) const {
    return {all_shares.data() + i * most, static_cast<size_t>(count[i])};
  }
};

// The sum of the shares of as many rows of `length` elements.
template <class T>
void weighted_sum(const T* rows, int64_t length, at::ArrayRef<float> shares, float* sum) {
  const auto add = [&](auto count) {
    for (int64_t i = 0; i < length; i += kLanes) {
      Vec total(0.f);
      for (int64_t j = 0; j < count; ++j) {
        total = at::vec::fmadd(load_channels(rows + j * length + i, length - i), Vec(shares[j]), total);
      }
      total.store(sum + i);
    }
  };
  if (shares.size() == 4) { // twice the size
    add(std::integral_constant<int64_t, 4>());
  } else {
    add(static_cast<int64_t>(shares.size()));
  }
}

struct Upsampling {
  int64_t batch, channels, height, width, branch_height, branch_width;

  Upsampling(at::IntArrayRef main, at::IntArrayRef branch)
      : batch(main[0]),
        channels(main[1]),
        height(main[2]),
        width(main[3]),
        branch_height(branch[2]),
        branch_width(branch[3]) {}

  int64_t lines_a_task() const {
    return std::max<int64_t>(16384 / std::max<int64_t>(width * channels, 1), 1);
  }
};

struct UpsampleAdd : Upsampling {
  Axis rows, columns;

  UpsampleAdd(at::IntArrayRef main, at::IntArrayRef branch)
      : Upsampling(main, branch), rows(branch_height, height), columns(branch_width, width) {}

  // read(image, row, column, channel, lanes): of the branch. out may be main. `this` must outlive the tasks.
  template <class T, class Read>
  Tasks tasks(const T* main, T* out, const Read& read) const {
    return pieces_of(batch * height, lines_a_task(), [=, this](int64_t begin, int64_t end) {
      const int64_t padded = padded_channels(channels), length = branch_width * padded;
      float* between = scratch<float>(kRows, 3 * length); // rows of the branch
      float* const read_rows[] = {between + length, between + 2 * length}; // the last even and the last odd one
      int64_t held[] = {-1, -1}; // which they are
      const auto branch_row = [&](int64_t image, int64_t row) {
        float* target = read_rows[row % 2];
        if (held[row % 2] != image * branch_height + row) {
          held[row % 2] = image * branch_height + row;
          for (int64_t column = 0; column < branch_width; ++column) {
            for (int64_t c = 0; c < channels; c += kLanes) {
              read(image, row, column, c, channels - c).store(target + column * padded + c);
            }
          }
        }
        return target;
      };
      for (int64_t line = begin; line < end; ++line) {
        const int64_t image = line / height, row = line % height;
        const float* low = branch_row(image, rows.low[row]);
        const float* high = branch_row(image, rows.high[row]);
        const Vec down(rows.weight[row]), up(1.f - rows.weight[row]);
        for (int64_t i = 0; i < length; i += kLanes) {
          (Vec::loadu(low + i) * up + Vec::loadu(high + i) * down).store(between + i);
        }
        for (int64_t column = 0; column < width; ++column) {
          const int64_t at = (line * width + column) * channels;
          const float* left = between + columns.low[column] * padded;
          const float* right = between + columns.high[column] * padded;
          const Vec to_right(columns.weight[column]), to_left(1.f - columns.weight[column]);
          for (int64_t c = 0; c < channels; c += kLanes) {
            const Vec added = Vec::loadu(left + c) * to_left + Vec::loadu(right + c) * to_right;
            store_channels(out + at + c, load_channels(main + at + c, channels - c) + added, channels - c);
          }
        }
      }
    });
  }
};

struct UpsampleAdjoint : Upsampling {
  Readers rows, columns;

  UpsampleAdjoint(at::IntArrayRef main, at::IntArrayRef branch)
      : Upsampling(main, branch),
        rows(Axis(branch_height, height), branch_height),
        columns(Axis(branch_width, width), branch_width) {}

  // write(image, row, column, channel, lanes, value): of dbranch. `this` must outlive the tasks.
  template <class T, class Write>
  Tasks tasks(const T* grad, const Write& write) const {
    return pieces_of(batch * branch_height, std::max<int64_t>(lines_a_task() / 2, 1), [=, this](int64_t begin, int64_t end) {
      const int64_t length = width * channels;
      float* combined = scratch<float>(kRows, length + kLanes); // the last column is read by whole vectors
      for (int64_t line = begin; line < end; ++line) {
        const int64_t image = line / branch_height, row = line % branch_height;
        const T* from = grad + (image * height + rows.first[row]) * length;
        weighted_sum(from, length, rows.shares(row), combined);
        for (int64_t column = 0; column < branch_width; ++column) {
          const float* first = combined + columns.first[column] * channels;
          const auto column_shares = columns.shares(column);
          for (int64_t c = 0; c < channels; c += kLanes) {
            Vec sum(0.f);
            const float* value = first + c;
            for (const float share : column_shares) {
              sum = at::vec::fmadd(Vec::loadu(value), Vec(share), sum);
              value += channels;
            }
            write(image, row, column, c, channels - c, sum);
          }
        }
      }
    });
  }
};

} // namespace tinytl::cpu
