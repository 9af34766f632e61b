// pointwise_batch_norm on the CPU: y = (z - mean(z)) / sqrt(var(z) + eps) per channel, z = conv2d(relu(x), weight), 1x1.
//
// Some pixels at a time, close by in the cache: forward, they are rectified, multiplied, and their moments added up; a
// second pass normalises in place. Backward, one pass finds the two sums over a channel; the other takes pixels of the
// gradient through the norm, through the weights and through the ReLU, and multiplies them with what x was. Nothing is
// kept between but y.
//
// Registered for the CPU key through the LibTorch stable ABI (torch >= 2.10); op.py has checked the arguments, and that
// the tensors are dense, in channels_last memory, of sums' own type, and their channels whole vectors.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../cpu_norms.h"
#include "../cpu_pointwise.h"
#include "../cpu_statistics.h"
#include "../depthwise_conv/cpu_bands.h"

namespace dssp {
namespace {

constexpr int64_t kPixels = 64;  // at a time

// The pixels of a dense channels_last tensor.
template <typename S>
struct Pixels {
  static constexpr int64_t width = Lanes<std::remove_const_t<S>>::width;
  S* data;
  int64_t channels, vectors = channels / width;

  S* at(int64_t pixel) const { return data + pixel * channels; }
  SumRow<S> row(int64_t pixel) const { return {at(pixel), width, channels}; }
};

template <typename S>
Pixels<const S> read_pixels(const Tensor& tensor) {
  return {static_cast<const S*>(tensor.const_data_ptr()), tensor.size(1)};
}

template <typename S>
Pixels<S> write_pixels(Tensor& tensor) {
  return {static_cast<S*>(tensor.mutable_data_ptr()), tensor.size(1)};
}

template <typename S>
SumRow<const S> constant(const SumRow<S>& row) {
  return {row.data, row.vector, row.column};
}

// How the pixels of a batch are cut, by their number alone: results do not depend on the number of threads.
struct Cut {
  int64_t rows, columns;
  Parts parts;

  Cut(const Tensor& x, int64_t outputs, int64_t most)
      : rows(x.size(2)), columns(x.size(3)),
        parts(x.size(0), rows, rows * columns * ceil_div(x.size(1), 8) * outputs, most) {}

  template <typename Use>
  void for_parts(Use use) const {  // use(first part, last part + 1), from several threads
    torch::stable::parallel_for(0, parts.count, 1, use);
  }
  template <typename Use>
  void for_pixels(int64_t part, Use use) const {  // use(first pixel, how many)
    const auto [begin, end] = parts.rows(part, rows);
    for (int64_t image = parts.first_image(part); image < parts.first_image(part + parts.bands); ++image) {
      const int64_t last = (image * rows + end) * columns;
      for (int64_t pixel = (image * rows + begin) * columns; pixel < last; pixel += kPixels) {
        use(pixel, std::min(kPixels, last - pixel));
      }
    }
  }
};

template <typename S>
struct Rows {  // to[pixel][channel] = relu(from), or from where `rectified` is not 0
  const S *from, *rectified;
  S* to;
  int64_t size;
};

template <typename S>
void rectify_loop(const Rows<S>& r) {
  with_best_vectors([&](auto) DSSP_INLINE_LAMBDA {
    for (int64_t i = 0; i < r.size; i += Lanes<S>::width) {
      Lanes<S>::store(r.to + i, rectified(Lanes<S>::load(r.from + i)));
    }
  });
}

template <typename S>
void mask_loop(const Rows<S>& r) {  // the derivative of ReLU as in PyTorch: NaN in x lets gradients through
  with_best_vectors([&](auto) DSSP_INLINE_LAMBDA {
    for (int64_t i = 0; i < r.size; i += Lanes<S>::width) {
      const auto value = Lanes<S>::load(r.from + i);
      Lanes<S>::store(r.to + i, Lanes<S>::load(r.rectified + i) == 0 ? typename Lanes<S>::Vector{} : value);
    }
  });
}

// ---- the whole tensors ---------------------------------------------------------------------------------------------

template <typename S>
void forward(const Tensor& x, const Tensor& weight, bool relu, double eps, Tensor& y, Tensor& means, Tensor& variances,
             Tensor& scales) {
  constexpr int64_t width = Lanes<S>::width;
  const Cut cut(x, y.size(1), kMaxParts);
  const auto from = read_pixels<S>(x);
  const auto to = write_pixels<S>(y);
  const auto weights = packed_pointwise<S>(weight, false);
  PartMoments<S> moments(cut.parts.count, to.vectors);
  cut.for_parts([&](int64_t begin, int64_t end) {
    Buffer<S> loaded(kPixels * from.channels);  // [vector][pixel][lane]
    for (int64_t part = begin; part < end; ++part) {
      cut.for_pixels(part, [&](int64_t pixel, int64_t count) {
        const Row<const S, S> row = {from.at(pixel), 1, from.channels, from.channels, count, loaded.data(),
                                     kPixels * width};
        relu ? load_row_loop<S>(row, Rectified()) : load_row_loop<S>(row);
        const auto results = to.row(pixel);
        multiply_loop<S>({loaded.data(), weights.data(), count, from.channels, to.vectors, results.data,
                          kPixels * width, results.vector, results.column});
        moments.add(part, constant(results), count);
      });
    }
  });
  moments.write(eps, means, variances, scales);
  const S *mean = static_cast<const S*>(means.const_data_ptr()), *scale = static_cast<const S*>(scales.const_data_ptr());
  cut.for_parts([&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      cut.for_pixels(part, [&](int64_t pixel, int64_t count) {
        normalise_loop<S>({constant(to.row(pixel)), to.row(pixel), mean, scale, to.vectors, count});
      });
    }
  });
}

// sum(grad) and sum(grad * y) per channel.
template <typename S>
ChannelSums gradient_sums(const Cut& cut, const Pixels<const S>& grad, const Pixels<const S>& y) {
  ChannelSums sums = {cut.parts.count, y.channels};
  const Buffer<S> no_shift(y.channels, S(0));
  cut.for_parts([&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      cut.for_pixels(part, [&](int64_t pixel, int64_t count) {
        moments_loop<S>({grad.row(pixel), y.row(pixel), no_shift.data(), y.vectors, count, sums.first(part),
                         sums.second(part)});
      });
    }
  });
  return sums;
}

