// What the tests of plans share: shapes of every kind.
#pragma once

#include <source_location>
#include <string>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "plan/plan.h"

namespace roundel::test {

using namespace roundel::plan;

inline void check_all_right(const std::string& said, std::source_location at = std::source_location::current()) {
  if (!said.empty()) fail(at.file_name(), static_cast<int>(at.line()), said);
}

inline const Algorithm& row(const char* name, Collective collective) {
  const Algorithm* found = find_algorithm(collective, name);
  ROUNDEL_CHECK(found != nullptr);
  return *found;
}

inline Shape even_shape(int size, size_t count) { return {.size = size, .parts = Parts::even(count, size)}; }

// Rank a sends to rank b what `count(a, b)` says.
template <class F>
Shape matrix_shape(int size, F count) {
  Shape shape{.size = size, .parts = Parts::even(0, size)};
  for (int a = 0; a < size; ++a)
    for (int b = 0; b < size; ++b) shape.sends.push_back(static_cast<size_t>(count(a, b)));
  return shape;
}

// Hosts that take `ranks[0]`, `ranks[1]`, ... consecutive ranks, again and again until all have one.
inline std::vector<int> blocks(int size, const std::vector<int>& ranks) {
  std::vector<int> host;
  for (int h = 0; static_cast<int>(host.size()) < size; ++h)
    for (int i = 0; i < ranks[static_cast<size_t>(h) % ranks.size()] && static_cast<int>(host.size()) < size; ++i)
      host.push_back(h);
  return host;
}

inline std::vector<int> interleaved(int size, int hosts) {
  std::vector<int> host;
  for (int r = 0; r < size; ++r) host.push_back(r % hosts);
  return host;
}

inline bool has_root(Collective collective) {
  return collective == Collective::Broadcast || collective == Collective::Reduce || collective == Collective::Gather ||
         collective == Collective::Scatter;
}

inline bool has_own_parts(Collective collective) {
  return collective == Collective::ReduceScatter || collective == Collective::AllGather || collective == Collective::Gather ||
         collective == Collective::Scatter;
}

}  // namespace roundel::test
