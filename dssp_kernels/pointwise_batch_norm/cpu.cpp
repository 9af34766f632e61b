// pointwise_batch_norm on the CPU: y_k = (z_k - mean(z_k)) / sqrt(var(z_k) + eps_k) per channel, with
// z_k = conv2d(relu(cat(maps)), weights_k), 1x1. All weights read the same maps.
//
// Some pixels at a time, close by in the cache: forward, they are rectified, multiplied, and their moments added up; a
// second pass normalises in place. Backward, one pass finds the two sums over a channel; the other takes pixels of the
// gradients through the norms, side by side through the weights and through the ReLU, and multiplies them with what the
// maps were. Nothing is kept between but the results; the maps are never put side by side.
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
const S* vector_of(const Tensor& tensor) {
  return static_cast<const S*>(tensor.const_data_ptr());
}

template <typename S>
SumRow<const S> constant(const SumRow<S>& row) {
  return {row.data, row.vector, row.column};
}

// How the pixels of a batch are cut, by their number alone: results do not depend on the number of threads.
struct Cut {
  int64_t rows, columns;
  Parts parts;

  Cut(const Tensor& x, int64_t inputs, int64_t outputs, int64_t most)
      : rows(x.size(2)), columns(x.size(3)),
        parts(x.size(0), rows, rows * columns * ceil_div(inputs, 8) * outputs, most) {}

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

using Tensors = std::vector<Tensor>;

template <typename S>
std::vector<Pixels<const S>> read_all(const Tensors& tensors) {
  std::vector<Pixels<const S>> all;
  for (const Tensor& tensor : tensors) all.push_back(read_pixels<S>(tensor));
  return all;
}

template <typename S>
std::vector<Pixels<S>> write_all(Tensors& tensors) {
  std::vector<Pixels<S>> all;
  for (Tensor& tensor : tensors) all.push_back(write_pixels<S>(tensor));
  return all;
}

template <typename AllPixels>
int64_t channels_of(const AllPixels& all) {
  int64_t channels = 0;
  for (const auto& pixels : all) channels += pixels.channels;
  return channels;
}

template <typename S>
void forward(const Tensors& maps, const Tensors& weights, bool relu, const std::vector<double>& eps, Tensors& ys,
             Tensors& means, Tensors& variances, Tensors& scales) {
  constexpr int64_t width = Lanes<S>::width;
  const auto from = read_all<S>(maps);
  const auto to = write_all<S>(ys);
  const int64_t inputs = channels_of(from);
  const Cut cut(maps[0], inputs, channels_of(to), kMaxParts);
  std::vector<Buffer<S>> packed;
  std::vector<PartMoments<S>> moments;
  for (size_t k = 0; k < to.size(); ++k) {
    packed.push_back(packed_pointwise<S>(weights[k], false));
    moments.emplace_back(cut.parts.count, to[k].vectors);
  }
  cut.for_parts([&](int64_t begin, int64_t end) {
    Buffer<S> loaded(kPixels * inputs);  // [vector][pixel][lane]
    for (int64_t part = begin; part < end; ++part) {
      cut.for_pixels(part, [&](int64_t pixel, int64_t count) {
        S* vectors = loaded.data();
        for (const auto& map : from) {
          const Row<const S, S> row = {map.at(pixel), 1, map.channels, map.channels, count, vectors, kPixels * width};
          relu ? load_row_loop<S>(row, Rectified()) : load_row_loop<S>(row);
          vectors += kPixels * map.channels;
        }
        for (size_t k = 0; k < to.size(); ++k) {
          const auto results = to[k].row(pixel);
          multiply_loop<S>({loaded.data(), packed[k].data(), count, inputs, to[k].vectors, results.data,
                            kPixels * width, results.vector, results.column});
          moments[k].add(part, constant(results), count);
        }
      });
    }
  });
  for (size_t k = 0; k < to.size(); ++k) moments[k].write(eps[k], means[k], variances[k], scales[k]);
  cut.for_parts([&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      cut.for_pixels(part, [&](int64_t pixel, int64_t count) {
        for (size_t k = 0; k < to.size(); ++k) {
          normalise_loop<S>({constant(to[k].row(pixel)), to[k].row(pixel), vector_of<S>(means[k]),
                             vector_of<S>(scales[k]), to[k].vectors, count});
        }
      });
    }
  });
}