// d_z = (grad - mean(grad) - y * mean(grad * y)) * scale; d_x = weight^T d_z where relu(x) > 0; d_weight = d_z relu(x)^T.
template <typename S>
void backward(const Tensor& grads, const Tensor& x, const Tensor& y, const Tensor& scales, const Tensor& weight,
              bool relu, Tensor* d_x, Tensor* d_weight) {
  constexpr int64_t width = Lanes<S>::width;
  const int64_t products = weight.size(0) * weight.size(1);
  const Cut cut(x, y.size(1), std::clamp<int64_t>(kPartialSums / products, 8, kMaxParts));
  const auto from = read_pixels<S>(x), result = read_pixels<S>(y), grad = read_pixels<S>(grads);
  const auto sums = gradient_sums<S>(cut, grad, result);
  const double count_of_all = x.size(0) * x.size(2) * x.size(3);
  Buffer<S> constants(result.channels), slopes(result.channels);
  for (int64_t c = 0; c < result.channels; ++c) {
    constants[c] = static_cast<S>(sums.total(0, c) / count_of_all);
    slopes[c] = static_cast<S>(sums.total(1, c) / count_of_all);
  }
  const S* scale = static_cast<const S*>(scales.const_data_ptr());
  const auto weights = packed_pointwise<S>(weight, true);
  const auto to = d_x ? write_pixels<S>(*d_x) : Pixels<S>{nullptr, from.channels};
  UnsetBuffer<S> partial(d_weight ? cut.parts.count * products : 0);
  cut.for_parts([&](int64_t begin, int64_t end) {
    Buffer<S> d_z(kPixels * result.channels), loaded(relu ? kPixels * from.channels : 0);
    for (int64_t part = begin; part < end; ++part) {
      if (d_weight) std::fill_n(partial.data() + part * products, products, S(0));
      cut.for_pixels(part, [&](int64_t pixel, int64_t count) {
        const SumRow<S> row = {d_z.data(), kPixels * width, width};
        norm_gradient_loop<S>({grad.row(pixel), result.row(pixel), row, constants.data(), slopes.data(), scale,
                               result.vectors, count});
        const S* source = from.at(pixel);
        if (relu) {
          rectify_loop<S>({source, nullptr, loaded.data(), count * from.channels});
          source = loaded.data();
        }
        if (d_weight) {
          accumulate_loop<S>({source, d_z.data(), count, from.vectors, result.channels,
                              partial.data() + part * products, kPixels * width});
        }
        if (!d_x) return;
        multiply_loop<S>({d_z.data(), weights.data(), count, result.channels, to.vectors, to.at(pixel),
                          kPixels * width, width, to.channels});
        if (relu) mask_loop<S>({to.at(pixel), source, to.at(pixel), count * to.channels});
      });
    }
  });
  if (d_weight) write_pointwise_gradient<S>(partial, cut.parts.count, *d_weight);
}

// ---- the registered operators --------------------------------------------------------------------------------------

template <typename Use>
void with_sums(ScalarType type, Use use) {
  type == ScalarType::Double ? use(double{}) : use(float{});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pointwise_batch_norm_forward(Tensor x, Tensor weight, bool relu, double eps) {
  const int32_t dtype = dtype_of(x);
  const int64_t outputs = weight.size(0);
  Tensor y = empty_images(x, outputs, x.size(2), x.size(3));
  Tensor mean = empty_vector(outputs, dtype), variance = empty_vector(outputs, dtype);
  Tensor scale = empty_vector(outputs, dtype);
  with_sums(x.scalar_type(), [&](auto scalar) {
    forward<decltype(scalar)>(x, weight, relu, eps, y, mean, variance, scale);
  });
  return {y, mean, variance, scale};
}

std::tuple<Tensor, Tensor> pointwise_batch_norm_backward(Tensor grad, Tensor x, Tensor y, Tensor scale, Tensor weight,
                                                         bool relu, bool needs_input_grad, bool needs_weight_grad) {
  const int64_t channels = x.size(1);
  Tensor d_x = needs_input_grad ? empty_as(x) : no_elements(x);
  Tensor d_weight = needs_weight_grad
                        ? empty_strided({weight.size(0), channels, 1, 1}, {channels, 1, 1, 1}, dtype_of(x))
                        : no_elements(x);
  with_sums(x.scalar_type(), [&](auto scalar) {
    backward<decltype(scalar)>(grad, x, y, scale, weight, relu, needs_input_grad ? &d_x : nullptr,
                               needs_weight_grad ? &d_weight : nullptr);
  });
  return {d_x, d_weight};
}

}  // namespace
}  // namespace dssp

STABLE_TORCH_LIBRARY_IMPL(dssp_kernels, CPU, library) {
  library.impl("pointwise_batch_norm_forward", TORCH_BOX(&dssp::pointwise_batch_norm_forward));
  library.impl("pointwise_batch_norm_backward", TORCH_BOX(&dssp::pointwise_batch_norm_backward));
}
