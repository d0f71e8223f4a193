// One collective call of one rank, with its buffers' types erased.
#pragma once

#include <string>
#include <vector>

#include "base/clock.h"
#include "base/signature.h"
#include "base/view.h"
#include "kernels/kernels.h"
#include "plan/plan.h"

namespace roundel::comm {

// Buffers by kind (counts in elements, `parts` per rank):
//   AllReduce      in, out: the same count; out may be in
//   ReduceScatter  in: parts.total(), out: parts.count(rank)
//   AllGather      in: parts.count(rank), out: parts.total()
//   Broadcast      in: read at root, out: written elsewhere; may be the same
//   AllToAll       in, out: parts.total(), equal parts; out must not be in
//   PointToPoint   in: what is sent, or out: where it is received; root is the peer
struct Operation {
  OpKind kind = OpKind::Barrier;
  View in, out;
  ReduceOp op = ReduceOp::Sum;
  double prescale = 1, postscale = 1;
  int root = 0;
  plan::Parts parts = plan::Parts::even(0, 1);
  std::vector<int64_t> shape;  // AllReduce, Broadcast: of the array; only compared between ranks
  std::string name;
  double timeout = 0;  // seconds; 0: ROUNDEL_TIMEOUT

  // Filled in by the communicator.
  uint64_t sequence = 0;
  uint64_t record = 0;  // its number in the flight recorder
  Signature signature;
  Deadline deadline = Deadline::after(0);

  bool sends() const { return kind == OpKind::PointToPoint && in.data != nullptr; }
  size_t count() const;                    // the elements that all ranks agree on
  kernels::Finish finish(int size) const;  // average and postscale, done in the completing pass
  ReduceOp kernel_op() const { return op == ReduceOp::Average ? ReduceOp::Sum : op; }
  std::string describe() const;  // "all-reduce 'fc.weight' (operation 17)"
};

// Checks counts, parts, root and op against `size` and `rank`; throws InvalidArgument saying what was expected and what came.
void validate(const Operation& operation, int rank, int size);

// Everything that must be equal on all ranks, in 16 bytes.
Signature sign(const Operation& operation);

}  // namespace roundel::comm
