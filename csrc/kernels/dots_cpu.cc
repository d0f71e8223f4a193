// What Adasum does to a pair of vectors: their products with each other, and a combination of them. Compiled once per
// instruction set; see isa.h.
#include "kernels/map.h"
#include "kernels/table.h"

namespace roundel::kernels {
inline namespace ROUNDEL_ISA_NAMESPACE {

namespace {

constexpr size_t kLanes = 8;  // on every path, for the same bits: element i is added to lane i % 8
typedef double Lanes __attribute__((vector_size(kLanes * sizeof(double))));

template <class T>
struct Source {
  typedef T Memory __attribute__((vector_size(kLanes * sizeof(T)), aligned(alignof(T)), may_alias));
};

// One pass over both. A product of two float32 is exact in float64.
template <class T>
void dots_of(double* sums, const T* a, const T* b, size_t count) {
  using Memory = typename Source<T>::Memory;
  Lanes aa = {}, ab = {}, bb = {};
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Lanes x = __builtin_convertvector(*reinterpret_cast<const Memory*>(a + i), Lanes);
    const Lanes y = __builtin_convertvector(*reinterpret_cast<const Memory*>(b + i), Lanes);
    aa += x * x;
    ab += x * y;
    bb += y * y;
  }
  for (size_t lane = 0; i < count; ++i, ++lane) {
    const double x = static_cast<double>(a[i]), y = static_cast<double>(b[i]);
    aa[lane] += x * x;
    ab[lane] += x * y;
    bb[lane] += y * y;
  }
  for (size_t lane = 1; lane < kLanes; ++lane) {
    aa[0] += aa[lane];
    ab[0] += ab[lane];
    bb[0] += bb[lane];
  }
  sums[0] = aa[0];
  sums[1] = ab[0];
  sums[2] = bb[0];
}

// In float64 for float32 too: beside a very small vector, a weight may be out of float32's range where its product is not.
struct Weighted {
  double x, y;
  HOST_DEVICE double operator()(double a, double b) const { return x * a + y * b; }
};

template <class T>
void combine_as(void* out, const void* a, const void* b, size_t count, double x, double y) {
  map<Plain<T>>(count, Weighted{x, y}, static_cast<T*>(out), static_cast<const T*>(a), static_cast<const T*>(b));
}

}  // namespace

void dots(DType dtype, double* sums, const void* a, const void* b, size_t count) {
  if (dtype == DType::Float32) return dots_of(sums, static_cast<const float*>(a), static_cast<const float*>(b), count);
  dots_of(sums, static_cast<const double*>(a), static_cast<const double*>(b), count);
}

void combine(DType dtype, void* out, const void* a, const void* b, size_t count, double x, double y) {
  if (dtype == DType::Float32) return combine_as<float>(out, a, b, count, x, y);
  combine_as<double>(out, a, b, count, x, y);
}

}  // namespace ROUNDEL_ISA_NAMESPACE
}  // namespace roundel::kernels
