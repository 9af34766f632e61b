// Rows of a depthwise convolution: which taps meet which rows, and the sums over taps.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu_transfers.h"

namespace dssp {
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- geometry ----------------------------------------------------------------------------------------------------

// One spatial axis: output o reads the inputs o * stride + tap * dilation - padding that exist.
struct Axis {
  int64_t inputs, outputs, taps, stride, padding, dilation;

  int64_t reach() const { return (taps - 1) * dilation; }
};

// What one output reads along an axis: taps first, first + step, ... (count of them), the first from source index
// `source`, each next one `source_step` further. Sources outside the tensor are left out.
struct Reads {
  int64_t first, count, step, source, source_step;
};

inline Reads without_outside(Reads reads, int64_t sources) {
  while (reads.count > 0 && (reads.source < 0 || reads.source >= sources)) {
    reads.first += reads.step;
    reads.source += reads.source_step;
    --reads.count;
  }
  while (reads.count > 0) {
    const int64_t last = reads.source + (reads.count - 1) * reads.source_step;
    if (last >= 0 && last < sources) break;
    --reads.count;
  }
  return reads;
}

// Output o of the convolution reads inputs.
inline Reads forward_reads(const Axis& axis, int64_t o) {
  return {0, axis.taps, 1, o * axis.stride - axis.padding, axis.dilation};
}

// Input i gets its gradient from those outputs (i + padding - tap * dilation) / stride that are whole numbers.
inline Reads backward_reads(const Axis& axis, int64_t i) {
  const int64_t step = axis.stride / std::gcd(axis.stride, axis.dilation);
  for (int64_t tap = 0; tap < std::min(step, axis.taps); ++tap) {
    const int64_t scaled = i + axis.padding - tap * axis.dilation;
    if (scaled % axis.stride != 0) continue;
    return {tap, ceil_div(axis.taps - tap, step), step, scaled / axis.stride, -step * axis.dilation / axis.stride};
  }
  return {0, 0, 1, 0, 0};
}

// A block of channels, processed together: the `vectors` vectors from channel `first` on, `channels` channels in all.
struct ChannelBlock {
  int64_t first, channels, vectors;
};

// ---- rows of taps: from sums to sums -----------------------------------------------------------------------------

// The kernel rows that meet the image at one output row: where each one's source row starts, and its first tap's number.
struct TapRows {
  const int64_t *sources, *taps;
  int64_t count;
};

// One row of results from rows of sources: results[j] = sum over taps of weight * source[j * stride + ...], added to
// what is there if `adds`.
template <typename S>
struct Correlation {
  const S *source, *weights;  // weights: packed_weights()
  TapRows rows;
  Reads taps;  // of the first column
  int64_t taps_in_all, stride, columns, vectors;
  const S* rectified;  // null, or relu(x) where results are wanted: they are cleared where it is 0
  S* results;
  // distances between vectors, and between columns
  int64_t source_vector, rectified_vector, result_vector, rectified_column, result_column;
  bool adds;
};

// A weight stands this often in memory, to be multiplied with vectors of as many neighbouring columns.
constexpr int64_t kWeightCopies = 2;

// kPacks packs of kPack results side by side, so that every weight is loaded once for all. kTaps, kStride: 0 = any.
template <int kPack, int kPacks, int kTaps, int kStride, typename S>
DSSP_INLINE void correlate_columns(const Correlation<S>& c, int64_t vector, int64_t column) {
  static_assert(kPack <= kWeightCopies && (kPack == 1 || kStride == 1), "columns of a pack are neighbours");
  using P = Pack<S, kPack>;
  using V = typename Lanes<S>::Vector;
  constexpr int64_t width = Lanes<S>::width, weight_size = kWeightCopies * width;
  const int64_t stride = (kStride ? kStride : c.stride) * width, taps = kTaps ? kTaps : c.taps.count;
  const int64_t source_step = c.taps.source_step * width, weight_step = c.taps.step * weight_size;
  const int64_t result_step = c.result_column, rectified_step = c.rectified_column, rows = c.rows.count;
  const int64_t *row_sources = c.rows.sources, *row_taps = c.rows.taps;
  const S* source = c.source + vector * c.source_vector + c.taps.source * width + column * stride;
  const S* weights = c.weights + (vector * c.taps_in_all + c.taps.first) * weight_size;
  typename P::Vector packs[kPacks] = {};
  for (int64_t i = 0; i < rows; ++i) {
    const S* from = source + row_sources[i];
    const S* weight = weights + row_taps[i] * weight_size;
#pragma GCC unroll 5
    for (int64_t t = 0; t < taps; ++t) {
      const typename P::Vector w = P::load(weight);
#pragma GCC unroll 8
      for (int j = 0; j < kPacks; ++j) packs[j] += w * P::load(from + j * kPack * stride);
      from += source_step;
      weight += weight_step;
    }
  }
  V sums[kPacks * kPack];
#pragma GCC unroll 16
  for (int j = 0; j < kPacks * kPack; ++j) sums[j] = P::part(packs[j / kPack], j % kPack);
  if (c.rectified) {
    const S* x = c.rectified + vector * c.rectified_vector + column * rectified_step;
#pragma GCC unroll 16
    for (int j = 0; j < kPacks * kPack; ++j) {  // the derivative of ReLU as in PyTorch: NaN in x lets gradients through
      sums[j] = Lanes<S>::load(x + j * rectified_step) == 0 ? V{} : sums[j];
    }
  }
  S* to = c.results + vector * c.result_vector + column * result_step;
  if (c.adds) {
#pragma GCC unroll 16
    for (int j = 0; j < kPacks * kPack; ++j) sums[j] += Lanes<S>::load(to + j * result_step);
  }
#pragma GCC unroll 16
  for (int j = 0; j < kPacks * kPack; ++j) Lanes<S>::store(to + j * result_step, sums[j]);
}

template <int kPack, int kTaps, int kStride, typename S>
DSSP_INLINE void correlate_in_groups(const Correlation<S>& c) {
  for (int64_t vector = 0; vector < c.vectors; ++vector) {
    int64_t j = 0;
    for (; j + 8 * kPack <= c.columns; j += 8 * kPack) correlate_columns<kPack, 8, kTaps, kStride>(c, vector, j);
    if (kPack == 2 && c.columns - j >= 8) correlate_columns<kPack, 8 / kPack, kTaps, kStride>(c, vector, j), j += 8;
    if (c.columns & 4) correlate_columns<kPack, 4 / kPack, kTaps, kStride>(c, vector, j), j += 4;
    if (c.columns & 2) correlate_columns<kPack, 2 / kPack, kTaps, kStride>(c, vector, j), j += 2;
    if (c.columns & 1) correlate_columns<1, 1, kTaps, kStride>(c, vector, j);
  }
}

template <int kPack, typename S>
DSSP_INLINE void correlate(const Correlation<S>& c) {
  if (c.stride == 1 && c.taps.count == 3) return correlate_in_groups<kPack, 3, 1>(c);
  if (c.stride == 1 && c.taps.count == 5) return correlate_in_groups<kPack, 5, 1>(c);
  if (c.stride == 1) return correlate_in_groups<kPack, 0, 1>(c);
  if (c.stride == 2) return correlate_in_groups<1, 0, 2>(c);
  return correlate_in_groups<1, 0, 0>(c);
}

// One output row's share of the weight gradient: gradients[tap] += sum_j grad[j] * source[j * stride + tap * dilation]
template <typename S>
struct Contribution {
  const S *grad, *source;
  TapRows rows;
  int64_t taps, stride, dilation, columns, vectors;
  S* gradients;
  int64_t grad_vector, source_vector, gradient_vector;  // distances between vectors
};

// kRows kernel rows of kTaps taps, their sums in registers: columns begin..end, a whole number of packs.
template <int kPack, int kRows, int kTaps, int kDilation, typename S>
DSSP_INLINE void contribute_columns(const Contribution<S>& c, int64_t vector, int64_t first_row, int64_t begin,
                                    int64_t end) {
  using P = Pack<S, kPack>;
  constexpr int64_t width = Lanes<S>::width;
  const S* grad = c.grad + vector * c.grad_vector;
  const int64_t stride = c.stride * width;
  const S* from[kRows];
  typename P::Vector sums[kRows][kTaps] = {};
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    from[r] = c.source + vector * c.source_vector + c.rows.sources[first_row + r] + begin * stride;
  }
  for (int64_t j = begin; j < end; j += kPack) {
    const typename P::Vector g = P::load(grad + j * width);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int t = 0; t < kTaps; ++t) sums[r][t] += g * P::load(from[r] + t * kDilation * width);
      from[r] += kPack * stride;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    S* to = c.gradients + vector * c.gradient_vector + c.rows.taps[first_row + r] * width;
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; ++t) {
      typename Lanes<S>::Vector sum = Lanes<S>::load(to + t * width);
#pragma GCC unroll 2
      for (int k = 0; k < kPack; ++k) sum += P::part(sums[r][t], k);
      Lanes<S>::store(to + t * width, sum);
    }
  }
}

