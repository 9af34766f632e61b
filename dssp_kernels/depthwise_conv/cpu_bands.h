// Bands of rows of a depthwise convolution, and how a batch is cut into them.
#pragma once

#include <utility>

#include "../cpu_moments.h"
#include "cpu_rows.h"

namespace dssp {
namespace {

constexpr int64_t kGrain = 16 * 1024;  // vector multiply-adds below which a second thread costs more than it brings
constexpr int64_t kMaxParts = 64;      // partial sums of the weight gradient, however many threads there are

using Pair = std::vector<int64_t>;

// ---- rows near at hand ---------------------------------------------------------------------------------------------

struct Geometry {
  int64_t batch, channels;
  Axis rows, columns;

  int64_t taps() const { return rows.taps * columns.taps; }
};

// The last few rows of an image, as sums: [vector][slot][left zeros, columns, right zeros][lane]; row r in slot r % slots.
template <typename S>
struct Ring {
  static constexpr int64_t width = Lanes<S>::width;
  int64_t left, row_size, slots;
  Buffer<S> storage;

  Ring(int64_t columns, int64_t left, int64_t right, int64_t slots, int64_t vectors)
      : left(left), row_size((left + columns + right) * width), slots(slots),
        storage(vectors * slots * row_size) {}

  S* data() { return storage.data(); }
  const S* data() const { return storage.data(); }
  int64_t vector_size() const { return slots * row_size; }
  int64_t offset(int64_t row) const { return row % slots * row_size + left * width; }  // of column 0
};

// The columns that one row of a ring needs beside those of the tensor, and how many rows are needed at a time.
struct Margins {
  int64_t left, right, slots;
};

inline Margins input_margins(const Geometry& g) {
  const Axis& w = g.columns;
  const int64_t right = std::max<int64_t>(0, (w.outputs - 1) * w.stride + w.reach() - w.padding - (w.inputs - 1));
  return {w.padding, right, g.rows.reach() + 1};
}

inline Margins gradient_margins(const Geometry& g) {
  const Axis& w = g.columns;
  const int64_t left = ceil_div(std::max<int64_t>(0, w.reach() - w.padding), w.stride);
  const int64_t right = std::max<int64_t>(0, (w.inputs - 1 + w.padding) / w.stride - (w.outputs - 1));
  return {left, right, g.rows.reach() / g.rows.stride + 1};
}

// What becomes of pixels as a ring loads them. Both kinds of norms are for blocks of all channels.
template <typename Scalar>
struct OnLoad {
  bool relu = false;
  const Norm<Sum<Scalar>>* norm = nullptr;         // before the ReLU; null: none
  const NormBackward<Scalar>* gradient = nullptr;  // instead of both; null: none
};

// Rows of one image and channel block of a tensor.
template <typename Scalar>
struct RowRing : Ring<Sum<Scalar>> {
  using Base = Ring<Sum<Scalar>>;
  using S = Sum<Scalar>;
  Images<const Scalar> source;
  int64_t rows, columns, image = 0, next = 0;
  OnLoad<Scalar> on_load;
  ChannelBlock block = {};

  RowRing(Images<const Scalar> source, int64_t rows, int64_t columns, const Margins& margins, int64_t vectors,
          const OnLoad<Scalar>& on_load)
      : Base(columns, margins.left, margins.right, margins.slots, vectors), source(source), rows(rows),
        columns(columns), on_load(on_load) {}

  void start(int64_t new_image, const ChannelBlock& new_block) {
    image = new_image;
    block = new_block;
    next = 0;
  }

  // Whether a row is still there, or still to come.
  bool reaches_back_to(int64_t row) const { return row >= next - this->slots; }

  // Make rows first..last available, as far as they exist; rows come in ascending order.
  void load(int64_t first, int64_t last) {
    for (next = std::max(next, first); next <= std::min(last, rows - 1); ++next) load_next();
  }

 private:
  void load_next() {
    const Row<const Scalar, S> row = {source.at(image, block.first, next, 0), source.channel, source.column,
                                      block.channels, columns, this->data() + this->offset(next), this->vector_size()};
    const int64_t ahead = next + 1 < rows ? source.row : 0;
    const auto& [relu, norm, gradient] = on_load;
    if (gradient) return load_row_loop(row, ThroughNorm<Scalar>{*gradient, gradient->z.at(image, 0, next, 0)}, ahead);
    if (norm && relu) return load_row_loop(row, Normalised<S, true>{*norm}, ahead);
    if (norm) return load_row_loop(row, Normalised<S, false>{*norm}, ahead);
    if (relu) return load_row_loop(row, Rectified(), ahead);
    load_row_loop(row, Unchanged(), ahead);
  }
};

// Where rows of results go: straight into the tensor where its elements are sums, else through a row of sums.
template <typename Scalar>
struct RowWriter {
  static constexpr int64_t width = Lanes<Scalar>::width;
  Images<Scalar> target;
  int64_t columns;
  Buffer<Sum<Scalar>> buffer;

