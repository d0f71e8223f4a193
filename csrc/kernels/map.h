// The one loop of this folder: out[i] = f(in1[i], in2[i], ...), in vectors, one at a time at the end.
//
// Lanes say how elements become registers: Storage (in memory), Accumulator (the scalar that f computes in), width (elements
// per register), load and store between memory and registers, One (the same for single elements). Lanes of width 1 leave it to
// the compiler to make vectors.
#pragma once

#include <cstddef>

#include "kernels/isa.h"
#include ROUNDEL_ISA_LANES  // lanes_portable.h, lanes_avx2.h or lanes_avx512.h

namespace roundel::kernels {
inline namespace ROUNDEL_ISA_NAMESPACE {

template <class T>
struct Plain {
  using Storage = T;
  using Accumulator = T;
  using One = Plain;
  static constexpr size_t width = 1;
  HOST_DEVICE static T load(const T* from) { return *from; }
  HOST_DEVICE static void store(T* to, T x) { *to = x; }
};

constexpr size_t kBlock = 1024;  // elements between passes: 4 KiB of float32, in the first-level cache beside its inputs

// Not inlined: its callers share one copy. `out` may be one of the inputs. Loader and Storer differ where a type is converted;
// their registers are alike.
template <class Storer, class Loader, class F, class Out, class... In>
[[gnu::noinline]] void convert(size_t count, F f, Out* out, const In*... in) {
  static_assert(Storer::width == Loader::width);
  size_t i = 0;
  if constexpr (Loader::width > 1) {
    ROUNDEL_INDEPENDENT
    for (; i + Loader::width <= count; i += Loader::width) Storer::store(out + i, f(Loader::load(in + i)...));
  }
  ROUNDEL_INDEPENDENT
  for (; i < count; ++i) Storer::One::store(out + i, f(Loader::One::load(in + i)...));
}

template <class Lanes, class F, class Out, class... In>
void map(size_t count, F f, Out* out, const In*... in) {
  convert<Lanes, Lanes>(count, f, out, in...);
}

}  // namespace ROUNDEL_ISA_NAMESPACE
}  // namespace roundel::kernels
