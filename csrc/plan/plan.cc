// Parts of a buffer and names: what plan.h declares and every plan uses.
#include "plan/plan.h"

#include <algorithm>

#include "base/error.h"

namespace roundel::plan {

Parts Parts::even(size_t n, int size) {
  ROUNDEL_CHECK(size >= 1);
  const size_t ranks = static_cast<size_t>(size);
  Parts parts;
  parts.offsets_.reserve(ranks + 1);
  parts.offsets_.push_back(0);
  for (size_t r = 0; r < ranks; ++r) parts.offsets_.push_back(parts.total() + n / ranks + (r < n % ranks ? 1 : 0));
  return parts;
}

Parts Parts::of(const std::vector<size_t>& counts) {
  Parts parts;
  parts.offsets_.reserve(counts.size() + 1);
  parts.offsets_.push_back(0);
  for (const size_t count : counts) parts.offsets_.push_back(parts.total() + count);
  return parts;
}

void Cost::take_max(const Cost& other) {
  rounds = std::max(rounds, other.rounds);
  elements_sent = std::max(elements_sent, other.elements_sent);
  messages = std::max(messages, other.messages);
  elements_added = std::max(elements_added, other.elements_added);
}

Parts Parts::equal(size_t n, int size) {
  Parts parts;
  parts.offsets_.resize(static_cast<size_t>(size) + 1);
  for (size_t r = 0; r < parts.offsets_.size(); ++r) parts.offsets_[r] = r * n;
  return parts;
}

const char* name_of(Collective collective) {
  constexpr const char* names[kCollectives] = {"all-reduce", "reduce-scatter", "all-gather", "broadcast",   "all-to-all",
                                               "reduce",     "gather",         "scatter",    "all-to-all-v"};
  return names[static_cast<int>(collective)];
}

}  // namespace roundel::plan
