// separable_conv2d_group on the CPU: y = conv2d(conv2d(relu(x), depthwise, groups = C), pointwise), a row at a time.
//
// A row of the depthwise convolution lives in the nearest cache just long enough to be multiplied by the pointwise
// weights: the map between the two convolutions never exists in memory. The gradient for the pointwise weights computes
// its rows again; the gradient for the depthwise convolution reads rows of the output's gradient already taken through
// the pointwise weights.
//
// All convolutions of a group have the same x.
//
// Registered for the CPU key through the LibTorch stable ABI (torch >= 2.10); op.py has checked the arguments.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "../depthwise_conv/cpu_bands.h"
#include "cpu_products.h"

namespace dssp {
namespace {

// ---- bands of rows -------------------------------------------------------------------------------------------------

template <typename Scalar>
int64_t vectors_of(int64_t channels) {
  return ceil_div(channels, Lanes<Scalar>::width);
}

template <typename Scalar>
ChannelBlock all_channels(int64_t channels) {
  return {0, channels, vectors_of<Scalar>(channels)};
}

// [C_out, C_in, 1, 1] -> [in][out], transposed: [out][in]; zeros up to whole vectors
template <typename Scalar>
Buffer<Sum<Scalar>> packed_pointwise(const Tensor& weight, bool transposed) {
  constexpr int64_t width = Lanes<Scalar>::width;
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const int64_t all_outputs = vectors_of<Scalar>(outputs) * width, all_inputs = vectors_of<Scalar>(inputs) * width;
  Buffer<Sum<Scalar>> packed(all_outputs * all_inputs);
  const auto from = read_images<Scalar>(weight);
  for (int64_t out = 0; out < outputs; ++out) {
    for (int64_t in = 0; in < inputs; ++in) {
      packed[transposed ? out * all_inputs + in : in * all_outputs + out] = widened(*from.at(out, in, 0, 0));
    }
  }
  return packed;
}

// A row of the depthwise convolution: [vector][column][lane] or, with its channels innermost, [column][channel].
template <typename Scalar>
struct DepthwiseRow {
  static constexpr int64_t width = Lanes<Scalar>::width;
  const Geometry& g;
  const Sum<Scalar>* weights;
  int64_t vector, column;  // distances
  Buffer<Sum<Scalar>> row = Buffer<Sum<Scalar>>(vectors_of<Scalar>(g.channels) * g.columns.outputs * width);

  static DepthwiseRow of_vectors(const Geometry& g, const Sum<Scalar>* weights) {
    return {g, weights, g.columns.outputs * width, width};
  }
  static DepthwiseRow of_channels(const Geometry& g, const Sum<Scalar>* weights) {
    return {g, weights, width, vectors_of<Scalar>(g.channels) * width};
  }

  // `taps`: the kernel rows that meet rows of x at this output row
  void compute(const RowRing<Scalar>& x, const TapRows& taps) {
    Correlation<Sum<Scalar>> c = {x.data(), weights};
    c.rows = taps;
    c.taps = forward_reads(g.columns, 0);
    c.stride = g.columns.stride;
    c.columns = g.columns.outputs;
    c.vectors = x.block.vectors;
    c.source_vector = x.vector_size();
    c.taps_in_all = g.taps();
    c.results = row.data();
    c.result_vector = vector;
    c.result_column = column;
    correlate_loop(c);
  }
};

// Output rows of one image.
template <typename Scalar>
struct SeparableForward {
  static constexpr int64_t width = Lanes<Scalar>::width;
  const Geometry& g;
  RowRing<Scalar> x;
  DepthwiseRow<Scalar> depthwise;
  const Sum<Scalar>* pointwise;
  Images<Scalar> y;
  int64_t outputs;
  Buffer<Sum<Scalar>> buffer = Buffer<Sum<Scalar>>(vectors_of<Scalar>(outputs) * depthwise.vector);
  TapFinder finder{g.rows.taps};

  void band(int64_t image, int64_t begin, int64_t end) {
    x.start(image, all_channels<Scalar>(g.channels));
    for (int64_t row = begin; row < end; ++row) {
      const Reads reads = forward_reads(g.rows, row);
      x.load(std::max<int64_t>(0, reads.source), reads.source + g.rows.reach());
      depthwise.compute(x, finder.find(without_outside(reads, g.rows.inputs), x, g.columns.taps));
      write(y.at(image, 0, row, 0));
    }
  }

