// Products of rows and pointwise weights, and of rows and rows: pointwise convolutions and their gradients.
#pragma once

#include "cpu_tensors.h"

namespace dssp {
namespace {

// results[column][out] = sum_in source[column][in] * weights[in][out] for one row
template <typename S>
struct Product {
  const S *source, *weights;  // source: [in vector][column][lane]
  int64_t columns, inputs, vectors;  // inputs: a whole number of vectors; vectors: of outputs
  S* results;
  int64_t source_vector, result_vector, result_column;  // distances between vectors and between columns
};

// kColumns columns by kPacks packs of kPack output vectors.
template <int kPack, int kColumns, int kPacks, typename S>
DSSP_INLINE void multiply_columns(const Product<S>& p, int64_t vector, int64_t column) {
  using P = Pack<S, kPack>;
  constexpr int64_t width = Lanes<S>::width;
  const S* weights = p.weights + vector * width;
  typename P::Vector sums[kColumns][kPacks] = {};
  for (int64_t in = 0; in < p.inputs; in += width) {
    const S* source = p.source + in / width * p.source_vector + column * width;
    for (int64_t lane = 0; lane < width; ++lane) {
      typename P::Vector w[kPacks];
#pragma GCC unroll 2
      for (int i = 0; i < kPacks; ++i) w[i] = P::load(weights + i * kPack * width);
      weights += p.vectors * width;
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) {
        const S value = source[j * width + lane];
#pragma GCC unroll 2
        for (int i = 0; i < kPacks; ++i) sums[j][i] += value * w[i];
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kColumns; ++j) {
    S* to = p.results + vector * p.result_vector + (column + j) * p.result_column;
#pragma GCC unroll 2
    for (int i = 0; i < kPacks * kPack; ++i) {
      Lanes<S>::store(to + i * p.result_vector, P::part(sums[j][i / kPack], i % kPack));
    }
  }
}

// Eight sums are the fewest that hide the latency of the multiply-add.
template <int kPack, int kPacks, typename S>
DSSP_INLINE void multiply_vectors(const Product<S>& p, int64_t vector) {
  int64_t j = 0;
  if constexpr (kPacks == 1) {
    for (; p.columns - j >= 8; j += 8) multiply_columns<kPack, 8, 1>(p, vector, j);
  } else {  // twelve are as many as 16 registers hold
    for (; p.columns - j >= 10 || p.columns - j == 6; j += 6) multiply_columns<kPack, 6, kPacks>(p, vector, j);
  }
  for (; p.columns - j >= 4; j += 4) multiply_columns<kPack, 4, kPacks>(p, vector, j);
  for (; j < p.columns; ++j) multiply_columns<kPack, 1, kPacks>(p, vector, j);
}

template <int kPack, typename S>
DSSP_INLINE void multiply(const Product<S>& p) {
  int64_t vector = 0;
  for (; vector + 2 <= p.vectors; vector += 2) multiply_vectors<kPack, 2 / kPack>(p, vector);
  if (vector < p.vectors) multiply_vectors<1, 1>(p, vector);
}

// gradients[out][in] += sum over columns of grad[column][out] * source[column][in] for one row
template <typename S>
struct OuterProduct {
  const S *source, *grad;  // source: [column][in]; grad: [out vector][column][lane]
  int64_t columns, vectors, outputs;  // vectors: of inputs; outputs: a whole number of vectors
  S* gradients;
  int64_t grad_vector;  // distance between vectors
};

template <int kPack, int kPacks, typename S>
DSSP_INLINE void accumulate_vectors(const OuterProduct<S>& p, int64_t vector) {
  using P = Pack<S, kPack>;
  constexpr int64_t width = Lanes<S>::width;
  constexpr int kOutputs = kPack == 1 ? 4 : width;  // divides a vector
  const int64_t inputs = p.vectors * width;
  for (int64_t out = 0; out < p.outputs; out += kOutputs) {
    const S* source = p.source + vector * width;
    const S* grad = p.grad + out / width * p.grad_vector + out % width;
    typename P::Vector sums[kOutputs][kPacks] = {};
    for (int64_t j = 0; j < p.columns; ++j) {
      typename P::Vector x[kPacks];
#pragma GCC unroll 2
      for (int k = 0; k < kPacks; ++k) x[k] = P::load(source + k * kPack * width);
      source += inputs;
#pragma GCC unroll 8
      for (int i = 0; i < kOutputs; ++i) {
        const S value = grad[j * width + i];
#pragma GCC unroll 2
        for (int k = 0; k < kPacks; ++k) sums[i][k] += value * x[k];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kOutputs; ++i) {
#pragma GCC unroll 2
      for (int k = 0; k < kPacks * kPack; ++k) {
        S* to = p.gradients + (out + i) * inputs + (vector + k) * width;
        Lanes<S>::store(to, Lanes<S>::load(to) + P::part(sums[i][k / kPack], k % kPack));
      }
    }
  }
}

template <int kPack, typename S>
DSSP_INLINE void accumulate(const OuterProduct<S>& p) {
  int64_t vector = 0;
  for (; vector + 2 <= p.vectors; vector += 2) accumulate_vectors<kPack, 2 / kPack>(p, vector);
  if (vector < p.vectors) accumulate_vectors<1, 1>(p, vector);
}

// ---- the same, as calls --------------------------------------------------------------------------------------------

template <typename S>
void multiply_loop(const Product<S>& work) {
  with_best_vectors([&](auto pack) DSSP_INLINE_LAMBDA { multiply<pack()>(work); });
}

template <typename S>
void accumulate_loop(const OuterProduct<S>& work) {
  with_best_vectors([&](auto pack) DSSP_INLINE_LAMBDA { accumulate<pack()>(work); });
}

}  // namespace
}  // namespace dssp