// Where one d_z comes from, pixels at a time: (grad - mean(grad) - y * mean(grad * y)) * scale.
template <typename S>
struct GradientSource {
  Pixels<const S> grad, y;
  const S* scale;
  Buffer<S> constants = Buffer<S>(y.channels), slopes = Buffer<S>(y.channels);

  void find_means(const Cut& cut, double count_of_all) {
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
    for (int64_t c = 0; c < y.channels; ++c) {
      constants[c] = static_cast<S>(sums.total(0, c) / count_of_all);
      slopes[c] = static_cast<S>(sums.total(1, c) / count_of_all);
    }
  }

  void apply(int64_t pixel, int64_t count, const SumRow<S>& d_z) const {
    norm_gradient_loop<S>({grad.row(pixel), y.row(pixel), d_z, constants.data(), slopes.data(), scale, y.vectors,
                           count});
  }
};

// Those input channels of all weights that read one map, as [out][in]; the outputs of all stand side by side.
template <typename S>
Buffer<S> packed_for_gradient(const Tensors& weights, int64_t outputs, int64_t first_input, int64_t inputs) {
  Buffer<S> packed(outputs * inputs);
  S* to = packed.data();
  for (const Tensor& weight : weights) {
    const auto from = read_images<S>(weight);
    for (int64_t out = 0; out < weight.size(0); ++out) {
      for (int64_t in = 0; in < inputs; ++in) *to++ = *from.at(out, first_input + in, 0, 0);
    }
  }
  return packed;
}

// Sums over the parts of [map][out][in] as the gradients of the weights.
template <typename S>
void write_weight_gradients(const Buffer<double>& total, const std::vector<Pixels<const S>>& maps, Tensors& d_weights) {
  const double* from = total.data();
  int64_t first_input = 0;
  for (const auto& map : maps) {
    for (Tensor& d_weight : d_weights) {
      const auto to = write_images<S>(d_weight);
      for (int64_t out = 0; out < d_weight.size(0); ++out) {
        for (int64_t in = 0; in < map.channels; ++in) *to.at(out, first_input + in, 0, 0) = static_cast<S>(*from++);
      }
    }
    first_input += map.channels;
  }
}