  RowWriter(Images<Scalar> target, int64_t columns, int64_t vectors)
      : target(target), columns(columns), buffer(columns * vectors * width) {}

  // The results of `c`, into the columns of one row from `column` on, `step` apart. Returns where they are as sums.
  SumRow<const Sum<Scalar>> write(Correlation<Sum<Scalar>>& c, int64_t image, const ChannelBlock& block, int64_t row,
                                  int64_t column, int64_t step) {
    Scalar* to = target.at(image, block.first, row, column);
    if constexpr (std::is_same_v<Scalar, Sum<Scalar>>) {
      if (target.channel == 1 && block.channels % width == 0) {
        c.results = to;
        c.result_vector = width;
        c.result_column = step * target.column;
        correlate_loop(c);
        return {c.results, c.result_vector, c.result_column};
      }
    }
    c.results = buffer.data();
    c.result_vector = columns * width;
    c.result_column = width;
    const int64_t to_next = step * target.column;
    if (c.adds) {
      load_row_loop<Scalar>({to, target.channel, to_next, block.channels, c.columns, buffer.data(), c.result_vector});
    }
    correlate_loop(c);
    store_row_loop<Scalar>({to, target.channel, to_next, block.channels, c.columns, buffer.data(), c.result_vector});
    return {c.results, c.result_vector, c.result_column};
  }
};

// Where the kernel rows of `reads` find their source rows in a ring, and the numbers of their first taps.
struct TapFinder {
  std::vector<int64_t> sources, taps;

  explicit TapFinder(int64_t rows) : sources(rows), taps(rows) {}

  template <typename S>
  TapRows find(const Reads& reads, const Ring<S>& ring, int64_t taps_of_a_row) {
    for (int64_t i = 0; i < reads.count; ++i) {
      sources[i] = ring.offset(reads.source + i * reads.source_step);
      taps[i] = (reads.first + i * reads.step) * taps_of_a_row;
    }
    return {sources.data(), taps.data(), reads.count};
  }
};

template <typename Scalar>
RowRing<Scalar> input_rows(const Geometry& g, const Images<const Scalar>& x, int64_t vectors,
                           const OnLoad<Scalar>& on_load) {
  return {x, g.rows.inputs, g.columns.inputs, input_margins(g), vectors, on_load};
}

template <typename Scalar>
RowRing<Scalar> gradient_rows(const Geometry& g, const Images<const Scalar>& grad, int64_t vectors) {
  return {grad, g.rows.outputs, g.columns.outputs, gradient_margins(g), vectors, {}};
}

// ---- the parts of a batch -------------------------------------------------------------------------------------------

// The parts of the batch whose contributions to the weight gradient are summed apart: some images each, or a band of
// rows of one image. They depend on the shapes alone, so the result is the same on any number of threads.
struct Parts {
  int64_t batch, count, images, bands;

  Parts(const Geometry& g, int64_t vectors)
      : Parts(g.batch, g.rows.outputs, g.rows.outputs * g.columns.outputs * g.taps() * vectors, kMaxParts) {}

  // rows: of an image's results; work: multiply-adds of vectors per image.
  Parts(int64_t batch, int64_t rows, int64_t work, int64_t most) : batch(batch), count(0), images(1), bands(1) {
    if (batch == 0) return;
    const int64_t wanted = std::max<int64_t>(1, std::min(most, batch * work / kGrain));
    images = ceil_div(batch, wanted);
    bands = std::min(ceil_div(wanted, batch), rows);
    count = ceil_div(batch, images) * bands;
  }

  int64_t first_image(int64_t part) const { return std::min(batch, part / bands * images); }

  std::pair<int64_t, int64_t> rows(int64_t part, int64_t all) const {
    const int64_t band = part % bands;
    return {all * band / bands, all * (band + 1) / bands};
  }
};

// ---- the gradients of a band ----------------------------------------------------------------------------------------

// Nothing to be done with an output row.
struct NoWork {
  bool is_wanted() const { return false; }
  template <typename... Rows>
  void operator()(const Rows&...) const {}
};

// Both gradients of one image and channel block, in one sweep over its rows. Gradients: a ring of rows of the outputs'
// gradient, with start(), load() and reaches_back_to() as RowRing has them. OutputRow: what else wants to see each output
// row while its gradient has just been loaded and the rows of x that it reads are near: (x, gradients, taps that meet x,
// row). InputRow: what wants to see the gradient of x as it is written, and what the ring has of x there: (gradient, x,
// vectors, columns).
template <typename Scalar, typename Gradients, typename OutputRow = NoWork, typename InputRow = NoWork>
struct Backward {
  static constexpr int64_t width = Lanes<Scalar>::width;
  const Geometry& g;
  const Sum<Scalar>* weights;
  Gradients grad;
  RowRing<Scalar> x;
  RowWriter<Scalar> d_x;
  bool adds = false;  // to what d_x holds
  OutputRow output_row = {};
  InputRow input_row = {};
  TapFinder finder{g.rows.taps};
  int64_t begun = -1, out_next = 0, in_next = 0;  // where the band before this one ended, and in which image

