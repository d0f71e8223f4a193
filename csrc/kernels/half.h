// float16 and bfloat16 as bits, to and from float32: round to nearest even, denormals and infinities exact, a NaN stays a NaN.
//
// The bits are those of the instructions (VCVTPH2PS, VCVTPS2PH; VCVTNEPS2BF16 but with denormals kept), NaN payloads included,
// so that a path without them gives the same result. No branches: a compiler makes vectors of the loops around these functions.
// They hold with flush-to-zero on, too: no denormal float32 is ever an operand that matters.
#pragma once

#include <cstdint>

#include "kernels/isa.h"

namespace roundel::kernels {
inline namespace ROUNDEL_ISA_NAMESPACE {

HOST_DEVICE uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
HOST_DEVICE float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

// `condition ? yes : no` that no compiler turns into a jump, which would cost it the vectors.
HOST_DEVICE uint32_t select(bool condition, uint32_t yes, uint32_t no) {
  return no ^ ((yes ^ no) & -static_cast<uint32_t>(condition));
}

HOST_DEVICE float float16_to_float(uint16_t half) {
  constexpr uint32_t rebias = (127 - 15) << 23;
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t shifted = (half & 0x7fffu) << 13;  // exponent and mantissa in float32's places
  const uint32_t quiet = select((shifted & 0x007fffffu) != 0, 0x00400000u, 0);
  const uint32_t special = (shifted + 2 * rebias) | quiet;  // infinity or NaN
  // A denormal is 0.m * 2^-14: give it the hidden bit 1, then take it away again.
  const uint32_t denormal = bits_of(float_of(shifted + rebias + (1u << 23)) - float_of(rebias + (1u << 23)));
  const int32_t order = static_cast<int32_t>(shifted);  // signed: SSE2 compares no unsigned numbers
  const uint32_t finite = select(order < (1 << 23), denormal, shifted + rebias);
  return float_of(sign | select(order >= (31 << 23), special, finite));
}

HOST_DEVICE uint16_t float_to_float16(float x) {
  const uint32_t sign = bits_of(x) & 0x80000000u;
  const uint32_t magnitude = bits_of(x) ^ sign;
  const int32_t order = static_cast<int32_t>(magnitude);
  const uint32_t special = select(order > 0x7f800000, 0x7e00u | (magnitude >> 13 & 0x3ffu), 0x7c00u);
  // The sum with 0.5 has its last bit at 2^-24, as a denormal float16 has: the addition rounds.
  const uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (magnitude - ((127u - 15) << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t finite = select(order < ((127 - 14) << 23), denormal, normal);
  return static_cast<uint16_t>(sign >> 16 | select(order >= ((127 + 16) << 23), special, finite));
}

HOST_DEVICE float bfloat16_to_float(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }

// The 16 bits in the low half of a Bits; for a float, or for a vector of floats with Bits the vector of as many uint32_t.
template <class Bits, class Float>
HOST_DEVICE Bits bfloat16_bits(Float x) {
  const Bits bits = __builtin_bit_cast(Bits, x);
  const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Bits quiet = bits | 0x00400000u;
  return (x != x ? quiet : rounded) >> 16;
}

HOST_DEVICE uint16_t float_to_bfloat16(float x) { return static_cast<uint16_t>(bfloat16_bits<uint32_t>(x)); }

// float64 to float32 rounded to odd: cut off, and the last bit set if anything was lost. Rounding that to 16 bits gives what
// rounding the float64 at once would give; nearest even twice would not. Boldo & Melquiond, "Emulation of FMA and correctly
// rounded sums: proved algorithms using rounding to odd", IEEE Trans. Computers 2008.
HOST_DEVICE float double_to_float_odd(double x) {
  const float nearest = static_cast<float>(x);
  const double back = static_cast<double>(nearest);
  const bool away = ((back > x) & (x > 0)) | ((back < x) & (x < 0));
  const uint32_t cut = bits_of(nearest) - static_cast<uint32_t>(away);
  return float_of(cut | static_cast<uint32_t>(back != x));  // for a NaN this sets a payload bit that no 16-bit type keeps
}

}  // namespace ROUNDEL_ISA_NAMESPACE
}  // namespace roundel::kernels
