// Rows of windows, vectorised over channels: maxima and averages, and their gradients.
#pragma once

#include <limits>

#include "../cpu_moments.h"
#include "../depthwise_conv/cpu_rows.h"

namespace dssp {
namespace {

// ---- positions ----------------------------------------------------------------------------------------------------

// Positions in windows: as many lanes as S has, as wide as its own while computing, bytes in memory. They are narrowed
// and widened by halves, for which there are instructions; at once, compilers do it lane by lane.
template <typename S>
struct Positions {
  using Vector = int32_t __attribute__((vector_size(32)));
  using Halves = uint16_t __attribute__((vector_size(16)));
  using Bytes = uint8_t __attribute__((vector_size(8)));

  static DSSP_INLINE Halves narrowed(Vector value) { return __builtin_convertvector(value, Halves); }
  static DSSP_INLINE Vector widened(Halves value) { return __builtin_convertvector(value, Vector); }
};
template <>
struct Positions<double> {
  using Vector = int64_t __attribute__((vector_size(32)));
  using Quarters = int32_t __attribute__((vector_size(16)));
  using Halves = uint16_t __attribute__((vector_size(8)));
  using Bytes = uint8_t __attribute__((vector_size(4)));

  static DSSP_INLINE Halves narrowed(Vector value) {
    return __builtin_convertvector(__builtin_convertvector(value, Quarters), Halves);
  }
  static DSSP_INLINE Vector widened(Halves value) {
    return __builtin_convertvector(__builtin_convertvector(value, Quarters), Vector);
  }
};

template <typename S>
using Position = typename Positions<S>::Vector;

template <typename S>
DSSP_INLINE Position<S> all_at(int64_t position) {
  using Lane = std::conditional_t<std::is_same_v<S, double>, int64_t, int32_t>;
  return Position<S>{} + static_cast<Lane>(position);
}

template <typename S>
DSSP_INLINE void store_position(uint8_t* to, Position<S> position) {
  const auto bytes = __builtin_convertvector(Positions<S>::narrowed(position), typename Positions<S>::Bytes);
  std::memcpy(to, &bytes, sizeof(bytes));
}

template <typename S>
DSSP_INLINE Position<S> load_position(const uint8_t* from) {
  const auto bytes = load_unaligned<typename Positions<S>::Bytes>(from);
  return Positions<S>::widened(__builtin_convertvector(bytes, typename Positions<S>::Halves));
}

// ---- windows ------------------------------------------------------------------------------------------------------

// The part of a window that lies inside the image: positions first..last - 1 along one axis, the first at tap `tap`.
struct Window {
  int64_t first, last, tap;

  Window(const Axis& axis, int64_t output) {
    const int64_t start = output * axis.stride - axis.padding;
    first = std::max<int64_t>(start, 0);
    last = std::min(start + axis.taps, axis.inputs);
    tap = first - start;
  }
};

// One row of windows.
template <typename Pixel, typename S>
struct Pooling {
  SumRow<Pixel> image;  // the first of the rows that the windows reach
  int64_t image_row;    // distance to the next one
  int64_t row_count, row_tap;
  Axis columns;
  int64_t vectors, taps;  // taps of a whole window
  bool counts_padding;
  SumRow<S> pooled;    // forward: results; backward: their gradients, which are added to those of the image
  uint8_t* positions;  // [vector][column][lane]: row * columns.taps + column in the window

  S share(int64_t columns_inside) const {  // what one pixel has in an average
    return S(1) / static_cast<S>(counts_padding ? taps : row_count * columns_inside);
  }
  uint8_t* position(int64_t vector, int64_t column) const {
    return positions + (vector * columns.outputs + column) * Lanes<S>::width;
  }
};

// Some windows side by side. kTaps: their columns if these all lie inside the image, 0 = any number, of one window.
template <int kTaps, int kWindows>
struct Group {
  static constexpr int windows = kWindows;
  int64_t vector, column;  // of the first
  Window window;           // the first's columns

  Group(int64_t vector, int64_t column, const Axis& columns)
      : vector(vector), column(column), window(columns, column) {}

