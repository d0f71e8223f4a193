// Who shares a host with whom, for the hierarchical plans.
//
// Hosts may have different numbers of ranks. The smallest number, m, is how many ranks of every host talk to other hosts: rank
// number i < m of a host, its i-th owner, with the i-th owners of the others.
#pragma once

#include <vector>

#include "plan/direct.h"

namespace roundel::plan {

class Hosts {
 public:
  explicit Hosts(const Shape& shape);
  int count() const { return static_cast<int>(ranks_.size()); }
  const std::vector<int>& ranks(int host) const { return ranks_[static_cast<size_t>(host)]; }  // ascending
  int host(int rank) const { return host_[static_cast<size_t>(rank)]; }
  int index(int rank) const { return index_[static_cast<size_t>(rank)]; }  // among the ranks of its host
  int owners() const { return owners_; }                                   // m

  Group group(int rank) const { return {ranks(host(rank)), index(rank)}; }
  // The owners of the same index as this rank, one on each host.
  Group peers(int rank) const;

 private:
  std::vector<std::vector<int>> ranks_;
  std::vector<int> host_, index_;
  int owners_ = 0;
};

}  // namespace roundel::plan