  // The weight gradient takes output rows out_begin..out_end as soon as rows in_begin..in_end of the input gradient need
  // them, and loads them, so every row is loaded once. gradients: null if not wanted.
  void band(int64_t image, const ChannelBlock& block, Sum<Scalar>* gradients, int64_t out_begin, int64_t out_end,
            int64_t in_begin, int64_t in_end) {
    if (!continues(image, block, out_begin, in_begin)) {
      x.start(image, block);
      grad.start(image, block);
    }
    begun = image, out_next = out_end, in_next = in_end;
    Contribution<Sum<Scalar>> to_weights = weight_gradient_work(gradients);
    Correlation<Sum<Scalar>> to_input = input_gradient_work();
    int64_t next = gradients || output_row.is_wanted() ? out_begin : out_end;
    for (int64_t row = in_begin; row < in_end && d_x.target.data; ++row) {
      const int64_t reached = row + g.rows.padding;
      const int64_t first = ceil_div(std::max<int64_t>(0, reached - g.rows.reach()), g.rows.stride);
      const int64_t last = reached / g.rows.stride;
      for (; next < std::min(out_end, first); ++next) visit_output_row(to_weights, next);
      grad.load(first, std::min(last, next - 1));
      for (; next < std::min(out_end, last + 1); ++next) visit_output_row(to_weights, next);
      grad.load(first, last);
      input_gradient_row(to_input, row);
    }
    for (; next < out_end; ++next) visit_output_row(to_weights, next);
  }

  // Whether the rows that a band starts with are still in the rings.
  bool continues(int64_t image, const ChannelBlock& block, int64_t out_begin, int64_t in_begin) const {
    if (image != begun || block.first != x.block.first || out_begin != out_next || in_begin != in_next) return false;
    const int64_t reached = in_begin + g.rows.padding - g.rows.reach();
    return x.reaches_back_to(out_begin * g.rows.stride - g.rows.padding) && x.reaches_back_to(in_begin) &&
           grad.reaches_back_to(std::min(out_begin, ceil_div(std::max<int64_t>(0, reached), g.rows.stride)));
  }

  // The rows of an image that belong to one part of the batch.
  void part_of_image(const Parts& parts, int64_t part, int64_t image, const ChannelBlock& block,
                     Sum<Scalar>* gradients) {
    const auto [out_begin, out_end] = parts.rows(part, g.rows.outputs);
    const auto [in_begin, in_end] = parts.rows(part, g.rows.inputs);
    band(image, block, gradients, out_begin, out_end, in_begin, in_end);
  }

  Contribution<Sum<Scalar>> weight_gradient_work(Sum<Scalar>* gradients) const {
    Contribution<Sum<Scalar>> c = {nullptr, x.data() - g.columns.padding * width};
    c.taps = g.columns.taps;
    c.stride = g.columns.stride;
    c.dilation = g.columns.dilation;
    c.columns = g.columns.outputs;
    c.vectors = x.block.vectors;
    c.gradients = gradients;
    c.grad_vector = grad.vector_size();
    c.source_vector = x.vector_size();
    c.gradient_vector = g.taps() * width;
    return c;
  }

  Correlation<Sum<Scalar>> input_gradient_work() const {
    Correlation<Sum<Scalar>> c = {grad.data(), weights + x.block.first * g.taps() * kWeightCopies};
    c.stride = 1;
    c.vectors = x.block.vectors;
    c.source_vector = grad.vector_size();
    c.taps_in_all = g.taps();
    c.rectified_vector = x.vector_size();
    c.rectified_column = g.columns.stride * width;
    c.adds = adds;
    return c;
  }

  void visit_output_row(Contribution<Sum<Scalar>>& c, int64_t row) {
    const Reads reads = forward_reads(g.rows, row);
    x.load(std::max<int64_t>(0, reads.source), reads.source + g.rows.reach());
    grad.load(row, row);
    c.rows = finder.find(without_outside(reads, g.rows.inputs), x, g.columns.taps);
    output_row(x, grad, c.rows, row);
    if (!c.gradients) return;
    c.grad = grad.data() + grad.offset(row);
    contribute_loop(c);
  }

