// depthwise_conv2d on the CPU: y = conv2d(relu(x), weight, groups = C) and its gradients, vectorised over channels.
//
// Every pass keeps a ring of padded source rows in the nearest cache: widened to the type of the sums, rectified,
// channels in groups of one vector. On it the taps are plain multiply-adds without bounds checks or conversions,
// whatever the kernel size, stride, dilation, storage type and memory layout of the tensors.
//
// Registered for the CPU key through the LibTorch stable ABI (torch >= 2.10); op.py has checked the arguments.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../cpu_vectors.h"

namespace dssp {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Pair = std::vector<int64_t>;

constexpr int64_t kRingBytes = 64 * 1024;  // two rings of rows stay in the nearest caches
constexpr int64_t kGrain = 16 * 1024;      // vector multiply-adds below which a second thread costs more than it brings
constexpr int64_t kMaxParts = 64;          // partial sums of the weight gradient, however many threads there are

template <typename Use>
void with_storage(ScalarType type, Use use) {
  switch (type) {
    case ScalarType::Float: return use(float{});
    case ScalarType::Double: return use(double{});
    case ScalarType::BFloat16: return use(BFloat16{});
    case ScalarType::Half: return use(Half{});
    default: STD_TORCH_CHECK(false, "depthwise_conv2d: expected floating-point tensors");
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- geometry ----------------------------------------------------------------------------------------------------

// One spatial axis: output o reads the inputs o * stride + tap * dilation - padding that exist.
struct Axis {
  int64_t inputs, outputs, taps, stride, padding, dilation;

  int64_t reach() const { return (taps - 1) * dilation; }
};

// What one output reads along an axis: taps first, first + step, ... (count of them), the first from source index
// `source`, each next one `source_step` further. Sources outside the tensor are left out.
struct Reads {
  int64_t first, count, step, source, source_step;
};

Reads without_outside(Reads reads, int64_t sources) {
  while (reads.count > 0 && (reads.source < 0 || reads.source >= sources)) {
    reads.first += reads.step;
    reads.source += reads.source_step;
    --reads.count;
  }
  while (reads.count > 0) {
    const int64_t last = reads.source + (reads.count - 1) * reads.source_step;
    if (last >= 0 && last < sources) break;
    --reads.count;
  }
  return reads;
}

// Output o of the convolution reads inputs.
Reads forward_reads(const Axis& axis, int64_t o) {
  return {0, axis.taps, 1, o * axis.stride - axis.padding, axis.dilation};
}

// Input i gets its gradient from those outputs (i + padding - tap * dilation) / stride that are whole numbers.
Reads backward_reads(const Axis& axis, int64_t i) {
  const int64_t step = axis.stride / std::gcd(axis.stride, axis.dilation);
  for (int64_t tap = 0; tap < std::min(step, axis.taps); ++tap) {
    const int64_t scaled = i + axis.padding - tap * axis.dilation;
    if (scaled % axis.stride != 0) continue;
    return {tap, ceil_div(axis.taps - tap, step), step, scaled / axis.stride, -step * axis.dilation / axis.stride};
  }
  return {0, 0, 1, 0, 0};
}

// One tensor [B, C, H, W] in any memory layout.
template <typename Scalar>
struct Images {
  Scalar* data;
  int64_t image, channel, row, column;  // strides

  Scalar* at(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return data + n * image + c * channel + h * row + w * column;
  }
};

template <typename Scalar>
Images<const Scalar> read_images(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {static_cast<const Scalar*>(tensor.const_data_ptr()), strides[0], strides[1], strides[2], strides[3]};
}

template <typename Scalar>
Images<Scalar> write_images(Tensor& tensor) {
  const auto strides = tensor.strides();
  return {static_cast<Scalar*>(tensor.mutable_data_ptr()), strides[0], strides[1], strides[2], strides[3]};
}

// A block of channels, processed together: the `vectors` vectors from channel `first` on, `channels` channels in all.
struct ChannelBlock {
  int64_t first, channels, vectors;
};

template <typename Scalar>
using Sum = typename Lanes<Scalar>::Sum;
template <typename Scalar>
using Vector = typename Lanes<Scalar>::Vector;

// ---- rows in and out: tensors <-> [vector][column][lane] of sums -------------------------------------------------

// One row of one image and channel block in a tensor, and where its vectors lie as sums.
template <typename Scalar, typename S>
struct Row {
  Scalar* pixels;
  int64_t channel, column, channels, columns;  // strides, then sizes
  S* sums;
  int64_t vector;  // distance of one vector's columns from the next one's
};

template <typename V>
DSSP_INLINE V rectified(V value) {  // NaN stays NaN
  return value < 0 ? V{} : value;
}

template <typename Scalar>
DSSP_INLINE Sum<Scalar> widened(Scalar value) {
  if constexpr (std::is_same_v<Scalar, Sum<Scalar>>) return value;
  return load_first(&value, 1)[0];
}

template <typename Scalar>
DSSP_INLINE Scalar narrowed(Sum<Scalar> value) {
  if constexpr (std::is_same_v<Scalar, Sum<Scalar>>) return value;
  Scalar result;
  store_first(&result, Vector<Scalar>{value}, 1);
  return result;
}

// sums = relu(pixels), or pixels. `ahead`: distance to the pixels wanted next, fetched from memory meanwhile.
template <typename Scalar>
DSSP_INLINE void load_row(const Row<const Scalar, Sum<Scalar>>& row, bool relu, int64_t ahead) {
  constexpr int64_t width = Lanes<Scalar>::width;
  const int64_t channel = row.channel, column = row.column, columns = row.columns;
  for (int64_t c = 0; c < row.channels; c += width) {
    const Scalar* from = row.pixels + c * channel;
    Sum<Scalar>* to = row.sums + c / width * row.vector;
    const int64_t count = std::min(width, row.channels - c);
    if (channel != 1 || count < width) {
      for (int64_t lane = 0; lane < count; ++lane) {
        for (int64_t j = 0; j < columns; ++j) {
          const Sum<Scalar> value = widened(from[lane * channel + j * column]);
          to[j * width + lane] = relu && value < 0 ? 0 : value;
        }
      }
    } else if (relu) {
      for (int64_t j = 0; j < columns; ++j) {
        if (c == 0) __builtin_prefetch(from + j * column + ahead);
        Lanes<Sum<Scalar>>::store(to + j * width, rectified(Lanes<Scalar>::load(from + j * column)));
      }
    } else {
      for (int64_t j = 0; j < columns; ++j) {
        if (c == 0) __builtin_prefetch(from + j * column + ahead);
        Lanes<Sum<Scalar>>::store(to + j * width, Lanes<Scalar>::load(from + j * column));
      }
    }
  }
}

template <typename Scalar>
DSSP_INLINE void store_row(const Row<Scalar, const Sum<Scalar>>& row) {
  constexpr int64_t width = Lanes<Scalar>::width;
  const int64_t channel = row.channel, column = row.column, columns = row.columns;
  for (int64_t c = 0; c < row.channels; c += width) {
    const Sum<Scalar>* from = row.sums + c / width * row.vector;
    Scalar* to = row.pixels + c * channel;
    const int64_t count = std::min(width, row.channels - c);
    if (channel != 1 || count < width) {
      for (int64_t lane = 0; lane < count; ++lane) {
        for (int64_t j = 0; j < columns; ++j) {
          to[lane * channel + j * column] = narrowed<Scalar>(from[j * width + lane]);
        }
      }
    } else {
      for (int64_t j = 0; j < columns; ++j) {
        Lanes<Scalar>::store(to + j * column, Lanes<Sum<Scalar>>::load(from + j * width));
      }
    }
  }
}

// ---- rows of taps: from sums to sums -----------------------------------------------------------------------------

// The kernel rows that meet the image at one output row: where each one's source row and weights start.
struct TapRows {
  const int64_t *sources, *weights;
  int64_t count;
};

// One row of results from rows of sources: results[j] = sum over taps of weight * source[j * stride + ...]
template <typename S>
struct Correlation {
  const S *source, *weights;
  TapRows rows;
  Reads taps;  // of the first column
  int64_t stride, columns, vectors;
  const S* rectified;  // null, or relu(x) where results are wanted: they are cleared where it is 0
  S* results;
  // distances between vectors, and between columns
  int64_t source_vector, weight_vector, rectified_vector, result_vector, rectified_column, result_column;
};

// kColumns results side by side, so that every weight is loaded once for all of them. kTaps, kStride: 0 = any.
template <int kColumns, int kTaps, int kStride, typename S>
DSSP_INLINE void correlate_columns(const Correlation<S>& c, int64_t vector, int64_t column) {
  using V = typename Lanes<S>::Vector;
  constexpr int64_t width = Lanes<S>::width;
  const int64_t stride = (kStride ? kStride : c.stride) * width, taps = kTaps ? kTaps : c.taps.count;
  const int64_t source_step = c.taps.source_step * width, weight_step = c.taps.step * width;
  const int64_t result_step = c.result_column, rectified_step = c.rectified_column, rows = c.rows.count;
  const int64_t *row_sources = c.rows.sources, *row_weights = c.rows.weights;
  const S* source = c.source + vector * c.source_vector + c.taps.source * width + column * stride;
  const S* weights = c.weights + vector * c.weight_vector + c.taps.first * width;
  V sums[kColumns];
#pragma GCC unroll 8
  for (int j = 0; j < kColumns; ++j) sums[j] = V{};
  for (int64_t i = 0; i < rows; ++i) {
    const S* from = source + row_sources[i];
    const S* weight = weights + row_weights[i];
#pragma GCC unroll 5
    for (int64_t t = 0; t < taps; ++t) {
      const V w = Lanes<S>::load(weight);
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) sums[j] += w * Lanes<S>::load(from + j * stride);
      from += source_step;
      weight += weight_step;
    }
  }
  if (c.rectified) {
    const S* x = c.rectified + vector * c.rectified_vector + column * rectified_step;
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {  // the derivative of ReLU as in PyTorch: a NaN in x lets the gradient through
      sums[j] = Lanes<S>::load(x + j * rectified_step) == 0 ? V{} : sums[j];
    }
  }
  S* to = c.results + vector * c.result_vector + column * result_step;
#pragma GCC unroll 8
  for (int j = 0; j < kColumns; ++j) Lanes<S>::store(to + j * result_step, sums[j]);
}

template <int kTaps, int kStride, typename S>
DSSP_INLINE void correlate_in_groups(const Correlation<S>& c) {
  for (int64_t vector = 0; vector < c.vectors; ++vector) {
    int64_t j = 0;
    for (; j + 8 <= c.columns; j += 8) correlate_columns<8, kTaps, kStride>(c, vector, j);
    if (c.columns & 4) correlate_columns<4, kTaps, kStride>(c, vector, j), j += 4;
    if (c.columns & 2) correlate_columns<2, kTaps, kStride>(c, vector, j), j += 2;
    if (c.columns & 1) correlate_columns<1, kTaps, kStride>(c, vector, j);
  }
}

template <typename S>
DSSP_INLINE void correlate(const Correlation<S>& c) {
  if (c.stride == 1 && c.taps.count == 3) return correlate_in_groups<3, 1>(c);
  if (c.stride == 1 && c.taps.count == 5) return correlate_in_groups<5, 1>(c);
  if (c.stride == 1) return correlate_in_groups<0, 1>(c);
  if (c.stride == 2) return correlate_in_groups<0, 2>(c);
  return correlate_in_groups<0, 0>(c);
}

// One output row's share of the weight gradient: gradients[tap] += sum_j grad[j] * source[j * stride + tap * dilation]
template <typename S>
struct Contribution {
  const S *grad, *source;
  TapRows rows;
  int64_t taps, stride, dilation, columns, vectors;
  S* gradients;
  int64_t grad_vector, source_vector, gradient_vector;  // distances between vectors
};

// kRows kernel rows of kTaps taps, their sums in registers.
template <int kRows, int kTaps, int kDilation, typename S>
DSSP_INLINE void contribute_rows(const Contribution<S>& c, int64_t vector, int64_t first_row) {
  using V = typename Lanes<S>::Vector;
  constexpr int64_t width = Lanes<S>::width;
  const S* grad = c.grad + vector * c.grad_vector;
  const S* from[kRows];
  V sums[kRows][kTaps] = {};
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) from[r] = c.source + vector * c.source_vector + c.rows.sources[first_row + r];
  const int64_t columns = c.columns, stride = c.stride * width;
  for (int64_t j = 0; j < columns; ++j) {
    const V g = Lanes<S>::load(grad + j * width);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int t = 0; t < kTaps; ++t) sums[r][t] += g * Lanes<S>::load(from[r] + t * kDilation * width);
      from[r] += stride;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    S* to = c.gradients + vector * c.gradient_vector + c.rows.weights[first_row + r];
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; ++t) Lanes<S>::store(to + t * width, Lanes<S>::load(to + t * width) + sums[r][t]);
  }
}