// d_map = weights^T d_z where relu(map) > 0, over all weights; d_weight_k = d_z_k relu(map)^T. Those asked for.
template <typename S>
void backward(const Tensors& grads, const Tensors& maps, const Tensors& ys, const Tensors& scales,
              const Tensors& weights, bool relu, Tensors& d_maps, Tensors& d_weights) {
  constexpr int64_t width = Lanes<S>::width;
  const auto from = read_all<S>(maps);
  const auto to = write_all<S>(d_maps);
  std::vector<GradientSource<S>> norms;
  int64_t outputs = 0, widest = 0;
  for (size_t k = 0; k < ys.size(); ++k) {
    norms.push_back({read_pixels<S>(grads[k]), read_pixels<S>(ys[k]), vector_of<S>(scales[k])});
    outputs += ys[k].size(1);
  }
  const int64_t inputs = channels_of(from), products = outputs * inputs;
  const Cut cut(maps[0], inputs, outputs, std::clamp<int64_t>(kPartialSums / products, 8, kMaxParts));
  for (auto& norm : norms) norm.find_means(cut, maps[0].size(0) * maps[0].size(2) * maps[0].size(3));
  std::vector<Buffer<S>> packed;
  int64_t first_input = 0;
  for (const auto& map : from) {
    if (!to.empty()) packed.push_back(packed_for_gradient<S>(weights, outputs, first_input, map.channels));
    first_input += map.channels;
    widest = std::max(widest, map.channels);
  }
  UnsetBuffer<S> partial(d_weights.empty() ? 0 : cut.parts.count * products);
  cut.for_parts([&](int64_t begin, int64_t end) {
    Buffer<S> d_z(kPixels * outputs), loaded(relu ? kPixels * widest : 0);  // d_z: [vector][pixel][lane]
    for (int64_t part = begin; part < end; ++part) {
      if (!partial.empty()) std::fill_n(partial.data() + part * products, products, S(0));
      cut.for_pixels(part, [&](int64_t pixel, int64_t count) {
        S* vectors = d_z.data();
        for (const auto& norm : norms) {
          norm.apply(pixel, count, {vectors, kPixels * width, width});
          vectors += kPixels * norm.y.channels;
        }
        int64_t done = 0;  // of a part's products
        for (size_t m = 0; m < from.size(); ++m) {
          const auto& map = from[m];
          const S* source = map.at(pixel);
          if (relu) {
            rectify_loop<S>({source, nullptr, loaded.data(), count * map.channels});
            source = loaded.data();
          }
          if (!partial.empty()) {
            accumulate_loop<S>({source, d_z.data(), count, map.vectors, outputs,
                                partial.data() + part * products + done, kPixels * width});
            done += outputs * map.channels;
          }
          if (to.empty()) continue;
          multiply_loop<S>({d_z.data(), packed[m].data(), count, outputs, map.vectors, to[m].at(pixel),
                            kPixels * width, width, map.channels});
          if (relu) mask_loop<S>({to[m].at(pixel), source, to[m].at(pixel), count * map.channels});
        }
      });
    }
  });
  if (!partial.empty()) write_weight_gradients<S>(summed_parts(partial, cut.parts.count), from, d_weights);
}

// ---- the registered operators --------------------------------------------------------------------------------------

template <typename Use>
void with_sums(ScalarType type, Use use) {
  type == ScalarType::Double ? use(double{}) : use(float{});
}

std::tuple<Tensors, Tensors, Tensors, Tensors> pointwise_batch_norm_forward(Tensors maps, Tensors weights, bool relu,
                                                                            std::vector<double> eps) {
  const Tensor& x = maps[0];
  Tensors ys, means, variances, scales;
  for (const Tensor& weight : weights) {
    ys.push_back(empty_channels_last(x, weight.size(0), x.size(2), x.size(3)));
    for (Tensors* vectors : {&means, &variances, &scales}) {
      vectors->push_back(empty_vector(weight.size(0), dtype_of(x)));
    }
  }
  with_sums(x.scalar_type(), [&](auto scalar) {
    forward<decltype(scalar)>(maps, weights, relu, eps, ys, means, variances, scales);
  });
  return {ys, means, variances, scales};
}

std::tuple<Tensors, Tensors> pointwise_batch_norm_backward(Tensors grads, Tensors maps, Tensors ys, Tensors scales,
                                                           Tensors weights, bool relu, bool needs_map_grads,
                                                           bool needs_weight_grads) {
  Tensors d_maps, d_weights;
  for (const Tensor& map : maps) {
    if (needs_map_grads) d_maps.push_back(empty_as(map));
  }
  for (const Tensor& weight : weights) {
    const int64_t inputs = weight.size(1);
    if (!needs_weight_grads) continue;
    d_weights.push_back(empty_strided({weight.size(0), inputs, 1, 1}, {inputs, 1, 1, 1}, dtype_of(weight)));
  }
  with_sums(maps[0].scalar_type(), [&](auto scalar) {
    backward<decltype(scalar)>(grads, maps, ys, scales, weights, relu, d_maps, d_weights);
  });
  return {d_maps, d_weights};
}

}  // namespace
}  // namespace dssp

STABLE_TORCH_LIBRARY_IMPL(dssp_kernels, CPU, library) {
  library.impl("pointwise_batch_norm_forward", TORCH_BOX(&dssp::pointwise_batch_norm_forward));
  library.impl("pointwise_batch_norm_backward", TORCH_BOX(&dssp::pointwise_batch_norm_backward));
}