  // A row's columns fall into `stride` phases; within a phase all read the same taps, from neighbouring gradients.
  void input_gradient_row(Correlation<Sum<Scalar>>& c, int64_t row) {
    const int64_t stride = g.columns.stride;
    const bool reads_x = x.on_load.relu || input_row.is_wanted();
    if (reads_x) x.load(row, row);
    c.rows = finder.find(without_outside(backward_reads(g.rows, row), g.rows.outputs), grad, g.columns.taps);
    for (int64_t phase = 0; phase < std::min(stride, g.columns.inputs); ++phase) {
      c.taps = backward_reads(g.columns, phase);
      c.columns = ceil_div(g.columns.inputs - phase, stride);
      const Sum<Scalar>* from = x.data() + x.offset(row) + phase * width;
      if (x.on_load.relu) c.rectified = from;
      const auto written = d_x.write(c, x.image, x.block, row, phase, stride);
      const SumRow<const Sum<Scalar>> seen = {from, c.rectified_vector, c.rectified_column};
      if (input_row.is_wanted()) input_row(written, seen, c.vectors, c.columns);
    }
  }
};

// ---- weights and tensors -----------------------------------------------------------------------------------------

// [C, 1, kh, kw] -> [vector][tap][copy][lane], zeros in the lanes behind the last channel
template <typename Scalar>
Buffer<Sum<Scalar>> packed_weights(const Geometry& g, const Tensor& weight) {
  constexpr int64_t width = Lanes<Scalar>::width;
  const auto from = read_images<Scalar>(weight);
  Buffer<Sum<Scalar>> packed(ceil_div(g.channels, width) * g.taps() * kWeightCopies * width);
  for (int64_t c = 0; c < g.channels; ++c) {
    for (int64_t t = 0; t < g.taps(); ++t) {
      const Sum<Scalar> value = widened(*from.at(c, 0, t / g.columns.taps, t % g.columns.taps));
      for (int64_t copy = 0; copy < kWeightCopies; ++copy) {
        packed[((c / width * g.taps() + t) * kWeightCopies + copy) * width + c % width] = value;
      }
    }
  }
  return packed;
}

// partial [part][vector][tap][lane] -> [C, 1, kh, kw], summed over the parts in order
template <typename Scalar>
void write_weight_gradient(const Geometry& g, const UnsetBuffer<Sum<Scalar>>& partial, int64_t parts,
                           Tensor& d_weight) {
  constexpr int64_t width = Lanes<Scalar>::width;
  const auto total = summed_parts(partial, parts);
  const auto to = write_images<Scalar>(d_weight);
  for (int64_t c = 0; c < g.channels; ++c) {
    for (int64_t t = 0; t < g.taps(); ++t) {
      const double value = parts ? total[(c / width * g.taps() + t) * width + c % width] : 0.0;
      *to.at(c, 0, t / g.columns.taps, t % g.columns.taps) = narrowed<Scalar>(static_cast<Sum<Scalar>>(value));
    }
  }
}

// [B, channels, rows, columns] in the layout of x: channels_last if its channels lie innermost, else contiguous.
inline Tensor empty_channels_last(const Tensor& x, int64_t channels, int64_t rows, int64_t columns) {
  const int64_t row = columns * channels;
  return empty_strided({x.size(0), channels, rows, columns}, {rows * row, 1, row, channels}, dtype_of(x));
}

inline Tensor empty_images(const Tensor& x, int64_t channels, int64_t rows, int64_t columns) {
  if (x.stride(1) == 1 && x.stride(3) != 1) return empty_channels_last(x, channels, rows, columns);
  const int64_t batch = x.size(0), image = channels * rows * columns;
  return empty_strided({batch, channels, rows, columns}, {image, rows * columns, columns, 1}, dtype_of(x));
}

// images: the sizes [B, C, H, W] of what is read
inline Geometry geometry_of(const std::vector<int64_t>& images, const Tensor& weight, const Pair& stride,
                            const Pair& padding, const Pair& dilation) {
  const auto axis = [&](int64_t i) -> Axis {
    const int64_t inputs = images[2 + i], taps = weight.size(2 + i);
    const int64_t last = inputs + 2 * padding[i] - (taps - 1) * dilation[i] - 1;
    return {inputs, last / stride[i] + 1, taps, stride[i], padding[i], dilation[i]};
  };
  return {images[0], images[1], axis(0), axis(1)};
}

// Of a tensor [B, C, H, W].
inline std::vector<int64_t> sizes_of(const Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3)}; }

}  // namespace
}  // namespace dssp
