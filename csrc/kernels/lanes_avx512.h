// 16-bit elements sixteen at a time, by AVX-512; the rest of a buffer (One) one at a time.
#pragma once

#include <immintrin.h>

#include "kernels/arith.h"
#include "kernels/lane.h"

namespace roundel::kernels {
inline namespace ROUNDEL_ISA_NAMESPACE {

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

struct FloatLanes {
  using Storage = uint16_t;
  using Accumulator = float;
  static constexpr size_t width = 16;
  HOST_DEVICE static Floats load(const float* from) { return _mm512_loadu_ps(from); }
  HOST_DEVICE static void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
};

struct Float16 : FloatLanes {
  using FloatLanes::load, FloatLanes::store;
  HOST_DEVICE static Floats load(const uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  HOST_DEVICE static void store(uint16_t* to, Floats x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  struct One : FloatLane {
    using FloatLane::load, FloatLane::store;
    HOST_DEVICE static float load(const uint16_t* from) { return _cvtsh_ss(*from); }
    HOST_DEVICE static void store(uint16_t* to, float x) { *to = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
  };
};

struct BFloat16 : FloatLanes {
  using FloatLanes::load, FloatLanes::store;
  HOST_DEVICE static Floats load(const uint16_t* from) {
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  }
  HOST_DEVICE static void store(uint16_t* to, Floats x) {
    const __m512i words = reinterpret_cast<__m512i>(bfloat16_bits<Words>(x));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(words));
  }
  using One = BFloat16Lane;
};

// For the optimizers (arith.h).
template <>
struct Math<Floats> {
  using Scalar = float;
  using Bits = Words;
  HOST_DEVICE static Floats splat(float x) { return _mm512_set1_ps(x); }
  HOST_DEVICE static Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  HOST_DEVICE static Floats root(Floats x) { return _mm512_sqrt_ps(x); }
  HOST_DEVICE static Floats root_over(Floats x, float divisor) { return root_over_by_fusing(x, divisor); }
  HOST_DEVICE static Floats truncate(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC); }
};

// For sums of squares: float64 from narrower elements.
using Doubles = __m512d;
HOST_DEVICE Doubles fused(Doubles a, Doubles b, Doubles c) { return _mm512_fmadd_pd(a, b, c); }

struct SingleDoubles {
  using Storage = float;
  using One = FloatLane;
  HOST_DEVICE static Doubles load_doubles(const float* from) { return _mm512_cvtps_pd(_mm256_loadu_ps(from)); }
};
struct Float16Doubles {
  using Storage = uint16_t;
  using One = Float16::One;
  HOST_DEVICE static Doubles load_doubles(const uint16_t* from) {
    return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
};
struct BFloat16Doubles {
  using Storage = uint16_t;
  using One = BFloat16Lane;
  HOST_DEVICE static Doubles load_doubles(const uint16_t* from) {
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)));
  }
};

using Float16Register = Float16;
using BFloat16Register = BFloat16;

}  // namespace ROUNDEL_ISA_NAMESPACE
}  // namespace roundel::kernels
