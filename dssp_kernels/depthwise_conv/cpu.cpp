// depthwise_conv2d on the CPU: y = conv2d(relu(x), weight, groups = C) and its gradients, vectorised over channels.
//
// Every pass keeps a ring of padded source rows in the first-level cache: widened to the type of the sums, rectified,
// channels in groups of one vector. There the taps are plain multiply-adds without bounds checks or conversions,
// whatever the kernel size, stride, dilation, storage type and memory layout of the tensors.
//
// Registered for the CPU key through the LibTorch stable ABI (torch >= 2.10); op.py has checked the arguments.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "../cpu_vectors.h"

namespace dssp {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Pair = std::vector<int64_t>;

constexpr int64_t kRingBytes = 24 * 1024;  // a ring of rows leaves room in the first-level cache for weights and outputs
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

// ---- geometry ------------------------------------------------------------------------------------------------------

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

// Input i of the convolution gets its gradient from the outputs (i + padding - tap * dilation) / stride that are whole.
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

// ---- the ring of source rows ---------------------------------------------------------------------------------------

template <typename Scalar>
using Sum = typename Lanes<Scalar>::Sum;
template <typename Scalar>
using Vector = typename Lanes<Scalar>::Vector;

template <typename V>
DSSP_INLINE V rectified(V value) {  // NaN stays NaN
  return value < 0 ? V{} : value;
}

// Up to a vector of channels of one pixel, in any layout.
template <typename Scalar>
DSSP_INLINE Vector<Scalar> load_channels(const Scalar* from, int64_t channel_stride, int64_t count) {
  if (channel_stride == 1) return load_first(from, count);
  Scalar gathered[Lanes<Scalar>::width] = {};
  for (int64_t lane = 0; lane < count; ++lane) gathered[lane] = from[lane * channel_stride];
  return Lanes<Scalar>::load(gathered);
}

template <typename Scalar>
DSSP_INLINE void store_channels(Scalar* to, int64_t channel_stride, Vector<Scalar> value, int64_t count) {
  if (channel_stride == 1) return store_first(to, value, count);
  Scalar gathered[Lanes<Scalar>::width];
  Lanes<Scalar>::store(gathered, value);
  for (int64_t lane = 0; lane < count; ++lane) to[lane * channel_stride] = gathered[lane];
}

// Rows of one image and channel block as [vector][slot][left zeros, columns, right zeros][lane]; row r in slot r % slots.
template <typename Scalar>
struct RowRing {
  Images<const Scalar> source;
  int64_t columns, left, row_size, slots, image = 0, next = 0;
  bool relu;
  ChannelBlock block = {};
  std::vector<Sum<Scalar>> storage;
  Sum<Scalar>* data;

  RowRing(Images<const Scalar> source, int64_t columns, int64_t left, int64_t right, int64_t slots, int64_t vectors, bool relu)
      : source(source), columns(columns), left(left), row_size((left + columns + right) * Lanes<Scalar>::width), slots(slots),
        relu(relu), storage(vectors * slots * row_size + 64 / sizeof(Sum<Scalar>)) {
    const auto address = reinterpret_cast<uintptr_t>(storage.data());
    data = storage.data() + ((64 - address % 64) % 64) / sizeof(Sum<Scalar>);
  }

  void start(int64_t image_, const ChannelBlock& block_) {
    image = image_;
    block = block_;
    next = 0;
  }

  DSSP_INLINE Sum<Scalar>* vector(int64_t v) const { return data + v * slots * row_size; }
  DSSP_INLINE int64_t offset(int64_t row) const { return row % slots * row_size + left * Lanes<Scalar>::width; }

  // Make rows first..last available; rows come in ascending order.
  DSSP_INLINE void load(int64_t first, int64_t last) {
    for (next = std::max(next, first); next <= last; ++next) {
      for (int64_t v = 0; v < block.vectors; ++v) load_row(v);
    }
  }

 private:
  DSSP_INLINE void load_row(int64_t v) {
    constexpr int64_t width = Lanes<Scalar>::width;
    const Scalar* from = source.at(image, block.first + v * width, next, 0);
    Sum<Scalar>* to = vector(v) + offset(next);
    const int64_t count = std::min(width, block.channels - v * width);
    const bool whole = source.channel == 1 && count == width;
    for (int64_t w = 0; w < columns; ++w, from += source.column, to += width) {
      const Vector<Scalar> value = whole ? Lanes<Scalar>::load(from) : load_channels(from, source.channel, count);
      const Vector<Scalar> kept = relu ? rectified(value) : value;
      std::memcpy(to, &kept, sizeof(kept));
    }
  }
};

// ---- the taps ------------------------------------------------------------------------------------------------------

// Taps of one output row: for each kernel row that meets the image, where its source row and its weights start.
struct TapRows {
  std::vector<int64_t> sources, weights;
  int64_t count = 0;

