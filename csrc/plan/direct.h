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

// What a member owns: elements, and how many places that are not empty.
struct Amount {
  size_t elements = 0, places = 0;

  void add(size_t count) {
    elements += count;
    places += count > 0 ? 1 : 0;
  }
};
Amount operator-(Amount a, Amount b);
std::vector<Amount> amounts(const Owned& owned);
Amount sum(const std::vector<Amount>& amounts);

// What these exchanges cost a member of a group of `size` that owns `mine`, when the group owns `all`.
Cost cost_of_reduce_scatter(size_t size, Amount all, Amount mine);
Cost cost_of_allgather(size_t size, Amount all, Amount mine);
Cost operator+(const Cost& a, const Cost& b);

}  // namespace roundel::plan
