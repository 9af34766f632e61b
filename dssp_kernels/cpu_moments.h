// Sums over parts of the batch, and moments of rows: what BatchNorm and the gradients of weights are made of.
#pragma once

#include <algorithm>

#include "cpu_tensors.h"

namespace dssp {
namespace {

// A row of pixels as vectors of channels: in a tensor whose elements are sums, or in a buffer [vector][column][lane].
template <typename S>
struct SumRow {
  S* data;
  int64_t vector, column;  // distances

  S* at(int64_t v, int64_t c) const { return data + v * vector + c * column; }
};

// Two sums per channel that each part of the batch adds to on its own: no result depends on who computed which part.
struct ChannelSums {
  int64_t parts, lanes;
  Buffer<double> sums = Buffer<double>(parts * 2 * lanes, 0.0);  // [part][sum][lane]

  double* first(int64_t part) { return sums.data() + part * 2 * lanes; }
  double* second(int64_t part) { return first(part) + lanes; }
  double at(int64_t part, int64_t which, int64_t lane) const { return sums[(part * 2 + which) * lanes + lane]; }
  double total(int64_t which, int64_t lane) const {
    double total = 0;
    for (int64_t part = 0; part < parts; ++part) total += at(part, which, lane);
    return total;
  }
};

DSSP_INLINE void add_to_doubles(double* sums, Vector4d value) {
  Lanes<double>::store(sums, Lanes<double>::load(sums) + value);
}
DSSP_INLINE void add_to_doubles(double* sums, Vector8f value) {
  using Doubles = double __attribute__((vector_size(64)));
  const Doubles total = load_unaligned<Doubles>(sums) + __builtin_convertvector(value, Doubles);
  std::memcpy(sums, &total, sizeof(total));
}

// Sums that every part of the batch has made for itself, whole vectors of them: [part][...], added up in their order.
template <typename S>
Buffer<double> summed_parts(const UnsetBuffer<S>& partial, int64_t parts) {
  const int64_t size = partial.size() / std::max<int64_t>(parts, 1);
  Buffer<double> total(size, 0.0);
  with_best_vectors([&](auto) DSSP_INLINE_LAMBDA {
    for (int64_t part = 0; part < parts; ++part) {
      const S* from = partial.data() + part * size;
      for (int64_t i = 0; i < size; i += Lanes<S>::width) add_to_doubles(total.data() + i, Lanes<S>::load(from + i));
    }
  });
  return total;
}

// Per channel, over one row: first += sum(a - shift), second += sum((a - shift) * (b - shift)); [vector][lane] each.
template <typename S>
struct Moments {
  SumRow<const S> a, b;
  const S* shift;
  int64_t vectors, columns;
  double *first, *second;
};

// kColumns columns at a time, with sums of their own: one sum alone would wait for itself.
template <int kColumns, typename S>
DSSP_INLINE void add_moments_of_columns(const Moments<S>& m, int64_t vector, int64_t begin, int64_t end) {
  using V = typename Lanes<S>::Vector;
  constexpr int64_t width = Lanes<S>::width;
  const V shift = Lanes<S>::load(m.shift + vector * width);
  V first[kColumns] = {}, second[kColumns] = {};
  for (int64_t j = begin; j < end; j += kColumns) {
#pragma GCC unroll 4
    for (int k = 0; k < kColumns; ++k) {
      const V from_a = Lanes<S>::load(m.a.at(vector, j + k)) - shift;
      first[k] += from_a;
      second[k] += from_a * (Lanes<S>::load(m.b.at(vector, j + k)) - shift);
    }
  }
  for (int k = 1; k < kColumns; ++k) {
    first[0] += first[k];
    second[0] += second[k];
  }
  add_to_doubles(m.first + vector * width, first[0]);
  add_to_doubles(m.second + vector * width, second[0]);
}

template <typename S>
DSSP_INLINE void add_moments(const Moments<S>& m) {
  const int64_t by_fours = m.columns / 4 * 4;
  for (int64_t vector = 0; vector < m.vectors; ++vector) {
    if (by_fours) add_moments_of_columns<4>(m, vector, 0, by_fours);
    if (by_fours < m.columns) add_moments_of_columns<1>(m, vector, by_fours, m.columns);
  }
}

template <typename S>
void moments_loop(const Moments<S>& m) {
  with_best_vectors([&](auto) DSSP_INLINE_LAMBDA { add_moments<S>(m); });
}

}  // namespace
}  // namespace dssp
