// The tree over which readiness travels up and announcements travel down: rank 0, below it the first rank of every other host,
// below each of these the other ranks of its host.
#pragma once

#include <vector>

namespace roundel::engine {

struct Tree {
  int parent = -1;                        // none for rank 0
  std::vector<int> children;              // ascending
  std::vector<std::vector<int>> subtree;  // of each child, itself included
  std::vector<int> reporting;             // this rank and all below it, ascending

  // host[r]: the host of rank r.
  Tree(int rank, const std::vector<int>& host);
};

}  // namespace roundel::engine
