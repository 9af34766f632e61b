// batch_norm_mixed_sum on the CPU: y = sum_ek c[e,k] norm_ek(o[e,k]) and its gradients, vectorised and multi-threaded.
//
// Forward: one pass over the entries for their statistics, one that adds them up. Backward: one pass for every sum over
// a channel, one that writes the gradients. Both passes are made over as many entries as the cache holds, then over the
// next ones: memory is read once. Entries are read as deviations from their channel's mean, never as
// scale * o + shift: with means far larger than the deviations that would cancel.
//
// Registered for the CPU key through the LibTorch stable ABI (torch >= 2.10); op.py has checked the arguments: all
// entries share one shape [B, C, H, W], dtype and dense strides.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <unistd.h>

#include <cmath>
#include <tuple>

#include "cpu_loops.h"

namespace dssp {
namespace {

using Tensors = std::vector<Tensor>;

enum Kind : int64_t { kPlain, kRunning, kBatch };  // as in reference.py

constexpr int64_t kCachedBytes = 12 << 20;  // of tensors that a second pass finds in a large cache; see cached_ranges()

// ---- entries and their statistics ----------------------------------------------------------------------------------

const Tensor* entry_of(const Entries& entries, int64_t i) {  // lists without any entry stand for lists of None
  return entries.empty() || !entries[i] ? nullptr : &*entries[i];
}

template <typename Scalar>
const Scalar* data_of(const Tensor& tensor) {
  return static_cast<const Scalar*>(tensor.const_data_ptr());
}

// What an entry goes through, per channel: y += coefficient * ((o - mean) * inverse * weight + bias).
struct Channels {
  std::vector<double> mean, inverse, weight, bias;

  Channels(int64_t channels, const double* means, const double* variances, bool normalised, double eps,
           const Tensor* weights, const Tensor* biases)
      : mean(means, means + channels), inverse(channels, 1.0), weight(channels, 1.0), bias(channels, 0.0) {
    if (!normalised) return;
    for (int64_t c = 0; c < channels; ++c) inverse[c] = 1.0 / std::sqrt(variances[c] + eps);
    if (weights) weight = read_scalars(*weights);
    if (biases) bias = read_scalars(*biases);
  }
};

// Entries begin .. end.
struct Range {
  int64_t begin, end;
};

// Tables of one kind of coefficient, one per entry of a range.
template <typename Scalar>
class Tables {
 public:
  Tables(const Walk& walk, Range range)
      : walk_(walk), begin_(range.begin), values_((range.end - range.begin) * walk.lanes) {}

  // Stores the values, rounded, and returns what the rounding has left of each.
  const Sum<Scalar>* fill(int64_t entry, const std::vector<double>& values) {
    Sum<Scalar>* table = values_.data() + (entry - begin_) * walk_.lanes;
    walk_.spread(values.data(), table);
    return table;
  }

