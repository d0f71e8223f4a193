// The rules that the plan of one rank must obey by itself, before it is run together with the others'.
#pragma once

#include <string>
#include <vector>

#include "plan/plan.h"

namespace roundel::plan {

// What the checker found wrong, in words; thrown inside the checker only.
struct Fault {
  std::string what;
};

// "rank 2, step 7 of 12 (round 3: recv_reduce Out[4, 8) from rank 1)"
std::string describe(int rank, const Plan& plan, size_t step);

inline bool communicates(const Step& step) { return step.action != Action::Fold && step.action != Action::Copy; }
inline bool reduces(Collective collective) {
  return collective == Collective::AllReduce || collective == Collective::ReduceScatter;
}

// The ranges that a plan distinguishes: those it names, and the gaps between them so that all of Out is covered.
class Ranges {
 public:
  // Throws Fault if two named ranges overlap in part.
  Ranges(int rank, const Plan& plan, const Shape& shape);
  size_t size() const { return ranges_.size(); }
  const Place& operator[](size_t index) const { return ranges_[index]; }
  size_t find(const Place& place) const;
  // The range that begins at this element or has it inside.
  size_t first(Buffer buffer, size_t element) const;

 private:
  std::vector<Place> ranges_;  // ascending by buffer and begin, disjoint
};

// Throws Fault for a step that is malformed or outside its buffers, for ranges that are neither equal nor disjoint, and for
// steps of one round of which one writes what another uses.
Ranges inspect(int rank, const Plan& plan, const Algorithm& algorithm, const Shape& shape);

}  // namespace roundel::plan