// As many kernel rows at a time as 16 registers hold the sums of.
template <int kTaps, int kDilation, typename S>
DSSP_INLINE void contribute_taps(const Contribution<S>& c) {
  constexpr int kRows = kTaps == 7 ? 2 : 3;
  for (int64_t vector = 0; vector < c.vectors; ++vector) {
    int64_t row = 0;
    for (; row + kRows <= c.rows.count; row += kRows) contribute_rows<kRows, kTaps, kDilation>(c, vector, row);
    if (row + 2 <= c.rows.count) contribute_rows<2, kTaps, kDilation>(c, vector, row), row += 2;
    if (row < c.rows.count) contribute_rows<1, kTaps, kDilation>(c, vector, row);
  }
}

// Any kernel: a tap at a time.
template <typename S>
DSSP_INLINE void contribute_any(const Contribution<S>& c) {
  using V = typename Lanes<S>::Vector;
  constexpr int64_t width = Lanes<S>::width;
  for (int64_t vector = 0; vector < c.vectors; ++vector) {
    const S* grad = c.grad + vector * c.grad_vector;
    for (int64_t i = 0; i < c.rows.count * c.taps; ++i) {
      const int64_t row = i / c.taps, tap = i % c.taps;
      const S* from = c.source + vector * c.source_vector + c.rows.sources[row] + tap * c.dilation * width;
      S* to = c.gradients + vector * c.gradient_vector + c.rows.weights[row] + tap * width;
      V sum = {};
      for (int64_t j = 0; j < c.columns; ++j) {
        sum += Lanes<S>::load(grad + j * width) * Lanes<S>::load(from + j * c.stride * width);
      }
      Lanes<S>::store(to, Lanes<S>::load(to) + sum);
    }
  }
}

