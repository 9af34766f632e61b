// mixed_sum on the CPU: y = sum_ek c[e,k] o[e,k] and its gradients, vectorised and multi-threaded.
//
// Registered for the CPU key through the LibTorch stable ABI (torch >= 2.10): one build serves every later torch.
// op.py has checked the arguments: all entries share one shape, dtype and dense strides, so memory is walked flat.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../cpu_mixture.h"

namespace dssp {
namespace {

constexpr int64_t kBlock = 2048;       // elements; a block of the gradient stays in the first-level cache for all entries
constexpr int64_t kMaxChunks = 1024;   // partial sums per entry are at most this many, however large the tensors
constexpr int64_t kGrain = 32 * 1024;  // element visits below which a second thread costs more than it brings

// ---- the large side: entries ---------------------------------------------------------------------------------------

// out[i] = sum_k coefficients[k] * inputs[k][i]  for begin <= i < end; kAdd: added to what is there
template <bool kAdd, bool kStreamed, typename Scalar>
DSSP_INLINE void weighted_sum(const Scalar* const* inputs, const Sum<Scalar>* coefficients, int64_t count, Scalar* out,
                              int64_t begin, int64_t end) {
  using L = Lanes<Scalar>;
  using Vector = typename L::Vector;
  constexpr int64_t w = L::width;
  int64_t i = begin;
  for (; i + 4 * w <= end; i += 4 * w) {  // four sums in flight hide the latency of the multiply-add
    Vector a = {}, b = {}, c = {}, d = {};
    if constexpr (kAdd) {
      a = L::load(out + i), b = L::load(out + i + w), c = L::load(out + i + 2 * w), d = L::load(out + i + 3 * w);
    }
    for (int64_t k = 0; k < count; ++k) {
      const Scalar* input = inputs[k] + i;
      const Sum<Scalar> coefficient = coefficients[k];
      a += coefficient * L::load(input);
      b += coefficient * L::load(input + w);
      c += coefficient * L::load(input + 2 * w);
      d += coefficient * L::load(input + 3 * w);
    }
    store<kStreamed>(out + i, a);
    store<kStreamed>(out + i + w, b);
    store<kStreamed>(out + i + 2 * w, c);
    store<kStreamed>(out + i + 3 * w, d);
  }
  for (; i < end; i += w) {
    const int64_t rest = std::min(w, end - i);
    Vector a = {};
    if constexpr (kAdd) a = load_first(out + i, rest);
    for (int64_t k = 0; k < count; ++k) a += coefficients[k] * load_first(inputs[k] + i, rest);
    store_first(out + i, a, rest);
  }
}

// d_input[i] = coefficient * grad[i]  for i < count
template <bool kStreamed, typename Scalar>
DSSP_INLINE void scale(const Scalar* grad, Sum<Scalar> coefficient, Scalar* d_input, int64_t count) {
  using L = Lanes<Scalar>;
  int64_t i = 0;
  for (; i + L::width <= count; i += L::width) store<kStreamed>(d_input + i, coefficient * L::load(grad + i));
  if (i < count) store_first(d_input + i, coefficient * load_first(grad + i, count - i), count - i);
}

// <grad, input>, and on the way d_input = coefficient * grad unless d_input is null
template <bool kStreamed, typename Scalar>
DSSP_INLINE double dot_and_scale(const Scalar* grad, const Scalar* input, Sum<Scalar> coefficient, Scalar* d_input,
                                 int64_t count) {
  using L = Lanes<Scalar>;
  using Vector = typename L::Vector;
  constexpr int64_t w = L::width;
  Vector a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  for (; i + 4 * w <= count; i += 4 * w) {
    const Vector g0 = L::load(grad + i), g1 = L::load(grad + i + w);
    const Vector g2 = L::load(grad + i + 2 * w), g3 = L::load(grad + i + 3 * w);
    a += g0 * L::load(input + i);
    b += g1 * L::load(input + i + w);
    c += g2 * L::load(input + i + 2 * w);
    d += g3 * L::load(input + i + 3 * w);
    if (d_input) {
      store<kStreamed>(d_input + i, coefficient * g0);
      store<kStreamed>(d_input + i + w, coefficient * g1);
      store<kStreamed>(d_input + i + 2 * w, coefficient * g2);
      store<kStreamed>(d_input + i + 3 * w, coefficient * g3);
    }
  }
  for (; i < count; i += w) {
    const int64_t rest = std::min(w, count - i);
    const Vector g = load_first(grad + i, rest);
    a += g * load_first(input + i, rest);
    if (d_input) store_first(d_input + i, coefficient * g, rest);
  }
  return sum_of_lanes((a + b) + (c + d));
}

template <typename Scalar>
void weighted_sum_loop(const Scalar* const* inputs, const Sum<Scalar>* coefficients, int64_t count, Scalar* out,
                       int64_t begin, int64_t end, bool streamed) {
  with_best_vectors([&](auto) DSSP_INLINE_LAMBDA {
    streamed ? weighted_sum<false, true>(inputs, coefficients, count, out, begin, end)
             : weighted_sum<false, false>(inputs, coefficients, count, out, begin, end);
  });
}

template <typename Scalar>
void add_weighted_sum_loop(const Scalar* const* inputs, const Sum<Scalar>* coefficients, int64_t count, Scalar* out,
                           int64_t begin, int64_t end) {
  with_best_vectors([&](auto) DSSP_INLINE_LAMBDA {
    weighted_sum<true, false>(inputs, coefficients, count, out, begin, end);
  });
}

template <typename Scalar>
void scale_loop(const Scalar* grad, Sum<Scalar> coefficient, Scalar* d_input, int64_t count, bool streamed) {
  with_best_vectors([&](auto) DSSP_INLINE_LAMBDA {
    streamed ? scale<true>(grad, coefficient, d_input, count) : scale<false>(grad, coefficient, d_input, count);
  });
}

template <typename Scalar>
double dot_loop(const Scalar* grad, const Scalar* input, Sum<Scalar> coefficient, Scalar* d_input, int64_t count,
                bool streamed) {
  return with_best_vectors([&](auto) DSSP_INLINE_LAMBDA {
    if (!d_input) return dot_and_scale<false, Scalar>(grad, input, coefficient, nullptr, count);
    return streamed ? dot_and_scale<true>(grad, input, coefficient, d_input, count)
                    : dot_and_scale<false>(grad, input, coefficient, d_input, count);
  });
}

// Many inputs: a block at a time, which stays in the first-level cache, and of the inputs kStreams at a time. Where sums
// are wider than what is stored, all inputs at once: a sum must not be rounded in between.
template <typename Scalar>
void weighted_sum_in_groups(const Scalar* const* inputs, const Sum<Scalar>* coefficients, int64_t count, Scalar* out,
                            int64_t begin, int64_t end, bool streamed) {
  const int64_t groups = std::is_same_v<Scalar, Sum<Scalar>> ? (count + kStreams - 1) / kStreams : 1;
  if (groups <= 1) {
    weighted_sum_loop(inputs, coefficients, count, out, begin, end, streamed);
    if (streamed) finish_streaming();
    return;
  }
  const int64_t size = (count + groups - 1) / groups;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t last = std::min(end, first + kBlock);
    weighted_sum_loop(inputs, coefficients, size, out, first, last, false);
    for (int64_t k = size; k < count; k += size) {
      add_weighted_sum_loop(inputs + k, coefficients + k, std::min(size, count - k), out, first, last);
    }
  }
}

// What is live of the entries: the tensors that are there and whose edge is active, with their coefficients.
template <typename Scalar>
void forward(const Entries& outputs, const Mixture& mixture, Tensor& result) {
  std::vector<const Scalar*> inputs;
  std::vector<Sum<Scalar>> coefficients;
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!outputs[i] || !mixture.is_active(i)) continue;
    inputs.push_back(static_cast<const Scalar*>(outputs[i]->const_data_ptr()));
    coefficients.push_back(static_cast<Sum<Scalar>>(mixture.coefficients[i]));
  }
  auto* out = static_cast<Scalar*>(result.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(kGrain / (inputs.size() + 1), 1);
  const bool streamed = static_cast<int64_t>(sizeof(Scalar)) * result.numel() >= kStreamedBytes;
  torch::stable::parallel_for(0, result.numel(), grain, [&](int64_t begin, int64_t end) {
    weighted_sum_in_groups(inputs.data(), coefficients.data(), inputs.size(), out, begin, end, streamed);
  });
}

