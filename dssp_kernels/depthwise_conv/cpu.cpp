// depthwise_conv2d on the CPU: y = conv2d(relu(x), weight, groups = C) and its gradients, vectorised over channels.
//
// Every pass keeps a ring of padded source rows in the nearest cache: widened to the type of the sums, rectified,
// channels in groups of one vector. On it the taps are plain multiply-adds without bounds checks or conversions,
// whatever the kernel size, stride, dilation, storage type and memory layout of the tensors.
//
// Registered for the CPU key through the LibTorch stable ABI (torch >= 2.10); op.py has checked the arguments.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cpu_bands.h"

namespace dssp {
namespace {

constexpr int64_t kRingBytes = 64 * 1024;  // two rings of rows stay in the nearest caches

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
    Correlation<Sum<Scalar>> c = {x.data(), weights + block.first * g.taps() * kWeightCopies};
    c.taps = forward_reads(g.columns, 0);
    c.stride = g.columns.stride;
    c.columns = g.columns.outputs;
    c.vectors = block.vectors;
    c.source_vector = x.vector_size();
    c.taps_in_all = g.taps();
    for (int64_t row = begin; row < end; ++row) {
      const Reads reads = forward_reads(g.rows, row);
      x.load(std::max<int64_t>(0, reads.source), reads.source + g.rows.reach());
      c.rows = finder.find(without_outside(reads, g.rows.inputs), x, g.columns.taps);
      y.write(c, image, block, row, 0, 1);
    }
  }
};

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

template <typename Scalar>
void forward(const Geometry& g, const Tensor& x, const Tensor& weight, bool relu, Tensor& result) {
  const ChannelBlocks<Scalar> blocks(g);
  const auto weights = packed_weights<Scalar>(g, weight);
  const auto input = read_images<Scalar>(x);
  const auto y = write_images<Scalar>(result);
  const int64_t work = g.columns.outputs * g.taps() * blocks.vectors;
  const int64_t rows = g.rows.outputs;
  torch::stable::parallel_for(0, g.batch * blocks.count * rows, kGrain / work + 1, [&](int64_t begin, int64_t end) {
    Forward<Scalar> sweep = {g, weights.data(), input_rows<Scalar>(g, input, blocks.vectors, {relu}),
                             RowWriter<Scalar>(y, g.columns.outputs, blocks.vectors)};
    while (begin < end) {
      const int64_t band = begin / rows, row = begin % rows, last = std::min(rows, row + end - begin);
      sweep.band(band / blocks.count, blocks[band % blocks.count], row, last);
      begin += last - row;
    }
  });
}

template <typename Scalar>
void backward(const Geometry& g, const Tensor& grad, const Tensor& x, const Tensor& weight, bool relu, Tensor* d_x,
              Tensor* d_weight) {
  constexpr int64_t width = Lanes<Scalar>::width;
  const ChannelBlocks<Scalar> blocks(g);
  const int64_t vectors = ceil_div(g.channels, width);
  const Parts parts(g, vectors);
  const auto weights = d_x ? packed_weights<Scalar>(g, weight) : Buffer<Sum<Scalar>>();
  const auto input = read_images<Scalar>(x);
  const auto output_gradient = read_images<Scalar>(grad);
  const auto input_gradient = d_x ? write_images<Scalar>(*d_x) : Images<Scalar>{};
  const int64_t size = vectors * width * g.taps();
  UnsetBuffer<Sum<Scalar>> partial(d_weight ? parts.count * size : 0);  // [part][vector][tap][lane]
  torch::stable::parallel_for(0, parts.count * blocks.count, 1, [&](int64_t begin, int64_t end) {
    Backward<Scalar, RowRing<Scalar>> sweep = {g, weights.data(),
                                               gradient_rows<Scalar>(g, output_gradient, blocks.vectors),
                                               input_rows<Scalar>(g, input, blocks.vectors, {relu}),
                                               RowWriter<Scalar>(input_gradient, g.columns.inputs, blocks.vectors)};
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item / blocks.count;
      const ChannelBlock block = blocks[item % blocks.count];
      Sum<Scalar>* gradients = d_weight ? partial.data() + part * size + block.first * g.taps() : nullptr;
      if (gradients) std::fill_n(gradients, block.vectors * width * g.taps(), Sum<Scalar>(0));
      for (int64_t image = parts.first_image(part); image < parts.first_image(part + parts.bands); ++image) {
        sweep.part_of_image(parts, part, image, block, gradients);
      }
    }
  });
  if (d_weight) write_weight_gradient<Scalar>(g, partial, parts.count, *d_weight);
}

// ---- the registered operators ------------------------------------------------------------------------------------

Tensor depthwise_conv2d_forward(Tensor x, Tensor weight, Pair stride, Pair padding, Pair dilation, bool relu) {
  const Geometry g = geometry_of(sizes_of(x), weight, stride, padding, dilation);
  Tensor y = empty_images(x, g.channels, g.rows.outputs, g.columns.outputs);
  with_storage(x.scalar_type(), [&](auto scalar) { forward<decltype(scalar)>(g, x, weight, relu, y); });
  return y;
}

std::tuple<Tensor, Tensor> depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Pair stride, Pair padding,
                                                     Pair dilation, bool relu, bool needs_input_grad,
                                                     bool needs_weight_grad) {
  const Geometry g = geometry_of(sizes_of(x), weight, stride, padding, dilation);
  const int64_t kh = g.rows.taps, kw = g.columns.taps;
  Tensor d_x = needs_input_grad ? empty_images(x, g.channels, g.rows.inputs, g.columns.inputs) : no_elements(x);
  Tensor d_weight = needs_weight_grad ? empty_strided({g.channels, 1, kh, kw}, {kh * kw, kh * kw, kw, 1}, dtype_of(x))
                                      : no_elements(x);
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