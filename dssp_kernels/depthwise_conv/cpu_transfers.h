// Rows in and out: tensors <-> [vector][column][lane] of sums, and what becomes of pixels on the way in.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../cpu_tensors.h"

namespace dssp {
namespace {

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

// ---- what becomes of pixels on the way in --------------------------------------------------------------------------

// Of one vector of channels: change.of(first channel, row), then value = that(value, column).

struct Unchanged {
  template <typename Scalar>
  DSSP_INLINE Unchanged of(int64_t, const Row<const Scalar, Sum<Scalar>>&) const { return {}; }
  template <typename V>
  DSSP_INLINE V operator()(V value, int64_t) const { return value; }
};

struct Rectified {
  template <typename Scalar>
  DSSP_INLINE Rectified of(int64_t, const Row<const Scalar, Sum<Scalar>>&) const { return {}; }
  template <typename V>
  DSSP_INLINE V operator()(V value, int64_t) const { return rectified(value); }
};

// relu((pixels - mean) * scale), or without the ReLU: a BatchNorm. [channel] each, zeros up to a whole vector.
template <typename S>
struct Norm {
  const S *mean, *scale;
};

template <typename S, bool kRelu>
struct Normalised {
  using V = typename Lanes<S>::Vector;
  struct OfVector {
    V mean, scale;
    DSSP_INLINE V operator()(V value, int64_t) const {
      const V normalised = (value - mean) * scale;
      return kRelu ? rectified(normalised) : normalised;
    }
  };
  Norm<S> norm;

  template <typename Scalar>
  DSSP_INLINE OfVector of(int64_t channel, const Row<const Scalar, S>&) const {
    return {Lanes<S>::load(norm.mean + channel), Lanes<S>::load(norm.scale + channel)};
  }
};

// With y = (z - mean) * scale: the gradient of z from that of y, (grad - constant - (z - mean) * slope) * scale, where
// constant = mean(grad), slope = mean(grad * y) * scale.
template <typename Scalar>
struct NormBackward {
  Norm<Sum<Scalar>> norm;
  const Sum<Scalar> *constant, *slope;  // [channel] as in the norm
  Images<const Scalar> z;
};

template <typename Scalar>
struct ThroughNorm {
  using S = Sum<Scalar>;
  using V = typename Lanes<S>::Vector;
  struct OfVector {
    V mean, scale, constant, slope;
    const Scalar* z;
    int64_t channel, column, count;

    DSSP_INLINE V operator()(V grad, int64_t j) const {
      return (grad - constant - (at(j) - mean) * slope) * scale;
    }
    DSSP_INLINE V at(int64_t j) const {
      if (channel == 1 && count == Lanes<Scalar>::width) return Lanes<Scalar>::load(z + j * column);
      S lanes[Lanes<Scalar>::width] = {};
      for (int64_t lane = 0; lane < count; ++lane) lanes[lane] = widened(z[j * column + lane * channel]);
      return Lanes<S>::load(lanes);
    }
  };
  const NormBackward<Scalar>& of_norm;
  const Scalar* z;  // the row

  DSSP_INLINE OfVector of(int64_t channel, const Row<const Scalar, S>& row) const {
    const auto& [norm, constant, slope, images] = of_norm;
    return {Lanes<S>::load(norm.mean + channel), Lanes<S>::load(norm.scale + channel),
            Lanes<S>::load(constant + channel),  Lanes<S>::load(slope + channel),
            z + channel * images.channel,        images.channel,
            images.column,                       std::min(Lanes<Scalar>::width, row.channels - channel)};
  }
};

// ---- rows ----------------------------------------------------------------------------------------------------------

// sums = change(pixels). `ahead`: distance to the pixels wanted next, fetched from memory meanwhile.
template <typename Scalar, typename Change>
DSSP_INLINE void load_row(const Row<const Scalar, Sum<Scalar>>& row, const Change& change, int64_t ahead) {
  using L = Lanes<Sum<Scalar>>;
  constexpr int64_t width = L::width;
  const int64_t channel = row.channel, column = row.column, columns = row.columns;
  for (int64_t c = 0; c < row.channels; c += width) {
    const Scalar* from = row.pixels + c * channel;
    Sum<Scalar>* to = row.sums + c / width * row.vector;
    const int64_t count = std::min(width, row.channels - c);
    const auto changed = change.of(c, row);
    if (channel != 1 || count < width) {
      for (int64_t lane = 0; lane < count; ++lane) {
        for (int64_t j = 0; j < columns; ++j) to[j * width + lane] = widened(from[lane * channel + j * column]);
      }
      for (int64_t j = 0; j < columns; ++j) L::store(to + j * width, changed(L::load(to + j * width), j));
    } else {
      for (int64_t j = 0; j < columns; ++j) {
        if (c == 0) __builtin_prefetch(from + j * column + ahead);
        L::store(to + j * width, changed(Lanes<Scalar>::load(from + j * column), j));
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

// ---- the same, as calls --------------------------------------------------------------------------------------------

template <typename Scalar, typename Change = Unchanged>
void load_row_loop(const Row<const Scalar, Sum<Scalar>>& row, const Change& change = Unchanged(), int64_t ahead = 0) {
  with_best_vectors([&](auto) DSSP_INLINE_LAMBDA { load_row<Scalar>(row, change, ahead); });
}

template <typename Scalar>
void store_row_loop(const Row<Scalar, const Sum<Scalar>>& row) {
  with_best_vectors([&](auto) DSSP_INLINE_LAMBDA { store_row<Scalar>(row); });
}

}  // namespace
}  // namespace dssp