template <typename S>
DSSP_INLINE void contribute(const Contribution<S>& c) {
  switch (c.dilation <= 2 ? 10 * c.taps + c.dilation : 0) {
    case 31: return contribute_taps<3, 1>(c);
    case 32: return contribute_taps<3, 2>(c);
    case 51: return contribute_taps<5, 1>(c);
    case 52: return contribute_taps<5, 2>(c);
    case 71: return contribute_taps<7, 1>(c);
    case 72: return contribute_taps<7, 2>(c);
    default: return contribute_any(c);
  }
}

// target_clones takes no templates: plain functions, compiled for every instruction set.
#define DSSP_ROW_LOOPS(Scalar)                                                                                 \
  DSSP_CLONES void load_row_loop(const Row<const Scalar, Sum<Scalar>>& row, bool relu, int64_t ahead) {        \
    load_row<Scalar>(row, relu, ahead);                                                                        \
  }                                                                                                            \
  DSSP_CLONES void store_row_loop(const Row<Scalar, const Sum<Scalar>>& row) { store_row<Scalar>(row); }
DSSP_ROW_LOOPS(float)
DSSP_ROW_LOOPS(double)
DSSP_ROW_LOOPS(BFloat16)
DSSP_ROW_LOOPS(Half)
#define DSSP_TAP_LOOPS(S)                                                               \
  DSSP_CLONES void correlate_loop(const Correlation<S>& c) { correlate<S>(c); }         \
  DSSP_CLONES void contribute_loop(const Contribution<S>& c) { contribute<S>(c); }
