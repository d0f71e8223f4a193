// Conversions between the floating types. Compiled once per instruction set; see isa.h.
#include <cstring>

#include "kernels/map.h"
#include "kernels/table.h"

namespace roundel::kernels {
inline namespace ROUNDEL_ISA_NAMESPACE {

namespace {

struct Same {
  template <class T>
  HOST_DEVICE T operator()(T x) const {
    return x;
  }
};

template <class Lanes>
struct Half {  // a 16-bit type against the others
  static void to_float(float* out, const void* in, size_t count) {
    map<Lanes>(count, Same{}, out, static_cast<const uint16_t*>(in));
  }
  static void from_float(void* out, const float* in, size_t count) {
    map<Lanes>(count, Same{}, static_cast<uint16_t*>(out), in);
  }
  static void to_double(double* out, const void* in, size_t count) {
    alignas(64) float block[kBlock];
    for (size_t at = 0; at < count; at += kBlock) {
      const size_t length = count - at < kBlock ? count - at : kBlock;
      to_float(block, static_cast<const uint16_t*>(in) + at, length);
      for (size_t i = 0; i < length; ++i) out[at + i] = block[i];
    }
  }
  static void from_double(void* out, const double* in, size_t count) {
    alignas(64) float block[kBlock];
    for (size_t at = 0; at < count; at += kBlock) {
      const size_t length = count - at < kBlock ? count - at : kBlock;
      for (size_t i = 0; i < length; ++i) block[i] = double_to_float_odd(in[at + i]);
      from_float(static_cast<uint16_t*>(out) + at, block, length);
    }
  }
  template <class Other>
  static void from_half(void* out, const void* in, size_t count) {
    convert<Lanes, Other>(count, Same{}, static_cast<uint16_t*>(out), static_cast<const uint16_t*>(in));
  }
};

template <class Lanes, class Other>
void cast_to_half(void* out, DType from, const void* in, size_t count) {
  if (from == DType::Float32) return Half<Lanes>::from_float(out, static_cast<const float*>(in), count);
  if (from == DType::Float64) return Half<Lanes>::from_double(out, static_cast<const double*>(in), count);
  Half<Lanes>::template from_half<Other>(out, in, count);
}

void cast_to_float(float* out, DType from, const void* in, size_t count) {
  if (from == DType::Float16) return Half<Float16>::to_float(out, in, count);
  if (from == DType::BFloat16) return Half<BFloat16>::to_float(out, in, count);
  auto* wide = static_cast<const double*>(in);
  for (size_t i = 0; i < count; ++i) out[i] = static_cast<float>(wide[i]);
}

void cast_to_double(double* out, DType from, const void* in, size_t count) {
  if (from == DType::Float16) return Half<Float16>::to_double(out, in, count);
  if (from == DType::BFloat16) return Half<BFloat16>::to_double(out, in, count);
  auto* narrow = static_cast<const float*>(in);
  for (size_t i = 0; i < count; ++i) out[i] = narrow[i];
}

}  // namespace

void cast(DType to, void* out, DType from, const void* in, size_t count) {
  if (to == from) {
    if (out != in) std::memcpy(out, in, count * (to == DType::Float64 ? 8 : to == DType::Float32 ? 4 : 2));
    return;
  }
  if (to == DType::Float16) return cast_to_half<Float16, BFloat16>(out, from, in, count);
  if (to == DType::BFloat16) return cast_to_half<BFloat16, Float16>(out, from, in, count);
  if (to == DType::Float32) return cast_to_float(static_cast<float*>(out), from, in, count);
  cast_to_double(static_cast<double*>(out), from, in, count);
}

}  // namespace ROUNDEL_ISA_NAMESPACE
}  // namespace roundel::kernels
