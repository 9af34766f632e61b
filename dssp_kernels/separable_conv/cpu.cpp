// separable_conv2d_group on the CPU: y = conv2d(conv2d(relu(x), depthwise, groups = C), pointwise), a row at a time.
//
// A row of the depthwise convolution lives in the nearest cache just long enough to be multiplied by the pointwise
// weights: the map between the two convolutions never exists in memory. The gradient for the pointwise weights computes
// its rows again; the gradient for the depthwise convolution reads rows of the output's gradient already taken through
// the pointwise weights.
//
// Convolutions of a group read x, or follow one of those that do: then they read what it gives, z, normalised by the
// statistics of the batch as its rows are loaded, and backward hands the gradient of z on in the same way. Neither the
// normalised map nor the gradient of z exists in memory.
//
// Registered for the CPU key through the LibTorch stable ABI (torch >= 2.10); op.py has checked the arguments.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>
#include <optional>
#include <tuple>

#include "cpu_sweeps.h"

namespace dssp {
namespace {

// One convolution of a group.
struct Separable {
  Geometry g;
  Tensor depthwise, pointwise;
  bool relu;
  int64_t follows;  // a convolution of the group, by its number; -1: it reads x
  double eps;       // of the norm behind that

  int64_t outputs() const { return pointwise.size(0); }
};
using Group = std::vector<Separable>;

// A stage: the convolutions that read x, or those that follow others.
std::vector<size_t> stage_of(const Group& group, bool followers) {
  std::vector<size_t> stage;
  for (size_t k = 0; k < group.size(); ++k) {
    if ((group[k].follows >= 0) == followers) stage.push_back(k);
  }
  return stage;
}

// ---- forward ---------------------------------------------------------------------------------------------------------

// What every convolution gives, and for each that follows another the statistics [C] between them: the mean, the unbiased
// variance (for the running statistics) and 1 / sqrt(biased variance + eps).
struct Results {
  std::vector<Tensor> maps, means, variances, scales;
};

// A norm by statistics of the batch, in whole vectors of channels.
template <typename S>
struct BatchNorm {
  Buffer<S> mean, scale;

  BatchNorm(int64_t channels) : mean(vectors_of<S>(channels) * Lanes<S>::width, S(0)), scale(mean) {}
  BatchNorm(const Tensor& means, const Tensor& scales) : BatchNorm(means.size(0)) {
    std::copy_n(static_cast<const S*>(means.const_data_ptr()), means.size(0), mean.data());
    std::copy_n(static_cast<const S*>(scales.const_data_ptr()), means.size(0), scale.data());
  }
  Norm<S> norm() const { return {mean.data(), scale.data()}; }
};

// A convolution, what it reads and how, and where its results go.
template <typename Scalar>
struct ForwardWork {
  const Separable& convolution;
  Images<const Scalar> x;
  OnLoad<Scalar> on_load;
  Images<Scalar> y;
  std::unique_ptr<PartMoments<Sum<Scalar>>> moments;  // of y; null: not wanted
  Buffer<Sum<Scalar>> depthwise, pointwise;

  ForwardWork(const Separable& convolution, Images<const Scalar> x, const OnLoad<Scalar>& on_load, Tensor& y)
      : convolution(convolution), x(x), on_load(on_load), y(write_images<Scalar>(y)),
        depthwise(packed_weights<Scalar>(convolution.g, convolution.depthwise)),
        pointwise(packed_pointwise<Scalar>(convolution.pointwise, false)) {}

  SeparableForward<Scalar> sweep() {
    const Geometry& g = convolution.g;
    return {g, input_rows<Scalar>(g, x, vectors_of<Scalar>(g.channels), on_load),
            DepthwiseRow<Scalar>::of_vectors(g, depthwise.data()), pointwise.data(), y, convolution.outputs(),
            moments.get()};
  }
};

// A thread takes an image's rows through one convolution after the other: x stays in the cache. Where they have not all
// as many output rows, it takes the same share of each one's.
template <typename Scalar>
void run_forward(std::vector<ForwardWork<Scalar>>& stage, const Parts& parts) {
  torch::stable::parallel_for(0, parts.count, 1, [&](int64_t begin, int64_t end) {
    std::vector<SeparableForward<Scalar>> sweeps;
    for (auto& work : stage) sweeps.push_back(work.sweep());
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t image = parts.first_image(part); image < parts.first_image(part + parts.bands); ++image) {
        for (auto& sweep : sweeps) sweep.part_of_image(parts, part, image);
      }
    }
  });
}