template <int kPack, int kRows, int kTaps, int kDilation, typename S>
DSSP_INLINE void contribute_rows(const Contribution<S>& c, int64_t vector, int64_t first_row) {
  if constexpr (kPack > 1) {
    const int64_t packed = c.stride == 1 ? c.columns / kPack * kPack : 0;  // columns of a pack are neighbours
    if (packed) contribute_columns<kPack, kRows, kTaps, kDilation>(c, vector, first_row, 0, packed);
    if (packed < c.columns) contribute_columns<1, kRows, kTaps, kDilation>(c, vector, first_row, packed, c.columns);
  } else {
    contribute_columns<1, kRows, kTaps, kDilation>(c, vector, first_row, 0, c.columns);
  }
}

// As many kernel rows at a time as 16 registers hold the sums of.
template <int kPack, int kTaps, int kDilation, typename S>
DSSP_INLINE void contribute_taps(const Contribution<S>& c) {
  constexpr int kRows = kTaps == 7 ? 2 : 3;
  for (int64_t vector = 0; vector < c.vectors; ++vector) {
    int64_t row = 0;
    for (; row + kRows <= c.rows.count; row += kRows) contribute_rows<kPack, kRows, kTaps, kDilation>(c, vector, row);
    if (row + 2 <= c.rows.count) contribute_rows<kPack, 2, kTaps, kDilation>(c, vector, row), row += 2;
    if (row < c.rows.count) contribute_rows<kPack, 1, kTaps, kDilation>(c, vector, row);
  }
}

