// parameter_free_sums on the CPU: s_j = addend_j + sum_k w[edge_j, candidate_k] f_k(x), where f_k is a pool, with or
// without the BatchNorm without weights after it, or x itself.
//
// Forward: one pass over the images pools and adds up moments, one normalises in place and writes the sums. Backward:
// one pass multiplies every gradient with every f_k(x), which is all that the weights' gradients and the norms need;
// one adds up, row by row, the gradient of each f_k(x), takes it through the norm and hands it to the pixels of x. Of
// what is between x and the sums, nothing is kept but the pools, and of a maximum which pixel it was.
//
// Registered for the CPU key through the LibTorch stable ABI (torch >= 2.10); op.py has checked the arguments, and that
// the tensors are dense, in channels_last memory, of sums' own type, and their channels whole vectors.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>

#include "../cpu_mixture.h"
#include "../cpu_norms.h"
#include "../pool_batch_norm/cpu_pools.h"

namespace dssp {
namespace {

using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;

enum Kind : int64_t { kMax, kAverage, kIdentity };  // as in op.py

// to = sum of weight * term, along a row whose pixels and channels lie one after the other.
template <typename S>
struct Combination {
  std::vector<const S*> terms;
  std::vector<S> weights;

  void clear() {  // the memory stays: this is filled for every row
    terms.clear();
    weights.clear();
  }
  void add(const S* term, double weight) {
    terms.push_back(term);
    weights.push_back(static_cast<S>(weight));
  }
};

template <typename S>
void combine_loop(const Combination<S>& c, int64_t size, S* to) {
  const S* const* terms = c.terms.data();
  const S* weights = c.weights.data();
  const int64_t count = c.terms.size();
  with_best_vectors([&](auto) DSSP_INLINE_LAMBDA {
    constexpr int64_t width = Lanes<S>::width, kBlock = 8 * width;
    int64_t i = 0;
    for (; i + kBlock <= size; i += kBlock) {
      typename Lanes<S>::Vector sums[8] = {};
      for (int64_t t = 0; t < count; ++t) {
        const S weight = weights[t];
#pragma GCC unroll 8
        for (int64_t u = 0; u < 8; ++u) sums[u] += Lanes<S>::load(terms[t] + i + u * width) * weight;
      }
#pragma GCC unroll 8
      for (int64_t u = 0; u < 8; ++u) Lanes<S>::store(to + i + u * width, sums[u]);
    }
    for (; i < size; i += width) {
      typename Lanes<S>::Vector sum = {};
      for (int64_t t = 0; t < count; ++t) sum += Lanes<S>::load(terms[t] + i) * weights[t];
      Lanes<S>::store(to + i, sum);
    }
  });
}

constexpr int kAtOnce = 4;  // values that a row of a gradient is multiplied with

// Per channel, over one row: sum += sum(grad), products[k] += sum(grad * values[k]).
template <typename S>
struct RowProducts {
  SumRow<const S> grad;
  const SumRow<const S>* values;
  int64_t vectors, columns;
  double* sum;
  double* products;
  int64_t lanes;  // distance between products
};

template <int kValues, typename S>
DSSP_INLINE void add_row_products(const RowProducts<S>& p) {
  using V = typename Lanes<S>::Vector;
  constexpr int64_t width = Lanes<S>::width;
  for (int64_t vector = 0; vector < p.vectors; ++vector) {
    V sums[2] = {}, products[2][kValues] = {};  // of even and of odd columns: one sum alone would wait for itself
    const auto add = [&](int64_t column, int u) DSSP_INLINE_LAMBDA {
      const V grad = Lanes<S>::load(p.grad.at(vector, column));
      sums[u] += grad;
#pragma GCC unroll 4
      for (int k = 0; k < kValues; ++k) products[u][k] += grad * Lanes<S>::load(p.values[k].at(vector, column));
    };
    int64_t j = 0;
    for (; j + 2 <= p.columns; j += 2) {
      add(j, 0);
      add(j + 1, 1);
    }
    if (j < p.columns) add(j, 0);
    add_to_doubles(p.sum + vector * width, sums[0] + sums[1]);
    for (int k = 0; k < kValues; ++k) {
      add_to_doubles(p.products + k * p.lanes + vector * width, products[0][k] + products[1][k]);
    }
  }
}

template <typename S>
void row_products_loop(const RowProducts<S>& p, int64_t values) {
  with_best_vectors([&](auto) DSSP_INLINE_LAMBDA {
    switch (values) {
      case 1: return add_row_products<1>(p);
      case 2: return add_row_products<2>(p);
      case 3: return add_row_products<3>(p);
      default: return add_row_products<kAtOnce>(p);
    }
  });
}

// The f_k: kind, pool, norm.
struct Function {
  int64_t kind;
  Pool pool;
  bool normalised;
  double eps;
};

// What a pass over a batch needs to know. weight(j, k): of f_k in sum j, where that takes it.
struct Work {
  std::vector<Function> functions;
  int64_t sums, candidates;
  std::vector<double> weights;  // of all edges
  Integers edges, positions;    // row and column in them
  std::vector<bool> takes;