  explicit TapRows(int64_t taps) : sources(taps), weights(taps) {}

  template <typename Ring>
  DSSP_INLINE void set(const Reads& reads, const Ring& ring, int64_t weight_row_size) {
    count = reads.count;
    for (int64_t i = 0; i < count; ++i) {
      sources[i] = ring.offset(reads.source + i * reads.source_step);
      weights[i] = (reads.first + i * reads.step) * weight_row_size;
    }
  }
};

// sums[j] = sum over taps of weight * source[column j]: outputs side by side keep every weight in a register.
template <int kColumns, typename V, typename S>
DSSP_INLINE void correlate(const S* source, const S* weights, const TapRows& rows, const Reads& columns, int64_t stride,
                           V (&sums)[kColumns]) {
  constexpr int64_t width = sizeof(V) / sizeof(S);
  for (int j = 0; j < kColumns; ++j) sums[j] = V{};
  for (int64_t i = 0; i < rows.count; ++i) {
    const S* from = source + rows.sources[i] + columns.source * width;
    const S* weight = weights + rows.weights[i] + columns.first * width;
    for (int64_t t = 0; t < columns.count; ++t) {
      const V w = load_unaligned<V>(weight);
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) sums[j] += w * load_unaligned<V>(from + j * stride * width);
      from += columns.source_step * width;
      weight += columns.step * width;
    }
  }
}

// gradients[tap] += sum_j grad[j] * source[column j], for every tap
template <int kColumns, typename V, typename S>
DSSP_INLINE void accumulate(const S* grad, const S* source, const TapRows& rows, const Reads& columns, int64_t stride,
                            S* gradients) {
  constexpr int64_t width = sizeof(V) / sizeof(S);
  V g[kColumns];
#pragma GCC unroll 8
  for (int j = 0; j < kColumns; ++j) g[j] = load_unaligned<V>(grad + j * width);
  for (int64_t i = 0; i < rows.count; ++i) {
    const S* from = source + rows.sources[i] + columns.source * width;
    S* gradient = gradients + rows.weights[i];
    for (int64_t t = 0; t < columns.count; ++t) {
      V even = load_unaligned<V>(gradient), odd = {};
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) {
        V& sum = j % 2 ? odd : even;
        sum += g[j] * load_unaligned<V>(from + j * stride * width);
      }
      even += odd;
      std::memcpy(gradient, &even, sizeof(V));
      from += columns.source_step * width;
      gradient += width;
    }
  }
}


// ---- one row of results --------------------------------------------------------------------------------------------

// Columns begin, begin + 1, ... of a row, in groups of 8, 4, 2, 1: use(columns, begin) with a compile-time number of columns.
template <int kColumns>
struct Columns {
  static constexpr int count = kColumns;
};

template <typename Use>
DSSP_INLINE void in_groups(int64_t columns, Use use) {
  int64_t j = 0;
  for (; j + 8 <= columns; j += 8) use(Columns<8>{}, j);
  if (columns & 4) use(Columns<4>{}, j), j += 4;
  if (columns & 2) use(Columns<2>{}, j), j += 2;
  if (columns & 1) use(Columns<1>{}, j);
}

template <typename Scalar, int kColumns>
DSSP_INLINE void store_columns(const Vector<Scalar> (&values)[kColumns], Scalar* to, int64_t column_stride,
                               int64_t channel_stride, int64_t count) {
  if (channel_stride == 1 && count == Lanes<Scalar>::width) {
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) Lanes<Scalar>::store(to + j * column_stride, values[j]);
  } else {
    for (int j = 0; j < kColumns; ++j) store_channels(to + j * column_stride, channel_stride, values[j], count);
  }
}

