// Loops over pieces first .. last of a walk: statistics, the mix, sums over channels, gradients.
#pragma once

#include "cpu_walk.h"

#define DSSP_INLINE_LAMBDA __attribute__((always_inline))

namespace dssp {
namespace {

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

// sums[0] = sum grad, if asked for; sums[1 + k] = <grad, input_k - mean_k>; each [walk.lanes]
template <typename Scalar>
DSSP_INLINE void sum_products(const Scalar* grad, const Term<Scalar>* terms, int64_t count, bool sum_grad,
                              const Walk& walk, int64_t first, int64_t last, double* sums) {
  using L = Lanes<Scalar>;
  using T = Lanes<Sum<Scalar>>;
  using Vector = typename L::Vector;
  constexpr int64_t w = L::width;
  for (int64_t p = first; p < last; ++p) {
    const Piece piece = walk.piece(p);
    const Scalar* g = grad + piece.begin;
    for (int64_t k = sum_grad ? -1 : 0; k < count; ++k) {
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

// ---- the same, as calls --------------------------------------------------------------------------------------------

template <typename Scalar>
void deviations_loop(const Scalar* input, const Walk& walk, int64_t first, int64_t last, LaneDeviations& sums) {
  with_best_vectors([&](auto) DSSP_INLINE_LAMBDA { sum_deviations<Scalar>(input, walk, first, last, sums); });
}

template <typename Scalar>
void terms_loop(const Term<Scalar>* terms, int64_t count, const Sum<Scalar>* constant, const Walk& walk, int64_t first,
                int64_t last, Scalar* out, bool add, bool streamed) {
  with_best_vectors([&](auto) DSSP_INLINE_LAMBDA {
    add        ? add_terms<true, false, Scalar>(terms, count, constant, walk, first, last, out)
    : streamed ? add_terms<false, true, Scalar>(terms, count, constant, walk, first, last, out)
               : add_terms<false, false, Scalar>(terms, count, constant, walk, first, last, out);
    if (streamed) finish_streaming();
  });
}

template <typename Scalar>
void products_loop(const Scalar* grad, const Term<Scalar>* terms, int64_t count, bool sum_grad, const Walk& walk,
                   int64_t first, int64_t last, double* sums) {
  with_best_vectors([&](auto) DSSP_INLINE_LAMBDA {
    sum_products<Scalar>(grad, terms, count, sum_grad, walk, first, last, sums);
  });
}

template <typename Scalar>
void gradients_loop(const Scalar* grad, const Gradient<Scalar>* entries, int64_t count, const Walk& walk, int64_t first,
                    int64_t last, bool streamed) {
  with_best_vectors([&](auto) DSSP_INLINE_LAMBDA {
    streamed ? write_gradients<true, Scalar>(grad, entries, count, walk, first, last)
             : write_gradients<false, Scalar>(grad, entries, count, walk, first, last);
    if (streamed) finish_streaming();
  });
}

}  // namespace
}  // namespace dssp