  // Straight into the tensor where its elements are sums, else through a row of sums.
  void write(Scalar* to) {
    Product<Sum<Scalar>> p = {depthwise.row.data(), pointwise};
    p.columns = g.columns.outputs;
    p.inputs = x.block.vectors * width;
    p.vectors = vectors_of<Scalar>(outputs);
    p.source_vector = depthwise.vector;
    if constexpr (std::is_same_v<Scalar, Sum<Scalar>>) {
      if (y.channel == 1 && outputs % width == 0) {
        p.results = to;
        p.result_vector = width;
        p.result_column = y.column;
        return multiply_loop(p);
      }
    }
    p.results = buffer.data();
    p.result_vector = p.source_vector;
    p.result_column = width;
    multiply_loop(p);
    store_row_loop<Scalar>({to, y.channel, y.column, outputs, p.columns, buffer.data(), p.result_vector});
  }
};

// Rows of the depthwise output's gradient: rows of the output's gradient taken through the pointwise weights.
template <typename Scalar>
struct GradientRows : Ring<Sum<Scalar>> {
  static constexpr int64_t width = Lanes<Scalar>::width;
  const Sum<Scalar>* pointwise;  // transposed; null: nobody wants these rows, only those that came
  RowRing<Scalar> output;        // the last row, as it came
  int64_t outputs, vectors, next = 0;

  GradientRows(const Geometry& g, const Sum<Scalar>* pointwise, const Images<const Scalar>& grad, int64_t outputs)
      : GradientRows(g, pointwise, grad, outputs, gradient_margins(g)) {}

  void start(int64_t image, const ChannelBlock&) {
    output.start(image, all_channels<Scalar>(outputs));
    next = 0;
  }

  void load(int64_t first, int64_t last) {
    for (next = std::max(next, first); next <= std::min(last, output.rows - 1); ++next) {
      output.load(next, next);
      if (!pointwise) continue;
      Product<Sum<Scalar>> p = {output.data() + output.offset(next), pointwise};
      p.columns = output.columns;
      p.inputs = output.block.vectors * width;
      p.vectors = vectors;
      p.results = this->data() + this->offset(next);
      p.source_vector = output.vector_size();
      p.result_vector = this->vector_size();
      p.result_column = width;
      multiply_loop(p);
    }
  }

 private:
  GradientRows(const Geometry& g, const Sum<Scalar>* pointwise, const Images<const Scalar>& grad, int64_t outputs,
               const Margins& margins)
      : Ring<Sum<Scalar>>(g.columns.outputs, margins.left, margins.right, margins.slots,
                          vectors_of<Scalar>(g.channels)),
        pointwise(pointwise),
        output{grad, g.rows.outputs, g.columns.outputs, {0, 0, 1}, vectors_of<Scalar>(outputs), false},
        outputs(outputs), vectors(vectors_of<Scalar>(g.channels)) {}
};

// The gradient of the pointwise weights, from output rows as Backward visits them: computes each depthwise row again.
template <typename Scalar>
struct PointwiseGradient {
  DepthwiseRow<Scalar> depthwise;
  Sum<Scalar>* gradients;  // null: not wanted

  bool is_wanted() const { return gradients; }

  void operator()(const RowRing<Scalar>& x, const GradientRows<Scalar>& grad, const TapRows& taps, int64_t row) {
    if (!gradients) return;
    depthwise.compute(x, taps);
    OuterProduct<Sum<Scalar>> p = {depthwise.row.data(), grad.output.data() + grad.output.offset(row)};
    p.columns = grad.output.columns;
    p.vectors = x.block.vectors;
    p.outputs = grad.output.block.vectors * Lanes<Scalar>::width;
    p.gradients = gradients;
    p.grad_vector = grad.output.vector_size();
    accumulate_loop(p);
  }
};

// ---- the whole tensors -----------------------------------------------------------------------------------------------

// One convolution of a group: all have the same x.
struct Separable {
  Geometry g;
  Tensor depthwise, pointwise;
  bool relu;

