// Pools of whole tensors: their images as sums, and what a pass over their outputs needs to know.
#pragma once

#include <cmath>

#include "../depthwise_conv/cpu_bands.h"
#include "cpu_windows.h"

namespace dssp {
namespace {

// ---- images --------------------------------------------------------------------------------------------------------

struct Pool {
  Geometry g;
  bool is_max, counts_padding;
};

inline Pool pool_of(const Tensor& x, bool is_max, const Pair& kernel, const Pair& stride, const Pair& padding,
                    bool counts_padding) {
  const auto axis = [&](int64_t i) -> Axis {
    const int64_t inputs = x.size(2 + i);
    return {inputs, (inputs + 2 * padding[i] - kernel[i]) / stride[i] + 1, kernel[i], stride[i], padding[i], 1};
  };
  return {{x.size(0), x.size(1), axis(0), axis(1)}, is_max, counts_padding};
}

inline uint8_t* bytes_of(const Tensor& positions) {
  return positions.numel() ? static_cast<uint8_t*>(positions.mutable_data_ptr()) : nullptr;
}

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

// The mean and 1 / sqrt(biased variance + eps) of each channel, from its moments about `shift`; also as [C] tensors, and
// the unbiased variance, for running statistics.
template <typename S>
void write_statistics(const ChannelSums& moments, const Buffer<S>& shift, double count, double eps, Buffer<S>& means,
                      Buffer<S>& scales, Tensor& mean, Tensor& variance, Tensor& scale) {
  for (int64_t c = 0; c < mean.size(0); ++c) {
    const double deviation = moments.total(0, c) / count;
    const double spread = moments.total(1, c) / count - deviation * deviation;
    const double biased = spread < 0 ? 0.0 : spread;  // NaN stays NaN
    means[c] = static_cast<S>(shift[c] + deviation);
    scales[c] = static_cast<S>(1.0 / std::sqrt(biased + eps));
    static_cast<S*>(mean.mutable_data_ptr())[c] = means[c];
    static_cast<S*>(variance.mutable_data_ptr())[c] = static_cast<S>(biased * count / (count - 1));
    static_cast<S*>(scale.mutable_data_ptr())[c] = scales[c];
  }
}

}  // namespace
}  // namespace dssp