// Fills the requested gradients of the entries and returns the dots <grad, o[e,k]> (zeros where nobody needs them).
template <typename Scalar>
std::vector<double> backward(const Tensor& grad, const Entries& outputs, const Mixture& mixture, bool needs_dots,
                             const Entries& d_outputs) {
  struct Work {
    const Scalar* input;  // null: no dot
    Scalar* d_input;      // null: no gradient
    Sum<Scalar> coefficient;
    bool active;
  };
  const int64_t entries = outputs.size();
  std::vector<Work> work(entries);
  for (int64_t i = 0; i < entries; ++i) {
    const bool active = mixture.is_active(i);
    work[i].input = needs_dots && active && outputs[i] ? static_cast<const Scalar*>(outputs[i]->const_data_ptr()) : nullptr;
    work[i].d_input = d_outputs[i] ? static_cast<Scalar*>(d_outputs[i]->mutable_data_ptr()) : nullptr;
    work[i].coefficient = static_cast<Sum<Scalar>>(mixture.coefficients[i]);
    work[i].active = active;
  }

  // Chunks depend on the size alone, and their sums are added in order: the result is the same on any number of threads.
  const int64_t n = grad.numel();
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  const int64_t chunk = kBlock * ((blocks + kMaxChunks - 1) / kMaxChunks);
  const int64_t chunks = n == 0 ? 0 : (n + chunk - 1) / chunk;
  std::vector<double> partial(chunks * entries, 0.0);
  const auto* g = static_cast<const Scalar*>(grad.const_data_ptr());
  const int64_t grain = std::max<int64_t>(kGrain / std::max<int64_t>(chunk * entries, 1), 1);
  const int64_t written = std::count_if(work.begin(), work.end(), [](const Work& entry) { return entry.d_input; });
  const bool streamed = written * n * static_cast<int64_t>(sizeof(Scalar)) >= kStreamedBytes;
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      for (int64_t begin = c * chunk; begin < std::min(n, (c + 1) * chunk); begin += kBlock) {
        const int64_t count = std::min(kBlock, n - begin);
        for (int64_t i = 0; i < entries; ++i) {
          const Work& entry = work[i];
          Scalar* d_input = entry.d_input ? entry.d_input + begin : nullptr;
          if (entry.input) {
            partial[c * entries + i] +=
                dot_loop(g + begin, entry.input + begin, entry.coefficient, d_input, count, streamed);
          } else if (d_input && entry.active) {
            scale_loop(g + begin, entry.coefficient, d_input, count, streamed);
          } else if (d_input) {
            std::memset(static_cast<void*>(d_input), 0, sizeof(Scalar) * count);
          }
        }
      }
    }
    if (streamed) finish_streaming();
  });
  std::vector<double> dots(entries, 0.0);
  for (int64_t c = 0; c < chunks; ++c) {
    for (int64_t i = 0; i < entries; ++i) dots[i] += partial[c * entries + i];
  }
  return dots;
}