// Any kernel: a tap at a time.
template <typename S>
DSSP_INLINE void contribute_any(const Contribution<S>& c) {
  using V = typename Lanes<S>::Vector;
  constexpr int64_t width = Lanes<S>::width;
  for (int64_t vector = 0; vector < c.vectors; ++vector) {
    const S* grad = c.grad + vector * c.grad_vector;
    for (int64_t i = 0; i < c.rows.count * c.taps; ++i) {
      const int64_t row = i / c.taps, tap = i % c.taps;
      const S* from = c.source + vector * c.source_vector + c.rows.sources[row] + tap * c.dilation * width;
      S* to = c.gradients + vector * c.gradient_vector + (c.rows.taps[row] + tap) * width;
      V sum = {};
      for (int64_t j = 0; j < c.columns; ++j) {
        sum += Lanes<S>::load(grad + j * width) * Lanes<S>::load(from + j * c.stride * width);
      }
      Lanes<S>::store(to, Lanes<S>::load(to) + sum);
    }
  }
}

template <int kPack, typename S>
DSSP_INLINE void contribute(const Contribution<S>& c) {
  switch (c.dilation <= 2 ? 10 * c.taps + c.dilation : 0) {
    case 31: return contribute_taps<kPack, 3, 1>(c);
    case 32: return contribute_taps<kPack, 3, 2>(c);
    case 51: return contribute_taps<kPack, 5, 1>(c);
    case 52: return contribute_taps<kPack, 5, 2>(c);
    case 71: return contribute_taps<kPack, 7, 1>(c);
    case 72: return contribute_taps<kPack, 7, 2>(c);
    default: return contribute_any(c);
  }
}

// ---- the same, as calls --------------------------------------------------------------------------------------------

template <typename S>
void correlate_loop(const Correlation<S>& work) {
  with_best_vectors([&](auto pack) DSSP_INLINE_LAMBDA { correlate<pack()>(work); });
}

template <typename S>
void contribute_loop(const Contribution<S>& work) {
  with_best_vectors([&](auto pack) DSSP_INLINE_LAMBDA { contribute<pack()>(work); });
}

}  // namespace
}  // namespace dssp