 private:
  const Walk& walk_;
  int64_t begin_;
  std::vector<Sum<Scalar>> values_;
};

template <typename Scalar>
double rounding_error(double value) {  // of keeping the value in a table
  return value - static_cast<double>(static_cast<Sum<Scalar>>(value));
}

// Bytes of tensors that a second pass finds in the cache that all cores share. Others use it too: half of it counts.
int64_t cached_bytes() {
#ifdef _SC_LEVEL3_CACHE_SIZE
  static const int64_t cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (cache > 0) return std::min(kCachedBytes, cache / 2);
#endif
  return kCachedBytes;
}

// Splits the entries so that those of a range that are read fit into the cache beside one more tensor, the gradient or
// the sum. Where fewer than `least` would fit they are left together.
std::vector<Range> cached_ranges(const Flags& is_read, int64_t tensor_bytes, int64_t least) {
  const int64_t entries = is_read.size(), fitting = cached_bytes() / std::max<int64_t>(tensor_bytes, 1) - 1;
  std::vector<Range> ranges{{0, entries}};
  if (fitting < least) return ranges;
  for (int64_t i = 0, count = 0; i < entries; ++i) {
    if (!is_read[i] || ++count <= fitting) continue;
    ranges.back().end = i;
    ranges.push_back({i, entries});
    count = 1;
  }
  return ranges;
}

// Mean and variance [entries, channels] of the range's entries that are normalised by their batch.
template <typename Scalar>
void batch_statistics(const Walk& walk, const Entries& outputs, Range range, const Flags& from_batch, double* mean,
                      double* variance) {
  Integers batch;
  for (int64_t i = range.begin; i < range.end; ++i) {
    if (from_batch[i]) batch.push_back(i);
  }
  if (batch.empty()) return;
  const int64_t count = batch.size(), per_chunk = walk.channels * count;
  std::vector<Deviations> partial(walk.chunks * per_chunk);
  walk.for_chunks(count, false, [&](int64_t chunk, int64_t first, int64_t last) {
    LaneDeviations lanes(walk.lanes);
    for (int64_t b = 0; b < count; ++b) {
      lanes.clear();
      deviations_loop(data_of<Scalar>(*outputs[batch[b]]), walk, first, last, lanes);
      Deviations* sums = partial.data() + chunk * per_chunk + b * walk.channels;
      for (int64_t lane = 0; lane < walk.lanes; ++lane) {
        const Deviations from = lanes.at(lane);
        if (from.count > 0) sums[walk.channel[lane]].add(from.count, from.reference, from.sum, from.square);
      }
    }
  });
  for (int64_t b = 0; b < count; ++b) {
    for (int64_t c = 0; c < walk.channels; ++c) {
      Deviations all;
      for (int64_t chunk = 0; chunk < walk.chunks; ++chunk) {
        const Deviations& from = partial[chunk * per_chunk + b * walk.channels + c];
        if (from.count > 0) all.add(from.count, from.reference, from.sum, from.square);
      }
      if (all.count == 0) continue;
      const double offset = all.sum / all.count;
      mean[batch[b] * walk.channels + c] = all.reference + offset;
      variance[batch[b] * walk.channels + c] = std::max(all.square / all.count - offset * offset, 0.0);
    }
  }
}

// ---- the two passes that know all entries --------------------------------------------------------------------------

// What the operators are told about the norms, with the mixture's coefficients.
struct Norms {
  const Entries &weights, &biases;
  const Integers& kinds;
  const Doubles& eps;
  const double *mean, *variance;  // [entries, channels]

