// Elements of any floating type in memory as registers of float32, or as single float64: the type is looked at for every
// register, a jump that is always predicted and costs far less than the memory access beside it.
#pragma once

#include "kernels/half.h"
#include "kernels/map.h"
#include "kernels/optim_table.h"

namespace roundel::kernels {
inline namespace ROUNDEL_ISA_NAMESPACE {

constexpr size_t kWidth = sizeof(Floats) / sizeof(float);
typedef float UnalignedFloats __attribute__((vector_size(sizeof(Floats)), aligned(4), may_alias));

template <class T>
T* at(const Stream& stream, size_t i) {
  return static_cast<T*>(stream.data) + i;
}

[[gnu::noinline]] inline Floats load_doubles(const double* from) {  // float64 beside float32: rare
  Floats x;
  for (size_t lane = 0; lane < kWidth; ++lane) x[lane] = static_cast<float>(from[lane]);
  return x;
}

[[gnu::noinline]] inline void store_doubles(double* to, Floats x) {
  for (size_t lane = 0; lane < kWidth; ++lane) to[lane] = static_cast<double>(x[lane]);
}

HOST_DEVICE Floats load_float(const Stream& stream, size_t i) {
  return *reinterpret_cast<const UnalignedFloats*>(at<float>(stream, i));
}
HOST_DEVICE Floats load_bfloat16(const Stream& stream, size_t i) {
  return BFloat16Register::load(at<const uint16_t>(stream, i));
}
HOST_DEVICE void store_float(const Stream& stream, size_t i, Floats x) {
  *reinterpret_cast<UnalignedFloats*>(at<float>(stream, i)) = x;
}
HOST_DEVICE void store_bfloat16(const Stream& stream, size_t i, Floats x) {
  BFloat16Register::store(at<uint16_t>(stream, i), x);
}

// A register of elements from i on.
template <class T>
HOST_DEVICE T load(const Stream& stream, size_t i);

template <>
HOST_DEVICE Floats load<Floats>(const Stream& stream, size_t i) {
  switch (stream.dtype) {
    case DType::Float32:
      return load_float(stream, i);
    case DType::Float16:
      return Float16Register::load(at<const uint16_t>(stream, i));
    case DType::BFloat16:
      return load_bfloat16(stream, i);
    default:
      return load_doubles(at<const double>(stream, i));
  }
}

template <>
HOST_DEVICE double load<double>(const Stream& stream, size_t i) {
  switch (stream.dtype) {
    case DType::Float32:
      return static_cast<double>(*at<const float>(stream, i));
    case DType::Float16:
      return static_cast<double>(Float16Lane::load(at<const uint16_t>(stream, i)));
    case DType::BFloat16:
      return static_cast<double>(BFloat16Lane::load(at<const uint16_t>(stream, i)));
    default:
      return *at<const double>(stream, i);
  }
}

HOST_DEVICE void store(const Stream& stream, size_t i, Floats x) {
  switch (stream.dtype) {
    case DType::Float32:
      return store_float(stream, i, x);
    case DType::Float16:
      return Float16Register::store(at<uint16_t>(stream, i), x);
    case DType::BFloat16:
      return store_bfloat16(stream, i, x);
    default:
      return store_doubles(at<double>(stream, i), x);
  }
}

HOST_DEVICE void store(const Stream& stream, size_t i, double x) {
  switch (stream.dtype) {
    case DType::Float32:
      *at<float>(stream, i) = static_cast<float>(x);
      return;
    case DType::Float16:
      return Float16Lane::store(at<uint16_t>(stream, i), double_to_float_odd(x));
    case DType::BFloat16:
      return BFloat16Lane::store(at<uint16_t>(stream, i), double_to_float_odd(x));
    default:
      *at<double>(stream, i) = x;
  }
}

}  // namespace ROUNDEL_ISA_NAMESPACE
}  // namespace roundel::kernels
