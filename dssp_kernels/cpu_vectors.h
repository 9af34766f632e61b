// Vectors of storage scalars (float, double, bfloat16, half) widened to the type sums are kept in.
//
// GCC/Clang vector extensions rather than intrinsics: one source serves every instruction set, and with_best_vectors()
// runs what it was compiled to for the best one that this machine has.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <type_traits>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#define DSSP_INLINE inline __attribute__((always_inline))
#define DSSP_INLINE_LAMBDA __attribute__((always_inline))

namespace dssp {

// Storage types without arithmetic of their own: they only exist in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

using Vector4d = double __attribute__((vector_size(32)));
using Vector8d = double __attribute__((vector_size(64)));
using Vector8f = float __attribute__((vector_size(32)));
using Vector16f = float __attribute__((vector_size(64)));
using Vector8u = uint32_t __attribute__((vector_size(32)));
using Vector8h = uint16_t __attribute__((vector_size(16)));

template <typename To, typename From>
DSSP_INLINE To bit_cast(const From& value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

template <typename Vector, typename Scalar>
DSSP_INLINE Vector load_unaligned(const Scalar* from) {
  Vector value;
  std::memcpy(&value, from, sizeof(Vector));
  return value;
}

DSSP_INLINE Vector8u select(Vector8u condition, Vector8u yes, Vector8u no) {  // condition: all ones or all zeros
  return (condition & yes) | (~condition & no);
}

// Lanes<Scalar>: Vector (of sums), Sum (its element), width, load, store.
template <typename Scalar>
struct Lanes;

template <>
struct Lanes<double> {
  using Sum = double;
  using Vector = Vector4d;
  static constexpr int64_t width = 4;
  static DSSP_INLINE Vector load(const double* from) { return load_unaligned<Vector>(from); }
  static DSSP_INLINE void store(double* to, Vector value) { std::memcpy(to, &value, sizeof(Vector)); }
};

struct SinglePrecisionSums {
  using Sum = float;
  using Vector = Vector8f;
  static constexpr int64_t width = 8;
};

template <>
struct Lanes<float> : SinglePrecisionSums {
  static DSSP_INLINE Vector load(const float* from) { return load_unaligned<Vector>(from); }
  static DSSP_INLINE void store(float* to, Vector value) { std::memcpy(to, &value, sizeof(Vector)); }
};

template <>
struct Lanes<BFloat16> : SinglePrecisionSums {
  static DSSP_INLINE Vector load(const BFloat16* from) {
    return bit_cast<Vector>(__builtin_convertvector(load_unaligned<Vector8h>(from), Vector8u) << 16);
  }
  static DSSP_INLINE void store(BFloat16* to, Vector value) {  // round to nearest even; NaN stays a quiet NaN
    const Vector8u bits = bit_cast<Vector8u>(value);
    const Vector8u rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Vector8u is_nan = (Vector8u)((bits & 0x7fffffffu) > 0x7f800000u);
    const Vector8h result = __builtin_convertvector(select(is_nan, Vector8u{} + 0x7fc0u, rounded), Vector8h);
    std::memcpy(to, &result, sizeof(result));
  }
};

template <>
struct Lanes<Half> : SinglePrecisionSums {
  // The multiply-by-a-power-of-two conversions of Maratyszcza's FP16 library (also c10/util/Half.h), on whole vectors.
  static DSSP_INLINE Vector load(const Half* from) {
    const Vector8u word = __builtin_convertvector(load_unaligned<Vector8h>(from), Vector8u) << 16;
    const Vector8u sign = word & 0x80000000u;
    const Vector8u doubled = word + word;
    const Vector normal = bit_cast<Vector>((doubled >> 4) + (0xe0u << 23)) * 0x1.0p-112f;
    const Vector subnormal = bit_cast<Vector>((doubled >> 17) | (126u << 23)) - 0.5f;
    const Vector8u is_subnormal = (Vector8u)(doubled < (1u << 27));
    return bit_cast<Vector>(sign | select(is_subnormal, bit_cast<Vector8u>(subnormal), bit_cast<Vector8u>(normal)));
  }
  static DSSP_INLINE void store(Half* to, Vector value) {
    const Vector8u word = bit_cast<Vector8u>(value);
    const Vector8u sign = word & 0x80000000u;
    const Vector8u doubled = word + word;
    Vector base = (bit_cast<Vector>(word & 0x7fffffffu) * 0x1.0p+112f) * 0x1.0p-110f;  // overflows to infinity
    Vector8u bias = doubled & 0xff000000u;
    bias = select((Vector8u)(bias < 0x71000000u), Vector8u{} + 0x71000000u, bias);
    base = bit_cast<Vector>((bias >> 1) + 0x07800000u) + base;
    const Vector8u bits = bit_cast<Vector8u>(base);
    const Vector8u magnitude = ((bits >> 13) & 0x7c00u) + (bits & 0x0fffu);
    const Vector8u is_nan = (Vector8u)(doubled > 0xff000000u);
    const Vector8u half = (sign >> 16) | select(is_nan, Vector8u{} + 0x7e00u, magnitude);
    const Vector8h result = __builtin_convertvector(half, Vector8h);
    std::memcpy(to, &result, sizeof(result));
  }
};

// kVectors neighbouring vectors of sums in one register. They are loaded from one place and taken apart again, never put
// together: GCC does that through memory.
template <typename S, int kVectors>
struct Pack;

template <typename S>
struct Pack<S, 1> {
  using Vector = typename Lanes<S>::Vector;
  static DSSP_INLINE Vector load(const S* from) { return Lanes<S>::load(from); }
  static DSSP_INLINE Vector part(Vector value, int) { return value; }
};

template <typename S>
struct Pack<S, 2> {
  using Vector = std::conditional_t<sizeof(S) == sizeof(float), Vector16f, Vector8d>;
  struct Parts {
    typename Lanes<S>::Vector first, second;
  };
  static DSSP_INLINE Vector load(const S* from) { return load_unaligned<Vector>(from); }
  static DSSP_INLINE typename Lanes<S>::Vector part(Vector value, int i) {
    const Parts parts = bit_cast<Parts>(value);
    return i ? parts.second : parts.first;
  }
};

// ---- instruction sets --------------------------------------------------------------------------------------------

#if defined(__x86_64__) && !defined(DSSP_VECTORS_IN_A_PACK)

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

// The best one that this machine has or, as for torch's own kernels, that ATEN_CPU_CAPABILITY (default, avx2) leaves.
inline InstructionSet best_instruction_set() {
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view most = wanted ? wanted : "";
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!has_avx2 || most == "default") return InstructionSet::kBaseline;
  return has_avx512 && most != "avx2" ? InstructionSet::kAvx512 : InstructionSet::kAvx2;
}

inline const InstructionSet kInstructionSet = best_instruction_set();

// Everything in `loop` is inlined here, and so compiled for this instruction set.
template <typename Loop>
__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))) auto with_avx512(const Loop& loop) {
  return loop(std::integral_constant<int, 2>());
}