  int64_t count() const { return functions.size(); }
  bool taken(int64_t j, int64_t k) const { return takes[j * count() + k]; }
  int64_t place(int64_t j, int64_t k) const { return edges[j] * candidates + positions[k]; }
  double weight(int64_t j, int64_t k) const { return weights[place(j, k)]; }

  // use(first image, last)
  template <typename Use>
  void for_images(const Tensor& x, Use use) const {
    const int64_t image = x.size(1) * x.size(2) * x.size(3) * (count() + sums);
    torch::stable::parallel_for(0, x.size(0), kGrain / (image + 1) + 1, use);
  }
};

// f_k(x) as its rows lie in memory: of pools their outputs, else x.
template <typename S>
std::vector<SumImages<S>> read_values(const Work& work, const Tensor& x, const Tensors& pooled) {
  std::vector<SumImages<S>> values;
  size_t pool = 0;
  for (const Function& f : work.functions) values.push_back(read_only<S>(f.kind == kIdentity ? x : pooled[pool++]));
  return values;
}

// Per f_k: what is subtracted and what is multiplied by, [C]; 0 and 1 where there is no norm.
template <typename S>
struct Norms {
  std::vector<Buffer<S>> constants, slopes, scales;

  Norms(const Work& work, int64_t channels)
      : constants(work.count(), Buffer<S>(channels, S(0))), slopes(constants),
        scales(work.count(), Buffer<S>(channels, S(1))) {}
};

struct Results {
  Tensors sums, pooled, positions, means, variances, scales;
};

template <typename S>
void forward(const Work& work, const Tensor& x, const Entries& addends, Results& results) {
  const int64_t channels = x.size(1), batch = x.size(0), functions = work.count();
  std::vector<Outputs<S>> outputs;
  std::vector<uint8_t*> positions(functions, nullptr);
  std::vector<Buffer<S>> shifts(functions);
  std::vector<ChannelSums> moments;
  std::vector<int64_t> pool_of_function(functions, -1);
  int64_t pools = 0, maxima = 0;
  for (int64_t k = 0; k < functions; ++k) {
    const Function& f = work.functions[k];
    outputs.push_back({f.pool});
    moments.push_back({f.normalised ? batch : 0, channels});
    if (f.kind == kIdentity) continue;
    pool_of_function[k] = pools++;
    if (f.kind == kMax) positions[k] = bytes_of(results.positions[maxima++]);
    if (f.normalised) shifts[k] = means_of_first_row(outputs[k], x, positions[k]);
  }
  work.for_images(x, [&](int64_t begin, int64_t end) {
    auto inputs = read_only<S>(x);
    std::vector<SumImages<S>> pooled;
    for (Tensor& tensor : results.pooled) pooled.push_back(writable<S>(tensor));
    for (int64_t image = begin; image < end; ++image) {
      const auto pixels = inputs.load(image);
      for (int64_t k = 0; k < functions; ++k) {
        const Function& f = work.functions[k];
        if (f.kind == kIdentity) continue;
        const Outputs<S>& of = outputs[k];
        const auto rows = pooled[pool_of_function[k]].at(image);
        for (int64_t row = 0; row < of.rows; ++row) {
          const auto to = rows.at(row);
          const auto p = of.pooling(pixels, row, to, positions[k] ? positions[k] + image * of.image : nullptr);
          f.kind == kMax ? max_loop(p) : average_loop(p);
          if (!f.normalised) continue;
          const SumRow<const S> from = {to.data, to.vector, to.column};
          moments_loop<S>({from, from, shifts[k].data(), of.vectors, of.columns, moments[k].first(image),
                           moments[k].second(image)});
        }
      }
    }
  });
  Norms<S> norms(work, channels);
  for (int64_t k = 0, norm = 0; k < functions; ++k) {
    const Function& f = work.functions[k];
    if (!f.normalised) continue;
    write_statistics(moments[k], shifts[k], outputs[k].per_channel, f.eps, norms.constants[k], norms.scales[k],
                     results.means[norm], results.variances[norm], results.scales[norm]);
    ++norm;
  }
  work.for_images(x, [&](int64_t begin, int64_t end) {
    auto values = read_values<S>(work, x, results.pooled);
    std::vector<SumImages<S>> sums, given;
    for (Tensor& tensor : results.sums) sums.push_back(writable<S>(tensor));
    for (const auto& addend : addends) given.push_back(read_only<S>(addend ? *addend : results.sums[0]));
    std::vector<const S*> rows(functions);
    Combination<S> combination;
    for (int64_t image = end - 1; image >= begin; --image) {  // what the first pass read last is still in the cache
      for (int64_t row = 0; row < outputs[0].rows; ++row) {
        for (int64_t k = 0; k < functions; ++k) {
          const auto of_row = values[k].at(image).at(row);
          const SumRow<const S> from = {of_row.data, of_row.vector, of_row.column};
          if (work.functions[k].normalised) {
            normalise_loop<S>({from, of_row, norms.constants[k].data(), norms.scales[k].data(), outputs[k].vectors,
                               outputs[k].columns});
          }
          rows[k] = of_row.data;
        }
        for (int64_t j = 0; j < work.sums; ++j) {
          combination.clear();
          if (addends[j]) combination.add(given[j].at(image).at(row).data, 1.0);
          for (int64_t k = 0; k < functions; ++k) {
            if (work.taken(j, k)) combination.add(rows[k], work.weight(j, k));
          }
          combine_loop(combination, outputs[0].columns * channels, sums[j].at(image).at(row).data);
        }
      }
    }
  });
}

// Of one gradient per channel: its products with the values, and its sum; each image adds to its own.
struct Products {
  int64_t images, values, lanes;
  Buffer<double> all = Buffer<double>(images * (values + ceil_div(values, kAtOnce)) * lanes, 0.0);

