// Eight elements of any floating type per thread: one or more 16-byte accesses, where the tensor is aligned.
#pragma once

#include <cuda_fp16.h>

#include "kernels/half.h"
#include "kernels/optim_table.h"

namespace roundel::kernels {
inline namespace ROUNDEL_ISA_NAMESPACE {

constexpr int kPack = 8;

template <class T>
struct alignas(16) Pack {
  T element[kPack];
};

template <class T>
__device__ __forceinline__ T* at(const Stream& stream, size_t i) {
  return static_cast<T*>(stream.data) + i;
}

__device__ __forceinline__ float from_half(uint16_t x) { return __half2float(__ushort_as_half(x)); }
__device__ __forceinline__ uint16_t to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ __forceinline__ uint16_t to_half(double x) { return to_half(double_to_float_odd(x)); }
__device__ __forceinline__ uint16_t to_bfloat16(float x) { return float_to_bfloat16(x); }
__device__ __forceinline__ uint16_t to_bfloat16(double x) { return float_to_bfloat16(double_to_float_odd(x)); }

template <class T>
__device__ __forceinline__ T load_one(const Stream& stream, size_t i) {
  switch (stream.dtype) {
    case DType::Float32:
      return static_cast<T>(*at<const float>(stream, i));
    case DType::Float16:
      return static_cast<T>(from_half(*at<const uint16_t>(stream, i)));
    case DType::BFloat16:
      return static_cast<T>(bfloat16_to_float(*at<const uint16_t>(stream, i)));
    default:
      return static_cast<T>(*at<const double>(stream, i));
  }
}

template <class T>
__device__ __forceinline__ void store_one(const Stream& stream, size_t i, T x) {
  switch (stream.dtype) {
    case DType::Float32:
      *at<float>(stream, i) = static_cast<float>(x);
      return;
    case DType::Float16:
      *at<uint16_t>(stream, i) = to_half(x);
      return;
    case DType::BFloat16:
      *at<uint16_t>(stream, i) = to_bfloat16(x);
      return;
    default:
      *at<double>(stream, i) = static_cast<double>(x);
  }
}

template <class T>
__device__ __forceinline__ void load_pack(const Stream& stream, size_t i, T* x) {
  switch (stream.dtype) {
    case DType::Float32: {
      const Pack<float> pack = *reinterpret_cast<const Pack<float>*>(at<const float>(stream, i));
      for (int e = 0; e < kPack; ++e) x[e] = static_cast<T>(pack.element[e]);
      return;
    }
    case DType::Float16: {
      const Pack<uint16_t> pack = *reinterpret_cast<const Pack<uint16_t>*>(at<const uint16_t>(stream, i));
      for (int e = 0; e < kPack; ++e) x[e] = static_cast<T>(from_half(pack.element[e]));
      return;
    }
    case DType::BFloat16: {
      const Pack<uint16_t> pack = *reinterpret_cast<const Pack<uint16_t>*>(at<const uint16_t>(stream, i));
      for (int e = 0; e < kPack; ++e) x[e] = static_cast<T>(bfloat16_to_float(pack.element[e]));
      return;
    }
    default: {
      const Pack<double> pack = *reinterpret_cast<const Pack<double>*>(at<const double>(stream, i));
      for (int e = 0; e < kPack; ++e) x[e] = static_cast<T>(pack.element[e]);
    }
  }
}

template <class T>
__device__ __forceinline__ void store_pack(const Stream& stream, size_t i, const T* x) {
  switch (stream.dtype) {
    case DType::Float32: {
      Pack<float> pack;
      for (int e = 0; e < kPack; ++e) pack.element[e] = static_cast<float>(x[e]);
      *reinterpret_cast<Pack<float>*>(at<float>(stream, i)) = pack;
      return;
    }
    case DType::Float16: {
      Pack<uint16_t> pack;
      for (int e = 0; e < kPack; ++e) pack.element[e] = to_half(x[e]);
      *reinterpret_cast<Pack<uint16_t>*>(at<uint16_t>(stream, i)) = pack;
      return;
    }
    case DType::BFloat16: {
      Pack<uint16_t> pack;
      for (int e = 0; e < kPack; ++e) pack.element[e] = to_bfloat16(x[e]);
      *reinterpret_cast<Pack<uint16_t>*>(at<uint16_t>(stream, i)) = pack;
      return;
    }
    default: {
      Pack<double> pack;
      for (int e = 0; e < kPack; ++e) pack.element[e] = static_cast<double>(x[e]);
      *reinterpret_cast<Pack<double>*>(at<double>(stream, i)) = pack;
    }
  }
}

}  // namespace ROUNDEL_ISA_NAMESPACE
}  // namespace roundel::kernels
