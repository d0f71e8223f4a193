// The public functions: look at the arguments, then hand over to the table of the chosen instruction set.
#include "base/env.h"
#include "base/error.h"
#include "kernels/kernels.h"
#include "kernels/table.h"

namespace roundel::kernels {

const Table& chosen() {
  static const Table& table = choose(env::text("ROUNDEL_ISA"));
  return table;
}

const Table* table_for(const std::string& isa) {
  for (const Table* table : tables())
    if (isa == table->isa) return table;
  return nullptr;
}

const Table& choose(const std::string& setting) {
  if (setting.empty()) return *tables().front();
  if (const Table* table = table_for(setting)) return *table;
  std::string available;
  for (const Table* table : tables()) available += (available.empty() ? "" : ", ") + std::string(table->isa);
  throw InvalidArgument(format("ROUNDEL_ISA=%s: this build on this processor has %s", setting.c_str(), available.c_str()));
}

void reduce(ReduceOp op, DType dtype, void* out, std::span<const void* const> in, size_t count, Finish finish) {
  if (static_cast<int>(dtype) >= kDTypes) throw InvalidArgument("kernels: reduce of an unknown dtype");
  if (op == ReduceOp::Average || static_cast<int>(op) >= kReduceOps)
    throw InvalidArgument("kernels: reduce takes sum, min, max or product; an average is a sum and a Finish");
  if (in.empty()) throw InvalidArgument("kernels: reduce needs an input");
  if (finish.divisor == 0) throw InvalidArgument("kernels: reduce with divisor 0");
  const Table& table = chosen();
  if (count > 0) table.reduce(op, dtype, out, in.data(), in.size(), count, finish);
}

void scale(DType dtype, void* out, const void* in, size_t count, double factor) {
  reduce(ReduceOp::Sum, dtype, out, {&in, 1}, count, Finish{factor, 1});
}

void cast(DType to, void* out, DType from, const void* in, size_t count) {
  if (!is_floating(to) || !is_floating(from)) throw InvalidArgument("kernels: cast is between floating types only");
  const Table& table = chosen();
  if (count > 0) table.cast(to, out, from, in, count);
}

Dots dots(DType dtype, const void* a, const void* b, size_t count) {
  if (dtype != DType::Float32 && dtype != DType::Float64) throw InvalidArgument("kernels: dots are of float32 or float64");
  double sums[3] = {};
  const Table& table = chosen();
  if (count > 0) table.dots(dtype, sums, a, b, count);
  return {sums[0], sums[1], sums[2]};
}

void combine(DType dtype, void* out, const void* a, const void* b, size_t count, double x, double y) {
  if (dtype != DType::Float32 && dtype != DType::Float64) throw InvalidArgument("kernels: combine is of float32 or float64");
  const Table& table = chosen();
  if (count > 0) table.combine(dtype, out, a, b, count, x, y);
}

const char* isa() { return chosen().isa; }

}  // namespace roundel::kernels
