// Direct exchanges inside a group of ranks: the halves of direct.cc, where the group is everyone, and of hierarchical.cc.
#pragma once

#include <vector>

#include "plan/builder.h"

namespace roundel::plan {

// Ranks, ascending, and the index among them of the rank that the plan is for.
struct Group {
  std::vector<int> ranks;
  int me = 0;

  int size() const { return static_cast<int>(ranks.size()); }
  int ahead(int steps) const { return (me + steps) % size(); }
};

// What each member of a group owns: owned[i] are places of Out, the same list at every rank.
using Owned = std::vector<std::vector<Place>>;

// Adds up every place at its owner, in the order of the group. `last`: the group's sum is everyone's sum.
void reduce_scatter_within(Builder& plan, const Group& group, const Owned& owned, bool last);

// Sends every place from its owner to the others.
void allgather_within(Builder& plan, const Group& group, const Owned& owned);

}  // namespace roundel::plan