  int64_t taps() const { return kTaps ? kTaps : window.last - window.first; }
};

// Calls use(group) until all windows of the row had their turn: those of three columns inside the image four at a time,
// which keeps four sums in flight.
template <typename P, typename Use>
DSSP_INLINE void for_windows(const P& p, Use use) {
  const Axis& columns = p.columns;
  const int64_t before = columns.taps == 3 ? ceil_div(columns.padding, columns.stride) : columns.outputs;
  const int64_t inside = columns.taps == 3 ? (columns.inputs + columns.padding - 3) / columns.stride + 1 : 0;
  for (int64_t vector = 0; vector < p.vectors; ++vector) {
    int64_t column = 0;
    for (; column < std::min(before, columns.outputs); ++column) use(Group<0, 1>(vector, column, columns));
    for (; column + 4 <= inside; column += 4) use(Group<3, 4>(vector, column, columns));
    for (; column < inside; ++column) use(Group<3, 1>(vector, column, columns));
    for (; column < columns.outputs; ++column) use(Group<0, 1>(vector, column, columns));
  }
}

// ---- pools --------------------------------------------------------------------------------------------------------

// Of equal pixels the first, and NaN wherever one is: as torch.nn.functional.max_pool2d has it.
template <typename S>
DSSP_INLINE void max_row(const Pooling<const S, S>& p) {
  using V = typename Lanes<S>::Vector;
  const int64_t next = p.image.column, stride = p.columns.stride * next;
  const Position<S> row_step = all_at<S>(p.columns.taps);
  for_windows(p, [&](const auto group) DSSP_INLINE_LAMBDA {
    constexpr int windows = decltype(group)::windows;
    const S* image = p.image.at(group.vector, group.window.first);
    Position<S> first = all_at<S>(p.row_tap * p.columns.taps + group.window.tap);
    V best[windows];
    Position<S> position[windows];
    for (int i = 0; i < windows; ++i) best[i] = V{} - std::numeric_limits<S>::infinity(), position[i] = first;
    for (int64_t r = 0; r < p.row_count; ++r, first += row_step) {
      const S* from = image + r * p.image_row;
      Position<S> here = first;
      for (int64_t t = 0; t < group.taps(); ++t, here += 1, from += next) {
        for (int i = 0; i < windows; ++i) {
          const V value = Lanes<S>::load(from + i * stride);
          const auto better = (value > best[i]) | (value != value);
          best[i] = better ? value : best[i];
          position[i] = better ? here : position[i];
        }
      }
    }
    for (int i = 0; i < windows; ++i) {
      Lanes<S>::store(p.pooled.at(group.vector, group.column + i), best[i]);
      store_position<S>(p.position(group.vector, group.column + i), position[i]);
    }
  });
}

template <typename S>
DSSP_INLINE void average_row(const Pooling<const S, S>& p) {
  using V = typename Lanes<S>::Vector;
  const int64_t next = p.image.column, stride = p.columns.stride * next;
  for_windows(p, [&](const auto group) DSSP_INLINE_LAMBDA {
    constexpr int windows = decltype(group)::windows;
    const S* image = p.image.at(group.vector, group.window.first);
    V sums[windows] = {};
    for (int64_t r = 0; r < p.row_count; ++r) {
      const S* from = image + r * p.image_row;
      for (int64_t t = 0; t < group.taps(); ++t, from += next) {
        for (int i = 0; i < windows; ++i) sums[i] += Lanes<S>::load(from + i * stride);
      }
    }
    const S share = p.share(group.taps());
    for (int i = 0; i < windows; ++i) Lanes<S>::store(p.pooled.at(group.vector, group.column + i), sums[i] * share);
  });
}

// Adds of(i, here) to each pixel of window i, `here` being its position in the window.
template <typename S, typename Group, typename Of>
DSSP_INLINE void add_to_pixels(const Pooling<S, S>& p, const Group& group, Of of) {
  const int64_t next = p.image.column, stride = p.columns.stride * next;
  S* image = p.image.at(group.vector, group.window.first);
  const Position<S> row_step = all_at<S>(p.columns.taps);
  Position<S> first = all_at<S>(p.row_tap * p.columns.taps + group.window.tap);
  for (int64_t r = 0; r < p.row_count; ++r, first += row_step) {
    Position<S> here = first;
    S* row = image + r * p.image_row;
    for (int64_t t = 0; t < group.taps(); ++t, here += 1, row += next) {
      for (int i = 0; i < Group::windows; ++i) {
        S* to = row + i * stride;
        Lanes<S>::store(to, Lanes<S>::load(to) + of(i, here));
      }
    }
  }
}

template <typename S>
DSSP_INLINE void max_gradient_row(const Pooling<S, S>& p) {
  using V = typename Lanes<S>::Vector;
  for_windows(p, [&](const auto group) DSSP_INLINE_LAMBDA {
    constexpr int windows = decltype(group)::windows;
    V gradient[windows];
    Position<S> position[windows];
    for (int i = 0; i < windows; ++i) {
      gradient[i] = Lanes<S>::load(p.pooled.at(group.vector, group.column + i));
      position[i] = load_position<S>(p.position(group.vector, group.column + i));
    }
    add_to_pixels(p, group, [&](int i, const Position<S>& here) DSSP_INLINE_LAMBDA {
      return position[i] == here ? gradient[i] : V{};
    });
  });
}

template <typename S>
DSSP_INLINE void average_gradient_row(const Pooling<S, S>& p) {
  using V = typename Lanes<S>::Vector;
  for_windows(p, [&](const auto group) DSSP_INLINE_LAMBDA {
    constexpr int windows = decltype(group)::windows;
    const S share = p.share(group.taps());
    V gradient[windows];
    for (int i = 0; i < windows; ++i) {
      gradient[i] = Lanes<S>::load(p.pooled.at(group.vector, group.column + i)) * share;
    }
    add_to_pixels(p, group, [&](int i, const auto&) DSSP_INLINE_LAMBDA { return gradient[i]; });
  });
}

// ---- windows of three columns, one after the other ------------------------------------------------------------------
//
// DARTS' pools. Neighbours have two columns in common: what a column of pixels gives is found once, and each window
// puts three of them together.

inline bool is_strip(const Axis& columns) {
  return columns.taps == 3 && columns.stride == 1 && columns.padding == 1 && columns.inputs > 1;
}

template <typename S>
struct Largest {
  typename Lanes<S>::Vector value;
  Position<S> row;  // where it is, times the taps of a row
};

// The largest pixel of a column of the image; of equal ones the first.
template <int kRows, typename S>
DSSP_INLINE Largest<S> largest_of_column(const S* from, int64_t image_row, Position<S> first, Position<S> row_step) {
  Largest<S> best = {Lanes<S>::load(from), first};
#pragma GCC unroll 3
  for (int r = 1; r < kRows; ++r) {
    first += row_step;
    const auto value = Lanes<S>::load(from + r * image_row);
    const auto better = (value > best.value) | (value != value);
    best.value = better ? value : best.value;
    best.row = better ? first : best.row;
  }
  return best;
}

// The larger of two, `right` being some columns further: in the order of rows, then columns, the first of equal ones and
// the last NaN. `at` is where `left` is in the window, row and column, and becomes where the larger is.
template <typename S>
DSSP_INLINE void choose(Largest<S>& left, Position<S>& at, const Largest<S>& right, int64_t right_column) {
  const auto is_above = right.row < left.row;
  const auto better = (right.value > left.value) | (is_above & (right.value == left.value)) |
                      ((right.value != right.value) & ~(is_above & (left.value != left.value)));
  left.value = better ? right.value : left.value;
  left.row = better ? right.row : left.row;
  at = better ? right.row + all_at<S>(right_column) : at;
}

template <int kRows, typename S>
DSSP_INLINE void max_strip(const Pooling<const S, S>& p) {
  const Position<S> first = all_at<S>(p.row_tap * 3), row_step = all_at<S>(3);
  const int64_t last = p.columns.outputs - 1;
  for (int64_t vector = 0; vector < p.vectors; ++vector) {
    const auto column = [&](int64_t c) DSSP_INLINE_LAMBDA {
      return largest_of_column<kRows>(p.image.at(vector, c), p.image_row, first, row_step);
    };
    const auto store = [&](int64_t c, const Largest<S>& best, const Position<S>& at) DSSP_INLINE_LAMBDA {
      Lanes<S>::store(p.pooled.at(vector, c), best.value);
      store_position<S>(p.position(vector, c), at);
    };
    Largest<S> left = column(0), middle = column(1);
    {
      Largest<S> best = left;
      Position<S> at = best.row + all_at<S>(1);
      choose(best, at, middle, 2);
      store(0, best, at);
    }
    for (int64_t c = 1; c < last; ++c) {
      const Largest<S> right = column(c + 1);
      Largest<S> best = left;
      Position<S> at = best.row;
      choose(best, at, middle, 1);
      choose(best, at, right, 2);
      store(c, best, at);
      left = middle, middle = right;
    }
    Position<S> at = left.row;
    choose(left, at, middle, 1);
    store(last, left, at);
  }
}

template <int kRows, typename S>
DSSP_INLINE void average_strip(const Pooling<const S, S>& p) {
  using V = typename Lanes<S>::Vector;
  const int64_t last = p.columns.outputs - 1;
  const S share = p.share(3), share_at_edge = p.share(2);
  for (int64_t vector = 0; vector < p.vectors; ++vector) {
    const auto column = [&](int64_t c) DSSP_INLINE_LAMBDA {
      const S* from = p.image.at(vector, c);
      V sum = Lanes<S>::load(from);
#pragma GCC unroll 3
      for (int r = 1; r < kRows; ++r) sum += Lanes<S>::load(from + r * p.image_row);
      return sum;
    };
    V left = column(0), middle = column(1);
    Lanes<S>::store(p.pooled.at(vector, 0), (left + middle) * share_at_edge);
    for (int64_t c = 1; c < last; ++c) {
      const V right = column(c + 1);
      Lanes<S>::store(p.pooled.at(vector, c), (left + middle + right) * share);
      left = middle, middle = right;
    }
    Lanes<S>::store(p.pooled.at(vector, last), (left + middle) * share_at_edge);
  }
}

// The rows of a column, each a variable: GCC keeps arrays of vectors in memory.
template <int kRows, typename V>
struct ColumnOf;

template <typename V>
struct ColumnOf<2, V> {
  V first = {}, second = {};