DSSP_TAP_LOOPS(float)
DSSP_TAP_LOOPS(double)

// ---- bands of rows -----------------------------------------------------------------------------------------------

struct Geometry {
  int64_t batch, channels;
  Axis rows, columns;

  int64_t taps() const { return rows.taps * columns.taps; }
};

// Rows of one image and channel block: [vector][slot][left zeros, columns, right zeros][lane]; row r in slot r % slots.
template <typename Scalar>
struct RowRing {
  static constexpr int64_t width = Lanes<Scalar>::width;
  Images<const Scalar> source;
  int64_t rows, columns, left, row_size, slots, image = 0, next = 0;
  bool relu;
  ChannelBlock block = {};
  std::vector<Sum<Scalar>> storage;
  Sum<Scalar>* data;  // aligned to cache lines

  RowRing(Images<const Scalar> source, int64_t rows, int64_t columns, int64_t left, int64_t right, int64_t slots,
          int64_t vectors, bool relu)
      : source(source), rows(rows), columns(columns), left(left), row_size((left + columns + right) * width),
        slots(slots), relu(relu), storage(vectors * slots * row_size + 64 / sizeof(Sum<Scalar>)) {
    const auto address = reinterpret_cast<uintptr_t>(storage.data());
    data = storage.data() + ((64 - address % 64) % 64) / sizeof(Sum<Scalar>);
  }

