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
#include "../depthwise_conv/cpu_bands.h"
#include "cpu_windows.h"

namespace dssp {
namespace {

// ---- images --------------------------------------------------------------------------------------------------------

struct Pool {
  Geometry g;
  bool is_max, counts_padding;
};

// An image as vectors of channels.
template <typename S>
struct SumImage {
  S* data;
  int64_t row, vector, column;  // distances

  SumRow<S> at(int64_t r) const { return {data + r * row, vector, column}; }
};

// The images of a tensor, one at a time, as sums: where they lie if that is what they are, else widened in a buffer.
template <typename Scalar>
struct SumImages {
  using S = Sum<Scalar>;
  static constexpr int64_t width = Lanes<Scalar>::width;
  Images<Scalar> images;
  int64_t channels, rows, columns;
  bool in_place;
  Buffer<S> buffer;

  SumImages(const Tensor& tensor, Scalar* data)
      : images{data, tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)}, channels(tensor.size(1)),
        rows(tensor.size(2)), columns(tensor.size(3)),
        in_place(std::is_same_v<Scalar, S> && images.channel == 1 && channels % width == 0),
        buffer(in_place ? 0 : rows * row_size()) {}

  int64_t row_size() const { return ceil_div(channels, width) * width * columns; }

  SumImage<S> at(int64_t image) {  // of a buffer: as it was left
    if (in_place) return {reinterpret_cast<S*>(images.at(image, 0, 0, 0)), images.row, width, images.column};
    return {buffer.data(), row_size(), columns * width, width};
  }
  SumImage<const S> load(int64_t image) {
    const auto sums = at(image);
    for (int64_t r = 0; r < rows && !in_place; ++r) {
      load_row_loop<Scalar>({images.at(image, 0, r, 0), images.channel, images.column, channels, columns,
                             sums.at(r).data, sums.vector});
    }
    return {sums.data, sums.row, sums.vector, sums.column};
  }
  SumImage<S> zeros(int64_t image) {
    const auto sums = at(image);
    const int64_t size = in_place ? columns * channels : row_size();
    for (int64_t r = 0; r < rows; ++r) std::fill_n(sums.at(r).data, size, S(0));
    return sums;
  }
  void store(int64_t image) {
    const auto sums = at(image);
    for (int64_t r = 0; r < rows && !in_place; ++r) {
      store_row_loop<Scalar>({images.at(image, 0, r, 0), images.channel, images.column, channels, columns,
                              sums.at(r).data, sums.vector});
    }
  }
};

template <typename Scalar>
SumImages<Scalar> read_only(const Tensor& tensor) {
  return {tensor, const_cast<Scalar*>(static_cast<const Scalar*>(tensor.const_data_ptr()))};
}

template <typename Scalar>
SumImages<Scalar> writable(Tensor& tensor) {
  return {tensor, static_cast<Scalar*>(tensor.mutable_data_ptr())};
}

// What the passes over a tensor of outputs need to know; channels are padded to whole vectors.
template <typename Scalar>
struct Outputs {
  using S = Sum<Scalar>;
  const Pool& pool;
  const Geometry& g = pool.g;
  int64_t vectors = ceil_div(g.channels, Lanes<Scalar>::width);
  int64_t lanes = vectors * Lanes<Scalar>::width;
  int64_t rows = g.rows.outputs, columns = g.columns.outputs;
  int64_t image = rows * columns * lanes;
  int64_t per_channel = g.batch * rows * columns;  // elements

  template <typename Use>
  void for_images(Use use) const {  // use(first, last)
    torch::stable::parallel_for(0, g.batch, kGrain / (image / Lanes<Scalar>::width * g.taps() + 1) + 1, use);
  }

  template <typename Pixel>
  Pooling<Pixel, S> pooling(const SumImage<Pixel>& pixels, int64_t row, const SumRow<S>& pooled,
                            uint8_t* positions) const {
    const Window window(g.rows, row);
    return {pixels.at(window.first), pixels.row, window.last - window.first, window.tap, g.columns, vectors, g.taps(),
            pool.counts_padding, pooled, positions ? positions + row * columns * lanes : nullptr};
  }
};

// Close to the means over all rows, seen from far away: the moments about them do not cancel.
template <typename Scalar>
Buffer<Sum<Scalar>> means_of_first_row(const Outputs<Scalar>& of, const Tensor& x, uint8_t* positions) {
  using S = Sum<Scalar>;
  ChannelSums sums = {1, of.lanes};
  Buffer<S> means(of.lanes, S(0)), row(of.columns * of.lanes);
  const SumRow<S> pooled = {row.data(), of.columns * Lanes<Scalar>::width, Lanes<Scalar>::width};
  const SumRow<const S> from = {pooled.data, pooled.vector, pooled.column};
  auto inputs = read_only<Scalar>(x);
  const auto p = of.pooling(inputs.load(0), 0, pooled, positions);
  of.pool.is_max ? max_loop(p) : average_loop(p);
  moments_loop<Sum<Scalar>>({from, from, means.data(), of.vectors, of.columns, sums.first(0), sums.second(0)});
  for (int64_t lane = 0; lane < of.lanes; ++lane) {
    const S mean = static_cast<S>(sums.total(0, lane) / of.columns);
    means[lane] = std::isfinite(mean) ? mean : S(0);
  }
  return means;
}

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
  const double count = of.per_channel;
  for (int64_t c = 0; c < pool.g.channels; ++c) {
    const double deviation = moments.total(0, c) / count;
    const double spread = moments.total(1, c) / count - deviation * deviation;
    const double biased = spread < 0 ? 0.0 : spread;  // NaN stays NaN
    means[c] = static_cast<S>(shift[c] + deviation);
    scales[c] = static_cast<S>(1.0 / std::sqrt(biased + eps));
    static_cast<S*>(mean.mutable_data_ptr())[c] = means[c];
    static_cast<S*>(variance.mutable_data_ptr())[c] = static_cast<S>(biased * count / (count - 1));
    static_cast<S*>(scale.mutable_data_ptr())[c] = scales[c];
  }
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

Pool pool_of(const Tensor& x, bool is_max, const Pair& kernel, const Pair& stride, const Pair& padding,
             bool counts_padding) {
  const auto axis = [&](int64_t i) -> Axis {
    const int64_t inputs = x.size(2 + i);
    return {inputs, (inputs + 2 * padding[i] - kernel[i]) / stride[i] + 1, kernel[i], stride[i], padding[i], 1};
  };
  return {{x.size(0), x.size(1), axis(0), axis(1)}, is_max, counts_padding};
}

uint8_t* bytes_of(const Tensor& positions) {
  return positions.numel() ? static_cast<uint8_t*>(positions.mutable_data_ptr()) : nullptr;
}

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
