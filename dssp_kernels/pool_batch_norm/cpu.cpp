// pool_batch_norm on the CPU: y = (p - mean(p)) / sqrt(var(p) + eps) per channel, p = max_pool2d(x) or avg_pool2d(x).
//
// Forward: one pass pools a row at a time and adds up its moments, one normalises in place. Backward: one pass for the
// two sums over a channel, one that takes a row of the gradient through the norm and hands it to the pixels that were
// pooled. Between x and y nothing is kept but, of a maximum, which pixel of its window it was: a byte.
//
// Registered for the CPU key through the LibTorch stable ABI (torch >= 2.10); op.py has checked the arguments.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>

#include "../cpu_norms.h"
#include "cpu_pools.h"

namespace dssp {
namespace {

// y = pool(x), where its pixels came from, and its moments about `shift`.
template <typename Scalar>
ChannelSums pool_images(const Outputs<Scalar>& of, const Tensor& x, const Buffer<Sum<Scalar>>& shift, Tensor& y,
                        uint8_t* positions) {
  ChannelSums moments = {of.g.batch, of.lanes};
  of.for_images([&](int64_t begin, int64_t end) {
    auto inputs = read_only<Scalar>(x), outputs = writable<Scalar>(y);
    for (int64_t image = begin; image < end; ++image) {
      const auto pixels = inputs.load(image);
      const auto pooled = outputs.at(image);
      for (int64_t row = 0; row < of.rows; ++row) {
        const auto to = pooled.at(row);
        const auto p = of.pooling(pixels, row, to, positions ? positions + image * of.image : nullptr);
        of.pool.is_max ? max_loop(p) : average_loop(p);
        const SumRow<const Sum<Scalar>> from = {to.data, to.vector, to.column};
        moments_loop<Sum<Scalar>>({from, from, shift.data(), of.vectors, of.columns, moments.first(image),
                                   moments.second(image)});
      }
      outputs.store(image);
    }
  });
  return moments;
}

template <typename Scalar>
void normalise_images(const Outputs<Scalar>& of, const Buffer<Sum<Scalar>>& mean, const Buffer<Sum<Scalar>>& scale,
                      Tensor& y) {
  of.for_images([&](int64_t begin, int64_t end) {
    auto outputs = writable<Scalar>(y);
    for (int64_t image = begin; image < end; ++image) {
      const auto from = outputs.load(image);
      const auto to = outputs.at(image);
      for (int64_t row = 0; row < of.rows; ++row) {
        normalise_loop<Sum<Scalar>>({from.at(row), to.at(row), mean.data(), scale.data(), of.vectors, of.columns});
      }
      outputs.store(image);
    }
  });
}

// sum(grad) and sum(grad * y) per channel.
template <typename Scalar>
ChannelSums gradient_sums(const Outputs<Scalar>& of, const Tensor& grad, const Tensor& y) {
  ChannelSums sums = {of.g.batch, of.lanes};
  const Buffer<Sum<Scalar>> no_shift(of.lanes, Sum<Scalar>(0));
  of.for_images([&](int64_t begin, int64_t end) {
    auto gradients = read_only<Scalar>(grad), outputs = read_only<Scalar>(y);
    for (int64_t image = begin; image < end; ++image) {
      const auto a = gradients.load(image), b = outputs.load(image);
      for (int64_t row = 0; row < of.rows; ++row) {
        moments_loop<Sum<Scalar>>({a.at(row), b.at(row), no_shift.data(), of.vectors, of.columns, sums.first(image),
                                   sums.second(image)});
      }
    }
  });
  return sums;
}

// Takes rows of the gradient through the norm and adds them to the pixels that were pooled.
template <typename Scalar>
void pixel_gradients(const Outputs<Scalar>& of, const Tensor& grad, const Tensor& y, const Sum<Scalar>* constant,
                     const Sum<Scalar>* slope, const Sum<Scalar>* scale, uint8_t* positions, Tensor& d_x) {
  of.for_images([&](int64_t begin, int64_t end) {
    auto gradients = read_only<Scalar>(grad), outputs = read_only<Scalar>(y), inputs = writable<Scalar>(d_x);
    Buffer<Sum<Scalar>> buffer(of.columns * of.lanes);
    const SumRow<Sum<Scalar>> pooled = {buffer.data(), of.columns * Lanes<Scalar>::width, Lanes<Scalar>::width};
    for (int64_t image = begin; image < end; ++image) {
      const auto from = gradients.load(image), normalised = outputs.load(image);
      const auto pixels = inputs.zeros(image);
      for (int64_t row = 0; row < of.rows; ++row) {
        norm_gradient_loop<Sum<Scalar>>({from.at(row), normalised.at(row), pooled, constant, slope, scale, of.vectors,
                                         of.columns});
        const auto p = of.pooling(pixels, row, pooled, positions ? positions + image * of.image : nullptr);
        of.pool.is_max ? max_gradient_loop(p) : average_gradient_loop(p);
      }
      inputs.store(image);
    }
  });
}

// ---- the whole tensors ---------------------------------------------------------------------------------------------

// `mean` and `variance` [C] (unbiased, for the running statistics) and `scale` [C] = 1 / sqrt(biased variance + eps).
template <typename Scalar>
void forward(const Pool& pool, const Tensor& x, double eps, Tensor& y, uint8_t* positions, Tensor& mean,
             Tensor& variance, Tensor& scale) {
  using S = Sum<Scalar>;
  const Outputs<Scalar> of = {pool};
  const auto shift = means_of_first_row(of, x, positions);
  const auto moments = pool_images(of, x, shift, y, positions);
  Buffer<S> means(of.lanes, S(0)), scales(of.lanes, S(0));
  write_statistics(moments, shift, of.per_channel, eps, means, scales, mean, variance, scale);
  normalise_images(of, means, scales, y);
}

// With p = pool(x): d_p = (grad - mean(grad) - y * mean(grad * y)) * scale; d_x adds up d_p over the windows.
template <typename Scalar>
void backward(const Pool& pool, const Tensor& grad, const Tensor& y, const Tensor& scale, uint8_t* positions,
              Tensor& d_x) {
  using S = Sum<Scalar>;
  const Outputs<Scalar> of = {pool};
  const auto sums = gradient_sums(of, grad, y);
  Buffer<S> constant(of.lanes, S(0)), slope(of.lanes, S(0)), scales(of.lanes, S(0));
  for (int64_t c = 0; c < pool.g.channels; ++c) {
    constant[c] = static_cast<S>(sums.total(0, c) / of.per_channel);
    slope[c] = static_cast<S>(sums.total(1, c) / of.per_channel);
    scales[c] = static_cast<const S*>(scale.const_data_ptr())[c];
  }
  pixel_gradients(of, grad, y, constant.data(), slope.data(), scales.data(), positions, d_x);
}

// ---- the registered operators --------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pool_batch_norm_forward(Tensor x, bool is_max, Pair kernel,
                                                                           Pair stride, Pair padding,
                                                                           bool counts_padding, double eps) {
  const Pool pool = pool_of(x, is_max, kernel, stride, padding, counts_padding);
  Tensor y = empty_images(x, pool.g.channels, pool.g.rows.outputs, pool.g.columns.outputs);
  Tensor positions = x, mean = x, variance = x, scale = x;
  with_storage(x.scalar_type(), [&](auto scalar) {
    using Scalar = decltype(scalar);
    positions = empty_vector(is_max ? pool.g.batch * Outputs<Scalar>{pool}.image : 0, aoti_torch_dtype_uint8());
    for (Tensor* statistic : {&mean, &variance, &scale}) {
      *statistic = empty_vector(pool.g.channels, dtype_of_sums<Scalar>());
    }
    forward<Scalar>(pool, x, eps, y, bytes_of(positions), mean, variance, scale);
  });
  return {y, positions, mean, variance, scale};
}

Tensor pool_batch_norm_backward(Tensor grad, Tensor x, Tensor y, Tensor positions, Tensor scale, bool is_max,
                                Pair kernel, Pair stride, Pair padding, bool counts_padding) {
  const Pool pool = pool_of(x, is_max, kernel, stride, padding, counts_padding);
  Tensor d_x = empty_images(x, pool.g.channels, pool.g.rows.inputs, pool.g.columns.inputs);
  with_storage(x.scalar_type(), [&](auto scalar_type) {
    backward<decltype(scalar_type)>(pool, grad, y, scale, bytes_of(positions), d_x);
  });
  return d_x;
}

}  // namespace
}  // namespace dssp

STABLE_TORCH_LIBRARY_IMPL(dssp_kernels, CPU, library) {
  library.impl("pool_batch_norm_forward", TORCH_BOX(&dssp::pool_batch_norm_forward));
  library.impl("pool_batch_norm_backward", TORCH_BOX(&dssp::pool_batch_norm_backward));
}