Parts parts_of(const Group& group, const std::vector<size_t>& stage) {
  int64_t rows = 0, work = 0;
  for (const size_t k : stage) {
    const Geometry& g = group[k].g;
    rows = std::max(rows, g.rows.outputs);
    work += g.rows.outputs * g.columns.outputs * (g.taps() + group[k].outputs()) * ceil_div(g.channels, 8);
  }
  return Parts(group[stage[0]].g.batch, rows, work, kMaxParts);
}

template <typename Scalar>
void separable_forward(const Group& group, const Tensor& x, Results& results) {
  using S = Sum<Scalar>;
  const auto first = stage_of(group, false), second = stage_of(group, true);
  const Parts parts = parts_of(group, first);
  std::vector<ForwardWork<Scalar>> stage;
  for (const size_t k : first) {
    stage.emplace_back(group[k], read_images<Scalar>(x), OnLoad<Scalar>{group[k].relu}, results.maps[k]);
  }
  for (const size_t k : second) {  // the convolutions that read x come first
    const Separable& read = group[group[k].follows];
    stage[group[k].follows].moments =
        std::make_unique<PartMoments<S>>(parts.count, vectors_of<Scalar>(read.outputs()));
  }
  run_forward(stage, parts);
  if (second.empty()) return;
  std::vector<BatchNorm<S>> batch_norms;
  std::vector<Norm<S>> norms;  // refer to those, and are referred to
  batch_norms.reserve(second.size());
  norms.reserve(second.size());
  for (size_t i = 0; i < second.size(); ++i) {
    const Separable& follower = group[second[i]];
    Tensor &means = results.means[i], &scales = results.scales[i];
    stage[follower.follows].moments->write(follower.eps, means, results.variances[i], scales);
    batch_norms.emplace_back(means, scales);
    norms.push_back(batch_norms.back().norm());
  }
  std::vector<ForwardWork<Scalar>> next;
  for (size_t i = 0; i < second.size(); ++i) {
    const Separable& follower = group[second[i]];
    next.emplace_back(follower, read_images<Scalar>(results.maps[follower.follows]),
                      OnLoad<Scalar>{follower.relu, &norms[i]}, results.maps[second[i]]);
  }
  run_forward(next, parts_of(group, second));
}

// ---- backward --------------------------------------------------------------------------------------------------------

// The gradients wanted of one convolution, given that of its output.
template <typename Scalar>
struct BackwardWork {
  const Separable& convolution;
  Images<const Scalar> x;
  OnLoad<Scalar> x_on_load;
  Images<const Scalar> grad;
  OnLoad<Scalar> grad_on_load;
  Images<Scalar> d_x;  // no data: not wanted
  bool adds;           // to what d_x holds
  bool sums_d_x;       // see InputGradientSums
  Tensor *d_depthwise, *d_pointwise;  // null: not wanted
};

// Its packed weights, and the partial sums of their gradients: [part][...], as many sums per part as the size says.
template <typename Scalar>
struct SeparableGradients {
  using S = Sum<Scalar>;
  static constexpr int64_t width = Lanes<Scalar>::width;
  const BackwardWork<Scalar>& work;
  const Geometry& g = work.convolution.g;
  int64_t outputs = work.convolution.outputs(), vectors = vectors_of<Scalar>(g.channels);
  int64_t size = vectors * width * g.taps();
  int64_t pointwise_size = vectors_of<Scalar>(outputs) * width * vectors * width;
  Buffer<S> depthwise = packed_weights<Scalar>(g, work.convolution.depthwise);
  Buffer<S> pointwise = packed_pointwise<Scalar>(work.convolution.pointwise, true);
  UnsetBuffer<S> partial, pointwise_partial;
  Buffer<S> zeros;
  ChannelSums d_x_sums;

  SeparableGradients(const BackwardWork<Scalar>& work, int64_t parts)
      : work(work), partial(work.d_depthwise ? parts * size : 0),
        pointwise_partial(work.d_pointwise ? parts * pointwise_size : 0), zeros(vectors * width, S(0)),
        d_x_sums{work.sums_d_x ? parts : 0, vectors * width} {}

  void write(int64_t parts) const {
    if (work.d_depthwise) write_weight_gradient<Scalar>(g, partial, parts, *work.d_depthwise);
    if (work.d_pointwise) write_pointwise_gradient<Scalar>(pointwise_partial, parts, *work.d_pointwise);
  }
};

// One thread's share of these.
template <typename Scalar>
struct SeparableBackward {
  SeparableGradients<Scalar>& all;
  Sum<Scalar>* gradients = nullptr;  // of the depthwise weights, those of the part; null: not wanted
  Backward<Scalar, GradientRows<Scalar>, PointwiseGradient<Scalar>, InputGradientSums<Scalar>> sweep;

