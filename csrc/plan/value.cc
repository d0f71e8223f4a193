// Sums of multisets of ranks, and the fingerprint of their order.
#include "plan/value.h"

#include <algorithm>
#include <utility>

namespace roundel::plan {
namespace {

// Spreads any two different inputs to unrelated outputs. Steele, Lea & Flood, "Fast splittable pseudorandom number generators"
// (2014).
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

Value contribution(int rank, size_t element) {
  return {.origin = element, .runs = {{rank, rank + 1, 1}}, .order = mix(static_cast<uint64_t>(rank))};
}

Value sum(const std::vector<const Value*>& terms) {
  if (terms.size() == 1) return *terms[0];
  Value total{.origin = terms[0]->origin, .order = terms[0]->order};
  // a + b has the bits of b + a, but (a + b) + c not those of a + (b + c).
  for (size_t i = 1; i < terms.size(); ++i) total.order = mix(total.order + terms[i]->order);

  std::vector<std::pair<int, int>> changes;  // at this rank the number of contributions changes by so many
  for (const Value* term : terms) {
    for (const Run& run : term->runs) {
      changes.emplace_back(run.begin, run.times);
      changes.emplace_back(run.end, -run.times);
    }
  }
  std::sort(changes.begin(), changes.end());
  int begin = 0, times = 0;
  for (size_t i = 0; i < changes.size();) {
    const int rank = changes[i].first, before = times;
    for (; i < changes.size() && changes[i].first == rank; ++i) times += changes[i].second;
    if (times == before) continue;
    if (before > 0) total.runs.push_back({begin, rank, before});
    begin = rank;
  }
  return total;
}

}  // namespace roundel::plan
