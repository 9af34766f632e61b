// The weights of pointwise convolutions, packed for cpu_products.h, and their gradient.
#pragma once

#include "cpu_moments.h"
#include "cpu_products.h"
#include "depthwise_conv/cpu_rows.h"

namespace dssp {
namespace {

constexpr int64_t kPartialSums = 64 * 1024;  // of the pointwise weights' gradient, over all parts of the batch

template <typename Scalar>
int64_t vectors_of(int64_t channels) {
  return ceil_div(channels, Lanes<Scalar>::width);
}

// [C_out, C_in, 1, 1] -> [in][out], transposed: [out][in]; zeros up to whole vectors
template <typename Scalar>
Buffer<Sum<Scalar>> packed_pointwise(const Tensor& weight, bool transposed) {
  constexpr int64_t width = Lanes<Scalar>::width;
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const int64_t all_outputs = vectors_of<Scalar>(outputs) * width, all_inputs = vectors_of<Scalar>(inputs) * width;
  Buffer<Sum<Scalar>> packed(all_outputs * all_inputs);
  const auto from = read_images<Scalar>(weight);
  for (int64_t out = 0; out < outputs; ++out) {
    for (int64_t in = 0; in < inputs; ++in) {
      packed[transposed ? out * all_inputs + in : in * all_outputs + out] = widened(*from.at(out, in, 0, 0));
    }
  }
  return packed;
}

// partial [part][out][in], whole vectors of each -> [C_out, C_in, 1, 1], summed over the parts in order
template <typename Scalar>
void write_pointwise_gradient(const UnsetBuffer<Sum<Scalar>>& partial, int64_t parts, Tensor& d_weight) {
  constexpr int64_t width = Lanes<Scalar>::width;
  const auto total = summed_parts(partial, parts);
  const int64_t outputs = d_weight.size(0), inputs = d_weight.size(1), all = vectors_of<Scalar>(inputs) * width;
  const auto to = write_images<Scalar>(d_weight);
  for (int64_t out = 0; out < outputs; ++out) {
    for (int64_t in = 0; in < inputs; ++in) {
      const double value = parts ? total[out * all + in] : 0.0;
      *to.at(out, in, 0, 0) = narrowed<Scalar>(static_cast<Sum<Scalar>>(value));
    }
  }
}

}  // namespace
}  // namespace dssp