  SeparableBackward(SeparableGradients<Scalar>& all)
      : all(all),
        sweep{all.g, all.depthwise.data(),
              GradientRows<Scalar>(all.g,
                                   all.work.d_x.data || !all.partial.empty() ? all.pointwise.data() : nullptr,
                                   all.work.grad, all.work.grad_on_load, all.outputs),
              input_rows<Scalar>(all.g, all.work.x, all.vectors, all.work.x_on_load),
              RowWriter<Scalar>(all.work.d_x, all.g.columns.inputs, all.vectors), all.work.adds,
              {DepthwiseRow<Scalar>::of_channels(all.g, all.depthwise.data()), nullptr},
              {all.work.sums_d_x ? &all.d_x_sums : nullptr, all.zeros.data()}} {}

  // Whose sums are added to from now on.
  void start(int64_t part) {
    const auto zeroed = [part](UnsetBuffer<Sum<Scalar>>& partial, int64_t size) -> Sum<Scalar>* {
      if (partial.empty()) return nullptr;
      return std::fill_n(partial.data() + part * size, size, Sum<Scalar>(0)) - size;
    };
    gradients = zeroed(all.partial, all.size);
    sweep.output_row.gradients = zeroed(all.pointwise_partial, all.pointwise_size);
    sweep.input_row.part = part;
  }

  void part_of_image(const Parts& parts, int64_t part, int64_t image) {
    sweep.part_of_image(parts, part, image, all_channels<Scalar>(all.g.channels), gradients);
  }
};

// The parts of the batch are the same for all convolutions, so that one thread writes and adds up the rows of d_x that
// belong to a part while these are in its cache, in the order of the convolutions. Returns the sums that were wanted.
template <typename Scalar>
std::vector<ChannelSums> run_backward(const std::vector<BackwardWork<Scalar>>& stage) {
  constexpr int64_t width = Lanes<Scalar>::width;
  int64_t rows = 0, work = 0, most_products = 1;
  for (const auto& one : stage) {
    const Geometry& g = one.convolution.g;
    const int64_t vectors = vectors_of<Scalar>(g.channels);
    rows = std::max(rows, g.rows.outputs);
    work += g.rows.outputs * g.columns.outputs * g.taps() * vectors;
    most_products =
        std::max(most_products, vectors_of<Scalar>(one.convolution.outputs()) * width * vectors * width);
  }
  const int64_t batch = stage[0].convolution.g.batch;
  const Parts parts(batch, rows, work, std::clamp<int64_t>(kPartialSums / most_products, 8, kMaxParts));
  std::vector<SeparableGradients<Scalar>> gradients;
  gradients.reserve(stage.size());  // they refer to themselves
  for (const auto& one : stage) gradients.emplace_back(one, parts.count);
  torch::stable::parallel_for(0, parts.count, 1, [&](int64_t begin, int64_t end) {
    std::vector<SeparableBackward<Scalar>> sweeps;
    for (auto& all : gradients) sweeps.emplace_back(all);
    for (int64_t part = begin; part < end; ++part) {
      for (auto& sweep : sweeps) sweep.start(part);
      for (int64_t image = parts.first_image(part); image < parts.first_image(part + parts.bands); ++image) {
        for (auto& sweep : sweeps) sweep.part_of_image(parts, part, image);
      }
    }
  });
  torch::stable::parallel_for(0, gradients.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) gradients[k].write(parts.count);
  });
  std::vector<ChannelSums> sums;
  for (auto& all : gradients) sums.push_back(std::move(all.d_x_sums));
  return sums;
}

struct Gradients {
  Tensor x;
  std::vector<std::optional<Tensor>> depthwise, pointwise;  // those needed
};

// What backward is given beside the group: the gradient of each result (none where others follow it, or where nobody
// used it), and forward's x, maps, means and scales of those that others follow.
struct Saved {
  const std::vector<std::optional<Tensor>>& grads;
  const Tensor& x;
  const std::vector<Tensor>&maps, &means, &scales;
};

// The norm between a convolution and the one that follows it, backward.
template <typename Scalar>
struct NormBetween {
  using S = Sum<Scalar>;
  BatchNorm<S> batch_norm;
  Norm<S> norm = batch_norm.norm();
  Buffer<S> constant = Buffer<S>(batch_norm.mean.size(), S(0)), slope = constant;
  NormBackward<Scalar> gradient = {};
  Tensor d_y;  // of the normalised map

