// 16-bit elements one at a time, by half.h: all of the portable path, and the end of a buffer on the others.
#pragma once

#include <cstddef>

#include "kernels/half.h"

namespace roundel::kernels {
inline namespace ROUNDEL_ISA_NAMESPACE {

struct FloatLane {
  using Storage = uint16_t;
  using Accumulator = float;
  static constexpr size_t width = 1;
  HOST_DEVICE static float load(const float* from) { return *from; }
  HOST_DEVICE static void store(float* to, float x) { *to = x; }
};

struct Float16Lane : FloatLane {
  using One = Float16Lane;
  using FloatLane::load, FloatLane::store;
  HOST_DEVICE static float load(const uint16_t* from) { return float16_to_float(*from); }
  HOST_DEVICE static void store(uint16_t* to, float x) { *to = float_to_float16(x); }
};

struct BFloat16Lane : FloatLane {
  using One = BFloat16Lane;
  using FloatLane::load, FloatLane::store;
  HOST_DEVICE static float load(const uint16_t* from) { return bfloat16_to_float(*from); }
  HOST_DEVICE static void store(uint16_t* to, float x) { *to = float_to_bfloat16(x); }
};

}  // namespace ROUNDEL_ISA_NAMESPACE
}  // namespace roundel::kernels