// ---- the registered operators --------------------------------------------------------------------------------------

Tensor mixed_sum_forward(Entries outputs, Tensor alpha, std::optional<Tensor> mask, std::optional<Tensor> active,
                         bool softmax) {
  const auto present = std::find_if(outputs.begin(), outputs.end(), [](const auto& entry) { return entry.has_value(); });
  STD_TORCH_CHECK(present != outputs.end(), "mixed_sum_forward: at least one entry must be a tensor");
  const Mixture mixture(outputs.size(), alpha, mask, active, softmax);
  Tensor result = empty_as(**present);
  with_storage(result.scalar_type(), [&](auto scalar) { forward<decltype(scalar)>(outputs, mixture, result); });
  return result;
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> mixed_sum_backward(
    Tensor grad, Entries outputs, Tensor alpha, std::optional<Tensor> mask, std::optional<Tensor> active, bool softmax,
    Flags needs_output_grad, bool needs_parameter_grad) {
  Mixture mixture(outputs.size(), alpha, mask, active, softmax);
  std::vector<Tensor> requested;
  Entries d_outputs(outputs.size());
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!needs_output_grad[i]) continue;
    d_outputs[i] = empty_as(grad);
    requested.push_back(*d_outputs[i]);
  }
  std::vector<double> dots;
  with_storage(grad.scalar_type(), [&](auto scalar) {
    dots = backward<decltype(scalar)>(grad, outputs, mixture, needs_parameter_grad, d_outputs);
  });
  if (!needs_parameter_grad) return {requested, no_elements(alpha), no_elements(alpha)};
  std::vector<double> d_mask(mixture.edges, 0.0);
  Tensor d_alpha = write_scalars(mixture.parameter_gradients(dots, softmax, d_mask), alpha);
  return {requested, d_alpha, mask ? write_scalars(d_mask, *mask) : no_elements(alpha)};
}

}  // namespace
}  // namespace dssp

STABLE_TORCH_LIBRARY_IMPL(dssp_kernels, CPU, library) {
  library.impl("mixed_sum_forward", TORCH_BOX(&dssp::mixed_sum_forward));
  library.impl("mixed_sum_backward", TORCH_BOX(&dssp::mixed_sum_backward));
}
