// Sweeps of separable convolutions over the rows of an image: forward, and what backward wants beside a depthwise one.
#pragma once

#include "../cpu_pointwise.h"
#include "../cpu_statistics.h"
#include "../depthwise_conv/cpu_bands.h"

namespace dssp {
namespace {

template <typename Scalar>
ChannelBlock all_channels(int64_t channels) {
  return {0, channels, vectors_of<Scalar>(channels)};
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
  using S = Sum<Scalar>;
  static constexpr int64_t width = Lanes<Scalar>::width;
  const Geometry& g;
  RowRing<Scalar> x;
  DepthwiseRow<Scalar> depthwise;
  const S* pointwise;
  Images<Scalar> y;
  int64_t outputs;
  PartMoments<S>* moments;  // of y; null: not wanted
  Buffer<S> buffer = Buffer<S>(vectors_of<Scalar>(outputs) * depthwise.vector);
  TapFinder finder{g.rows.taps};
  int64_t begun = -1, next = 0;  // where the band before this one ended, and in which image

  void part_of_image(const Parts& parts, int64_t part, int64_t image) {
    const auto [begin, end] = parts.rows(part, g.rows.outputs);
    if (image != begun || begin != next) x.start(image, all_channels<Scalar>(g.channels));
    begun = image, next = end;
    for (int64_t row = begin; row < end; ++row) {
      const Reads reads = forward_reads(g.rows, row);
      x.load(std::max<int64_t>(0, reads.source), reads.source + g.rows.reach());
      depthwise.compute(x, finder.find(without_outside(reads, g.rows.inputs), x, g.columns.taps));
      const auto written = write(y.at(image, 0, row, 0));
      if (moments) moments->add(part, written, g.columns.outputs);
    }
  }

  // Straight into the tensor where its elements are sums, else through a row of sums. Returns where they are as sums;
  // where they were rounded and their moments are wanted, as they stand in the tensor.
  SumRow<const S> write(Scalar* to) {
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
        multiply_loop(p);
        return {p.results, p.result_vector, p.result_column};
      }
    }
    p.results = buffer.data();
    p.result_vector = p.source_vector;
    p.result_column = width;
    multiply_loop(p);
    store_row_loop<Scalar>({to, y.channel, y.column, outputs, p.columns, buffer.data(), p.result_vector});
    if (moments && !std::is_same_v<Scalar, S>) {
      load_row_loop<Scalar>({to, y.channel, y.column, outputs, p.columns, buffer.data(), p.result_vector});
    }
    return {p.results, p.result_vector, p.result_column};
  }
};

// Rows of the depthwise output's gradient: rows of the output's gradient taken through the pointwise weights.
template <typename Scalar>
struct GradientRows : Ring<Sum<Scalar>> {
  static constexpr int64_t width = Lanes<Scalar>::width;
  const Sum<Scalar>* pointwise;  // transposed; null: nobody wants these rows, only those that came
  RowRing<Scalar> output;        // these
  int64_t outputs, vectors, next = 0;

  GradientRows(const Geometry& g, const Sum<Scalar>* pointwise, const Images<const Scalar>& grad,
               const OnLoad<Scalar>& on_load, int64_t outputs)
      : GradientRows(g, pointwise, grad, on_load, outputs, gradient_margins(g)) {}

  void start(int64_t image, const ChannelBlock&) {
    output.start(image, all_channels<Scalar>(outputs));
    next = 0;
  }

  bool reaches_back_to(int64_t row) const { return row >= next - this->slots; }

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
  GradientRows(const Geometry& g, const Sum<Scalar>* pointwise, const Images<const Scalar>& grad,
               const OnLoad<Scalar>& on_load, int64_t outputs, const Margins& margins)
      : Ring<Sum<Scalar>>(g.columns.outputs, margins.left, margins.right, margins.slots,
                          vectors_of<Scalar>(g.channels)),
        pointwise(pointwise),
        output{grad, g.rows.outputs, g.columns.outputs, {0, 0, margins.slots}, vectors_of<Scalar>(outputs), on_load},
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

// sum(d_x) and sum(d_x * x) per channel, from rows of d_x as Backward writes them.
template <typename Scalar>
struct InputGradientSums {
  ChannelSums* sums;  // null: not wanted
  const Sum<Scalar>* zeros;
  int64_t part = 0;

  bool is_wanted() const { return sums; }

  void operator()(const SumRow<const Sum<Scalar>>& gradient, const SumRow<const Sum<Scalar>>& x, int64_t vectors,
                  int64_t columns) {
    moments_loop<Sum<Scalar>>({gradient, x, zeros, vectors, columns, sums->first(part), sums->second(part)});
  }
};

}  // namespace
}  // namespace dssp