  template <typename Of>
  DSSP_INLINE void add(Of of) {  // of(row)
    first += of(0), second += of(1);
  }
  template <typename S>
  DSSP_INLINE void add_to(S* image, int64_t row) const {
    Lanes<S>::store(image, Lanes<S>::load(image) + first);
    Lanes<S>::store(image + row, Lanes<S>::load(image + row) + second);
  }
};

template <typename V>
struct ColumnOf<3, V> : ColumnOf<2, V> {
  V third = {};

  template <typename Of>
  DSSP_INLINE void add(Of of) {
    ColumnOf<2, V>::add(of);
    third += of(2);
  }
  template <typename S>
  DSSP_INLINE void add_to(S* image, int64_t row) const {
    ColumnOf<2, V>::add_to(image, row);
    Lanes<S>::store(image + 2 * row, Lanes<S>::load(image + 2 * row) + third);
  }
};

template <int kRows, typename S>
DSSP_INLINE void max_gradient_strip(const Pooling<S, S>& p) {
  using V = typename Lanes<S>::Vector;
  const int64_t outputs = p.columns.outputs;
  for (int64_t vector = 0; vector < p.vectors; ++vector) {
    ColumnOf<kRows, V> left, middle;  // of the columns under the window: what came from windows before
    for (int64_t c = 0; c < outputs; ++c) {
      const V gradient = Lanes<S>::load(p.pooled.at(vector, c));
      const Position<S> position = load_position<S>(p.position(vector, c)) - all_at<S>(p.row_tap * 3);
      const auto at = [&](int64_t column) DSSP_INLINE_LAMBDA {
        return [=](int64_t row) DSSP_INLINE_LAMBDA {
          return position == all_at<S>(row * 3 + column) ? gradient : V{};
        };
      };
      ColumnOf<kRows, V> right;
      left.add(at(0));
      middle.add(at(1));
      right.add(at(2));
      if (c > 0) left.add_to(p.image.at(vector, c - 1), p.image_row);
      left = middle, middle = right;
    }
    left.add_to(p.image.at(vector, outputs - 1), p.image_row);
  }
}

template <int kRows, typename S>
DSSP_INLINE void average_gradient_strip(const Pooling<S, S>& p) {
  using V = typename Lanes<S>::Vector;
  const int64_t last = p.columns.outputs - 1;
  const S share = p.share(3), share_at_edge = p.share(2);
  for (int64_t vector = 0; vector < p.vectors; ++vector) {
    const auto add = [&](int64_t column, V sum) DSSP_INLINE_LAMBDA {
      S* to = p.image.at(vector, column);
#pragma GCC unroll 3
      for (int r = 0; r < kRows; ++r, to += p.image_row) Lanes<S>::store(to, Lanes<S>::load(to) + sum);
    };
    const auto gradient = [&](int64_t c) DSSP_INLINE_LAMBDA {
      return Lanes<S>::load(p.pooled.at(vector, c)) * (c == last ? share_at_edge : share);
    };
    V left = Lanes<S>::load(p.pooled.at(vector, 0)) * share_at_edge, middle = gradient(1);
    add(0, left + middle);
    for (int64_t c = 1; c < last; ++c) {
      const V right = gradient(c + 1);
      add(c, left + middle + right);
      left = middle, middle = right;
    }
    add(last, left + middle);
  }
}

// ---- the same, as calls --------------------------------------------------------------------------------------------

// strip(kRows) where the windows are those of DARTS' pools and have two or three rows inside the image, else row().
template <typename P, typename Strip, typename Row>
DSSP_INLINE void strip_or_row(const P& p, Strip strip, Row row) {
  if (is_strip(p.columns) && p.row_count == 3) return strip(std::integral_constant<int, 3>());
  if (is_strip(p.columns) && p.row_count == 2) return strip(std::integral_constant<int, 2>());
  row();
}

template <typename S>
void max_loop(const Pooling<const S, S>& p) {
  with_best_vectors([&](auto) DSSP_INLINE_LAMBDA {
    strip_or_row(p, [&](auto rows) DSSP_INLINE_LAMBDA { max_strip<rows()>(p); },
                 [&]() DSSP_INLINE_LAMBDA { max_row<S>(p); });
  });
}

template <typename S>
void average_loop(const Pooling<const S, S>& p) {
  with_best_vectors([&](auto) DSSP_INLINE_LAMBDA {
    strip_or_row(p, [&](auto rows) DSSP_INLINE_LAMBDA { average_strip<rows()>(p); },
                 [&]() DSSP_INLINE_LAMBDA { average_row<S>(p); });
  });
}

template <typename S>
void max_gradient_loop(const Pooling<S, S>& p) {
  with_best_vectors([&](auto) DSSP_INLINE_LAMBDA {
    strip_or_row(p, [&](auto rows) DSSP_INLINE_LAMBDA { max_gradient_strip<rows()>(p); },
                 [&]() DSSP_INLINE_LAMBDA { max_gradient_row<S>(p); });
  });
}

template <typename S>
void average_gradient_loop(const Pooling<S, S>& p) {
  with_best_vectors([&](auto) DSSP_INLINE_LAMBDA {
    strip_or_row(p, [&](auto rows) DSSP_INLINE_LAMBDA { average_gradient_strip<rows()>(p); },
                 [&]() DSSP_INLINE_LAMBDA { average_gradient_row<S>(p); });
  });
}

}  // namespace
}  // namespace dssp