  int64_t per_image() const { return (values + ceil_div(values, kAtOnce)) * lanes; }
  // [sum of those at once][products of those at once]...
  double* first(int64_t image, int64_t value) { return all.data() + image * per_image() + offset(value) - lanes; }
  double product(int64_t value, int64_t lane) const { return total(offset(value) + lane); }
  double sum(int64_t lane) const { return total(lane); }

 private:
  int64_t offset(int64_t value) const { return (value + value / kAtOnce + 1) * lanes; }
  double total(int64_t at) const {
    double total = 0;
    for (int64_t image = 0; image < images; ++image) total += all[image * per_image() + at];
    return total;
  }
};

template <typename S>
std::vector<Products> products(const Work& work, const Tensor& x, const Tensors& pooled, const Entries& grads) {
  const int64_t channels = x.size(1), functions = work.count();
  std::vector<Products> found;
  for (const auto& grad : grads) found.push_back({grad ? x.size(0) : 0, functions, channels});
  work.for_images(x, [&](int64_t begin, int64_t end) {
    auto values = read_values<S>(work, x, pooled);
    std::vector<SumImages<S>> gradients;
    for (const auto& grad : grads) gradients.push_back(read_only<S>(grad ? *grad : x));
    std::vector<SumRow<const S>> rows(functions);
    for (int64_t image = begin; image < end; ++image) {
      for (int64_t row = 0; row < values[0].rows; ++row) {
        for (int64_t k = 0; k < functions; ++k) rows[k] = values[k].load(image).at(row);
        for (int64_t j = 0; j < work.sums; ++j) {
          if (!grads[j]) continue;
          const auto grad = gradients[j].load(image).at(row);
          for (int64_t k = 0; k < functions; k += kAtOnce) {
            double* sum = found[j].first(image, k);
            row_products_loop<S>({grad, rows.data() + k, channels / Lanes<S>::width, values[0].columns, sum,
                                  sum + channels, channels}, std::min<int64_t>(functions - k, kAtOnce));
          }
        }
      }
    }
  });
  return found;
}

// d_f_k = sum_j w_jk grad_j; through the norm: (d_f_k - mean(d_f_k) - y * mean(d_f_k * y)) * scale; then to the pixels.
template <typename S>
void pixel_gradients(const Work& work, const Tensor& x, const Tensors& pooled, const Tensors& positions,
                     const Entries& grads, const Norms<S>& norms, Tensor& d_x) {
  const int64_t channels = x.size(1), functions = work.count();
  work.for_images(x, [&](int64_t begin, int64_t end) {
    auto values = read_values<S>(work, x, pooled);
    std::vector<SumImages<S>> gradients;
    for (const auto& grad : grads) gradients.push_back(read_only<S>(grad ? *grad : x));
    auto inputs = writable<S>(d_x);
    const int64_t size = values[0].columns * channels;
    Buffer<S> buffer(size);
    const SumRow<S> pooled_row = {buffer.data(), Lanes<S>::width, channels};
    Combination<S> combination;
    const auto combine = [&](int64_t k, int64_t image, int64_t row, S* to) {
      combination.clear();
      for (int64_t j = 0; j < work.sums; ++j) {
        if (grads[j] && work.taken(j, k)) combination.add(gradients[j].at(image).at(row).data, work.weight(j, k));
      }
      combine_loop(combination, size, to);
    };
    for (int64_t image = end - 1; image >= begin; --image) {
      const auto identity = std::find_if(work.functions.begin(), work.functions.end(),
                                         [](const Function& f) { return f.kind == kIdentity; });
      const auto pixels = identity == work.functions.end() ? inputs.zeros(image) : inputs.at(image);
      if (identity != work.functions.end()) {
        for (int64_t row = 0; row < inputs.rows; ++row) {
          combine(identity - work.functions.begin(), image, row, pixels.at(row).data);
        }
      }
      for (int64_t k = 0, maxima = 0; k < functions; ++k) {
        const Function& f = work.functions[k];
        if (f.kind == kIdentity) continue;
        const Outputs<S> of = {f.pool};
        uint8_t* bytes = f.kind == kMax ? bytes_of(positions[maxima++]) + image * of.image : nullptr;
        const auto y = values[k].load(image);
        for (int64_t row = 0; row < of.rows; ++row) {
          combine(k, image, row, buffer.data());
          if (f.normalised) {
            const SumRow<const S> grad = {pooled_row.data, pooled_row.vector, pooled_row.column};
            norm_gradient_loop<S>({grad, y.at(row), pooled_row, norms.constants[k].data(), norms.slopes[k].data(),
                                   norms.scales[k].data(), of.vectors, of.columns});
          }
          const auto p = of.pooling(pixels, row, pooled_row, bytes);
          f.kind == kMax ? max_gradient_loop(p) : average_gradient_loop(p);
        }
      }
    }
  });
}

template <typename S>
void backward(const Work& work, const Tensor& x, const Tensors& pooled, const Tensors& positions,
              const Tensors& scales, const Entries& grads, Tensor* d_x, std::vector<double>* d_weights) {
  const int64_t functions = work.count();
  const bool any_norm = std::any_of(work.functions.begin(), work.functions.end(),
                                    [](const Function& f) { return f.normalised; });
  Norms<S> norms(work, x.size(1));
  if (d_weights || any_norm) {
    const auto sums = products<S>(work, x, pooled, grads);
    for (int64_t j = 0; j < work.sums && d_weights; ++j) {
      for (int64_t k = 0; k < functions; ++k) {
        if (!grads[j] || !work.taken(j, k)) continue;
        for (int64_t c = 0; c < x.size(1); ++c) (*d_weights)[work.place(j, k)] += sums[j].product(k, c);
      }
    }
    for (int64_t k = 0, norm = 0; k < functions; ++k) {
      if (!work.functions[k].normalised) continue;
      const double count = Outputs<S>{work.functions[k].pool}.per_channel;
      const S* scale = static_cast<const S*>(scales[norm++].const_data_ptr());
      for (int64_t c = 0; c < x.size(1); ++c) {
        double constant = 0, slope = 0;
        for (int64_t j = 0; j < work.sums; ++j) {
          if (!grads[j] || !work.taken(j, k)) continue;
          constant += work.weight(j, k) * sums[j].sum(c);
          slope += work.weight(j, k) * sums[j].product(k, c);
        }
        norms.constants[k][c] = static_cast<S>(constant / count);
        norms.slopes[k][c] = static_cast<S>(slope / count);
        norms.scales[k][c] = scale[c];
      }
    }
  }
  if (d_x) pixel_gradients(work, x, pooled, positions, grads, norms, *d_x);
}

// ---- the registered operators --------------------------------------------------------------------------------------

template <typename Use>
void with_sums(ScalarType type, Use use) {
  type == ScalarType::Double ? use(double{}) : use(float{});
}

Work work_of(const Tensor& x, const Tensor& weights, const Integers& edges, const Integers& candidates,
             const std::vector<bool>& takes, const Integers& kinds, const Integers& kernels, const Integers& strides,
             const Integers& paddings, const std::vector<bool>& count_include_pad, const std::vector<bool>& normalised,
             const std::vector<double>& eps) {
  Work work = {{}, static_cast<int64_t>(edges.size()), weights.size(1), read_scalars(weights), edges, candidates, takes};
  for (size_t k = 0; k < kinds.size(); ++k) {
    const auto pair = [k](const Integers& values) { return Pair{values[2 * k], values[2 * k + 1]}; };
    const Pool pool = pool_of(x, kinds[k] == kMax, pair(kernels), pair(strides), pair(paddings), count_include_pad[k]);
    work.functions.push_back({kinds[k], pool, normalised[k], eps[k]});
  }
  return work;
}

std::tuple<Tensors, Tensors, Tensors, Tensors, Tensors, Tensors> parameter_free_sums_forward(
    Tensor x, Tensor weights, Entries addends, Integers edges, Integers candidates, std::vector<bool> takes,
    Integers kinds, Integers kernels, Integers strides, Integers paddings, std::vector<bool> count_include_pad,
    std::vector<bool> normalised, std::vector<double> eps) {
  const Work work = work_of(x, weights, edges, candidates, takes, kinds, kernels, strides, paddings, count_include_pad,
                            normalised, eps);
  const Geometry& g = work.functions[0].pool.g;
  const auto empty = [&] { return empty_channels_last(x, g.channels, g.rows.outputs, g.columns.outputs); };
  Results results;
  for (int64_t j = 0; j < work.sums; ++j) results.sums.push_back(empty());
  with_sums(x.scalar_type(), [&](auto scalar) {
    using S = decltype(scalar);
    for (const Function& f : work.functions) {
      if (f.kind == kIdentity) continue;
      results.pooled.push_back(empty());
      if (f.kind == kMax) {
        results.positions.push_back(empty_vector(g.batch * Outputs<S>{f.pool}.image, aoti_torch_dtype_uint8()));
      }
      if (!f.normalised) continue;
      for (Tensors* vectors : {&results.means, &results.variances, &results.scales}) {
        vectors->push_back(empty_vector(g.channels, dtype_of(x)));
      }
    }
    forward<S>(work, x, addends, results);
  });
  return {results.sums, results.pooled, results.positions, results.means, results.variances, results.scales};
}

std::tuple<Tensor, Tensor> parameter_free_sums_backward(
    Entries grads, Tensor x, Tensor weights, Tensors pooled, Tensors positions, Tensors scales, Integers edges,
    Integers candidates, std::vector<bool> takes, Integers kinds, Integers kernels, Integers strides, Integers paddings,
    std::vector<bool> count_include_pad, std::vector<bool> normalised, std::vector<double> eps, bool needs_input_grad,
    bool needs_weights_grad) {
  const Work work = work_of(x, weights, edges, candidates, takes, kinds, kernels, strides, paddings, count_include_pad,
                            normalised, eps);
  Tensor d_x = needs_input_grad ? empty_as(x) : no_elements(x);
  std::vector<double> d_weights(weights.numel(), 0.0);
  with_sums(x.scalar_type(), [&](auto scalar) {
    backward<decltype(scalar)>(work, x, pooled, positions, scales, grads, needs_input_grad ? &d_x : nullptr,
                               needs_weights_grad ? &d_weights : nullptr);
  });
  return {d_x, needs_weights_grad ? write_scalars(d_weights, weights) : no_elements(weights)};
}

}  // namespace
}  // namespace dssp

STABLE_TORCH_LIBRARY_IMPL(dssp_kernels, CPU, library) {
  library.impl("parameter_free_sums_forward", TORCH_BOX(&dssp::parameter_free_sums_forward));
  library.impl("parameter_free_sums_backward", TORCH_BOX(&dssp::parameter_free_sums_backward));
}