  void start(int64_t new_image, const ChannelBlock& new_block) {
    image = new_image;
    block = new_block;
    next = 0;
  }

  int64_t vector_size() const { return slots * row_size; }
  int64_t offset(int64_t row) const { return row % slots * row_size + left * width; }  // of column 0

  // Make rows first..last available, as far as they exist; rows come in ascending order.
  void load(int64_t first, int64_t last) {
    for (next = std::max(next, first); next <= std::min(last, rows - 1); ++next) {
      load_row_loop({source.at(image, block.first, next, 0), source.channel, source.column, block.channels, columns,
                     data + offset(next), vector_size()},
                    relu, next + 1 < rows ? source.row : 0);
    }
  }
};

// Where rows of results go: straight into the tensor where its elements are sums, else through a row of sums.
template <typename Scalar>
struct RowWriter {
  static constexpr int64_t width = Lanes<Scalar>::width;
  Images<Scalar> target;
  int64_t columns;
  std::vector<Sum<Scalar>> buffer;

  RowWriter(Images<Scalar> target, int64_t columns, int64_t vectors)
      : target(target), columns(columns), buffer(columns * vectors * width) {}

  // The results of `c`, into the columns of one row from `column` on, `step` apart.
  void write(Correlation<Sum<Scalar>>& c, int64_t image, const ChannelBlock& block, int64_t row, int64_t column,
             int64_t step) {
    Scalar* to = target.at(image, block.first, row, column);
    if constexpr (std::is_same_v<Scalar, Sum<Scalar>>) {
      if (target.channel == 1 && block.channels % width == 0) {
        c.results = to;
        c.result_vector = width;
        c.result_column = step * target.column;
        return correlate_loop(c);
      }
    }
    c.results = buffer.data();
    c.result_vector = columns * width;
    c.result_column = width;
    correlate_loop(c);
    store_row_loop({to, target.channel, step * target.column, block.channels, c.columns, buffer.data(),
                    columns * width});
  }
};

// Where the kernel rows of `reads` find their source rows in a ring and their weights.
struct TapFinder {
  std::vector<int64_t> sources, weights;

  explicit TapFinder(int64_t taps) : sources(taps), weights(taps) {}

  template <typename Scalar>
  TapRows find(const Reads& reads, const RowRing<Scalar>& ring, int64_t weight_row) {
    for (int64_t i = 0; i < reads.count; ++i) {
      sources[i] = ring.offset(reads.source + i * reads.source_step);
      weights[i] = (reads.first + i * reads.step) * weight_row;
    }
    return {sources.data(), weights.data(), reads.count};
  }
};

template <typename Scalar>
RowRing<Scalar> input_rows(const Geometry& g, const Images<const Scalar>& x, int64_t vectors, bool relu) {
  const Axis& w = g.columns;
  const int64_t right = std::max<int64_t>(0, (w.outputs - 1) * w.stride + w.reach() - w.padding - (w.inputs - 1));
  return {x, g.rows.inputs, w.inputs, w.padding, right, g.rows.reach() + 1, vectors, relu};
}

template <typename Scalar>
RowRing<Scalar> gradient_rows(const Geometry& g, const Images<const Scalar>& grad, int64_t vectors) {
  const Axis& w = g.columns;
  const int64_t left = ceil_div(std::max<int64_t>(0, w.reach() - w.padding), w.stride);
  const int64_t right = std::max<int64_t>(0, (w.inputs - 1 + w.padding) / w.stride - (w.outputs - 1));
  return {grad, g.rows.outputs, w.outputs, left, right, g.rows.reach() / g.rows.stride + 1, vectors, false};
}

// Output rows begin..end of one image and channel block.
template <typename Scalar>
struct Forward {
  static constexpr int64_t width = Lanes<Scalar>::width;
  const Geometry& g;
  const Sum<Scalar>* weights;
  RowRing<Scalar> x;
  RowWriter<Scalar> y;
  TapFinder finder{g.rows.taps};

  void band(int64_t image, const ChannelBlock& block, int64_t begin, int64_t end) {
    x.start(image, block);
    Correlation<Sum<Scalar>> c = {x.data, weights + block.first * g.taps()};
    c.taps = forward_reads(g.columns, 0);
    c.stride = g.columns.stride;
    c.columns = g.columns.outputs;
    c.vectors = block.vectors;
    c.source_vector = x.vector_size();
    c.weight_vector = g.taps() * width;
    for (int64_t row = begin; row < end; ++row) {
      const Reads reads = forward_reads(g.rows, row);
      x.load(std::max<int64_t>(0, reads.source), reads.source + g.rows.reach());
      c.rows = finder.find(without_outside(reads, g.rows.inputs), x, g.columns.taps * width);
      y.write(c, image, block, row, 0, 1);
    }
  }
};