template <typename Loop>
__attribute__((target("avx2,fma"))) auto with_avx2(const Loop& loop) {
  return loop(std::integral_constant<int, 1>());
}

template <typename Loop>
auto with_baseline(const Loop& loop) {
  return loop(std::integral_constant<int, 1>());
}

// loop(pack), where pack() vectors fill a register. `loop` is a DSSP_INLINE_LAMBDA that calls nothing but DSSP_INLINE.
template <typename Loop>
DSSP_INLINE auto with_best_vectors(const Loop& loop) {
  switch (kInstructionSet) {
    case InstructionSet::kAvx512: return with_avx512(loop);
    case InstructionSet::kAvx2: return with_avx2(loop);
    default: return with_baseline(loop);
  }
}

#else

#ifndef DSSP_VECTORS_IN_A_PACK
#define DSSP_VECTORS_IN_A_PACK 1
#endif

template <typename Loop>
DSSP_INLINE auto with_best_vectors(const Loop& loop) {
  return loop(std::integral_constant<int, DSSP_VECTORS_IN_A_PACK>());
}

#endif

// The last few elements, fewer than a vector: through a padded copy, so that no byte outside the array is touched.
template <typename Scalar>
DSSP_INLINE typename Lanes<Scalar>::Vector load_first(const Scalar* from, int64_t count) {
  Scalar padded[Lanes<Scalar>::width] = {};
  std::memcpy(padded, from, sizeof(Scalar) * count);
  return Lanes<Scalar>::load(padded);
}

template <typename Scalar>
DSSP_INLINE void store_first(Scalar* to, typename Lanes<Scalar>::Vector value, int64_t count) {
  Scalar padded[Lanes<Scalar>::width];
  Lanes<Scalar>::store(padded, value);
  std::memcpy(to, padded, sizeof(Scalar) * count);
}

// Bytes from which on a pass writes its results past the cache: they would not stay in it for their reader anyway, but
// would push out what is still to be read, and every line of them would be read before it is written. Measured with the
// reader: from here on that is never slower, below it costs a fifth where the rest stays in the cache.
constexpr int64_t kStreamedBytes = 4 << 20;

template <bool kStreamed, typename Scalar>
DSSP_INLINE void store(Scalar* to, typename Lanes<Scalar>::Vector value) {
#ifdef __SSE2__
  if (kStreamed && __builtin_expect(reinterpret_cast<uintptr_t>(to) % sizeof(__m128i) == 0, true)) {
    Scalar rounded[Lanes<Scalar>::width];
    Lanes<Scalar>::store(rounded, value);
    for (size_t byte = 0; byte < sizeof(rounded); byte += sizeof(__m128i)) {
      const char* from = reinterpret_cast<const char*>(rounded) + byte;
      _mm_stream_si128(reinterpret_cast<__m128i*>(reinterpret_cast<char*>(to) + byte), load_unaligned<__m128i>(from));
    }
    return;
  }
#endif
  Lanes<Scalar>::store(to, value);
}

DSSP_INLINE void finish_streaming() {  // other threads read what was written
#ifdef __SSE2__
  _mm_sfence();
#endif
}

template <typename Vector>
DSSP_INLINE double sum_of_lanes(Vector value) {
  double sum = 0;
  for (unsigned lane = 0; lane < sizeof(Vector) / sizeof(value[0]); ++lane) sum += value[lane];
  return sum;
}

}  // namespace dssp
