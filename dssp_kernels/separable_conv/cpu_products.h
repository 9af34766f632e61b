// Products of rows and pointwise weights, and of rows and rows: the matrix side of a separable convolution.
#pragma once

#include "../cpu_tensors.h"

namespace dssp {
namespace {

// results[column][out] = sum_in source[column][in] * weights[in][out] for one row; everything in vectors of channels
template <typename S>
struct Product {
  const S *source, *weights;  // weights: [out vector][in][lane]
  int64_t columns, inputs, vectors;  // inputs: a whole number of vectors; vectors: of outputs
  S* results;
  int64_t source_vector, result_vector, result_column;  // distances between vectors and between columns
};

template <int kColumns, int kVectors, typename S>
DSSP_INLINE void multiply_columns(const Product<S>& p, int64_t vector, int64_t column) {
  using V = typename Lanes<S>::Vector;
  constexpr int64_t width = Lanes<S>::width;
  const S* weights = p.weights + vector * p.inputs * width;
  V sums[kColumns][kVectors] = {};
  for (int64_t in = 0; in < p.inputs; in += width) {
    const S* source = p.source + in / width * p.source_vector + column * width;
    for (int64_t lane = 0; lane < width; ++lane) {
      V w[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) w[v] = Lanes<S>::load(weights + (v * p.inputs + in + lane) * width);
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) {
        const S value = source[j * width + lane];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[j][v] += value * w[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kColumns; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      Lanes<S>::store(p.results + (vector + v) * p.result_vector + (column + j) * p.result_column, sums[j][v]);
    }
  }
}

template <int kVectors, typename S>
DSSP_INLINE void multiply_vectors(const Product<S>& p, int64_t vector) {
  // Twelve sums are as many as registers hold, eight the fewest that hide the latency of the multiply-add.
  int64_t j = 0;
  for (; p.columns - j >= 10 || p.columns - j == 6; j += 6) multiply_columns<6, kVectors>(p, vector, j);
  for (; p.columns - j >= 4; j += 4) multiply_columns<4, kVectors>(p, vector, j);
  for (; j < p.columns; ++j) multiply_columns<1, kVectors>(p, vector, j);
}

template <typename S>
DSSP_INLINE void multiply(const Product<S>& p) {
  int64_t vector = 0;
  for (; vector + 2 <= p.vectors; vector += 2) multiply_vectors<2>(p, vector);
  if (vector < p.vectors) multiply_vectors<1>(p, vector);
}

// gradients[in][out] += sum over columns of source[column][in] * grad[column][out] for one row
template <typename S>
struct OuterProduct {
  const S *source, *grad;
  int64_t columns, inputs, vectors;
  S* gradients;  // [out vector][in][lane]
  int64_t source_vector, grad_vector;
};

template <int kVectors, typename S>
DSSP_INLINE void accumulate_vectors(const OuterProduct<S>& p, int64_t vector) {
  using V = typename Lanes<S>::Vector;
  constexpr int64_t width = Lanes<S>::width;
  constexpr int kInputs = 4;  // divides a vector
  for (int64_t in = 0; in < p.inputs; in += kInputs) {
    const S* source = p.source + in / width * p.source_vector + in % width;
    const S* grad = p.grad + vector * p.grad_vector;
    V sums[kInputs][kVectors] = {};
    for (int64_t j = 0; j < p.columns; ++j) {
      V g[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) g[v] = Lanes<S>::load(grad + v * p.grad_vector + j * width);
#pragma GCC unroll 4
      for (int i = 0; i < kInputs; ++i) {
        const S value = source[j * width + i];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[i][v] += value * g[v];
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kInputs; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        S* to = p.gradients + ((vector + v) * p.inputs + in + i) * width;
        Lanes<S>::store(to, Lanes<S>::load(to) + sums[i][v]);
      }
    }
  }
}

template <typename S>
DSSP_INLINE void accumulate(const OuterProduct<S>& p) {
  int64_t vector = 0;
  for (; vector + 2 <= p.vectors; vector += 2) accumulate_vectors<2>(p, vector);
  if (vector < p.vectors) accumulate_vectors<1>(p, vector);
}

// target_clones takes no templates: plain functions, compiled for every instruction set.
#define DSSP_PRODUCT_LOOPS(S)                                            \
  DSSP_CLONES void multiply_loop(const Product<S>& p) { multiply<S>(p); } \
  DSSP_CLONES void accumulate_loop(const OuterProduct<S>& p) { accumulate<S>(p); }
DSSP_PRODUCT_LOOPS(float)
DSSP_PRODUCT_LOOPS(double)

}  // namespace
}  // namespace dssp