  NormBetween(const Tensor& means, const Tensor& scales, const Tensor& like)
      : batch_norm(means, scales), d_y(empty_images(like, like.size(1), like.size(2), like.size(3))) {}
  NormBetween(const NormBetween&) = delete;  // it refers to itself

  void finish(const ChannelSums& sums, const Geometry& g, const Tensor& z) {
    const double count = g.batch * g.rows.inputs * g.columns.inputs;
    for (int64_t c = 0; c < g.channels; ++c) {
      constant[c] = static_cast<S>(sums.total(0, c) / count);
      slope[c] = static_cast<S>(sums.total(1, c) / count * batch_norm.scale[c]);
    }
    gradient = {norm, constant.data(), slope.data(), read_images<Scalar>(z)};
  }
};

template <typename Scalar>
void separable_backward(const Group& group, const Saved& saved, bool needs_input_grad, Gradients& found) {
  const auto wanted = [](std::optional<Tensor>& gradient) { return gradient ? &*gradient : nullptr; };
  const auto first = stage_of(group, false), second = stage_of(group, true);
  std::vector<std::unique_ptr<NormBetween<Scalar>>> norms(group.size());  // behind convolutions that others follow
  std::vector<BackwardWork<Scalar>> stage;
  std::vector<size_t> followers;
  for (size_t i = 0; i < second.size(); ++i) {
    const size_t k = second[i], read = group[k].follows;
    if (!saved.grads[k]) continue;
    const Tensor& z = saved.maps[i];
    norms[read] = std::make_unique<NormBetween<Scalar>>(saved.means[i], saved.scales[i], z);
    NormBetween<Scalar>& norm = *norms[read];
    const bool goes_on = needs_input_grad || found.depthwise[read] || found.pointwise[read];
    if (!goes_on && !found.depthwise[k] && !found.pointwise[k]) continue;
    stage.push_back({group[k], read_images<Scalar>(z), {group[k].relu, &norm.norm},
                     read_images<Scalar>(*saved.grads[k]), {},
                     goes_on ? write_images<Scalar>(norm.d_y) : Images<Scalar>{}, false, goes_on,
                     wanted(found.depthwise[k]), wanted(found.pointwise[k])});
    followers.push_back(i);
  }
  if (!stage.empty()) {
    const auto sums = run_backward(stage);
    for (size_t n = 0; n < followers.size(); ++n) {
      const Separable& follower = group[second[followers[n]]];
      if (stage[n].sums_d_x) norms[follower.follows]->finish(sums[n], follower.g, saved.maps[followers[n]]);
    }
  }
  stage.clear();
  const auto d_x = needs_input_grad ? write_images<Scalar>(found.x) : Images<Scalar>{};
  for (const size_t k : first) {
    const NormBetween<Scalar>* norm = norms[k].get();
    if (!(norm || saved.grads[k]) || !(needs_input_grad || found.depthwise[k] || found.pointwise[k])) continue;
    stage.push_back({group[k], read_images<Scalar>(saved.x), {group[k].relu},
                     read_images<Scalar>(norm ? norm->d_y : *saved.grads[k]),
                     {false, nullptr, norm ? &norm->gradient : nullptr}, d_x, !stage.empty(), false,
                     wanted(found.depthwise[k]), wanted(found.pointwise[k])});
  }
  if (!stage.empty()) run_backward(stage);
}

// ---- the registered operators ----------------------------------------------------------------------------------------

