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

template <typename S>
DSSP_INLINE void add_moments(const Moments<S>& m) {
  using V = typename Lanes<S>::Vector;
  constexpr int64_t width = Lanes<S>::width;
  for (int64_t vector = 0; vector < m.vectors; ++vector) {
    const V shift = Lanes<S>::load(m.shift + vector * width);
    V first = {}, second = {};
    for (int64_t j = 0; j < m.columns; ++j) {
      const V from_a = Lanes<S>::load(m.a.at(vector, j)) - shift;
      first += from_a;
      second += from_a * (Lanes<S>::load(m.b.at(vector, j)) - shift);
    }
    add_to_doubles(m.first + vector * width, first);
    add_to_doubles(m.second + vector * width, second);
  }
}

template <typename S>
void moments_loop(const Moments<S>& m) {
  with_best_vectors([&](auto) DSSP_INLINE_LAMBDA { add_moments<S>(m); });
}

}  // namespace
}  // namespace dssp
