// batch_norm_mixed_sum on the CPU: y = sum_ek c[e,k] norm_ek(o[e,k]) and its gradients, vectorised and multi-threaded.
//
// Forward: one pass over the entries for their statistics, one that adds them up. Backward: one pass for every sum over
// a channel, one that writes the gradients. Both passes are made over as many entries as the cache holds, then over the
// next ones: memory is read once. Entries are read as deviations from their channel's mean, never as
// scale * o + shift: with means far larger than the deviations that would cancel.
//
// Registered for the CPU key through the LibTorch stable ABI (torch >= 2.10); op.py has checked the arguments: all
// entries share one shape [B, C, H, W], dtype and dense strides.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../cpu_mixture.h"

namespace dssp {
namespace {

using Integers = std::vector<int64_t>;
using Doubles = std::vector<double>;
using Tensors = std::vector<Tensor>;

#define DSSP_INLINE_LAMBDA __attribute__((always_inline))

enum Kind : int64_t { kPlain, kRunning, kBatch };  // as in reference.py

constexpr int64_t kPiece = 2048;       // elements; a piece of the gradient stays in the cache for all entries
constexpr int64_t kPeriods = 64;       // repetitions of the channels in a piece at least: to be worth a sum each
constexpr int64_t kChunk = 32 * 1024;  // elements
constexpr int64_t kMaxChunks = 256;    // partial sums per entry are at most this many, however large the tensors
constexpr int64_t kShortRow = 16;      // elements; rows shorter than this are not worth a loop of their own
constexpr int64_t kGrain = 32 * 1024;  // element visits below which a second thread costs more than it brings
constexpr int64_t kCachedBytes = 12 << 20;  // of tensors that a second pass finds in a large cache; see cached_ranges()

// ---- how channels lie in memory ------------------------------------------------------------------------------------

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

// ---- kernels: loops over pieces first .. last ----------------------------------------------------------------------

// Sums of the deviations d = x - reference from a value near the mean.
struct Deviations {
  double count = 0, reference = 0, sum = 0, square = 0;

  // Sums about another reference join: d = (x - shift) + (shift - reference).
  void add(double n, double shift, double shifted_sum, double shifted_square) {
    if (count == 0) reference = shift;
    const double d = shift - reference;
    square += shifted_square + d * (2 * shifted_sum + n * d);
    sum += shifted_sum + n * d;
    count += n;
  }
};

// The same of many lanes, as arrays: this is done for every piece and should take no time.
struct LaneDeviations {
  Doubles count, reference, sum, square;

  explicit LaneDeviations(int64_t lanes) : count(lanes), reference(lanes), sum(lanes), square(lanes) {}

  void clear() {
    for (Doubles* values : {&count, &reference, &sum, &square}) std::fill(values->begin(), values->end(), 0.0);
  }

  Deviations at(int64_t lane) const { return {count[lane], reference[lane], sum[lane], square[lane]}; }

  void add_to(int64_t lane, double n, double shift, double shifted_sum, double shifted_square) {
    Deviations all = at(lane);
    all.add(n, shift, shifted_sum, shifted_square);
    count[lane] = all.count, reference[lane] = all.reference, sum[lane] = all.sum, square[lane] = all.square;
  }

  // `full` elements to each of the lanes of a vector, one more to the first `partial`.
  template <typename Vector>
  DSSP_INLINE void add_vector(int64_t lane, bool is_first, int64_t full, int64_t partial, Vector shift,
                              Vector shifted_sum, Vector shifted_square) {
    constexpr int64_t w = sizeof(Vector) / sizeof(shift[0]);
    double* __restrict n = count.data() + lane;
    double* __restrict r = reference.data() + lane;
    double* __restrict s = sum.data() + lane;
    double* __restrict q = square.data() + lane;
    for (int64_t i = 0; i < w; ++i) {
      const double added = full + (i < partial), x = shift[i], xs = shifted_sum[i], xq = shifted_square[i];
      r[i] = is_first ? x : r[i];
      const double d = x - r[i];
      q[i] += xq + d * (2 * xs + added * d);
      s[i] += xs + added * d;
      n[i] += added;
    }
  }
};

// The lanes of a piece, kVectors vectors of them at a time: use(first lane, number of vectors as a constant). Vectors that
// lie side by side share their cache lines, and their sums are enough in flight to hide the latency of the additions.
constexpr int64_t kSums = 4;

template <int64_t kWidth, typename Use>
DSSP_INLINE void for_lanes(int64_t lanes, Use use) {
  int64_t j = 0;
  for (; j + kSums * kWidth <= lanes; j += kSums * kWidth) use(j, std::integral_constant<int64_t, kSums>{});
  for (; j + 2 * kWidth <= lanes; j += 2 * kWidth) use(j, std::integral_constant<int64_t, 2>{});
  for (; j < lanes; j += kWidth) use(j, std::integral_constant<int64_t, 1>{});
}

// Sums over the vectors of kVectors neighbouring lanes: add(sum, u, offset) for every whole vector of lane u, in
// kSums / kVectors sums per lane. `rounds` are those in which all the lanes have a whole vector.
template <int64_t kVectors, int64_t kWidth, typename Sums, typename Add>
DSSP_INLINE void for_rounds(int64_t rounds, int64_t period, Sums (&sums)[kVectors], Add add) {
  constexpr int64_t kRepeats = kSums / kVectors;
  Sums more[kRepeats][kVectors] = {};
  int64_t v = 0;
  for (; v + kRepeats <= rounds; v += kRepeats) {
    for (int64_t r = 0; r < kRepeats; ++r) {
      for (int64_t u = 0; u < kVectors; ++u) add(more[r][u], u, (v + r) * period + u * kWidth);
    }
  }
  for (; v < rounds; ++v) {
    for (int64_t u = 0; u < kVectors; ++u) add(more[0][u], u, v * period + u * kWidth);
  }
  for (int64_t r = 0; r < kRepeats; ++r) {
    for (int64_t u = 0; u < kVectors; ++u) sums[u] += more[r][u];
  }
}

template <typename Vector>
struct SumAndSquare {
  Vector sum = {}, square = {};

