// separable_conv2d on the CPU: y = conv2d(conv2d(relu(x), depthwise, groups = C), pointwise), a row at a time.
//
// A row of the depthwise convolution lives in the nearest cache just long enough to be multiplied by the pointwise
// weights: the map between the two convolutions never exists in memory. The gradient for the pointwise weights computes
// its rows again; the gradient for the depthwise convolution reads rows of the output's gradient already taken through
// the pointwise weights.
//
// Registered for the CPU key through the LibTorch stable ABI (torch >= 2.10); op.py has checked the arguments.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../depthwise_conv/cpu_bands.h"

namespace dssp {
namespace {

// ---- products of rows and pointwise weights ------------------------------------------------------------------------

// results[column][out] = sum_in source[column][in] * weights[in][out] for one row; everything in vectors of channels
template <typename S>
struct Product {
  const S *source, *weights;  // weights: [out vector][in][lane]
  int64_t columns, inputs, vectors;  // inputs: a whole number of vectors; vectors: of outputs
  S* results;
  int64_t source_vector, result_vector, result_column;  // distances between vectors and between columns
};

template <int kColumns, int kVectors, typename S>
DSSP_INLINE void multiply_columns(const Product<S>& p, int64_t vector, int64_t column) {
  using V = typename Lanes<S>::Vector;
  constexpr int64_t width = Lanes<S>::width;
  const S* weights = p.weights + vector * p.inputs * width;
  V sums[kColumns][kVectors] = {};
  for (int64_t in = 0; in < p.inputs; in += width) {
    const S* source = p.source + in / width * p.source_vector + column * width;
    for (int64_t lane = 0; lane < width; ++lane) {
      V w[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) w[v] = Lanes<S>::load(weights + (v * p.inputs + in + lane) * width);
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) {
        const S value = source[j * width + lane];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[j][v] += value * w[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kColumns; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      Lanes<S>::store(p.results + (vector + v) * p.result_vector + (column + j) * p.result_column, sums[j][v]);
    }
  }
}

template <int kVectors, typename S>
DSSP_INLINE void multiply_vectors(const Product<S>& p, int64_t vector) {
  // Twelve sums are as many as registers hold, eight the fewest that hide the latency of the multiply-add.
  int64_t j = 0;
  for (; p.columns - j >= 10 || p.columns - j == 6; j += 6) multiply_columns<6, kVectors>(p, vector, j);
  for (; p.columns - j >= 4; j += 4) multiply_columns<4, kVectors>(p, vector, j);
  for (; j < p.columns; ++j) multiply_columns<1, kVectors>(p, vector, j);
}

template <typename S>
DSSP_INLINE void multiply(const Product<S>& p) {
  int64_t vector = 0;
  for (; vector + 2 <= p.vectors; vector += 2) multiply_vectors<2>(p, vector);
  if (vector < p.vectors) multiply_vectors<1>(p, vector);
}

// gradients[in][out] += sum over columns of source[column][in] * grad[column][out] for one row
template <typename S>
struct OuterProduct {
  const S *source, *grad;
  int64_t columns, inputs, vectors;
  S* gradients;  // [out vector][in][lane]
  int64_t source_vector, grad_vector;
};

template <int kVectors, typename S>
DSSP_INLINE void accumulate_vectors(const OuterProduct<S>& p, int64_t vector) {
  using V = typename Lanes<S>::Vector;
  constexpr int64_t width = Lanes<S>::width;
  constexpr int kInputs = 4;  // divides a vector
  for (int64_t in = 0; in < p.inputs; in += kInputs) {
    const S* source = p.source + in / width * p.source_vector + in % width;
    const S* grad = p.grad + vector * p.grad_vector;
    V sums[kInputs][kVectors] = {};
    for (int64_t j = 0; j < p.columns; ++j) {
      V g[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) g[v] = Lanes<S>::load(grad + v * p.grad_vector + j * width);
#pragma GCC unroll 4
      for (int i = 0; i < kInputs; ++i) {
        const S value = source[j * width + i];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[i][v] += value * g[v];
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kInputs; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        S* to = p.gradients + ((vector + v) * p.inputs + in + i) * width;
        Lanes<S>::store(to, Lanes<S>::load(to) + sums[i][v]);
      }
    }
  }
}

template <typename S>
DSSP_INLINE void accumulate(const OuterProduct<S>& p) {
  int64_t vector = 0;
  for (; vector + 2 <= p.vectors; vector += 2) accumulate_vectors<2>(p, vector);
  if (vector < p.vectors) accumulate_vectors<1>(p, vector);
}

// target_clones takes no templates: plain functions, compiled for every instruction set.
#define DSSP_PRODUCT_LOOPS(S)                                            \
  DSSP_CLONES void multiply_loop(const Product<S>& p) { multiply<S>(p); } \
  DSSP_CLONES void accumulate_loop(const OuterProduct<S>& p) { accumulate<S>(p); }
DSSP_PRODUCT_LOOPS(float)
DSSP_PRODUCT_LOOPS(double)

// ---- bands of rows -------------------------------------------------------------------------------------------------

template <typename Scalar>
int64_t vectors_of(int64_t channels) {
  return ceil_div(channels, Lanes<Scalar>::width);
}

template <typename Scalar>
ChannelBlock all_channels(int64_t channels) {
  return {0, channels, vectors_of<Scalar>(channels)};
}

// [C_out, C_in, 1, 1] -> [out vector][in][lane], zeros behind the last channels; transposed: [in vector][out][lane]
template <typename Scalar>
Buffer<Sum<Scalar>> packed_pointwise(const Tensor& weight, bool transposed) {
  constexpr int64_t width = Lanes<Scalar>::width;
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const int64_t rows = vectors_of<Scalar>(transposed ? outputs : inputs) * width;
  Buffer<Sum<Scalar>> packed(vectors_of<Scalar>(transposed ? inputs : outputs) * width * rows);
  const auto from = read_images<Scalar>(weight);
  for (int64_t out = 0; out < outputs; ++out) {
    for (int64_t in = 0; in < inputs; ++in) {
      const int64_t row = transposed ? out : in, lane = transposed ? in : out;
      packed[(lane / width * rows + row) * width + lane % width] = widened(*from.at(out, in, 0, 0));
    }
  }
  return packed;
}

// Rows of the depthwise convolution, one at a time.
template <typename Scalar>
struct DepthwiseRows {
  static constexpr int64_t width = Lanes<Scalar>::width;
  const Geometry& g;
  const Sum<Scalar>* weights;
  RowRing<Scalar> x;
  Buffer<Sum<Scalar>> row;  // [vector][column][lane]
  TapFinder finder;

  DepthwiseRows(const Geometry& g, const Sum<Scalar>* weights, const Images<const Scalar>& x, bool relu)
      : g(g), weights(weights), x(input_rows<Scalar>(g, x, vectors_of<Scalar>(g.channels), relu)),
        row(vectors_of<Scalar>(g.channels) * row_vector()), finder(g.rows.taps) {}

  int64_t row_vector() const { return g.columns.outputs * width; }

  void start(int64_t image) { x.start(image, all_channels<Scalar>(g.channels)); }

  void compute(int64_t output_row) {
    const Reads reads = forward_reads(g.rows, output_row);
    x.load(std::max<int64_t>(0, reads.source), reads.source + g.rows.reach());
    Correlation<Sum<Scalar>> c = {x.data(), weights};
    c.rows = finder.find(without_outside(reads, g.rows.inputs), x, g.columns.taps * width);
    c.taps = forward_reads(g.columns, 0);
    c.stride = g.columns.stride;
    c.columns = g.columns.outputs;
    c.vectors = x.block.vectors;
    c.source_vector = x.vector_size();
    c.weight_vector = g.taps() * width;
    c.results = row.data();
    c.result_vector = row_vector();
    c.result_column = width;
    correlate_loop(c);
  }
};

// Output rows of one image.
template <typename Scalar>
struct SeparableForward {
  static constexpr int64_t width = Lanes<Scalar>::width;
  DepthwiseRows<Scalar> depthwise;
  const Sum<Scalar>* pointwise;
  Images<Scalar> y;
  int64_t outputs;
  Buffer<Sum<Scalar>> buffer;

  SeparableForward(DepthwiseRows<Scalar> depthwise, const Sum<Scalar>* pointwise, Images<Scalar> y, int64_t outputs)
      : depthwise(std::move(depthwise)), pointwise(pointwise), y(y), outputs(outputs),
        buffer(vectors_of<Scalar>(outputs) * this->depthwise.row_vector()) {}

  void band(int64_t image, int64_t begin, int64_t end) {
    depthwise.start(image);
    for (int64_t row = begin; row < end; ++row) {
      depthwise.compute(row);
      write(y.at(image, 0, row, 0));
    }
  }

  // Straight into the tensor where its elements are sums, else through a row of sums.
  void write(Scalar* to) {
    Product<Sum<Scalar>> p = {depthwise.row.data(), pointwise};
    p.columns = depthwise.g.columns.outputs;
    p.inputs = depthwise.x.block.vectors * width;
    p.vectors = vectors_of<Scalar>(outputs);
    p.source_vector = depthwise.row_vector();
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
    store_row_loop({to, y.channel, y.column, outputs, p.columns, buffer.data(), p.result_vector});
  }
};

// Rows of the output's gradient as it came, one at a time.
template <typename Scalar>
RowRing<Scalar> output_rows(const Geometry& g, const Images<const Scalar>& grad, int64_t outputs) {
  return {grad, g.rows.outputs, g.columns.outputs, {0, 0, 1}, vectors_of<Scalar>(outputs), false};
}

// Rows of the depthwise output's gradient: rows of the output's gradient taken through the pointwise weights.
template <typename Scalar>
struct GradientRows : Ring<Sum<Scalar>> {
  static constexpr int64_t width = Lanes<Scalar>::width;
  const Sum<Scalar>* pointwise;  // transposed
  RowRing<Scalar> output;
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
        pointwise(pointwise), output(output_rows<Scalar>(g, grad, outputs)), outputs(outputs),
        vectors(vectors_of<Scalar>(g.channels)) {}
};

// The gradient of the pointwise weights, from a band of output rows.
template <typename Scalar>
struct PointwiseGradient {
  static constexpr int64_t width = Lanes<Scalar>::width;
  DepthwiseRows<Scalar> depthwise;
  RowRing<Scalar> grad;
  int64_t outputs;

  void band(int64_t image, Sum<Scalar>* gradients, int64_t begin, int64_t end) {
    depthwise.start(image);
    grad.start(image, all_channels<Scalar>(outputs));
    for (int64_t row = begin; row < end; ++row) {
      depthwise.compute(row);
      grad.load(row, row);
      OuterProduct<Sum<Scalar>> p = {depthwise.row.data(), grad.data() + grad.offset(row)};
      p.columns = grad.columns;
      p.inputs = depthwise.x.block.vectors * width;
      p.vectors = grad.block.vectors;
      p.gradients = gradients;
      p.source_vector = depthwise.row_vector();
      p.grad_vector = grad.vector_size();
      accumulate_loop(p);
    }
  }
};

// ---- the whole tensors -----------------------------------------------------------------------------------------------

template <typename Scalar>
void separable_forward(const Geometry& g, const Tensor& x, const Tensor& depthwise, const Tensor& pointwise, bool relu,
                       Tensor& result) {
  const auto depthwise_weights = packed_weights<Scalar>(g, depthwise);
  const auto pointwise_weights = packed_pointwise<Scalar>(pointwise, false);
  const auto input = read_images<Scalar>(x);
  const auto y = write_images<Scalar>(result);
  const int64_t rows = g.rows.outputs, outputs = pointwise.size(0);
  const int64_t work = g.columns.outputs * (g.taps() + outputs) * vectors_of<Scalar>(g.channels);
  torch::stable::parallel_for(0, g.batch * rows, kGrain / work + 1, [&](int64_t begin, int64_t end) {
    SeparableForward<Scalar> sweep(DepthwiseRows<Scalar>(g, depthwise_weights.data(), input, relu),
                                   pointwise_weights.data(), y, outputs);
    while (begin < end) {
      const int64_t image = begin / rows, row = begin % rows, last = std::min(rows, row + end - begin);
      sweep.band(image, row, last);
      begin += last - row;
    }
  });
}

// partial [part][out vector][in][lane] -> [C_out, C_in, 1, 1], summed over the parts in order
template <typename Scalar>
void write_pointwise_gradient(const Buffer<Sum<Scalar>>& partial, int64_t parts, Tensor& d_weight) {
  constexpr int64_t width = Lanes<Scalar>::width;
  const int64_t size = partial.size() / std::max<int64_t>(parts, 1);
  std::vector<double> total(size, 0.0);
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t i = 0; i < size; ++i) total[i] += partial[part * size + i];
  }
  const int64_t outputs = d_weight.size(0), inputs = d_weight.size(1), rows = vectors_of<Scalar>(inputs) * width;
  const auto to = write_images<Scalar>(d_weight);
  for (int64_t out = 0; out < outputs; ++out) {
    for (int64_t in = 0; in < inputs; ++in) {
      const double value = parts ? total[(out / width * rows + in) * width + out % width] : 0.0;
      *to.at(out, in, 0, 0) = narrowed<Scalar>(static_cast<Sum<Scalar>>(value));
    }
  }
}

constexpr int64_t kPartialSums = 64 * 1024;  // of the pointwise weights' gradient, over all parts of the batch

template <typename Scalar>
void separable_backward(const Geometry& g, const Tensor& grad, const Tensor& x, const Tensor& depthwise,
                        const Tensor& pointwise, bool relu, Tensor* d_x, Tensor* d_depthwise, Tensor* d_pointwise) {
  constexpr int64_t width = Lanes<Scalar>::width;
  const int64_t outputs = pointwise.size(0);
  const int64_t vectors = vectors_of<Scalar>(g.channels), output_vectors = vectors_of<Scalar>(outputs);
  const int64_t size = vectors * width * g.taps(), pointwise_size = output_vectors * width * vectors * width;
  const Parts parts(g, vectors, std::max<int64_t>(8, kPartialSums / pointwise_size));
  const auto depthwise_weights = packed_weights<Scalar>(g, depthwise);
  const auto pointwise_weights = packed_pointwise<Scalar>(pointwise, true);
  const auto input = read_images<Scalar>(x);
  const auto output_gradient = read_images<Scalar>(grad);
  const auto input_gradient = d_x ? write_images<Scalar>(*d_x) : Images<Scalar>{};
  Buffer<Sum<Scalar>> partial(d_depthwise ? parts.count * size : 0);
  Buffer<Sum<Scalar>> pointwise_partial(d_pointwise ? parts.count * pointwise_size : 0);
  torch::stable::parallel_for(0, parts.count, 1, [&](int64_t begin, int64_t end) {
    PointwiseGradient<Scalar> to_pointwise = {DepthwiseRows<Scalar>(g, depthwise_weights.data(), input, relu),
                                              output_rows<Scalar>(g, output_gradient, outputs), outputs};
    Backward<Scalar, GradientRows<Scalar>> sweep = {
        g, depthwise_weights.data(),
        GradientRows<Scalar>(g, pointwise_weights.data(), output_gradient, outputs),
        input_rows<Scalar>(g, input, vectors, relu), RowWriter<Scalar>(input_gradient, g.columns.inputs, vectors)};
    for (int64_t part = begin; part < end; ++part) {
      const auto [first, last] = parts.rows(part, g.rows.outputs);
      for (int64_t image = parts.first_image(part); image < parts.first_image(part + parts.bands); ++image) {
        if (d_pointwise) to_pointwise.band(image, pointwise_partial.data() + part * pointwise_size, first, last);
        if (d_x || d_depthwise) {
          sweep.part_of_image(parts, part, image, all_channels<Scalar>(g.channels),
                              d_depthwise ? partial.data() + part * size : nullptr);
        }
      }
    }
  });
  if (d_depthwise) write_weight_gradient<Scalar>(g, partial, parts.count, *d_depthwise);
  if (d_pointwise) write_pointwise_gradient<Scalar>(pointwise_partial, parts.count, *d_pointwise);
}

// ---- the registered operators ----------------------------------------------------------------------------------------

Tensor separable_conv2d_forward(Tensor x, Tensor depthwise, Tensor pointwise, Pair stride, Pair padding, Pair dilation,
                                bool relu) {
  const Geometry g = geometry_of(x, depthwise, stride, padding, dilation);
  Tensor y = empty_images(x, pointwise.size(0), g.rows.outputs, g.columns.outputs);
  with_storage(x.scalar_type(), [&](auto scalar) {
    separable_forward<decltype(scalar)>(g, x, depthwise, pointwise, relu, y);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> separable_conv2d_backward(Tensor grad, Tensor x, Tensor depthwise, Tensor pointwise,
                                                             Pair stride, Pair padding, Pair dilation, bool relu,
                                                             bool needs_input_grad, bool needs_depthwise_grad,
                                                             bool needs_pointwise_grad) {
  const Geometry g = geometry_of(x, depthwise, stride, padding, dilation);
  const int64_t taps = g.taps(), outputs = pointwise.size(0);
  const int32_t dtype = dtype_of(x);
  Tensor d_x = needs_input_grad ? empty_images(x, g.channels, g.rows.inputs, g.columns.inputs) : no_elements(x);
  Tensor d_depthwise = needs_depthwise_grad ? empty_strided({g.channels, 1, g.rows.taps, g.columns.taps},
                                                            {taps, taps, g.columns.taps, 1}, dtype)
                                            : no_elements(x);
  Tensor d_pointwise = needs_pointwise_grad ? empty_strided({outputs, g.channels, 1, 1}, {g.channels, 1, 1, 1}, dtype)
                                            : no_elements(x);
  with_storage(x.scalar_type(), [&](auto scalar) {
    separable_backward<decltype(scalar)>(g, grad, x, depthwise, pointwise, relu, needs_input_grad ? &d_x : nullptr,
                                         needs_depthwise_grad ? &d_depthwise : nullptr,
                                         needs_pointwise_grad ? &d_pointwise : nullptr);
  });
  return {d_x, d_depthwise, d_pointwise};
}

}  // namespace
}  // namespace dssp

STABLE_TORCH_LIBRARY_IMPL(dssp_kernels, CPU, library) {
  library.impl("separable_conv2d_forward", TORCH_BOX(&dssp::separable_conv2d_forward));
  library.impl("separable_conv2d_backward", TORCH_BOX(&dssp::separable_conv2d_backward));
}