  int64_t outputs() const { return pointwise.size(0); }
};
using Group = std::vector<Separable>;

inline int64_t most_rows(const Group& group) {
  int64_t rows = 0;
  for (const Separable& convolution : group) rows = std::max(rows, convolution.g.rows.outputs);
  return rows;
}

// A thread takes an image's rows through one convolution after the other: x stays in the cache. Where they have not all
// as many output rows, it takes the same share of each one's.
template <typename Scalar>
void separable_forward(const Group& group, const Tensor& x, std::vector<Tensor>& results) {
  const auto input = read_images<Scalar>(x);
  const int64_t rows = most_rows(group), batch = x.size(0);
  std::vector<Buffer<Sum<Scalar>>> depthwise, pointwise;
  std::vector<Images<Scalar>> y;
  for (Tensor& result : results) y.push_back(write_images<Scalar>(result));
  int64_t work = 0;  // per image
  for (const auto& [g, depthwise_weight, pointwise_weight, relu] : group) {
    depthwise.push_back(packed_weights<Scalar>(g, depthwise_weight));
    pointwise.push_back(packed_pointwise<Scalar>(pointwise_weight, false));
    work += g.rows.outputs * g.columns.outputs * (g.taps() + pointwise_weight.size(0)) * vectors_of<Scalar>(g.channels);
  }
  torch::stable::parallel_for(0, batch * rows, kGrain * rows / work + 1, [&](int64_t begin, int64_t end) {
    std::vector<SeparableForward<Scalar>> sweeps;
    for (size_t k = 0; k < group.size(); ++k) {
      const Geometry& g = group[k].g;
      sweeps.push_back({g, input_rows<Scalar>(g, input, vectors_of<Scalar>(g.channels), group[k].relu),
                        DepthwiseRow<Scalar>::of_vectors(g, depthwise[k].data()), pointwise[k].data(), y[k],
                        group[k].outputs()});
    }
    while (begin < end) {
      const int64_t image = begin / rows, row = begin % rows, last = std::min(rows, row + end - begin);
      for (auto& sweep : sweeps) {
        const int64_t outputs = sweep.g.rows.outputs;
        sweep.band(image, outputs * row / rows, outputs * last / rows);
      }
      begin += last - row;
    }
  });
}

// partial [part][out][in], whole vectors of each -> [C_out, C_in, 1, 1], summed over the parts in order
template <typename Scalar>
void write_pointwise_gradient(const Buffer<Sum<Scalar>>& partial, int64_t parts, Tensor& d_weight) {
  constexpr int64_t width = Lanes<Scalar>::width;
  const int64_t size = partial.size() / std::max<int64_t>(parts, 1);
  std::vector<double> total(size, 0.0);
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t i = 0; i < size; ++i) total[i] += partial[part * size + i];
  }
  const int64_t outputs = d_weight.size(0), inputs = d_weight.size(1), all = vectors_of<Scalar>(inputs) * width;
  const auto to = write_images<Scalar>(d_weight);
  for (int64_t out = 0; out < outputs; ++out) {
    for (int64_t in = 0; in < inputs; ++in) {
      const double value = parts ? total[out * all + in] : 0.0;
      *to.at(out, in, 0, 0) = narrowed<Scalar>(static_cast<Sum<Scalar>>(value));
    }
  }
}

constexpr int64_t kPartialSums = 64 * 1024;  // of the pointwise weights' gradient, over all parts of the batch

// The gradients wanted of one convolution, given that of its output; null: not wanted.
struct Wanted {
  const Separable& convolution;
  const Tensor& grad;
  Tensor *d_depthwise, *d_pointwise;
};

// Its packed weights, and the partial sums of their gradients: [part][...], as many sums per part as the size says.
template <typename Scalar>
struct SeparableGradients {
  static constexpr int64_t width = Lanes<Scalar>::width;
  const Geometry& g;
  Images<const Scalar> x, grad;
  int64_t outputs, vectors, size, pointwise_size;
  bool relu;
  Buffer<Sum<Scalar>> depthwise, pointwise, partial, pointwise_partial;

  SeparableGradients(const Wanted& wanted, const Images<const Scalar>& x, int64_t parts)
      : g(wanted.convolution.g), x(x), grad(read_images<Scalar>(wanted.grad)), outputs(wanted.convolution.outputs()),
        vectors(vectors_of<Scalar>(g.channels)), size(vectors * width * g.taps()),
        pointwise_size(vectors_of<Scalar>(outputs) * width * vectors * width), relu(wanted.convolution.relu),
        depthwise(packed_weights<Scalar>(g, wanted.convolution.depthwise)),
        pointwise(packed_pointwise<Scalar>(wanted.convolution.pointwise, true)),
        partial(wanted.d_depthwise ? parts * size : 0),
        pointwise_partial(wanted.d_pointwise ? parts * pointwise_size : 0) {}