// Both gradients of one image and channel block, in one sweep over its rows.
template <typename Scalar>
struct Backward {
  static constexpr int64_t width = Lanes<Scalar>::width;
  const Geometry& g;
  const Sum<Scalar>* weights;
  RowRing<Scalar> grad, x;
  RowWriter<Scalar> d_x;
  TapFinder finder{g.rows.taps};

  // The weight gradient takes output rows out_begin..out_end as soon as rows in_begin..in_end of the input gradient
  // have loaded them, so every row is loaded once. gradients: null if not wanted.
  void band(int64_t image, const ChannelBlock& block, Sum<Scalar>* gradients, int64_t out_begin, int64_t out_end,
            int64_t in_begin, int64_t in_end) {
    x.start(image, block);
    grad.start(image, block);
    Contribution<Sum<Scalar>> to_weights = weight_gradient_work(gradients);
    Correlation<Sum<Scalar>> to_input = input_gradient_work();
    int64_t next = gradients ? out_begin : out_end;
    for (int64_t row = in_begin; row < in_end && d_x.target.data; ++row) {
      const int64_t reached = row + g.rows.padding;
      const int64_t first = ceil_div(std::max<int64_t>(0, reached - g.rows.reach()), g.rows.stride);
      const int64_t last = reached / g.rows.stride;
      for (; next < std::min(out_end, first); ++next) weight_gradient_row(to_weights, next);
      grad.load(first, last);
      for (; next < std::min(out_end, last + 1); ++next) weight_gradient_row(to_weights, next);
      input_gradient_row(to_input, row);
    }
    for (; next < out_end; ++next) weight_gradient_row(to_weights, next);
  }

  Contribution<Sum<Scalar>> weight_gradient_work(Sum<Scalar>* gradients) const {
    Contribution<Sum<Scalar>> c = {nullptr, x.data - g.columns.padding * width};
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
    Correlation<Sum<Scalar>> c = {grad.data, weights + x.block.first * g.taps()};
    c.stride = 1;
    c.vectors = x.block.vectors;
    c.source_vector = grad.vector_size();
    c.weight_vector = g.taps() * width;
    c.rectified_vector = x.vector_size();
    c.rectified_column = g.columns.stride * width;
    return c;
  }

  void weight_gradient_row(Contribution<Sum<Scalar>>& c, int64_t row) {
    const Reads reads = forward_reads(g.rows, row);
    x.load(std::max<int64_t>(0, reads.source), reads.source + g.rows.reach());
    grad.load(row, row);
    c.grad = grad.data + grad.offset(row);
    c.rows = finder.find(without_outside(reads, g.rows.inputs), x, g.columns.taps * width);
    contribute_loop(c);
  }

  // A row's columns fall into `stride` phases; within a phase all read the same taps, from neighbouring gradients.
  void input_gradient_row(Correlation<Sum<Scalar>>& c, int64_t row) {
    const int64_t stride = g.columns.stride;
    if (x.relu) x.load(row, row);
    c.rows = finder.find(without_outside(backward_reads(g.rows, row), g.rows.outputs), grad, g.columns.taps * width);
    for (int64_t phase = 0; phase < std::min(stride, g.columns.inputs); ++phase) {
      c.taps = backward_reads(g.columns, phase);
      c.columns = ceil_div(g.columns.inputs - phase, stride);
      if (x.relu) c.rectified = x.data + x.offset(row) + phase * width;
      d_x.write(c, x.image, x.block, row, phase, stride);
    }
  }
};

// ---- the whole tensors -------------------------------------------------------------------------------------------

// How the channels are cut into blocks whose rings stay in the nearest caches.
template <typename Scalar>
struct ChannelBlocks {
  int64_t channels, vectors, count;  // vectors per block

  ChannelBlocks(const Geometry& g) : channels(g.channels) {
    const int64_t all = ceil_div(channels, Lanes<Scalar>::width);
    const int64_t columns = g.columns.inputs + 2 * g.columns.padding;
    const int64_t bytes = (g.rows.reach() + 1) * columns * sizeof(Vector<Scalar>);
    vectors = std::min(all, std::max<int64_t>(2, kRingBytes / bytes));
    count = ceil_div(all, vectors);
  }

