// What the CPU kernels of a mixture share: the small side (alpha, mask, active).
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "cpu_tensors.h"

namespace dssp {

using Entries = std::vector<std::optional<Tensor>>;
using Flags = std::vector<bool>;

constexpr int64_t kStreams = 8;  // inputs that a forward pass reads at once: prefetchers do not follow many more

// ---- the small side: alpha, mask, active ---------------------------------------------------------------------------

// Elements lie one after the other, or a stride apart in a vector.
inline int64_t step_of(const Tensor& tensor) { return tensor.dim() == 1 ? tensor.stride(0) : 1; }

inline std::vector<double> read_scalars(const Tensor& tensor) {
  const int64_t step = step_of(tensor);
  std::vector<double> values(tensor.numel());
  with_storage(tensor.scalar_type(), [&](auto scalar) {
    using Scalar = decltype(scalar);
    const auto* data = static_cast<const Scalar*>(tensor.const_data_ptr());
    for (size_t i = 0; i < values.size(); ++i) values[i] = load_first(data + i * step, 1)[0];
  });
  return values;
}

inline void write_scalars_into(Tensor& result, const std::vector<double>& values) {
  const int64_t step = step_of(result);
  with_storage(result.scalar_type(), [&](auto scalar) {
    using Scalar = decltype(scalar);
    auto* data = static_cast<Scalar*>(result.mutable_data_ptr());
    for (size_t i = 0; i < values.size(); ++i) {
      typename Lanes<Scalar>::Vector value = {};
      value[0] = static_cast<typename Lanes<Scalar>::Sum>(values[i]);
      store_first(data + i * step, value, 1);
    }
  });
}

inline Tensor write_scalars(const std::vector<double>& values, const Tensor& like) {
  Tensor result = empty_as(like);
  write_scalars_into(result, values);
  return result;
}

// Weights and gates of E edges with K candidates each, and the coefficients c[e,k] = active[e] gate[e] weight[e,k].
struct Mixture {
  int64_t edges, candidates;
  std::vector<double> weights, gates, coefficients;
  Flags active;

  Mixture(int64_t entries, const Tensor& alpha, const std::optional<Tensor>& mask,
          const std::optional<Tensor>& active_flags, bool softmax)
      : edges(alpha.dim() == 2 ? alpha.size(0) : 1),
        candidates(entries / edges),
        weights(read_scalars(alpha)),
        gates(edges, 1.0),
        coefficients(entries),
        active(edges, true) {
    if (softmax) {
      for (int64_t e = 0; e < edges; ++e) softmax_in_place(weights.data() + e * candidates);
    }
    if (mask) {
      gates = read_scalars(*mask);
      for (double& gate : gates) gate = 1.0 / (1.0 + std::exp(-gate));
    }
    if (active_flags) {
      const auto* flags = static_cast<const bool*>(active_flags->const_data_ptr());
      active.assign(flags, flags + edges);
    }
    for (int64_t i = 0; i < entries; ++i) coefficients[i] = gates[i / candidates] * weights[i];
  }

  bool is_active(int64_t entry) const { return active[entry / candidates]; }

  // dots[e,k] = <grad, o[e,k]>  ->  d alpha (returned) and d mask
  std::vector<double> parameter_gradients(const std::vector<double>& dots, bool softmax, std::vector<double>& d_mask) {
    std::vector<double> d_alpha(weights.size(), 0.0);
    for (int64_t e = 0; e < edges; ++e) {
      if (!active[e]) continue;
      double mean = 0;  // sum_k w d: what the edge's mix contributes, before its gate
      for (int64_t i = e * candidates; i < (e + 1) * candidates; ++i) mean += weights[i] * dots[i];
      d_mask[e] = gates[e] * (1.0 - gates[e]) * mean;
      for (int64_t i = e * candidates; i < (e + 1) * candidates; ++i) {
        d_alpha[i] = softmax ? coefficients[i] * (dots[i] - mean) : gates[e] * dots[i];
      }
    }
    return d_alpha;
  }

 private:
  void softmax_in_place(double* row) const {
    const double largest = *std::max_element(row, row + candidates);
    double sum = 0;
    for (int64_t k = 0; k < candidates; ++k) sum += row[k] = std::exp(row[k] - largest);
    for (int64_t k = 0; k < candidates; ++k) row[k] /= sum;
  }
};

}  // namespace dssp