  void write(const Wanted& wanted, int64_t parts) const {
    if (wanted.d_depthwise) write_weight_gradient<Scalar>(g, partial, parts, *wanted.d_depthwise);
    if (wanted.d_pointwise) write_pointwise_gradient<Scalar>(pointwise_partial, parts, *wanted.d_pointwise);
  }
};

// One thread's share of these.
template <typename Scalar>
struct SeparableBackward {
  SeparableGradients<Scalar>& all;
  Backward<Scalar, GradientRows<Scalar>, PointwiseGradient<Scalar>> sweep;

  // d_x: where the gradient of x goes, if anywhere; adds: to what is there
  SeparableBackward(SeparableGradients<Scalar>& all, const Images<Scalar>& d_x, bool adds)
      : all(all),
        sweep{all.g, all.depthwise.data(),
              GradientRows<Scalar>(all.g, d_x.data || !all.partial.empty() ? all.pointwise.data() : nullptr, all.grad,
                                   all.outputs),
              input_rows<Scalar>(all.g, all.x, all.vectors, all.relu),
              RowWriter<Scalar>(d_x, all.g.columns.inputs, all.vectors), adds,
              {DepthwiseRow<Scalar>::of_channels(all.g, all.depthwise.data()), nullptr}} {}

  void part_of_image(const Parts& parts, int64_t part, int64_t image) {
    const auto sums = [part](Buffer<Sum<Scalar>>& partial, int64_t size) {
      return partial.empty() ? nullptr : partial.data() + part * size;
    };
    sweep.output_row.gradients = sums(all.pointwise_partial, all.pointwise_size);
    sweep.part_of_image(parts, part, image, all_channels<Scalar>(all.g.channels), sums(all.partial, all.size));
  }
};

// The parts of the batch are the same for all convolutions, so that one thread writes and adds up the rows of d_x that
// belong to a part while these are in its cache, in the order of the convolutions.
template <typename Scalar>
void separable_backward(const std::vector<Wanted>& wanted, const Tensor& x, Tensor* d_x) {
  constexpr int64_t width = Lanes<Scalar>::width;
  const int64_t vectors = vectors_of<Scalar>(x.size(1));
  int64_t rows = 0, work = 0, outputs = 1;
  for (const auto& [convolution, grad, d_depthwise, d_pointwise] : wanted) {
    const Geometry& g = convolution.g;
    rows = std::max(rows, g.rows.outputs);
    work += g.rows.outputs * g.columns.outputs * g.taps() * vectors;
    outputs = std::max(outputs, vectors_of<Scalar>(convolution.outputs()) * width);
  }
  const Parts parts(x.size(0), rows, work, std::max<int64_t>(8, kPartialSums / (outputs * vectors * width)));
  const auto input = read_images<Scalar>(x);
  const auto input_gradient = d_x ? write_images<Scalar>(*d_x) : Images<Scalar>{};
  std::vector<SeparableGradients<Scalar>> gradients;
  for (const Wanted& one : wanted) gradients.emplace_back(one, input, parts.count);
  torch::stable::parallel_for(0, parts.count, 1, [&](int64_t begin, int64_t end) {
    std::vector<SeparableBackward<Scalar>> sweeps;
    for (auto& all : gradients) sweeps.emplace_back(all, input_gradient, !sweeps.empty());
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t image = parts.first_image(part); image < parts.first_image(part + parts.bands); ++image) {
        for (auto& sweep : sweeps) sweep.part_of_image(parts, part, image);
      }
    }
  });
  for (size_t k = 0; k < wanted.size(); ++k) gradients[k].write(wanted[k], parts.count);
}

// ---- the registered operators ----------------------------------------------------------------------------------------

// strides, paddings, dilations: two each per convolution
Group group_of(const Tensor& x, const std::vector<Tensor>& depthwise, const std::vector<Tensor>& pointwise,
               const Pair& strides, const Pair& paddings, const Pair& dilations, const std::vector<bool>& relu) {
  Group group;
  for (size_t k = 0; k < depthwise.size(); ++k) {
    const auto pair = [k](const Pair& values) { return Pair{values[2 * k], values[2 * k + 1]}; };
    const Geometry g = geometry_of(x, depthwise[k], pair(strides), pair(paddings), pair(dilations));
    group.push_back({g, depthwise[k], pointwise[k], relu[k]});
  }
  return group;
}

