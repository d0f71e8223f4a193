// Inside kernels/ and its tests: the functions of one instruction set, and which sets this processor runs.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/optim_table.h"

namespace roundel::kernels {

// Arguments are valid when they come here, dispatch.cc has looked: n >= 1, no Average, divisor not 0, cast of floating types,
// dots and combine of float32 or float64.
struct Table {
  const char* isa;
  void (*reduce)(ReduceOp op, DType dtype, void* out, const void* const* in, size_t n, size_t count, const Finish& finish);
  void (*cast)(DType to, void* out, DType from, const void* in, size_t count);
  void (*dots)(DType dtype, double* sums, const void* a, const void* b, size_t count);  // a.a, a.b, b.b
  void (*combine)(DType dtype, void* out, const void* a, const void* b, size_t count, double x, double y);
  // Optimizers (optim_cpu.cc): one step of a piece; of LAMB and LARS first the squares of two norms; the sum of squares.
  void (*update)(RuleId rule, RuleOptions options, const Piece& piece);
  void (*measure)(RuleId rule, const Piece& piece, double* sums);
  double (*squares)(DType dtype, const void* data, size_t count);
};

// The tables of this build that this processor and operating system run, best first, "portable" last.
// Defined in isa_x86.cc or isa_other.cc.
std::vector<const Table*> tables();

// Null when there is none of that name here.
const Table* table_for(const std::string& isa);

// What ROUNDEL_ISA asks for; the best when it is empty. Throws InvalidArgument, naming what there is.
const Table& choose(const std::string& setting);

// The choice of this process.
const Table& chosen();

}  // namespace roundel::kernels
