// How channels lie in memory, and walks over tensors by pieces of which each element knows its channel.
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

#include "../cpu_mixture.h"

namespace dssp {
namespace {

using Integers = std::vector<int64_t>;
using Doubles = std::vector<double>;

constexpr int64_t kPiece = 2048;       // elements; a piece of the gradient stays in the cache for all entries
constexpr int64_t kPeriods = 64;       // repetitions of the channels in a piece at least: to be worth a sum each
constexpr int64_t kChunk = 32 * 1024;  // elements
constexpr int64_t kMaxChunks = 256;    // partial sums per entry are at most this many, however large the tensors
constexpr int64_t kShortRow = 16;      // elements; rows shorter than this are not worth a loop of their own
constexpr int64_t kGrain = 32 * 1024;  // element visits below which a second thread costs more than it brings

// A run of elements of which element i takes the coefficients at position table + i % period of a table of `lanes`.
struct Piece {
  int64_t begin, count, table;
};

// Memory in order [outer, channel, inner]: inner = 1 for channels_last, H * W for contiguous tensors.
//
// Channels that change quickly (inner small) repeat with a period that is rounded up to whole vectors; a table of
// coefficients holds one period. Long rows of one channel have the period of one vector; their table holds, for every
// channel, a vector of equal coefficients. Either way the kernels load coefficients as they load data.
class Walk {
 public:
  int64_t channels, inner, elements, period, lanes;
  bool rows;
  int64_t pieces, pieces_per_chunk, chunks;
  Integers channel;  // of a lane

  Walk(const Tensor& tensor, int64_t vector_width)
      : channels(tensor.size(1)),
        inner(channels > 1 ? tensor.stride(1) : std::max<int64_t>(tensor.numel(), 1)),
        elements(tensor.numel()),
        rows(inner >= kShortRow),
        width_(vector_width) {
    if (rows) {
      period = width_;
      lanes = channels * width_;
      piece_size_ = std::min(inner, kPiece);
      pieces_per_row_ = ceil_div(inner, piece_size_);
      pieces = elements / inner * pieces_per_row_;
    } else {
      period = lanes = std::lcm(channels * inner, width_);
      piece_size_ = std::max(kPiece / period, kPeriods) * period;
      pieces_per_row_ = 1;
      pieces = ceil_div(elements, piece_size_);
    }
    channel.resize(lanes);
    for (int64_t lane = 0; lane < lanes; ++lane) channel[lane] = rows ? lane / width_ : lane / inner % channels;
    pieces_per_chunk = std::max(ceil_div(kChunk, piece_size_), ceil_div(pieces, kMaxChunks));
    chunks = ceil_div(pieces, pieces_per_chunk);
  }

  DSSP_INLINE Piece piece(int64_t p) const {
    if (!rows) return {p * piece_size_, std::min(piece_size_, elements - p * piece_size_), 0};
    const int64_t row = p / pieces_per_row_, offset = p % pieces_per_row_ * piece_size_;
    return {row * inner + offset, std::min(piece_size_, inner - offset), row % channels * width_};
  }

  int64_t elements_per_channel() const { return elements / channels; }

  // Calls use(chunk, first piece, last piece). Chunks depend on the size alone, so that no result depends on the number
  // of threads. A second pass goes backwards: what the first one read last is still in the cache.
  template <typename Use>
  void for_chunks(int64_t entries, bool backwards, Use use) const {
    const int64_t visits = pieces_per_chunk * piece_size_ * std::max<int64_t>(entries, 1);
    torch::stable::parallel_for(0, chunks, std::max<int64_t>(kGrain / visits, 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t c = backwards ? begin + end - 1 - i : i;
        use(c, c * pieces_per_chunk, std::min(pieces, (c + 1) * pieces_per_chunk));
      }
    });
  }

  // Values per channel as a table.
  template <typename Number>
  void spread(const double* values, Number* table) const {
    for (int64_t lane = 0; lane < lanes; ++lane) table[lane] = static_cast<Number>(values[channel[lane]]);
  }

 private:
  static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

  int64_t width_, piece_size_, pieces_per_row_;
};

template <typename Scalar>
DSSP_INLINE typename Lanes<Scalar>::Vector load_some(const Scalar* from, int64_t count) {
  return count >= Lanes<Scalar>::width ? Lanes<Scalar>::load(from) : load_first(from, count);
}

template <typename Scalar>
DSSP_INLINE void store_some(Scalar* to, typename Lanes<Scalar>::Vector value, int64_t count) {
  if (count >= Lanes<Scalar>::width) return Lanes<Scalar>::store(to, value);
  store_first(to, value, count);
}

// Four vectors side by side in memory, as far as their lanes go: kNeighbours lanes, 4 / kNeighbours times. What a loop
// reads next to what it has just read, the prefetchers find.
template <int64_t kNeighbours, int64_t kWidth>
struct Four {
  int64_t first, table, period;  // offsets of the first vector in the piece and of its coefficients in their table

  DSSP_INLINE int64_t offset(int64_t u) const { return first + u % kNeighbours * kWidth + u / kNeighbours * period; }
  DSSP_INLINE int64_t lane(int64_t u) const { return table + u % kNeighbours * kWidth; }
};

template <int64_t kNeighbours, int64_t kWidth, typename Use>
DSSP_INLINE int64_t for_fours(int64_t count, int64_t period, Use use) {
  constexpr int64_t kPeriods = 4 / kNeighbours;
  int64_t i = 0;
  for (; i + kPeriods * period <= count; i += kPeriods * period) {
    for (int64_t j = 0; j < period; j += kNeighbours * kWidth) use(Four<kNeighbours, kWidth>{i + j, j, period});
  }
  return i;
}

// Visits every element of a piece once: four(vectors), and for each vector that remains one(offset, offset in the table,
// elements left).
template <int64_t kWidth, typename Use, typename One>
DSSP_INLINE void for_vectors(int64_t count, int64_t period, Use four, One one) {
  int64_t i = period % (4 * kWidth) == 0   ? for_fours<4, kWidth>(count, period, four)
              : period % (2 * kWidth) == 0 ? for_fours<2, kWidth>(count, period, four)
                                           : for_fours<1, kWidth>(count, period, four);
  for (int64_t j = 0; i < count; i += kWidth) {
    one(i, j, count - i);
    j = j + kWidth == period ? 0 : j + kWidth;
  }
}

}  // namespace
}  // namespace dssp