// values = 0 where x <= 0: the derivative of ReLU as PyTorch has it (a NaN in x lets the gradient through).
template <typename Scalar, int kColumns>
DSSP_INLINE void clear_where_rectified(Vector<Scalar> (&values)[kColumns], const Scalar* x, int64_t column_stride,
                                       int64_t channel_stride, int64_t count) {
  const bool whole = channel_stride == 1 && count == Lanes<Scalar>::width;
#pragma GCC unroll 8
  for (int j = 0; j < kColumns; ++j) {
    const Scalar* from = x + j * column_stride;
    const Vector<Scalar> input = whole ? Lanes<Scalar>::load(from) : load_channels(from, channel_stride, count);
    values[j] = input <= 0 ? Vector<Scalar>{} : values[j];
  }
}

// ---- bands of rows -------------------------------------------------------------------------------------------------

struct Geometry {
  int64_t batch, channels;
  Axis rows, columns;

  int64_t taps() const { return rows.taps * columns.taps; }
};

// Output rows begin..end of one image and channel block.
template <typename Scalar>
DSSP_INLINE void forward_band(const Geometry& g, RowRing<Scalar>& x, const Sum<Scalar>* weights, TapRows& taps,
                              const Images<Scalar>& y, int64_t image, const ChannelBlock& block, int64_t begin, int64_t end) {
  constexpr int64_t width = Lanes<Scalar>::width;
  const Reads columns = forward_reads(g.columns, 0);
  x.start(image, block);
  for (int64_t row = begin; row < end; ++row) {
    const Reads reads = forward_reads(g.rows, row);
    x.load(std::max<int64_t>(0, reads.source), std::min(reads.source + g.rows.reach(), g.rows.inputs - 1));
    taps.set(without_outside(reads, g.rows.inputs), x, g.columns.taps * width);
    for (int64_t v = 0; v < block.vectors; ++v) {
      const int64_t channel = block.first + v * width, count = std::min(width, block.channels - v * width);
      const Sum<Scalar>* source = x.vector(v);
      const Sum<Scalar>* weight = weights + channel * g.taps();
      Scalar* to = y.at(image, channel, row, 0);
      const auto with_stride = [&](int64_t stride) __attribute__((always_inline)) {
        in_groups(g.columns.outputs, [&](auto group, int64_t j) __attribute__((always_inline)) {
          Vector<Scalar> sums[group.count];
          correlate(source + j * stride * width, weight, taps, columns, stride, sums);
          store_columns(sums, to + j * y.column, y.column, y.channel, count);
        });
      };
      if (g.columns.stride == 1) {
        with_stride(1);
      } else if (g.columns.stride == 2) {
        with_stride(2);
      } else {
        with_stride(g.columns.stride);
      }
    }
  }
}

// Rows begin..end of the input gradient of one image and channel block. A row's columns fall into `stride` phases; within
// a phase all read the same taps, from neighbouring columns of the gradient.
template <typename Scalar>
DSSP_INLINE void input_gradient_band(const Geometry& g, RowRing<Scalar>& grad, const Sum<Scalar>* weights, TapRows& taps,
                                     const Images<const Scalar>& x, bool relu, const Images<Scalar>& d_x, int64_t image,
                                     const ChannelBlock& block, int64_t begin, int64_t end) {
  constexpr int64_t width = Lanes<Scalar>::width;
  const int64_t stride = g.columns.stride;
  grad.start(image, block);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t reached = row + g.rows.padding;
    grad.load(std::max<int64_t>(0, ceil_div(std::max<int64_t>(0, reached - g.rows.reach()), g.rows.stride)),
              std::min(reached / g.rows.stride, g.rows.outputs - 1));
    taps.set(without_outside(backward_reads(g.rows, row), g.rows.outputs), grad, g.columns.taps * width);
    for (int64_t phase = 0; phase < std::min(stride, g.columns.inputs); ++phase) {
      const Reads columns = backward_reads(g.columns, phase);
      for (int64_t v = 0; v < block.vectors; ++v) {
        const int64_t channel = block.first + v * width, count = std::min(width, block.channels - v * width);
        const Sum<Scalar>* source = grad.vector(v);
        const Sum<Scalar>* weight = weights + channel * g.taps();
        const Scalar* input = x.at(image, channel, row, phase);
        Scalar* to = d_x.at(image, channel, row, phase);
        in_groups(ceil_div(g.columns.inputs - phase, stride), [&](auto group, int64_t j) __attribute__((always_inline)) {
          Vector<Scalar> sums[group.count];
          correlate(source + j * width, weight, taps, columns, 1, sums);
          const int64_t first = j * stride;
          if (relu) clear_where_rectified(sums, input + first * x.column, stride * x.column, x.channel, count);
          store_columns(sums, to + first * d_x.column, stride * d_x.column, d_x.channel, count);
        });
      }
    }
  }
}

