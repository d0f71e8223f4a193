// The binomial tree, for tree.cc, where everyone is in it, for rooted.cc, and for hierarchical.cc.
#pragma once

#include <bit>
#include <vector>

#include "plan/direct.h"

namespace roundel::plan {

// The tree as group.me sees it. Members are counted from the root, in positions; at `reach` 1, 2, 4, ... a multiple of
// 2 * reach is the parent of the one `reach` further on, whose subtree is the `reach` positions from there.
struct Tree {
  Group group;
  int root = 0;  // index in the group

  int size() const { return group.size(); }
  int me() const { return (group.me - root + size()) % size(); }
  int at(int position) const { return group.ranks[static_cast<size_t>((root + position) % size())]; }
  bool parent_at(int reach) const { return me() % (2 * reach) == 0 && me() + reach < size(); }
  bool child_at(int reach) const { return me() % (2 * reach) == reach; }
  int child(int reach) const { return at(me() + reach); }
  int parent(int reach) const { return at(me() - reach); }
  int top() const { return static_cast<int>(std::bit_ceil(static_cast<unsigned>(size()))) / 2; }
};

// Everyone, as shape.rank sees it.
Tree tree_of_all(const Shape& shape, int root);

// `all` is summed up at the root. `last`: with that every contribution is in.
void reduce_up(Builder& plan, const Tree& tree, Place all, bool last);
void broadcast_down(Builder& plan, const Tree& tree, Place all);

// The number of children at a position of a tree of `size`.
size_t children(int position, int size);

// The longest chain of messages up or down a tree whose members need `own` rounds at its far end.
size_t longest_chain(std::vector<size_t> own);

// The children of the root: ceil(log2 size).
inline size_t levels(int size) { return static_cast<size_t>(std::bit_width(static_cast<unsigned>(size - 1))); }

}  // namespace roundel::plan
