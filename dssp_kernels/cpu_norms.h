// BatchNorm along a row, forward and backward, once its statistics are known.
#pragma once

#include "cpu_moments.h"

namespace dssp {
namespace {

// to = (a - constant) * scale per channel. [vector][lane] each.
template <typename S>
struct Normalisation {
  SumRow<const S> a;
  SumRow<S> to;
  const S *constant, *scale;
  int64_t vectors, columns;
};

template <typename S>
DSSP_INLINE void normalise(const Normalisation<S>& n) {
  using V = typename Lanes<S>::Vector;
  constexpr int64_t width = Lanes<S>::width;
  for (int64_t vector = 0; vector < n.vectors; ++vector) {
    const V constant = Lanes<S>::load(n.constant + vector * width), scale = Lanes<S>::load(n.scale + vector * width);
    for (int64_t j = 0; j < n.columns; ++j) {
      Lanes<S>::store(n.to.at(vector, j), (Lanes<S>::load(n.a.at(vector, j)) - constant) * scale);
    }
  }
}

// to = (grad - constant - y * slope) * scale per channel. [vector][lane] each.
template <typename S>
struct NormGradient {
  SumRow<const S> grad, y;
  SumRow<S> to;
  const S *constant, *slope, *scale;
  int64_t vectors, columns;
};

template <typename S>
DSSP_INLINE void take_through_norm(const NormGradient<S>& n) {
  using V = typename Lanes<S>::Vector;
  constexpr int64_t width = Lanes<S>::width;
  for (int64_t vector = 0; vector < n.vectors; ++vector) {
    const V constant = Lanes<S>::load(n.constant + vector * width), slope = Lanes<S>::load(n.slope + vector * width);
    const V scale = Lanes<S>::load(n.scale + vector * width);
    for (int64_t j = 0; j < n.columns; ++j) {
      const V grad = Lanes<S>::load(n.grad.at(vector, j)), y = Lanes<S>::load(n.y.at(vector, j));
      Lanes<S>::store(n.to.at(vector, j), (grad - constant - y * slope) * scale);
    }
  }
}

template <typename S>
void normalise_loop(const Normalisation<S>& n) {
  with_best_vectors([&](auto) DSSP_INLINE_LAMBDA { normalise<S>(n); });
}

template <typename S>
void norm_gradient_loop(const NormGradient<S>& n) {
  with_best_vectors([&](auto) DSSP_INLINE_LAMBDA { take_through_norm<S>(n); });
}

}  // namespace
}  // namespace dssp
