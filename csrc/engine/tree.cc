#include "engine/tree.h"

#include <algorithm>

namespace roundel::engine {

Tree::Tree(int rank, const std::vector<int>& host) {
  const auto host_of = [&](int r) { return host[static_cast<size_t>(r)]; };
  const auto leader_of = [&](int r) {
    return static_cast<int>(std::find(host.begin(), host.end(), host_of(r)) - host.begin());
  };
  const auto parent_of = [&](int r) { return leader_of(r) != r ? leader_of(r) : r == 0 ? -1 : 0; };
  const int size = static_cast<int>(host.size());
  parent = parent_of(rank);
  reporting.push_back(rank);
  for (int child = 0; child < size; ++child) {
    if (parent_of(child) != rank) continue;
    std::vector<int> below{child};
    for (int r = 0; r < size; ++r)
      if (parent_of(r) == child) below.push_back(r);
    reporting.insert(reporting.end(), below.begin(), below.end());
    children.push_back(child);
    subtree.push_back(std::move(below));
  }
  std::sort(reporting.begin(), reporting.end());
}

}  // namespace roundel::engine