  DSSP_INLINE void operator+=(const SumAndSquare& other) { sum += other.sum, square += other.square; }
  DSSP_INLINE void add(Vector d) { sum += d, square += d * d; }
};

// Shifted sums of one entry. The shift of a lane is the mean of the first eighth of what the lane sums up in a piece.
// The mean of a fraction f of some numbers is at most sqrt(1/f - 1) standard deviations off the mean of all, so that
// the sums in single precision lose a factor of eight (three bits) at worst, whatever the numbers are.
template <typename Scalar>
DSSP_INLINE void sum_deviations(const Scalar* input, const Walk& walk, int64_t first, int64_t last,
                                LaneDeviations& sums) {
  using L = Lanes<Scalar>;
  using Vector = typename L::Vector;
  constexpr int64_t w = L::width;
  const int64_t period = walk.period;
  for (int64_t p = first; p < last; ++p) {
    const Piece piece = walk.piece(p);
    for_lanes<w>(std::min(period, piece.count), [&](int64_t j, auto vectors) DSSP_INLINE_LAMBDA {
      constexpr int64_t n = decltype(vectors)::value;
      const Scalar* x = input + piece.begin + j;
      const int64_t count = piece.count - j;
      const int64_t rounds = count < n * w ? 0 : (count - n * w) / period + 1;
      // After them each lane has a whole vector, part of one, or nothing.
      const auto rest = [&](int64_t u) { return std::clamp<int64_t>(count - rounds * period - u * w, 0, w); };

      Vector shift[n] = {};
      const int64_t sample = (rounds + 7) / 8;
      for_rounds<n, w>(sample, period, shift, [&](Vector& sum, int64_t, int64_t i) DSSP_INLINE_LAMBDA {
        sum += L::load(x + i);
      });
      for (int64_t u = 0; u < n; ++u) {
        if (sample > 0) {
          shift[u] /= static_cast<Sum<Scalar>>(sample);
        } else {
          shift[u] = load_first(x + u * w, rest(u));
        }
        if (walk.rows) {
          const int64_t lanes = sample > 0 ? w : rest(u);
          shift[u] = Vector{} + static_cast<Sum<Scalar>>(sum_of_lanes(shift[u]) / lanes);
        }
        shift[u] = (shift[u] - shift[u] == 0) ? shift[u] : Vector{};  // NaN and Inf are left to the sums
      }

      SumAndSquare<Vector> shifted[n] = {};
      for_rounds<n, w>(rounds, period, shifted, [&](auto& sum, int64_t u, int64_t i) DSSP_INLINE_LAMBDA {
        sum.add(L::load(x + i) - shift[u]);
      });
      for (int64_t u = 0; u < n; ++u) {
        const int64_t more = rest(u), full = rounds + more / w, partial = more % w;
        if (more > 0) {
          Vector d = load_some(x + rounds * period + u * w, more) - shift[u];
          for (int64_t lane = more; lane < w; ++lane) d[lane] = 0;
          shifted[u].add(d);
        }
        const Vector sum = shifted[u].sum, square = shifted[u].square;
        if (walk.rows) {
          sums.add_to(piece.table, full * w + partial, shift[u][0], sum_of_lanes(sum), sum_of_lanes(square));
        } else {
          sums.add_vector(j + u * w, p == first, full, partial, shift[u], sum, square);
        }
      }
    });
  }
}

// An entry of the forward pass: it adds scale * (input - mean).
template <typename Scalar>
struct Term {
  const Scalar* input;
  const Sum<Scalar>*mean, *scale;  // tables
};

// y = constant + sum_k scale_k * (input_k - mean_k) on a piece; kAdd: this is added to y instead
template <bool kAdd, bool kStreamed, typename Scalar>
DSSP_INLINE void add_terms_to_piece(const Term<Scalar>* terms, int64_t count, const Sum<Scalar>* constant,
                                    const Piece& piece, int64_t period, Scalar* y) {
  using L = Lanes<Scalar>;
  using T = Lanes<Sum<Scalar>>;
  using Vector = typename L::Vector;
  for_vectors<L::width>(
      piece.count, period,
      [&](auto four) DSSP_INLINE_LAMBDA {
        Vector sums[4];
        for (int64_t u = 0; u < 4; ++u) {
          sums[u] = T::load(constant + piece.table + four.lane(u));
          if (kAdd) sums[u] += L::load(y + four.offset(u));
        }
        for (int64_t k = 0; k < count; ++k) {
          const Scalar* x = terms[k].input + piece.begin;
          const Sum<Scalar>*mean = terms[k].mean + piece.table, *scale = terms[k].scale + piece.table;
          for (int64_t u = 0; u < 4; ++u) {
            sums[u] += T::load(scale + four.lane(u)) * (L::load(x + four.offset(u)) - T::load(mean + four.lane(u)));
          }
        }
        for (int64_t u = 0; u < 4; ++u) store<kStreamed>(y + four.offset(u), sums[u]);
      },
      [&](int64_t i, int64_t j, int64_t rest) DSSP_INLINE_LAMBDA {
        Vector a = T::load(constant + piece.table + j);
        if (kAdd) a += load_some(y + i, rest);
        for (int64_t k = 0; k < count; ++k) {
          const Vector x = load_some(terms[k].input + piece.begin + i, rest);
          a += T::load(terms[k].scale + piece.table + j) * (x - T::load(terms[k].mean + piece.table + j));
        }
        store_some(y + i, a, rest);
      });
}

// out = constant + sum_k scale_k * (input_k - mean_k), kStreams inputs at a time on a piece that stays in the cache;
// kAdd: this is added to out instead. `constant` is followed by a table of zeros. Where sums are wider than what is
// stored, all inputs at once: a sum must not be rounded in between.
template <bool kAdd, bool kStreamed, typename Scalar>
DSSP_INLINE void add_terms(const Term<Scalar>* terms, int64_t count, const Sum<Scalar>* constant, const Walk& walk,
                           int64_t first, int64_t last, Scalar* out) {
  const int64_t groups = std::is_same_v<Scalar, Sum<Scalar>> ? (count + kStreams - 1) / kStreams : 1;
  const int64_t size = groups > 1 ? (count + groups - 1) / groups : count;
  for (int64_t p = first; p < last; ++p) {
    const Piece piece = walk.piece(p);
    Scalar* y = out + piece.begin;
    if (size == count) {
      add_terms_to_piece<kAdd, kStreamed>(terms, count, constant, piece, walk.period, y);
      continue;
    }
    add_terms_to_piece<kAdd, false>(terms, size, constant, piece, walk.period, y);
    const Sum<Scalar>* zeros = constant + walk.lanes;
    for (int64_t k = size; k < count; k += size) {
      add_terms_to_piece<true, false>(terms + k, std::min(size, count - k), zeros, piece, walk.period, y);
    }
  }
}

// sums[0] = sum grad; sums[1 + k] = <grad, input_k - mean_k> where there is an input; each [walk.lanes]
template <typename Scalar>
DSSP_INLINE void sum_products(const Scalar* grad, const Term<Scalar>* terms, int64_t count, const Walk& walk,
                              int64_t first, int64_t last, double* sums) {
  using L = Lanes<Scalar>;
  using T = Lanes<Sum<Scalar>>;
  using Vector = typename L::Vector;
  constexpr int64_t w = L::width;
  for (int64_t p = first; p < last; ++p) {
    const Piece piece = walk.piece(p);
    const Scalar* g = grad + piece.begin;
    for (int64_t k = -1; k < count; ++k) {
      double* sum = sums + (k + 1) * walk.lanes + piece.table;
      const Scalar* x = k < 0 ? nullptr : terms[k].input + piece.begin;
      for_lanes<w>(std::min(walk.period, piece.count), [&](int64_t j, auto vectors) DSSP_INLINE_LAMBDA {
        constexpr int64_t n = decltype(vectors)::value;
        const int64_t left = piece.count - j;
        const int64_t rounds = left < n * w ? 0 : (left - n * w) / walk.period + 1;
        Vector total[n] = {}, mean[n] = {};
        if (!x) {
          for_rounds<n, w>(rounds, walk.period, total, [&](Vector& sum, int64_t, int64_t i) DSSP_INLINE_LAMBDA {
            sum += L::load(g + j + i);
          });
        } else {
          for (int64_t u = 0; u < n; ++u) mean[u] = T::load(terms[k].mean + piece.table + j + u * w);
          for_rounds<n, w>(rounds, walk.period, total, [&](Vector& sum, int64_t u, int64_t i) DSSP_INLINE_LAMBDA {
            sum += L::load(g + j + i) * (L::load(x + j + i) - mean[u]);
          });
        }
        for (int64_t u = 0; u < n; ++u) {
          const int64_t i = j + rounds * walk.period + u * w, rest = std::min(w, piece.count - i);
          if (rest > 0) {
            const Vector more = load_some(g + i, rest);
            total[u] += x ? more * (load_some(x + i, rest) - mean[u]) : more;
          }
          for (int64_t lane = 0; lane < w; ++lane) sum[j + u * w + lane] += total[u][lane];
        }
      });
    }
  }
}

// An entry of the backward pass: d_input = scale * grad + constant + slope * (input - mean), or without an input
// d_input = scale * grad, or without a scale zeros.
template <typename Scalar>
struct Gradient {
  const Scalar* input;
  Scalar* d_input;
  const Sum<Scalar>*mean, *scale, *constant, *slope;  // tables
};

template <bool kStreamed, typename Scalar>
DSSP_INLINE void write_gradients(const Scalar* grad, const Gradient<Scalar>* entries, int64_t count, const Walk& walk,
                                 int64_t first, int64_t last) {
  using L = Lanes<Scalar>;
  using T = Lanes<Sum<Scalar>>;
  using Vector = typename L::Vector;
  const int64_t period = walk.period;
  for (int64_t p = first; p < last; ++p) {
    const Piece piece = walk.piece(p);
    const Scalar* g = grad + piece.begin;
    for (int64_t k = 0; k < count; ++k) {
      const Gradient<Scalar>& entry = entries[k];
      Scalar* d = entry.d_input + piece.begin;
      if (!entry.scale) {
        std::memset(static_cast<void*>(d), 0, sizeof(Scalar) * piece.count);
      } else if (!entry.input) {
        const Sum<Scalar>* scale = entry.scale + piece.table;
        for_vectors<L::width>(
            piece.count, period,
            [&](auto four) DSSP_INLINE_LAMBDA {
              for (int64_t u = 0; u < 4; ++u) {
                store<kStreamed>(d + four.offset(u), T::load(scale + four.lane(u)) * L::load(g + four.offset(u)));
              }
            },
            [&](int64_t i, int64_t j, int64_t rest) DSSP_INLINE_LAMBDA {
              store_some(d + i, T::load(scale + j) * load_some(g + i, rest), rest);
            });
      } else {
        const Scalar* x = entry.input + piece.begin;
        const Sum<Scalar>*mean = entry.mean + piece.table, *scale = entry.scale + piece.table;
        const Sum<Scalar>*constant = entry.constant + piece.table, *slope = entry.slope + piece.table;
        for_vectors<L::width>(
            piece.count, period,
            [&](auto four) DSSP_INLINE_LAMBDA {
              for (int64_t u = 0; u < 4; ++u) {
                const int64_t i = four.offset(u), j = four.lane(u);
                const Vector deviation = L::load(x + i) - T::load(mean + j);
                const Vector shift = T::load(constant + j) + T::load(slope + j) * deviation;
                store<kStreamed>(d + i, T::load(scale + j) * L::load(g + i) + shift);
              }
            },
            [&](int64_t i, int64_t j, int64_t rest) DSSP_INLINE_LAMBDA {
              const Vector deviation = load_some(x + i, rest) - T::load(mean + j);
              const Vector shift = T::load(constant + j) + T::load(slope + j) * deviation;
              store_some(d + i, T::load(scale + j) * load_some(g + i, rest) + shift, rest);
            });
      }
    }
  }
}

// target_clones takes no templates: one plain function per storage type, compiled for every instruction set.
#define DSSP_BATCH_NORM_LOOPS(Scalar)                                                                                 \
  DSSP_CLONES void deviations_loop(const Scalar* input, const Walk& walk, int64_t first, int64_t last,                \
                                   LaneDeviations& sums) {                                                            \
    sum_deviations<Scalar>(input, walk, first, last, sums);                                                           \
  }                                                                                                                   \
  DSSP_CLONES void terms_loop(const Term<Scalar>* terms, int64_t count, const Sum<Scalar>* constant,                  \
                              const Walk& walk, int64_t first, int64_t last, Scalar* out, bool add, bool streamed) {  \
    add        ? add_terms<true, false, Scalar>(terms, count, constant, walk, first, last, out)                       \
    : streamed ? add_terms<false, true, Scalar>(terms, count, constant, walk, first, last, out)                       \
               : add_terms<false, false, Scalar>(terms, count, constant, walk, first, last, out);                     \
    if (streamed) finish_streaming();                                                                                 \
  }                                                                                                                   \
  DSSP_CLONES void products_loop(const Scalar* grad, const Term<Scalar>* terms, int64_t count, const Walk& walk,      \
                                 int64_t first, int64_t last, double* sums) {                                         \
    sum_products<Scalar>(grad, terms, count, walk, first, last, sums);                                                \
  }                                                                                                                   \
  DSSP_CLONES void gradients_loop(const Scalar* grad, const Gradient<Scalar>* entries, int64_t count,                 \
                                  const Walk& walk, int64_t first, int64_t last, bool streamed) {                     \
    streamed ? write_gradients<true, Scalar>(grad, entries, count, walk, first, last)                                 \
             : write_gradients<false, Scalar>(grad, entries, count, walk, first, last);                               \
    if (streamed) finish_streaming();                                                                                 \
  }
DSSP_BATCH_NORM_LOOPS(float)
DSSP_BATCH_NORM_LOOPS(double)
DSSP_BATCH_NORM_LOOPS(BFloat16)
DSSP_BATCH_NORM_LOOPS(Half)

// ---- entries and their statistics ----------------------------------------------------------------------------------

const Tensor* entry_of(const Entries& entries, int64_t i) {  // lists without any entry stand for lists of None
  return entries.empty() || !entries[i] ? nullptr : &*entries[i];
}

template <typename Scalar>
const Scalar* data_of(const Tensor& tensor) {
  return static_cast<const Scalar*>(tensor.const_data_ptr());
}

// What an entry goes through, per channel: y += coefficient * ((o - mean) * inverse * weight + bias).
struct Channels {
  std::vector<double> mean, inverse, weight, bias;