// strides, paddings, dilations: two each per convolution. Those that read x come first.
Group group_of(const Tensor& x, const std::vector<Tensor>& depthwise, const std::vector<Tensor>& pointwise,
               const Pair& strides, const Pair& paddings, const Pair& dilations, const std::vector<bool>& relu,
               const Pair& follows, const std::vector<double>& eps) {
  Group group;
  std::vector<bool> is_free;  // to be followed, of those that read x
  for (size_t k = 0; k < depthwise.size(); ++k) {
    const auto pair = [k](const Pair& values) { return Pair{values[2 * k], values[2 * k + 1]}; };
    const auto geometry = [&](const std::vector<int64_t>& sizes) {
      return geometry_of(sizes, depthwise[k], pair(strides), pair(paddings), pair(dilations));
    };
    if (follows[k] < 0) {
      STD_TORCH_CHECK(is_free.size() == k, "follows: expected the convolutions that read x to come first");
      is_free.push_back(true);
      group.push_back({geometry(sizes_of(x)), depthwise[k], pointwise[k], relu[k], -1, eps[k]});
    } else {
      const bool is_one = follows[k] < static_cast<int64_t>(is_free.size()) && is_free[follows[k]];
      STD_TORCH_CHECK(is_one, "follows: expected convolutions that read x, each at most once");
      is_free[follows[k]] = false;
      const Separable& read = group[follows[k]];
      const std::vector<int64_t> sizes = {read.g.batch, read.outputs(), read.g.rows.outputs, read.g.columns.outputs};
      group.push_back({geometry(sizes), depthwise[k], pointwise[k], relu[k], follows[k], eps[k]});
    }
  }
  return group;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>
separable_conv2d_group_forward(Tensor x, std::vector<Tensor> depthwise, std::vector<Tensor> pointwise, Pair strides,
                               Pair paddings, Pair dilations, std::vector<bool> relu, Pair follows,
                               std::vector<double> eps) {
  const Group group = group_of(x, depthwise, pointwise, strides, paddings, dilations, relu, follows, eps);
  Results results;
  with_storage(x.scalar_type(), [&](auto scalar) {
    using Scalar = decltype(scalar);
    for (const Separable& convolution : group) {
      const Geometry& g = convolution.g;
      results.maps.push_back(empty_images(x, convolution.outputs(), g.rows.outputs, g.columns.outputs));
      if (convolution.follows < 0) continue;
      for (auto* vectors : {&results.means, &results.variances, &results.scales}) {
        vectors->push_back(empty_vector(g.channels, dtype_of_sums<Scalar>()));
      }
    }
    separable_forward<Scalar>(group, x, results);
  });
  return {results.maps, results.means, results.variances, results.scales};
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> separable_conv2d_group_backward(
    std::vector<std::optional<Tensor>> grads, Tensor x, std::vector<Tensor> maps, std::vector<Tensor> means,
    std::vector<Tensor> scales, std::vector<Tensor> depthwise, std::vector<Tensor> pointwise, Pair strides,
    Pair paddings, Pair dilations, std::vector<bool> relu, Pair follows, std::vector<double> eps,
    bool needs_input_grad, std::vector<bool> needs_depthwise_grad, std::vector<bool> needs_pointwise_grad) {
  const Group group = group_of(x, depthwise, pointwise, strides, paddings, dilations, relu, follows, eps);
  const int32_t dtype = dtype_of(x);
  Gradients found = {needs_input_grad ? empty_images(x, x.size(1), x.size(2), x.size(3)) : no_elements(x), {}, {}};
  std::vector<bool> has_grad(group.size());
  for (size_t k = 0; k < group.size(); ++k) has_grad[k] = grads[k].has_value();
  for (const Separable& convolution : group) {
    if (convolution.follows >= 0) has_grad[convolution.follows] = has_grad[&convolution - group.data()];
  }
  for (size_t k = 0; k < group.size(); ++k) {
    const auto& [rows, columns] = std::tie(group[k].g.rows, group[k].g.columns);
    const int64_t channels = group[k].g.channels, taps = group[k].g.taps();
    STD_TORCH_CHECK(has_grad[k] || !(needs_depthwise_grad[k] || needs_pointwise_grad[k]),
                    "grads: expected one for every convolution that needs a gradient");
    found.depthwise.emplace_back();
    found.pointwise.emplace_back();
    if (needs_depthwise_grad[k]) {
      found.depthwise[k] = empty_strided({channels, 1, rows.taps, columns.taps}, {taps, taps, columns.taps, 1}, dtype);
    }
    if (needs_pointwise_grad[k]) {
      found.pointwise[k] = empty_strided({group[k].outputs(), channels, 1, 1}, {channels, 1, 1, 1}, dtype);
    }
  }
  const bool any = std::find(has_grad.begin(), has_grad.end(), true) != has_grad.end();
  STD_TORCH_CHECK(any || !needs_input_grad, "grads: expected at least one, got none");
  with_storage(x.scalar_type(), [&](auto scalar) {
    separable_backward<decltype(scalar)>(group, {grads, x, maps, means, scales}, needs_input_grad, found);
  });
  const auto needed = [](const std::vector<std::optional<Tensor>>& gradients) {
    std::vector<Tensor> some;
    for (const auto& gradient : gradients) {
      if (gradient) some.push_back(*gradient);
    }
    return some;
  };
  return {found.x, needed(found.depthwise), needed(found.pointwise)};
}

}  // namespace
}  // namespace dssp

STABLE_TORCH_LIBRARY_IMPL(dssp_kernels, CPU, library) {
  library.impl("separable_conv2d_group_forward", TORCH_BOX(&dssp::separable_conv2d_group_forward));
  library.impl("separable_conv2d_group_backward", TORCH_BOX(&dssp::separable_conv2d_group_backward));
}
