// The rules that the plan of one rank must obey by itself, before it is run together with the others'.
#pragma once

#include <string>

#include "plan/plan.h"

namespace roundel::plan {

// What the checker found wrong, in words; thrown inside the checker only.
struct Fault {
  std::string what;
};

// "rank 2, step 7 of 12 (round 3: recv_reduce Out[4, 8) from rank 1)"
std::string describe(int rank, const Plan& plan, size_t step);

inline bool communicates(const Step& step) { return step.action != Action::Fold && step.action != Action::Copy; }
inline bool adds(const Step& step) { return step.action == Action::RecvReduce || step.action == Action::Fold; }
inline bool reduces(Collective collective) {
  return collective == Collective::AllReduce || collective == Collective::ReduceScatter || collective == Collective::Reduce;
}

// How many elements a rank's buffers have; 0 where the collective gives it no such buffer.
struct Extents {
  size_t in = 0, out = 0, scratch = 0;
  size_t of(Buffer buffer) const { return buffer == Buffer::In ? in : buffer == Buffer::Out ? out : scratch; }
};
Extents extents(int rank, const Plan& plan, Collective collective, const Shape& shape);

// Throws Fault for a step that is malformed or outside its buffers, for ranges that are neither equal nor disjoint unless the
// plan is nested, and for steps of one round of which one writes what another uses.
void inspect(int rank, const Plan& plan, const Algorithm& algorithm, const Shape& shape);

}  // namespace roundel::plan