// gradients [vector][tap][lane] += what output rows begin..end of one image and channel block contribute.
template <typename Scalar>
DSSP_INLINE void weight_gradient_band(const Geometry& g, RowRing<Scalar>& x, RowRing<Scalar>& grad, TapRows& taps,
                                      Sum<Scalar>* gradients, int64_t image, const ChannelBlock& block, int64_t begin,
                                      int64_t end) {
  constexpr int64_t width = Lanes<Scalar>::width;
  const Reads columns = forward_reads(g.columns, 0);
  x.start(image, block);
  grad.start(image, block);
  for (int64_t row = begin; row < end; ++row) {
    const Reads reads = forward_reads(g.rows, row);
    x.load(std::max<int64_t>(0, reads.source), std::min(reads.source + g.rows.reach(), g.rows.inputs - 1));
    grad.load(row, row);
    taps.set(without_outside(reads, g.rows.inputs), x, g.columns.taps * width);
    for (int64_t v = 0; v < block.vectors; ++v) {
      const Sum<Scalar>* source = x.vector(v);
      const Sum<Scalar>* grad_row = grad.vector(v) + grad.offset(row);
      Sum<Scalar>* gradient = gradients + v * g.taps() * width;
      const auto with_stride = [&](int64_t stride) __attribute__((always_inline)) {
        in_groups(g.columns.outputs, [&](auto group, int64_t j) __attribute__((always_inline)) {
          accumulate<group.count, Vector<Scalar>>(grad_row + j * width, source + j * stride * width, taps, columns, stride,
                                                  gradient);
        });
      };
      if (g.columns.stride == 1) {
        with_stride(1);
      } else if (g.columns.stride == 2) {
        with_stride(2);
      } else {
        with_stride(g.columns.stride);
      }
    }
  }
}

// target_clones takes no templates: one plain function per storage type, compiled for every instruction set.
#define DSSP_DEPTHWISE_LOOPS(Scalar)                                                                                    \
  DSSP_CLONES void forward_loop(const Geometry& g, RowRing<Scalar>& x, const Sum<Scalar>* weights, TapRows& taps,       \
                                const Images<Scalar>& y, int64_t image, const ChannelBlock& block, int64_t begin,       \
                                int64_t end) {                                                                          \
    forward_band<Scalar>(g, x, weights, taps, y, image, block, begin, end);                                             \
  }                                                                                                                     \
  DSSP_CLONES void input_gradient_loop(const Geometry& g, RowRing<Scalar>& grad, const Sum<Scalar>* weights,            \
                                       TapRows& taps, const Images<const Scalar>& x, bool relu,                         \
                                       const Images<Scalar>& d_x, int64_t image, const ChannelBlock& block,             \
                                       int64_t begin, int64_t end) {                                                    \
    input_gradient_band<Scalar>(g, grad, weights, taps, x, relu, d_x, image, block, begin, end);                        \
  }                                                                                                                     \
  DSSP_CLONES void weight_gradient_loop(const Geometry& g, RowRing<Scalar>& x, RowRing<Scalar>& grad, TapRows& taps,    \
                                        Sum<Scalar>* gradients, int64_t image, const ChannelBlock& block,               \
                                        int64_t begin, int64_t end) {                                                   \
    weight_gradient_band<Scalar>(g, x, grad, taps, gradients, image, block, begin, end);                                \
  }
DSSP_DEPTHWISE_LOOPS(float)
DSSP_DEPTHWISE_LOOPS(double)
DSSP_DEPTHWISE_LOOPS(BFloat16)
DSSP_DEPTHWISE_LOOPS(Half)

// ---- the whole tensors ---------------------------------------------------------------------------------------------

template <typename Scalar>
RowRing<Scalar> input_rows(const Geometry& g, const Images<const Scalar>& x, int64_t vectors, bool relu) {
  const Axis& w = g.columns;
  const int64_t right = std::max<int64_t>(0, (w.outputs - 1) * w.stride + w.reach() - w.padding - (w.inputs - 1));
  return {x, w.inputs, w.padding, right, g.rows.reach() + 1, vectors, relu};
}

template <typename Scalar>
RowRing<Scalar> gradient_rows(const Geometry& g, const Images<const Scalar>& grad, int64_t vectors) {
  const Axis& w = g.columns;
  const int64_t left = ceil_div(std::max<int64_t>(0, w.reach() - w.padding), w.stride);
  const int64_t right = std::max<int64_t>(0, (w.inputs - 1 + w.padding) / w.stride - (w.outputs - 1));
  return {grad, w.outputs, left, right, g.rows.reach() / g.rows.stride + 1, vectors, false};
}

