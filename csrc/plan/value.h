// Symbolic values: what a range of a buffer holds while a plan is checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace roundel::plan {

// Ranks [begin, end), each `times` times.
struct Run {
  int begin;
  int end;
  int times;
  bool operator==(const Run&) const = default;
};

// Element k of the range holds a sum of contributions to element origin + k, by the ranks in `runs`: a multiset, exact, and
// short because algorithms add up runs of ranks.
struct Value {
  size_t origin = 0;
  std::vector<Run> runs{};  // ascending, disjoint, merged; empty: nobody has written here
  uint64_t order = 0;       // fingerprint of the order of additions: equal sums have equal bits only if it is equal
  bool scaled = false;      // a step with `last` has passed over it

  bool written() const { return !runs.empty(); }
  // One contribution of each rank of [begin, end), and nothing else.
  bool holds(int begin, int end) const { return runs.size() == 1 && runs[0] == Run{begin, end, 1}; }
};

Value contribution(int rank, size_t element);

// terms[0] + terms[1] + ... in this order; at least one, of one origin.
Value sum(const std::vector<const Value*>& terms);

}  // namespace roundel::plan