  ChannelBlock operator[](int64_t i) const {
    const int64_t first = i * vectors * Lanes<Scalar>::width;
    const int64_t some = std::min(channels - first, vectors * Lanes<Scalar>::width);
    return {first, some, ceil_div(some, Lanes<Scalar>::width)};
  }
};

// [C, 1, kh, kw] -> [vector][tap][lane], zeros in the lanes behind the last channel
template <typename Scalar>
std::vector<Sum<Scalar>> packed_weights(const Geometry& g, const Tensor& weight) {
  constexpr int64_t width = Lanes<Scalar>::width;
  const auto from = read_images<Scalar>(weight);
  std::vector<Sum<Scalar>> packed(ceil_div(g.channels, width) * width * g.taps());
  for (int64_t c = 0; c < g.channels; ++c) {
    for (int64_t t = 0; t < g.taps(); ++t) {
      const Scalar* value = from.at(c, 0, t / g.columns.taps, t % g.columns.taps);
      packed[(c / width * g.taps() + t) * width + c % width] = load_first(value, 1)[0];
    }
  }
  return packed;
}

template <typename Scalar>
void forward(const Geometry& g, const Tensor& x, const Tensor& weight, bool relu, Tensor& result) {
  const ChannelBlocks<Scalar> blocks(g);
  const auto weights = packed_weights<Scalar>(g, weight);
  const auto input = read_images<Scalar>(x);
  const auto y = write_images<Scalar>(result);
  const int64_t work = g.columns.outputs * g.taps() * blocks.vectors;
  const int64_t rows = g.rows.outputs;
  torch::stable::parallel_for(0, g.batch * blocks.count * rows, kGrain / work + 1, [&](int64_t begin, int64_t end) {
    Forward<Scalar> sweep = {g, weights.data(), input_rows<Scalar>(g, input, blocks.vectors, relu),
                             RowWriter<Scalar>(y, g.columns.outputs, blocks.vectors)};
    while (begin < end) {
      const int64_t band = begin / rows, row = begin % rows, last = std::min(rows, row + end - begin);
      sweep.band(band / blocks.count, blocks[band % blocks.count], row, last);
      begin += last - row;
    }
  });
}

// The parts of the batch whose contributions to the weight gradient are summed apart: some images each, or a band of
// rows of one image. They depend on the shapes alone, so the result is the same on any number of threads.
struct Parts {
  int64_t batch, count, images, bands;

  Parts(const Geometry& g, int64_t vectors) : batch(g.batch), count(0), images(1), bands(1) {
    if (batch == 0) return;
    const int64_t work = batch * g.rows.outputs * g.columns.outputs * g.taps() * vectors;
    const int64_t wanted = std::max<int64_t>(1, std::min(kMaxParts, work / kGrain));
    images = ceil_div(batch, wanted);
    bands = std::min(ceil_div(wanted, batch), g.rows.outputs);
    count = ceil_div(batch, images) * bands;
  }

  int64_t first_image(int64_t part) const { return std::min(batch, part / bands * images); }
};

