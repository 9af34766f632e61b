// Statistics of a BatchNorm from parts of the batch, found while the rows that it normalises are written.
#pragma once

#include <cmath>
#include <numeric>
#include <utility>

#include "cpu_moments.h"

namespace dssp {
namespace {

// Moments per channel that each part of the batch adds to on its own, about the mean of its first row: close to that of
// all, seen from far away, so they do not cancel.
template <typename S>
struct PartMoments {
  static constexpr int64_t width = Lanes<S>::width;
  int64_t parts, vectors, lanes = vectors * width;
  ChannelSums sums{parts, lanes};
  Buffer<S> shifts = Buffer<S>(parts * lanes, S(0));
  std::vector<int64_t> pixels = std::vector<int64_t>(parts, 0);

  PartMoments(int64_t parts, int64_t vectors) : parts(parts), vectors(vectors) {}

  void add(int64_t part, const SumRow<const S>& row, int64_t columns) {
    S* shift = shifts.data() + part * lanes;
    if (pixels[part] == 0) find_shift(row, columns, shift);
    moments_loop<S>({row, row, shift, vectors, columns, sums.first(part), sums.second(part)});
    pixels[part] += columns;
  }

  // Mean and biased variance of a channel.
  std::pair<double, double> statistics(int64_t channel) const {
    double count = 0, total = 0, spread = 0;
    for (int64_t part = 0; part < parts; ++part) {
      count += pixels[part];
      total += pixels[part] * static_cast<double>(shifts[part * lanes + channel]) + sums.at(part, 0, channel);
    }
    const double mean = total / count;
    for (int64_t part = 0; part < parts; ++part) {
      if (pixels[part] == 0) continue;
      const double within = sums.at(part, 0, channel) / pixels[part];
      const double between = shifts[part * lanes + channel] + within - mean;
      spread += sums.at(part, 1, channel) - pixels[part] * (within * within - between * between);
    }
    return {mean, spread < 0 ? 0.0 : spread / count};  // NaN stays NaN
  }

  // Into [C] each: mean, unbiased variance (for running statistics) and 1 / sqrt(biased variance + eps).
  void write(double eps, Tensor& means, Tensor& variances, Tensor& scales) const {
    const double count = std::accumulate(pixels.begin(), pixels.end(), 0.0);
    for (int64_t c = 0; c < means.size(0); ++c) {
      const auto [mean, variance] = statistics(c);
      static_cast<S*>(means.mutable_data_ptr())[c] = static_cast<S>(mean);
      static_cast<S*>(variances.mutable_data_ptr())[c] = static_cast<S>(variance * count / (count - 1));
      static_cast<S*>(scales.mutable_data_ptr())[c] = static_cast<S>(1.0 / std::sqrt(variance + eps));
    }
  }

 private:
  void find_shift(const SumRow<const S>& row, int64_t columns, S* shift) const {
    Buffer<double> totals(2 * lanes, 0.0);
    moments_loop<S>({row, row, shift, vectors, columns, totals.data(), totals.data() + lanes});
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const S mean = static_cast<S>(totals[lane] / columns);
      shift[lane] = std::isfinite(mean) ? mean : S(0);
    }
  }
};

}  // namespace
}  // namespace dssp