std::vector<Tensor> forward(const Tensor& x, const Group& group) {
  std::vector<Tensor> results;
  for (const Separable& convolution : group) {
    const Geometry& g = convolution.g;
    results.push_back(empty_images(x, convolution.outputs(), g.rows.outputs, g.columns.outputs));
  }
  with_storage(x.scalar_type(), [&](auto scalar) { separable_forward<decltype(scalar)>(group, x, results); });
  return results;
}

struct Gradients {
  Tensor x;
  std::vector<Tensor> depthwise, pointwise;  // those needed
};

Gradients backward(const std::vector<std::optional<Tensor>>& grads, const Tensor& x, const Group& group,
                   bool needs_input_grad, const std::vector<bool>& needs_depthwise_grad,
                   const std::vector<bool>& needs_pointwise_grad) {
  const int32_t dtype = dtype_of(x);
  const int64_t channels = x.size(1);
  Gradients found = {needs_input_grad ? empty_images(x, channels, x.size(2), x.size(3)) : no_elements(x), {}, {}};
  found.depthwise.reserve(group.size());  // pointers into them must stay
  found.pointwise.reserve(group.size());
  std::vector<Wanted> wanted;
  for (size_t k = 0; k < group.size(); ++k) {
    const Geometry& g = group[k].g;
    if (needs_depthwise_grad[k]) {
      found.depthwise.push_back(empty_strided({channels, 1, g.rows.taps, g.columns.taps},
                                              {g.taps(), g.taps(), g.columns.taps, 1}, dtype));
    }
    if (needs_pointwise_grad[k]) {
      found.pointwise.push_back(empty_strided({group[k].outputs(), channels, 1, 1}, {channels, 1, 1, 1}, dtype));
    }
    const bool needs_weight_grad = needs_depthwise_grad[k] || needs_pointwise_grad[k];
    STD_TORCH_CHECK(grads[k] || !needs_weight_grad, "grads: expected one for every convolution that needs a gradient");
    if (!grads[k] || !(needs_input_grad || needs_weight_grad)) continue;
    wanted.push_back({group[k], *grads[k], needs_depthwise_grad[k] ? &found.depthwise.back() : nullptr,
                      needs_pointwise_grad[k] ? &found.pointwise.back() : nullptr});
  }
  STD_TORCH_CHECK(!wanted.empty() || !needs_input_grad, "grads: expected at least one, got none");
  with_storage(x.scalar_type(), [&](auto scalar) {
    separable_backward<decltype(scalar)>(wanted, x, needs_input_grad ? &found.x : nullptr);
  });
  return found;
}

std::vector<Tensor> separable_conv2d_group_forward(Tensor x, std::vector<Tensor> depthwise,
                                                   std::vector<Tensor> pointwise, Pair strides, Pair paddings,
                                                   Pair dilations, std::vector<bool> relu) {
  return forward(x, group_of(x, depthwise, pointwise, strides, paddings, dilations, relu));
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> separable_conv2d_group_backward(
    std::vector<std::optional<Tensor>> grads, Tensor x, std::vector<Tensor> depthwise, std::vector<Tensor> pointwise,
    Pair strides, Pair paddings, Pair dilations, std::vector<bool> relu, bool needs_input_grad,
    std::vector<bool> needs_depthwise_grad, std::vector<bool> needs_pointwise_grad) {
  const Group group = group_of(x, depthwise, pointwise, strides, paddings, dilations, relu);
  Gradients found = backward(grads, x, group, needs_input_grad, needs_depthwise_grad, needs_pointwise_grad);
  return {found.x, found.depthwise, found.pointwise};
}

}  // namespace
}  // namespace dssp

STABLE_TORCH_LIBRARY_IMPL(dssp_kernels, CPU, library) {
  library.impl("separable_conv2d_group_forward", TORCH_BOX(&dssp::separable_conv2d_group_forward));
  library.impl("separable_conv2d_group_backward", TORCH_BOX(&dssp::separable_conv2d_group_backward));
}
