#include "plan/hosts.h"

#include <algorithm>

#include "base/error.h"

namespace roundel::plan {

Hosts::Hosts(const Shape& shape) {
  ROUNDEL_CHECK(shape.host.empty() || shape.host.size() == static_cast<size_t>(shape.size));
  host_ = shape.host.empty() ? std::vector<int>(static_cast<size_t>(shape.size)) : shape.host;
  for (int r = 0; r < shape.size; ++r) {
    ROUNDEL_CHECK(host(r) >= 0 && host(r) <= count());  // numbered in order of first appearance
    if (host(r) == count()) ranks_.emplace_back();
    std::vector<int>& mates = ranks_[static_cast<size_t>(host(r))];
    index_.push_back(static_cast<int>(mates.size()));
    mates.push_back(r);
  }
  owners_ = shape.size;
  for (const std::vector<int>& mates : ranks_) owners_ = std::min(owners_, static_cast<int>(mates.size()));
}

Group Hosts::peers(int rank) const {
  Group group{{}, host(rank)};
  for (const std::vector<int>& mates : ranks_) group.ranks.push_back(mates[static_cast<size_t>(index(rank))]);
  return group;
}

}  // namespace roundel::plan
