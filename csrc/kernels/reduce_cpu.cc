// The reduction, and the table of this instruction set. Compiled once per instruction set; see isa.h.
//
// The inputs are folded in rank order, a few at a time: a pass of up to four operands keeps the partial results of a block in
// the first-level cache, the last pass writes `out`. So every input is read from memory once and every output written once.
#include <cstring>

#include "kernels/map.h"
#include "kernels/ops.h"
#include "kernels/table.h"

namespace roundel::kernels {
inline namespace ROUNDEL_ISA_NAMESPACE {

void cast(DType to, void* out, DType from, const void* in, size_t count);          // cast_cpu.cc
void dots(DType dtype, double* sums, const void* a, const void* b, size_t count);  // dots_cpu.cc
void combine(DType dtype, void* out, const void* a, const void* b, size_t count, double x, double y);
void update(RuleId rule, RuleOptions options, const Piece& piece);  // optim_cpu.cc
void measure(RuleId rule, const Piece& piece, double* sums);
double squares(DType dtype, const void* data, size_t count);

namespace {

// Folds `first` and, from element `at` on, the n inputs at `in` into `out`; by way of `block` when one pass does not do.
template <class Lanes, class Op, class Out, class First>
void fold(size_t count, Out* out, typename Lanes::Accumulator* block, const First* first,
          const typename Lanes::Storage* const* in, size_t n, size_t at) {
  if (n == 1) return map<Lanes>(count, Fold<Op>{}, out, first, in[0] + at);
  if (n == 3) return map<Lanes>(count, Fold<Op>{}, out, first, in[0] + at, in[1] + at, in[2] + at);
  const size_t taken = n == 2 ? 1 : 3;
  fold<Lanes, Op>(count, block, block, first, in, taken, at);
  fold<Lanes, Op>(count, out, block, block, in + taken, n - taken, at);
}

template <class Lanes, class Op>
void reduce_plain(typename Lanes::Storage* out, const typename Lanes::Storage* const* in, size_t n, size_t count) {
  if (n == 1) {
    if (out != in[0]) std::memcpy(out, in[0], count * sizeof(*out));
    return;
  }
  alignas(64) typename Lanes::Accumulator block[kBlock];
  const size_t step = n == 2 || n == 4 ? count : kBlock;  // one pass does: no block
  for (size_t at = 0; at < count; at += step) {
    const size_t length = count - at < step ? count - at : step;
    fold<Lanes, Op>(length, out + at, block, in[0] + at, in + 1, n - 1, at);
  }
}

// As above, with `finish` applied to the block on its way to `out`.
template <class Lanes, class Op, class Finisher>
void reduce_finished(typename Lanes::Storage* out, const typename Lanes::Storage* const* in, size_t n, size_t count,
                     Finisher finish) {
  if (n == 1) return map<Lanes>(count, finish, out, in[0]);
  alignas(64) typename Lanes::Accumulator block[kBlock];
  for (size_t at = 0; at < count; at += kBlock) {
    const size_t length = count - at < kBlock ? count - at : kBlock;
    fold<Lanes, Op>(length, block, block, in[0] + at, in + 1, n - 1, at);
    map<Lanes>(length, finish, out + at, block);
  }
}

template <class Lanes, class Op>
void reduce_floating(void* out, const void* const* in, size_t n, size_t count, const Finish& finish) {
  using Storage = typename Lanes::Storage;
  using Scalar = typename Lanes::Accumulator;  // the factor's type, too
  auto* to = static_cast<Storage*>(out);
  auto* from = reinterpret_cast<const Storage* const*>(in);
  const ScaledSum<Scalar> scaled{static_cast<Scalar>(finish.scale)};
  if (finish.scale == 1) return reduce_plain<Lanes, Op>(to, from, n, count);
  if constexpr (std::is_same_v<Op, Sum>)  // an average of two, the commonest of all: scaled in the registers
    if (n == 2) return map<Lanes>(count, scaled, to, from[0], from[1]);
  reduce_finished<Lanes, Op>(to, from, n, count, scaled);
}

template <class T, class Op>
void reduce_integer(void* out, const void* const* in, size_t n, size_t count, const Finish& finish) {
  auto* to = static_cast<T*>(out);
  auto* from = reinterpret_cast<const T* const*>(in);
  if (finish.scale == 1 && finish.divisor == 1) return reduce_plain<Plain<T>, Op>(to, from, n, count);
  if constexpr (sizeof(T) == 8)
    if (finish.scale == 1) return reduce_finished<Plain<T>, Op>(to, from, n, count, Quotient{finish.divisor});
  reduce_finished<Plain<T>, Op>(to, from, n, count, ScaledQuotient<T>{static_cast<double>(finish.divisor), finish.scale});
}

template <class Op>
void reduce_as(DType dtype, void* out, const void* const* in, size_t n, size_t count, const Finish& finish) {
  switch (dtype) {
    case DType::Float32:
      return reduce_floating<Plain<float>, Op>(out, in, n, count, finish);
    case DType::Float64:
      return reduce_floating<Plain<double>, Op>(out, in, n, count, finish);
    case DType::Float16:
      return reduce_floating<Float16, Op>(out, in, n, count, finish);
    case DType::BFloat16:
      return reduce_floating<BFloat16, Op>(out, in, n, count, finish);
    case DType::Int8:
      return reduce_integer<int8_t, Op>(out, in, n, count, finish);
    case DType::Int16:
      return reduce_integer<int16_t, Op>(out, in, n, count, finish);
    case DType::Int32:
      return reduce_integer<int32_t, Op>(out, in, n, count, finish);
    case DType::Int64:
      return reduce_integer<int64_t, Op>(out, in, n, count, finish);
    case DType::UInt8:
      return reduce_integer<uint8_t, Op>(out, in, n, count, finish);
    case DType::Bool:
      return;  // below
  }
}

void reduce_bool(ReduceOp op, void* out, const void* const* in, size_t n, size_t count) {
  auto* to = static_cast<uint8_t*>(out);
  auto* from = reinterpret_cast<const uint8_t* const*>(in);
  const bool either = op == ReduceOp::Sum || op == ReduceOp::Max;
  return either ? reduce_plain<Plain<uint8_t>, Or>(to, from, n, count) : reduce_plain<Plain<uint8_t>, And>(to, from, n, count);
}

void reduce(ReduceOp op, DType dtype, void* out, const void* const* in, size_t n, size_t count, const Finish& finish) {
  if (dtype == DType::Bool) return reduce_bool(op, out, in, n, count);
  switch (op) {
    case ReduceOp::Sum:
      return reduce_as<Sum>(dtype, out, in, n, count, finish);
    case ReduceOp::Min:
      return reduce_as<Min>(dtype, out, in, n, count, finish);
    case ReduceOp::Max:
      return reduce_as<Max>(dtype, out, in, n, count, finish);
    case ReduceOp::Product:
      return reduce_as<Product>(dtype, out, in, n, count, finish);
    case ReduceOp::Average:
      return;  // refused by dispatch.cc
  }
}

}  // namespace

#define ROUNDEL_TEXT_OF(macro) #macro
#define ROUNDEL_TEXT(macro) ROUNDEL_TEXT_OF(macro)

extern const Table table;
const Table table{ROUNDEL_TEXT(ROUNDEL_ISA_NAMESPACE), reduce, cast, dots, combine, update, measure, squares};

}  // namespace ROUNDEL_ISA_NAMESPACE
}  // namespace roundel::kernels