template <typename Scalar>
void backward(const Geometry& g, const Tensor& grad, const Tensor& x, const Tensor& weight, bool relu, Tensor* d_x,
              Tensor* d_weight) {
  constexpr int64_t width = Lanes<Scalar>::width;
  const ChannelBlocks<Scalar> blocks(g);
  const int64_t vectors = ceil_div(g.channels, width);
  const Parts parts(g, vectors);
  const auto weights = d_x ? packed_weights<Scalar>(g, weight) : std::vector<Sum<Scalar>>();
  const auto input = read_images<Scalar>(x);
  const auto output_gradient = read_images<Scalar>(grad);
  const auto input_gradient = d_x ? write_images<Scalar>(*d_x) : Images<Scalar>{};
  const int64_t size = vectors * width * g.taps();
  std::vector<Sum<Scalar>> partial(d_weight ? parts.count * size : 0);  // [part][vector][tap][lane]
  torch::stable::parallel_for(0, parts.count * blocks.count, 1, [&](int64_t begin, int64_t end) {
    Backward<Scalar> sweep = {g, weights.data(), gradient_rows<Scalar>(g, output_gradient, blocks.vectors),
                              input_rows<Scalar>(g, input, blocks.vectors, relu),
                              RowWriter<Scalar>(input_gradient, g.columns.inputs, blocks.vectors)};
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item / blocks.count, band = part % parts.bands;
      const ChannelBlock block = blocks[item % blocks.count];
      Sum<Scalar>* gradients = d_weight ? partial.data() + part * size + block.first * g.taps() : nullptr;
      const auto cut = [&](int64_t rows, int64_t i) { return rows * i / parts.bands; };
      for (int64_t image = parts.first_image(part); image < parts.first_image(part + parts.bands); ++image) {
        sweep.band(image, block, gradients, cut(g.rows.outputs, band), cut(g.rows.outputs, band + 1),
                   cut(g.rows.inputs, band), cut(g.rows.inputs, band + 1));
      }
    }
  });
  if (!d_weight) return;
  std::vector<double> total(size, 0.0);
  for (int64_t part = 0; part < parts.count; ++part) {
    for (int64_t i = 0; i < size; ++i) total[i] += partial[part * size + i];
  }
  const auto to = write_images<Scalar>(*d_weight);
  for (int64_t c = 0; c < g.channels; ++c) {
    for (int64_t t = 0; t < g.taps(); ++t) {
      Vector<Scalar> value = {};
      value[0] = static_cast<Sum<Scalar>>(total[(c / width * g.taps() + t) * width + c % width]);
      store_first(to.at(c, 0, t / g.columns.taps, t % g.columns.taps), value, 1);
    }
  }
}

// ---- the registered operators ------------------------------------------------------------------------------------

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

Tensor empty_with(Sizes sizes, Sizes strides, const Tensor& like) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// [B, C, rows, columns] in the layout of x: channels_last if its channels lie innermost, else contiguous.
Tensor empty_images(const Tensor& x, int64_t rows, int64_t columns) {
  const int64_t batch = x.size(0), channels = x.size(1), image = channels * rows * columns;
  if (x.stride(1) == 1 && x.stride(3) != 1) {
    return empty_with({batch, channels, rows, columns}, {image, 1, columns * channels, channels}, x);
  }
  return empty_with({batch, channels, rows, columns}, {image, rows * columns, columns, 1}, x);
}

Geometry geometry_of(const Tensor& x, const Tensor& weight, const Pair& stride, const Pair& padding,
                     const Pair& dilation) {
  const auto axis = [&](int64_t i) -> Axis {
    const int64_t inputs = x.size(2 + i), taps = weight.size(2 + i);
    const int64_t last = inputs + 2 * padding[i] - (taps - 1) * dilation[i] - 1;
    return {inputs, last / stride[i] + 1, taps, stride[i], padding[i], dilation[i]};
  };
  return {x.size(0), x.size(1), axis(0), axis(1)};
}

Tensor depthwise_conv2d_forward(Tensor x, Tensor weight, Pair stride, Pair padding, Pair dilation, bool relu) {
  const Geometry g = geometry_of(x, weight, stride, padding, dilation);
  Tensor y = empty_images(x, g.rows.outputs, g.columns.outputs);
  with_storage(x.scalar_type(), [&](auto scalar) { forward<decltype(scalar)>(g, x, weight, relu, y); });
  return y;
}

std::tuple<Tensor, Tensor> depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Pair stride, Pair padding,
                                                     Pair dilation, bool relu, bool needs_input_grad,
                                                     bool needs_weight_grad) {
  const Geometry g = geometry_of(x, weight, stride, padding, dilation);
  const int64_t kh = g.rows.taps, kw = g.columns.taps;
  Tensor d_x = needs_input_grad ? empty_images(x, g.rows.inputs, g.columns.inputs) : empty_with({0}, {1}, x);
  Tensor d_weight = needs_weight_grad ? empty_with({g.channels, 1, kh, kw}, {kh * kw, kh * kw, kw, 1}, x)
                                      : empty_with({0}, {1}, x);
  with_storage(x.scalar_type(), [&](auto scalar) {
    backward<decltype(scalar)>(g, grad, x, weight, relu, needs_input_grad ? &d_x : nullptr,
                               needs_weight_grad ? &d_weight : nullptr);
  });
  return {d_x, d_weight};
}

}  // namespace
}  // namespace dssp

STABLE_TORCH_LIBRARY_IMPL(dssp_kernels, CPU, library) {
  library.impl("depthwise_conv2d_forward", TORCH_BOX(&dssp::depthwise_conv2d_forward));
  library.impl("depthwise_conv2d_backward", TORCH_BOX(&dssp::depthwise_conv2d_backward));
}