  Channels(int64_t channels, const double* means, const double* variances, bool normalised, double eps,
           const Tensor* weights, const Tensor* biases)
      : mean(means, means + channels), inverse(channels, 1.0), weight(channels, 1.0), bias(channels, 0.0) {
    if (!normalised) return;
    for (int64_t c = 0; c < channels; ++c) inverse[c] = 1.0 / std::sqrt(variances[c] + eps);
    if (weights) weight = read_scalars(*weights);
    if (biases) bias = read_scalars(*biases);
  }
};

// Tables of one kind of coefficient, one per entry.
template <typename Scalar>
class Tables {
 public:
  Tables(const Walk& walk, int64_t entries) : walk_(walk), values_(entries * walk.lanes) {}

  // Stores the values, rounded, and returns what the rounding has left of each.
  const Sum<Scalar>* fill(int64_t entry, const std::vector<double>& values) {
    walk_.spread(values.data(), values_.data() + entry * walk_.lanes);
    return values_.data() + entry * walk_.lanes;
  }

 private:
  const Walk& walk_;
  std::vector<Sum<Scalar>> values_;
};

template <typename Scalar>
double rounding_error(double value) {  // of keeping the value in a table
  return value - static_cast<double>(static_cast<Sum<Scalar>>(value));
}

// Entries begin .. end.
struct Range {
  int64_t begin, end;
};

// Bytes of tensors that a second pass finds in the cache that all cores share. Others use it too: half of it counts.
int64_t cached_bytes() {
#ifdef _SC_LEVEL3_CACHE_SIZE
  static const int64_t cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (cache > 0) return std::min(kCachedBytes, cache / 2);
#endif
  return kCachedBytes;
}

// Splits the entries so that those of a range that are read fit into the cache beside one more tensor, the gradient or
// the sum. Where fewer than `least` would fit they are left together.
std::vector<Range> cached_ranges(const Flags& is_read, int64_t tensor_bytes, int64_t least) {
  const int64_t entries = is_read.size(), fitting = cached_bytes() / std::max<int64_t>(tensor_bytes, 1) - 1;
  std::vector<Range> ranges{{0, entries}};
  if (fitting < least) return ranges;
  for (int64_t i = 0, count = 0; i < entries; ++i) {
    if (!is_read[i] || ++count <= fitting) continue;
    ranges.back().end = i;
    ranges.push_back({i, entries});
    count = 1;
  }
  return ranges;
}

// Mean and variance [entries, channels] of the range's entries that are normalised by their batch.
template <typename Scalar>
void batch_statistics(const Walk& walk, const Entries& outputs, Range range, const Flags& from_batch, double* mean,
                      double* variance) {
  Integers batch;
  for (int64_t i = range.begin; i < range.end; ++i) {
    if (from_batch[i]) batch.push_back(i);
  }
  if (batch.empty()) return;
  const int64_t count = batch.size(), per_chunk = walk.channels * count;
  std::vector<Deviations> partial(walk.chunks * per_chunk);
  walk.for_chunks(count, false, [&](int64_t chunk, int64_t first, int64_t last) {
    LaneDeviations lanes(walk.lanes);
    for (int64_t b = 0; b < count; ++b) {
      lanes.clear();
      deviations_loop(data_of<Scalar>(*outputs[batch[b]]), walk, first, last, lanes);
      Deviations* sums = partial.data() + chunk * per_chunk + b * walk.channels;
      for (int64_t lane = 0; lane < walk.lanes; ++lane) {
        const Deviations from = lanes.at(lane);
        if (from.count > 0) sums[walk.channel[lane]].add(from.count, from.reference, from.sum, from.square);
      }
    }
  });
  for (int64_t b = 0; b < count; ++b) {
    for (int64_t c = 0; c < walk.channels; ++c) {
      Deviations all;
      for (int64_t chunk = 0; chunk < walk.chunks; ++chunk) {
        const Deviations& from = partial[chunk * per_chunk + b * walk.channels + c];
        if (from.count > 0) all.add(from.count, from.reference, from.sum, from.square);
      }
      if (all.count == 0) continue;
      const double offset = all.sum / all.count;
      mean[batch[b] * walk.channels + c] = all.reference + offset;
      variance[batch[b] * walk.channels + c] = std::max(all.square / all.count - offset * offset, 0.0);
    }
  }
}

// ---- the two passes that know all entries --------------------------------------------------------------------------

// What the operators are told about the norms, with the mixture's coefficients.
struct Norms {
  const Entries &weights, &biases;
  const Integers& kinds;
  const Doubles& eps;
  const double *mean, *variance;  // [entries, channels]

