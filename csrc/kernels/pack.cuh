// A pack of N elements of any floating type per thread: one or more 16-byte accesses where the tensor is aligned, as many
// single ones where it is not or where it ends.
#pragma once

#include <cuda_fp16.h>

#include "kernels/half.h"
#include "kernels/optim_table.h"

namespace roundel::kernels {
inline namespace ROUNDEL_ISA_NAMESPACE {

template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T element[N];
};

// Where a thread's pack is: its first element, how many of it there are, and whether it can be accessed as a whole.
struct Place {
  size_t first;
  int count;
  bool whole;
};

__device__ __forceinline__ float from_half(uint16_t x) { return __half2float(__ushort_as_half(x)); }
__device__ __forceinline__ uint16_t to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ __forceinline__ uint16_t to_half(double x) { return to_half(double_to_float_odd(x)); }
__device__ __forceinline__ uint16_t to_bfloat16(float x) { return float_to_bfloat16(x); }
__device__ __forceinline__ uint16_t to_bfloat16(double x) { return float_to_bfloat16(double_to_float_odd(x)); }

// What is not there is 0.
template <class T, int N>
__device__ __forceinline__ Pack<T, N> fetch(const Stream& stream, const Place& place) {
  const T* from = static_cast<const T*>(stream.data) + place.first;
  if (place.whole) return *reinterpret_cast<const Pack<T, N>*>(from);
  Pack<T, N> pack;
#pragma unroll
  for (int e = 0; e < N; ++e) pack.element[e] = e < place.count ? from[e] : T(0);
  return pack;
}

template <class T, int N>
__device__ __forceinline__ void put(const Stream& stream, const Place& place, const Pack<T, N>& pack) {
  T* to = static_cast<T*>(stream.data) + place.first;
  if (place.whole) {
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
    return;
  }
#pragma unroll
  for (int e = 0; e < N; ++e)
    if (e < place.count) to[e] = pack.element[e];
}

template <int N, class T>
__device__ __forceinline__ void load(const Stream& stream, const Place& place, T (&x)[N]) {
  switch (stream.dtype) {
    case DType::Float32: {
      const auto pack = fetch<float, N>(stream, place);
      for (int e = 0; e < N; ++e) x[e] = static_cast<T>(pack.element[e]);
      return;
    }
    case DType::Float16: {
      const auto pack = fetch<uint16_t, N>(stream, place);
      for (int e = 0; e < N; ++e) x[e] = static_cast<T>(from_half(pack.element[e]));
      return;
    }
    case DType::BFloat16: {
      const auto pack = fetch<uint16_t, N>(stream, place);
      for (int e = 0; e < N; ++e) x[e] = static_cast<T>(bfloat16_to_float(pack.element[e]));
      return;
    }
    default: {
      const auto pack = fetch<double, N>(stream, place);
      for (int e = 0; e < N; ++e) x[e] = static_cast<T>(pack.element[e]);
    }
  }
}

template <int N, class T>
__device__ __forceinline__ void store(const Stream& stream, const Place& place, const T (&x)[N]) {
  switch (stream.dtype) {
    case DType::Float32: {
      Pack<float, N> pack;
      for (int e = 0; e < N; ++e) pack.element[e] = static_cast<float>(x[e]);
      return put(stream, place, pack);
    }
    case DType::Float16: {
      Pack<uint16_t, N> pack;
      for (int e = 0; e < N; ++e) pack.element[e] = to_half(x[e]);
      return put(stream, place, pack);
    }
    case DType::BFloat16: {
      Pack<uint16_t, N> pack;
      for (int e = 0; e < N; ++e) pack.element[e] = to_bfloat16(x[e]);
      return put(stream, place, pack);
    }
    default: {
      Pack<double, N> pack;
      for (int e = 0; e < N; ++e) pack.element[e] = static_cast<double>(x[e]);
      put(stream, place, pack);
    }
  }
}

}  // namespace ROUNDEL_ISA_NAMESPACE
}  // namespace roundel::kernels