// How the channels are cut into blocks whose rings stay in the first-level cache.
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
    auto ring = input_rows<Scalar>(g, input, blocks.vectors, relu);
    TapRows taps(g.rows.taps);
    while (begin < end) {
      const int64_t band = begin / rows, row = begin % rows, last = std::min(rows, row + end - begin);
      forward_loop(g, ring, weights.data(), taps, y, band / blocks.count, blocks[band % blocks.count], row, last);
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

  // use(image, numerator, denominator): rows from numerator / denominator on, for one band
  template <typename Use>
  void each_image(int64_t part, Use use) const {
    const int64_t first = part / bands * images;
    for (int64_t image = first; image < std::min(batch, first + images); ++image) use(image, part % bands);
  }
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
    auto x_rows = input_rows<Scalar>(g, input, blocks.vectors, relu);
    auto grad_rows = gradient_rows<Scalar>(g, output_gradient, blocks.vectors);
    TapRows taps(g.rows.taps);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item / blocks.count;
      const ChannelBlock block = blocks[item % blocks.count];
      parts.each_image(part, [&](int64_t image, int64_t band) {
        const auto first_row = [&](int64_t rows, int64_t i) { return rows * i / parts.bands; };
        if (d_weight) {
          weight_gradient_loop(g, x_rows, grad_rows, taps, partial.data() + part * size + block.first * g.taps(), image,
                               block, first_row(g.rows.outputs, band), first_row(g.rows.outputs, band + 1));
        }
        if (d_x) {
          input_gradient_loop(g, grad_rows, weights.data(), taps, input, relu, input_gradient, image, block,
                              first_row(g.rows.inputs, band), first_row(g.rows.inputs, band + 1));
        }
      });
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

// ---- the registered operators --------------------------------------------------------------------------------------

Geometry geometry_of(const Tensor& x, const Tensor& weight, const Pair& stride, const Pair& padding, const Pair& dilation) {
  const auto axis = [&](int64_t i) -> Axis {
    const int64_t inputs = x.size(2 + i), taps = weight.size(2 + i);
    return {inputs, (inputs + 2 * padding[i] - (taps - 1) * dilation[i] - 1) / stride[i] + 1, taps, stride[i], padding[i],
            dilation[i]};
  };
  return {x.size(0), x.size(1), axis(0), axis(1)};
}

// [batch, channels, rows, columns] in the layout of x: channels_last if its channels are innermost, else contiguous.
Tensor empty_images(const Tensor& x, int64_t batch, int64_t channels, int64_t rows, int64_t columns) {
  const bool channels_last = x.stride(1) == 1 && x.stride(3) != 1;
  const int64_t sizes[] = {batch, channels, rows, columns};
  const int64_t contiguous[] = {channels * rows * columns, rows * columns, columns, 1};
  const int64_t last[] = {channels * rows * columns, 1, columns * channels, channels};
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, channels_last ? last : contiguous, dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor no_elements(const Tensor& like) {
  const int64_t size = 0, stride = 1;
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &size, &stride, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor depthwise_conv2d_forward(Tensor x, Tensor weight, Pair stride, Pair padding, Pair dilation, bool relu) {
  const Geometry g = geometry_of(x, weight, stride, padding, dilation);
  Tensor result = empty_images(x, g.batch, g.channels, g.rows.outputs, g.columns.outputs);
  with_storage(x.scalar_type(), [&](auto scalar) { forward<decltype(scalar)>(g, x, weight, relu, result); });
  return result;
}

std::tuple<Tensor, Tensor> depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Pair stride, Pair padding,
                                                     Pair dilation, bool relu, bool needs_input_grad,
                                                     bool needs_weight_grad) {
  const Geometry g = geometry_of(x, weight, stride, padding, dilation);
  Tensor d_x = needs_input_grad ? empty_images(x, g.batch, g.channels, g.rows.inputs, g.columns.inputs) : no_elements(x);
  Tensor d_weight = no_elements(x);
  if (needs_weight_grad) {
    const int64_t sizes[] = {g.channels, 1, g.rows.taps, g.columns.taps};
    const int64_t strides[] = {g.taps(), g.taps(), g.columns.taps, 1};
    int32_t dtype = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
    d_weight = Tensor(handle);
  }
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