  Channels channels(int64_t i, int64_t count) const {
    return Channels(count, mean + i * count, variance + i * count, kinds[i] != kPlain, eps[i], entry_of(weights, i),
                    entry_of(biases, i));
  }
};

// The mix of the range's live entries; that of a range after the first is added to the result.
template <typename Scalar>
void forward(const Walk& walk, const Entries& outputs, Range range, const Mixture& mixture, const Norms& norms,
             Tensor& result) {
  const int64_t entries = outputs.size();
  std::vector<Term<Scalar>> terms;
  Tables<Scalar> means(walk, entries), scales(walk, entries), constants(walk, 2);
  Doubles constant(walk.channels, 0.0), scale(walk.channels);
  for (int64_t i = range.begin; i < range.end; ++i) {
    if (!outputs[i] || !mixture.is_active(i)) continue;
    const Channels of = norms.channels(i, walk.channels);
    for (int64_t c = 0; c < walk.channels; ++c) {
      scale[c] = mixture.coefficients[i] * of.inverse[c] * of.weight[c];
      constant[c] += mixture.coefficients[i] * of.bias[c] - scale[c] * rounding_error<Scalar>(of.mean[c]);
    }
    terms.push_back({data_of<Scalar>(*outputs[i]), means.fill(i, of.mean), scales.fill(i, scale)});
  }
  const Sum<Scalar>* constant_table = constants.fill(0, constant);  // and one of zeros after it
  auto* out = static_cast<Scalar*>(result.mutable_data_ptr());
  const bool add = range.begin > 0, is_whole = !add && range.end == entries;
  const bool streamed = is_whole && static_cast<int64_t>(sizeof(Scalar)) * walk.elements >= kStreamedBytes;
  walk.for_chunks(terms.size() + 1, true, [&](int64_t, int64_t first, int64_t last) {
    terms_loop(terms.data(), terms.size(), constant_table, walk, first, last, out, add, streamed);
  });
}

// Sums over a channel: of the gradient, and per entry that is read of its products with (o - mean).
struct ChannelSums {
  Doubles grad;                   // [channels]
  std::vector<Doubles> products;  // [entries][channels], zeros where an entry was not read
};

// Fills in the products of the range's entries, and the sums of the gradient.
template <typename Scalar>
void channel_sums(const Walk& walk, const Tensor& grad, const Entries& outputs, Range range, const Flags& is_read,
                  const Norms& norms, ChannelSums& sums) {
  std::vector<Term<Scalar>> terms;
  Integers term_entries;
  Tables<Scalar> means(walk, outputs.size());
  for (int64_t i = range.begin; i < range.end; ++i) {
    if (!is_read[i]) continue;
    const double* mean = norms.mean + i * walk.channels;
    terms.push_back({data_of<Scalar>(*outputs[i]), means.fill(i, Doubles(mean, mean + walk.channels)), nullptr});
    term_entries.push_back(i);
  }
  const int64_t columns = terms.size() + 1, per_chunk = columns * walk.channels;
  Doubles partial(walk.chunks * per_chunk, 0.0);
  walk.for_chunks(columns, false, [&](int64_t chunk, int64_t first, int64_t last) {
    Doubles lanes(columns * walk.lanes, 0.0);
    products_loop(data_of<Scalar>(grad), terms.data(), terms.size(), walk, first, last, lanes.data());
    for (int64_t column = 0; column < columns; ++column) {
      double* sums = partial.data() + chunk * per_chunk + column * walk.channels;
      for (int64_t lane = 0; lane < walk.lanes; ++lane) sums[walk.channel[lane]] += lanes[column * walk.lanes + lane];
    }
  });
  Doubles total(per_chunk, 0.0);
  for (int64_t chunk = 0; chunk < walk.chunks; ++chunk) {
    for (int64_t i = 0; i < per_chunk; ++i) total[i] += partial[chunk * per_chunk + i];
  }
  const auto column = [&](int64_t k) {
    return Doubles(total.begin() + k * walk.channels, total.begin() + (k + 1) * walk.channels);
  };
  sums.grad = column(0);
  for (size_t k = 0; k < terms.size(); ++k) {
    const int64_t i = term_entries[k];
    sums.products[i] = column(k + 1);
    for (int64_t c = 0; c < walk.channels; ++c) {  // the mean itself, instead of what of it fits into a table
      sums.products[i][c] -= rounding_error<Scalar>(norms.mean[i * walk.channels + c]) * sums.grad[c];
    }
  }
}

template <typename Scalar>
void write_output_gradients(const Walk& walk, const Tensor& grad, const Entries& outputs, Range range,
                            const Mixture& mixture, const Norms& norms, const ChannelSums& sums,
                            const Entries& d_outputs) {
  const int64_t entries = outputs.size();
  const double count = walk.elements_per_channel();
  std::vector<Gradient<Scalar>> gradients;
  Tables<Scalar> means(walk, entries), scales(walk, entries), constants(walk, entries), slopes(walk, entries);
  Doubles scale(walk.channels), constant(walk.channels), slope(walk.channels);
  for (int64_t i = range.begin; i < range.end; ++i) {
    if (!d_outputs[i]) continue;
    auto* d_output = static_cast<Scalar*>(d_outputs[i]->mutable_data_ptr());
    gradients.push_back({nullptr, d_output, nullptr, nullptr, nullptr, nullptr});
    if (!mixture.is_active(i)) continue;
    Gradient<Scalar>& gradient = gradients.back();
    const Channels of = norms.channels(i, walk.channels);
    for (int64_t c = 0; c < walk.channels; ++c) {
      scale[c] = mixture.coefficients[i] * of.inverse[c] * of.weight[c];
      slope[c] = -scale[c] * of.inverse[c] * of.inverse[c] * sums.products[i][c] / count;
      constant[c] = -scale[c] * sums.grad[c] / count - slope[c] * rounding_error<Scalar>(of.mean[c]);
    }
    gradient.scale = scales.fill(i, scale);
    if (norms.kinds[i] != kBatch) continue;
    gradient.input = data_of<Scalar>(*outputs[i]);
    gradient.mean = means.fill(i, of.mean);
    gradient.constant = constants.fill(i, constant);
    gradient.slope = slopes.fill(i, slope);
  }
  if (gradients.empty()) return;
  const int64_t written = std::count_if(d_outputs.begin(), d_outputs.end(), [](const auto& d) { return d.has_value(); });
  const bool streamed = static_cast<int64_t>(written * sizeof(Scalar)) * walk.elements >= kStreamedBytes;
  walk.for_chunks(2 * gradients.size(), true, [&](int64_t, int64_t first, int64_t last) {
    gradients_loop(data_of<Scalar>(grad), gradients.data(), gradients.size(), walk, first, last, streamed);
  });
}

// ---- the registered operators --------------------------------------------------------------------------------------

Tensor empty_statistics(int64_t entries, int64_t channels, double value) {
  const int64_t sizes[] = {entries, channels}, strides[] = {channels, 1};
  Tensor result = empty_strided({sizes, 2}, {strides, 2}, aoti_torch_dtype_float64());
  std::fill_n(static_cast<double*>(result.mutable_data_ptr()), entries * channels, value);
  return result;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_mixed_sum_forward(
    Entries outputs, Tensor alpha, std::optional<Tensor> mask, std::optional<Tensor> active, Entries weights,
    Entries biases, Entries running_means, Entries running_variances, Integers kinds, Doubles eps, bool softmax) {
  const auto present = std::find_if(outputs.begin(), outputs.end(), [](const auto& o) { return o.has_value(); });
  STD_TORCH_CHECK(present != outputs.end(), "batch_norm_mixed_sum_forward: at least one entry must be a tensor");
  const Mixture mixture(outputs.size(), alpha, mask, active, softmax);
  Tensor result = empty_as(**present);
  const int64_t entries = outputs.size(), channels = result.size(1);
  Tensor means = empty_statistics(entries, channels, 0.0), variances = empty_statistics(entries, channels, 1.0);
  auto* mean = static_cast<double*>(means.mutable_data_ptr());
  auto* variance = static_cast<double*>(variances.mutable_data_ptr());
  Flags is_read(entries), from_batch(entries);
  for (int64_t i = 0; i < entries; ++i) {
    is_read[i] = outputs[i] && mixture.is_active(i);
    from_batch[i] = is_read[i] && kinds[i] == kBatch;
    if (!is_read[i] || kinds[i] != kRunning) continue;
    const Tensor *running_mean = entry_of(running_means, i), *running_variance = entry_of(running_variances, i);
    STD_TORCH_CHECK(running_mean && running_variance, "batch_norm_mixed_sum_forward: no running statistics");
    const Doubles m = read_scalars(*running_mean), v = read_scalars(*running_variance);
    std::copy(m.begin(), m.end(), mean + i * channels);
    std::copy(v.begin(), v.end(), variance + i * channels);
  }
  if (result.numel() == 0) return {result, means, variances};
  with_storage(result.scalar_type(), [&](auto scalar) {
    using Scalar = decltype(scalar);
    const Walk walk(result, Lanes<Scalar>::width);
    const Norms norms{weights, biases, kinds, eps, mean, variance};
    // A pass without another needs no cache, and a sum wider than what is stored must not be rounded between ranges.
    // Each range costs a read and a write of the sum: under four entries that is more than it saves.
    const bool is_split = std::is_same_v<Scalar, Sum<Scalar>> && std::count(from_batch.begin(), from_batch.end(), true);
    std::vector<Range> ranges{{0, entries}};
    if (is_split) ranges = cached_ranges(is_read, result.numel() * sizeof(Scalar), 4);
    for (const Range range : ranges) {
      batch_statistics<Scalar>(walk, outputs, range, from_batch, mean, variance);
      forward<Scalar>(walk, outputs, range, mixture, norms, result);
    }
  });
  return {result, means, variances};
}

std::tuple<Tensors, Tensor, Tensor> batch_norm_mixed_sum_backward(
    Tensor grad, Entries outputs, Tensor alpha, std::optional<Tensor> mask, std::optional<Tensor> active,
    Entries weights, Entries biases, Tensor means, Tensor variances, Integers kinds, Doubles eps, bool softmax,
    Flags needs_output_grad, Flags needs_weight_grad, Flags needs_bias_grad, bool needs_parameter_grad) {
  Mixture mixture(outputs.size(), alpha, mask, active, softmax);
  const int64_t entries = outputs.size(), channels = grad.size(1);
  const Norms norms{weights, biases, kinds, eps, data_of<double>(means), data_of<double>(variances)};
  Tensors requested;
  Entries d_outputs(entries);
  Flags is_read(entries);
  bool needs_sums = needs_parameter_grad;
  for (int64_t i = 0; i < entries; ++i) {
    const bool from_batch = kinds[i] == kBatch && needs_output_grad[i];
    const bool needs_products = needs_parameter_grad || from_batch || needs_weight_grad[i];
    is_read[i] = needs_products && outputs[i] && mixture.is_active(i);
    needs_sums = needs_sums || is_read[i] || needs_bias_grad[i];
    if (!needs_output_grad[i]) continue;
    d_outputs[i] = empty_as(grad);
    requested.push_back(*d_outputs[i]);
  }
  ChannelSums sums{Doubles(channels, 0.0), std::vector<Doubles>(entries, Doubles(channels, 0.0))};
  if (grad.numel() > 0) {
    with_storage(grad.scalar_type(), [&](auto scalar) {
      using Scalar = decltype(scalar);
      const Walk walk(grad, Lanes<Scalar>::width);
      for (const Range range : cached_ranges(is_read, grad.numel() * sizeof(Scalar), 1)) {
        if (needs_sums) channel_sums<Scalar>(walk, grad, outputs, range, is_read, norms, sums);
        write_output_gradients<Scalar>(walk, grad, outputs, range, mixture, norms, sums, d_outputs);
      }
    });
  }

  Doubles dots(entries, 0.0);  // <grad, entry as it enters the mix>
  std::vector<Doubles> d_weights(entries), d_biases(entries);
  for (int64_t i = 0; i < entries; ++i) {
    const Channels of = norms.channels(i, channels);
    const auto scaled = [&](double sum) { return mixture.is_active(i) ? mixture.coefficients[i] * sum : 0.0; };
    for (int64_t c = 0; c < channels; ++c) {
      const double product = of.inverse[c] * sums.products[i][c];  // <grad, (o - mean) / sqrt(variance + eps)>
      if (is_read[i]) dots[i] += of.weight[c] * product + of.bias[c] * sums.grad[c];
      if (needs_weight_grad[i]) d_weights[i].push_back(scaled(product));
      if (needs_bias_grad[i]) d_biases[i].push_back(scaled(sums.grad[c]));
    }
  }
  for (int64_t i = 0; i < entries; ++i) {
    if (needs_weight_grad[i]) requested.push_back(write_scalars(d_weights[i], *weights[i]));
  }
  for (int64_t i = 0; i < entries; ++i) {
    if (needs_bias_grad[i]) requested.push_back(write_scalars(d_biases[i], *biases[i]));
  }
  if (!needs_parameter_grad) return {requested, no_elements(alpha), no_elements(alpha)};
  Doubles d_mask(mixture.edges, 0.0);
  Tensor d_alpha = write_scalars(mixture.parameter_gradients(dots, softmax, d_mask), alpha);
  return {requested, d_alpha, mask ? write_scalars(d_mask, *mask) : no_elements(alpha)};
}

void update(Tensor& running, const double* values, int64_t channels, double factor, double share) {
  Doubles updated = read_scalars(running);
  for (int64_t c = 0; c < channels; ++c) updated[c] = (1.0 - share) * updated[c] + share * factor * values[c];
  write_scalars_into(running, updated);
}

void batch_norm_update_running_statistics(Tensors running_means, Tensors running_variances, Tensors counters,
                                          Tensor mean, Tensor variance, std::optional<Tensor> active,
                                          Integers entries, Doubles momenta, int64_t count) {
  const int64_t channels = mean.size(1), edges = active ? active->numel() : 1, candidates = mean.size(0) / edges;
  const auto* is_active = active ? static_cast<const bool*>(active->const_data_ptr()) : nullptr;
  const double unbiased = static_cast<double>(count) / static_cast<double>(std::max<int64_t>(count - 1, 1));
  for (size_t i = 0; i < entries.size(); ++i) {
    if (is_active && !is_active[entries[i] / candidates]) continue;
    const int64_t batches = ++*static_cast<int64_t*>(counters[i].mutable_data_ptr());
    if (count == 0) continue;
    const double share = momenta[i] < 0 ? 1.0 / static_cast<double>(batches) : momenta[i];
    const int64_t row = entries[i] * channels;
    update(running_means[i], data_of<double>(mean) + row, channels, 1.0, share);
    update(running_variances[i], data_of<double>(variance) + row, channels, unbiased, share);
  }
}

}  // namespace
}  // namespace dssp

STABLE_TORCH_LIBRARY_IMPL(dssp_kernels, CPU, library) {
  library.impl("batch_norm_mixed_sum_forward", TORCH_BOX(&dssp::batch_norm_mixed_sum_forward));
  library.impl("batch_norm_mixed_sum_backward", TORCH_BOX(&dssp::batch_norm_mixed_sum_backward));
  library.impl("batch_norm_update_running_statistics", TORCH_BOX(&dssp::batch_norm_update_running_statistics));
}