  Channels channels(int64_t i, int64_t count) const {
    return Channels(count, mean + i * count, variance + i * count, kinds[i] != kPlain, eps[i], entry_of(weights, i),
                    entry_of(biases, i));
  }
};

// The mix of the range's live entries; that of a range after the first is added to the result.
template <typename Scalar>
void forward(const Walk& walk, const Entries& outputs, Range range, const Mixture& mixture, const Norms& norms,
             Tensor& result) {
  std::vector<Term<Scalar>> terms;
  Tables<Scalar> means(walk, range), scales(walk, range), constants(walk, {0, 2});
  Doubles constant(walk.channels, 0.0), scale(walk.channels);
  for (int64_t i = range.begin; i < range.end; ++i) {
    if (!outputs[i] || !mixture.is_active(i)) continue;
    const Channels of = norms.channels(i, walk.channels);
    for (int64_t c = 0; c < walk.channels; ++c) {
      scale[c] = mixture.coefficients[i] * of.inverse[c] * of.weight[c];
      constant[c] += mixture.coefficients[i] * of.bias[c] - scale[c] * rounding_error<Scalar>(of.mean[c]);
    }
    terms.push_back({data_of<Scalar>(*outputs[i]), means.fill(i, of.mean), scales.fill(i, scale)});
  }
  const Sum<Scalar>* constant_table = constants.fill(0, constant);  // and one of zeros after it
  auto* out = static_cast<Scalar*>(result.mutable_data_ptr());
  const bool add = range.begin > 0, is_whole = !add && range.end == static_cast<int64_t>(outputs.size());
  const bool streamed = is_whole && static_cast<int64_t>(sizeof(Scalar)) * walk.elements >= kStreamedBytes;
  walk.for_chunks(terms.size() + 1, true, [&](int64_t, int64_t first, int64_t last) {
    terms_loop(terms.data(), terms.size(), constant_table, walk, first, last, out, add, streamed);
  });
}

// Sums over a channel: of the gradient, and per entry that is read of its products with (o - mean).
struct ChannelSums {
  Doubles grad;                   // [channels]
  std::vector<Doubles> products;  // [entries][channels], zeros where an entry was not read
};

// Fills in the products of the range's entries and, with those of the first range, the sums of the gradient.
template <typename Scalar>
void channel_sums(const Walk& walk, const Tensor& grad, const Entries& outputs, Range range, const Flags& is_read,
                  const Norms& norms, ChannelSums& sums) {
  std::vector<Term<Scalar>> terms;
  Integers term_entries;
  Tables<Scalar> means(walk, range);
  for (int64_t i = range.begin; i < range.end; ++i) {
    if (!is_read[i]) continue;
    const double* mean = norms.mean + i * walk.channels;
    terms.push_back({data_of<Scalar>(*outputs[i]), means.fill(i, Doubles(mean, mean + walk.channels)), nullptr});
    term_entries.push_back(i);
  }
  const bool sum_grad = range.begin == 0;
  const int64_t columns = terms.size() + 1, per_chunk = columns * walk.channels;
  Doubles partial(walk.chunks * per_chunk, 0.0);
  walk.for_chunks(columns, false, [&](int64_t chunk, int64_t first, int64_t last) {
    Doubles lanes(columns * walk.lanes, 0.0);
    products_loop(data_of<Scalar>(grad), terms.data(), terms.size(), sum_grad, walk, first, last, lanes.data());
    for (int64_t column = 0; column < columns; ++column) {
      double* sums = partial.data() + chunk * per_chunk + column * walk.channels;
      for (int64_t lane = 0; lane < walk.lanes; ++lane) sums[walk.channel[lane]] += lanes[column * walk.lanes + lane];
    }
  });
  Doubles total(per_chunk, 0.0);
  for (int64_t chunk = 0; chunk < walk.chunks; ++chunk) {
    for (int64_t i = 0; i < per_chunk; ++i) total[i] += partial[chunk * per_chunk + i];
  }
  const auto column = [&](int64_t k) {
    return Doubles(total.begin() + k * walk.channels, total.begin() + (k + 1) * walk.channels);
  };
  if (sum_grad) sums.grad = column(0);
  for (size_t k = 0; k < terms.size(); ++k) {
    const int64_t i = term_entries[k];
    sums.products[i] = column(k + 1);
    for (int64_t c = 0; c < walk.channels; ++c) {  // the mean itself, instead of what of it fits into a table
      sums.products[i][c] -= rounding_error<Scalar>(norms.mean[i * walk.channels + c]) * sums.grad[c];
    }
  }
}

template <typename Scalar>
void write_output_gradients(const Walk& walk, const Tensor& grad, const Entries& outputs, Range range,
                            const Mixture& mixture, const Norms& norms, const ChannelSums& sums,
                            const Entries& d_outputs) {
  const double count = walk.elements_per_channel();
  std::vector<Gradient<Scalar>> gradients;
  Tables<Scalar> means(walk, range), scales(walk, range), constants(walk, range), slopes(walk, range);
  Doubles scale(walk.channels), constant(walk.channels), slope(walk.channels);
  for (int64_t i = range.begin; i < range.end; ++i) {
    if (!d_outputs[i]) continue;
    auto* d_output = static_cast<Scalar*>(d_outputs[i]->mutable_data_ptr());
    gradients.push_back({nullptr, d_output, nullptr, nullptr, nullptr, nullptr});
    if (!mixture.is_active(i)) continue;
    Gradient<Scalar>& gradient = gradients.back();
    const Channels of = norms.channels(i, walk.channels);
    for (int64_t c = 0; c < walk.channels; ++c) {
      scale[c] = mixture.coefficients[i] * of.inverse[c] * of.weight[c];
      slope[c] = -scale[c] * of.inverse[c] * of.inverse[c] * sums.products[i][c] / count;
      constant[c] = -scale[c] * sums.grad[c] / count - slope[c] * rounding_error<Scalar>(of.mean[c]);
    }
    gradient.scale = scales.fill(i, scale);
    if (norms.kinds[i] != kBatch) continue;
    gradient.input = data_of<Scalar>(*outputs[i]);
    gradient.mean = means.fill(i, of.mean);
    gradient.constant = constants.fill(i, constant);
    gradient.slope = slopes.fill(i, slope);
  }
  if (gradients.empty()) return;
  const int64_t written = std::count_if(d_outputs.begin(), d_outputs.end(), [](const auto& d) { return d.has_value(); });
  const bool streamed = static_cast<int64_t>(written * sizeof(Scalar)) * walk.elements >= kStreamedBytes;
  walk.for_chunks(2 * gradients.size(), true, [&](int64_t, int64_t first, int64_t last) {
    gradients_loop(data_of<Scalar>(grad), gradients.data(), gradients.size(), walk, first, last, streamed);
  });
}

// ---- the registered operators --------------------------------------------------------------------------------------

Tensor empty_statistics(int64_t entries, int64_t channels, double value) {
  const int64_t sizes[] = {entries, channels}, strides[] = {channels, 1};
  Tensor result = empty_strided({sizes, 2}, {strides, 2}, aoti_torch_dtype_float64());
  std::fill_n(static_cast<double*>(result.mutable_data_ptr()), entries * channels, value);
  return result;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_mixed_sum_forward(
    Entries outputs, Tensor alpha, std::optional<Tensor> mask, std::optional<Tensor> active, Entries weights,
    Entries biases, Entries running_means, Entries running_variances, Integers kinds, Doubles eps, bool softmax) {
  const auto present = std::find_if(outputs.begin(), outputs.end(), [](const auto& o) { return o.has_value(); });
  STD_TORCH_CHECK(present != outputs.end(), "batch_norm_mixed_sum_forward: at least one entry must be a tensor");
  const Mixture mixture(outputs.size(), alpha, mask, active, softmax);
  Tensor result = empty_as(**present);
  const int64_t entries = outputs.size(), channels = result.size(1);
  Tensor means = empty_statistics(entries, channels, 0.0), variances = empty_statistics(entries, channels, 1.0);
  auto* mean = static_cast<double*>(means.mutable_data_ptr());
  auto* variance = static_cast<double*>(variances.mutable_data_ptr());
  Flags is_read(entries), from_batch(entries);
  for (int64_t i = 0; i < entries; ++i) {
    is_read[i] = outputs[i] && mixture.is_active(i);
    from_batch[i] = is_read[i] && kinds[i] == kBatch;
    if (!is_read[i] || kinds[i] != kRunning) continue;
    const Tensor *running_mean = entry_of(running_means, i), *running_variance = entry_of(running_variances, i);
    STD_TORCH_CHECK(running_mean && running_variance, "batch_norm_mixed_sum_forward: no running statistics");
    const Doubles m = read_scalars(*running_mean), v = read_scalars(*running_variance);
    std::copy(m.begin(), m.end(), mean + i * channels);
    std::copy(v.begin(), v.end(), variance + i * channels);
  }
  if (result.numel() == 0) return {result, means, variances};
  with_storage(result.scalar_type(), [&](auto scalar) {
    using Scalar = decltype(scalar);
    const Walk walk(result, Lanes<Scalar>::width);
    const Norms norms{weights, biases, kinds, eps, mean, variance};
    // A pass without another needs no cache, and a sum wider than what is stored must not be rounded between ranges.
    // Each range costs a read and a write of the sum: under four entries that is more than it saves.
    const bool is_split = std::is_same_v<Scalar, Sum<Scalar>> && std::count(from_batch.begin(), from_batch.end(), true);
    std::vector<Range> ranges{{0, entries}};
    if (is_split) ranges = cached_ranges(is_read, result.numel() * sizeof(Scalar), 4);
    for (const Range range : ranges) {
      batch_statistics<Scalar>(walk, outputs, range, from_batch, mean, variance);
      forward<Scalar>(walk, outputs, range, mixture, norms, result);
    }
  });
  return {result, means, variances};
}

std::tuple<Tensors, Tensor, Tensor> batch_norm_mixed_sum_backward(
    Tensor grad, Entries outputs, Tensor alpha, std::optional<Tensor> mask, std::optional<Tensor> active,
    Entries weights, Entries biases, Tensor means, Tensor variances, Integers kinds, Doubles eps, bool softmax,
    Flags needs_output_grad, Flags needs_weight_grad, Flags needs_bias_grad, bool needs_parameter_grad) {
  Mixture mixture(outputs.size(), alpha, mask, active, softmax);
  const int64_t entries = outputs.size(), channels = grad.size(1);
  const Norms norms{weights, biases, kinds, eps, data_of<double>(means), data_of<double>(variances)};
  Tensors requested;
  Entries d_outputs(entries);
  Flags is_read(entries);
  bool needs_sums = needs_parameter_grad;
  for (int64_t i = 0; i < entries; ++i) {
    const bool from_batch = kinds[i] == kBatch && needs_output_grad[i];
    const bool needs_products = needs_parameter_grad || from_batch || needs_weight_grad[i];
    is_read[i] = needs_products && outputs[i] && mixture.is_active(i);
    needs_sums = needs_sums || is_read[i] || needs_bias_grad[i];
    if (!needs_output_grad[i]) continue;
    d_outputs[i] = empty_as(grad);
    requested.push_back(*d_outputs[i]);
  }
  ChannelSums sums{Doubles(channels, 0.0), std::vector<Doubles>(entries, Doubles(channels, 0.0))};
  if (grad.numel() > 0) {
    with_storage(grad.scalar_type(), [&](auto scalar) {
      using Scalar = decltype(scalar);
      const Walk walk(grad, Lanes<Scalar>::width);
      for (const Range range : cached_ranges(is_read, grad.numel() * sizeof(Scalar), 1)) {
        if (needs_sums) channel_sums<Scalar>(walk, grad, outputs, range, is_read, norms, sums);
        write_output_gradients<Scalar>(walk, grad, outputs, range, mixture, norms, sums, d_outputs);
      }
    });
  }

  Doubles dots(entries, 0.0);  // <grad, entry as it enters the mix>
  std::vector<Doubles> d_weights(entries), d_biases(entries);
  for (int64_t i = 0; i < entries; ++i) {
    const Channels of = norms.channels(i, channels);
    const auto scaled = [&](double sum) { return mixture.is_active(i) ? mixture.coefficients[i] * sum : 0.0; };
    for (int64_t c = 0; c < channels; ++c) {
      const double product = of.inverse[c] * sums.products[i][c];  // <grad, (o - mean) / sqrt(variance + eps)>
      if (is_read[i]) dots[i] += of.weight[c] * product + of.bias[c] * sums.grad[c];
      if (needs_weight_grad[i]) d_weights[i].push_back(scaled(product));
      if (needs_bias_grad[i]) d_biases[i].push_back(scaled(sums.grad[c]));
    }
  }
  for (int64_t i = 0; i < entries; ++i) {
    if (needs_weight_grad[i]) requested.push_back(write_scalars(d_weights[i], *weights[i]));
  }
  for (int64_t i = 0; i < entries; ++i) {
    if (needs_bias_grad[i]) requested.push_back(write_scalars(d_biases[i], *biases[i]));
  }
  if (!needs_parameter_grad) return {requested, no_elements(alpha), no_elements(alpha)};
  Doubles d_mask(mixture.edges, 0.0);
  Tensor d_alpha = write_scalars(mixture.parameter_gradients(dots, softmax, d_mask), alpha);
  return {requested, d_alpha, mask ? write_scalars(d_mask, *mask) : no_elements(alpha)};
}

void update(Tensor& running, const double* values, int64_t channels, double factor, double share) {
  Doubles updated = read_scalars(running);
  for (int64_t c = 0; c < channels; ++c) updated[c] = (1.0 - share) * updated[c] + share * factor * values[c];
  write_scalars_into(running, updated);
}

void batch_norm_update_running_statistics(Tensors running_means, Tensors running_variances, Tensors counters,
                                          Tensor mean, Tensor variance, std::optional<Tensor> active,
                                          Integers entries, Doubles momenta, int64_t count) {
  const int64_t channels = mean.size(1), edges = active ? active->numel() : 1, candidates = mean.size(0) / edges;
  const auto* is_active = active ? static_cast<const bool*>(active->const_data_ptr()) : nullptr;
  const double unbiased = static_cast<double>(count) / static_cast<double>(std::max<int64_t>(count - 1, 1));
  for (size_t i = 0; i < entries.size(); ++i) {
    if (is_active && !is_active[entries[i] / candidates]) continue;
    const int64_t batches = ++*static_cast<int64_t*>(counters[i].mutable_data_ptr());
    if (count == 0) continue;
    const double share = momenta[i] < 0 ? 1.0 / static_cast<double>(batches) : momenta[i];
    const int64_t row = entries[i] * channels;
    update(running_means[i], data_of<double>(mean) + row, channels, 1.0, share);
    update(running_variances[i], data_of<double>(variance) + row, channels, unbiased, share);
  }
}

}  // namespace
}  // namespace dssp

STABLE_TORCH_LIBRARY_IMPL(dssp_kernels, CPU, library) {
  library.impl("batch_norm_mixed_sum_forward", TORCH_BOX(&dssp::batch_norm_mixed_sum_forward));
  library.impl("batch_norm_mixed_sum_backward", TORCH_BOX(&dssp::batch_norm_mixed_sum_backward));
  library.impl("batch_norm_update_running_statistics", TORCH_BOX(&dssp::batch_norm_update_running_statistics));
}
