// Stochastic rounding to 16 bits: up with the probability of what is cut off, so that the mean of many roundings is exact.
//
// The random bits are a hash of (seed, step, tensor, stream, index of the element), so they depend neither on threads nor on
// the instruction set, and a run repeats itself. What comes out is still a float32, one that the 16-bit type has.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "kernels/arith.h"

namespace roundel::kernels {
inline namespace ROUNDEL_ISA_NAMESPACE {

// Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014: the finalizer of SplitMix64.
HOST_DEVICE uint64_t mixed64(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The key of one tensor in one step.
HOST_DEVICE uint64_t random_key(uint64_t seed, uint64_t step, uint64_t tensor) {
  return mixed64(mixed64(mixed64(seed) ^ step) ^ tensor);
}

// A permutation of 32 bits with low bias (C. Wellons' search with prospector, public domain), for one number or a register.
template <class Bits>
HOST_DEVICE Bits mixed32(Bits x) {
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ (x >> 15)) * 0xd35a2d97u;
  return x ^ (x >> 15);
}

// 32 random bits for each of the elements at `index`, whose upper halves are in the key (see random_key_at).
template <class Bits>
HOST_DEVICE Bits random_bits(uint64_t key, Bits index) {
  return mixed32(index ^ static_cast<uint32_t>(key)) ^ static_cast<uint32_t>(key >> 32);
}

// Of these, what one stream of the element uses: bits enough in the lower half.
template <class Bits>
HOST_DEVICE Bits random_bits_of(Bits random, uint32_t stream) {
  const Bits mixed = (random ^ (stream * 0x9e3779b9u)) * 0x21f0aaadu;
  return mixed ^ (mixed >> 16);
}

// The key for elements from `index` on, for as long as the upper half of their index stays.
HOST_DEVICE uint64_t random_key_at(uint64_t key, uint64_t index) { return mixed64(key ^ (index >> 32)); }

template <class Bits>
HOST_DEVICE Bits chosen_bits(Bits mask, Bits yes, Bits no) {  // mask: all ones or all zeros
  return no ^ ((yes ^ no) & mask);
}

template <class To, class From>
HOST_DEVICE To bits_as(From from) {
  return __builtin_bit_cast(To, from);
}

// All ones where a < b, both below 2^31.
template <class Bits>
HOST_DEVICE Bits below(Bits a, uint32_t b) {
  return ~(((a - b) >> 31) - 1u);
}

template <class T>
HOST_DEVICE T rounded_to_bfloat16(T x, typename Math<T>::Bits random) {
  using Bits = typename Math<T>::Bits;
  const Bits bits = bits_as<Bits>(x);
  const Bits finite = below(bits & 0x7fffffffu, 0x7f800000u);
  return bits_as<T>(chosen_bits(finite, (bits + (random & 0xffffu)) & 0xffff0000u, bits));
}

// Below 2^-14 the spacing is 2^-24; there the sum is made in units of that. Beyond the largest float16 nearest rounding
// decides.
template <class T>
HOST_DEVICE T rounded_to_float16(T x, typename Math<T>::Bits random) {
  using Bits = typename Math<T>::Bits;
  const Bits bits = bits_as<Bits>(x), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  const Bits normal = (magnitude + (random & 0x1fffu)) & 0xffffe000u;
  const Bits small = below(magnitude, 0x38800000u), ordinary = below(magnitude, 0x477fe000u);
  const T fraction = bits_as<T>(((random & 0x1fffu) << 10) | 0x3f800000u) - 1.0f;
  const T units = bits_as<T>(magnitude & small) * 16777216.0f;
  const Bits denormal = bits_as<Bits>(Math<T>::truncate(units + fraction) * (1 / 16777216.0f));
  return bits_as<T>(sign | chosen_bits(small, denormal, chosen_bits(ordinary, normal, magnitude)));
}

template <class T>
HOST_DEVICE T rounded_by_chance(T x, DType dtype, typename Math<T>::Bits random) {
  return dtype == DType::Float16 ? rounded_to_float16(x, random) : rounded_to_bfloat16(x, random);
}

}  // namespace ROUNDEL_ISA_NAMESPACE
}  // namespace roundel::kernels
