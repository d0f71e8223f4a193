// Gather and scatter. Direct: one round, P-1 messages at the root; every element travels once. Binomial tree: ceil(log2 P)
// rounds and messages, for small parts at many ranks; inner ranks pass on what belongs to their subtrees, about n/2 the
// busiest.
//
// Thakur, Rabenseifner & Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 2005.
//
// In the tree, ranks are counted from the root, and a subtree is a run of positions, kept in their order in scratch. At the
// root it is in the order of ranks: a subtree that goes past the last rank is two messages between the root and its child.
// Messages take up what several brought, so tree plans run in one piece.
#include <algorithm>

#include "plan/algorithms.h"
#include "plan/tree.h"

namespace roundel::plan {
namespace {

Place mine(const Shape& shape, Buffer buffer) { return {buffer, 0, shape.parts.count(shape.rank)}; }

Place at_root(const Shape& shape, Buffer buffer, int rank) {
  return {buffer, shape.parts.begin(rank), shape.parts.count(rank)};
}

Plan gather_directly(const Shape& shape) {
  Builder plan;
  const bool root = shape.rank == shape.root;
  if (root) plan.add(copy(at_root(shape, Buffer::Out, shape.root), mine(shape, Buffer::In)));
  if (!root) plan.add(send(shape.root, mine(shape, Buffer::In)));
  for (int r = 0; r < shape.size && root; ++r)
    if (r != shape.root) plan.add(recv(r, at_root(shape, Buffer::Out, r)));
  return plan.take(true);
}

Plan scatter_directly(const Shape& shape) {
  Builder plan;
  const bool root = shape.rank == shape.root;
  if (root) plan.add(copy(mine(shape, Buffer::Out), at_root(shape, Buffer::In, shape.root)));
  if (!root) plan.add(recv(shape.root, mine(shape, Buffer::Out)));
  for (int s = 1; s < shape.size && root; ++s) {
    const int to = (shape.rank + s) % shape.size;
    plan.add(send(to, at_root(shape, Buffer::In, to)));
  }
  return plan.take(true);
}

// The lengths of parts by position, and where they are.
struct Subtrees {
  const Shape& shape;
  Tree tree = tree_of_all(shape, shape.root);

  int end(int position, int reach) const { return std::min(position + reach, shape.size); }

  // The data of positions [begin, end): in the root's `buffer`, one place or two ...
  std::vector<Place> at_root(Buffer buffer, int begin, int end) const {
    const int wrap = shape.size - shape.root;  // the position of rank 0
    const auto run = [&](int first, int last) {
      const Place place = shape.parts.run(first, last);
      return Place{buffer, place.begin, place.count};
    };
    if (end <= wrap) return {run(shape.root + begin, shape.root + end)};
    if (begin >= wrap) return {run(begin - wrap, end - wrap)};
    return {run(shape.root + begin, shape.size), run(0, end - wrap)};
  }
  size_t count(int begin, int end) const {
    size_t count = 0;
    for (const Place& place : at_root(Buffer::Out, begin, end)) count += place.count;
    return count;
  }
  // ... and in `space`, the scratch of the rank at position `top`, in as many places as the other end of the message has.
  std::vector<Place> at_inner(const Place& space, int top, int begin, int end, bool to_or_from_root) const {
    const size_t first = space.begin + count(top, begin);
    if (!to_or_from_root) return {{space.buffer, first, count(begin, end)}};
    std::vector<Place> places;
    for (const Place& place : at_root(Buffer::Out, begin, end))
      places.push_back({space.buffer, places.empty() ? first : first + places[0].count, place.count});
    return places;
  }
};

Plan gather_by_tree(const Shape& shape) {
  const Subtrees subtrees{shape};
  const Tree& tree = subtrees.tree;
  const int me = tree.me();
  Builder plan;
  int width = 1;  // of the subtree here
  while (width <= tree.top() && !tree.child_at(width)) width *= 2;
  const bool leaf = subtrees.end(me, width) == me + 1;
  const Place space = me == 0 || leaf ? mine(shape, Buffer::In) : plan.scratch(subtrees.count(me, subtrees.end(me, width)));
  if (me == 0) plan.add(copy(at_root(shape, Buffer::Out, shape.rank), mine(shape, Buffer::In)));
  if (me != 0 && !leaf) plan.add(copy({space.buffer, space.begin, shape.parts.count(shape.rank)}, mine(shape, Buffer::In)));
  for (int reach = 1; reach < width && reach <= tree.top(); reach *= 2) {
    if (!tree.parent_at(reach)) continue;
    const int child = me + reach, end = subtrees.end(child, reach);
    plan.begin_round();
    for (const Place& place :
         me == 0 ? subtrees.at_root(Buffer::Out, child, end) : subtrees.at_inner(space, me, child, end, false))
      plan.add(recv(tree.child(reach), place));
  }
  if (me == 0) return plan.take(true, true);
  plan.begin_round();
  for (const Place& place : subtrees.at_inner(space, me, me, subtrees.end(me, width), me == width))
    plan.add(send(tree.parent(width), place));
  return plan.take(true, true);
}

Plan scatter_by_tree(const Shape& shape) {
  const Subtrees subtrees{shape};
  const Tree& tree = subtrees.tree;
  const int me = tree.me();
  Builder plan;
  int width = 1;
  while (width <= tree.top() && !tree.child_at(width)) width *= 2;
  const bool leaf = subtrees.end(me, width) == me + 1;
  const Place space = me == 0 || leaf ? mine(shape, Buffer::Out) : plan.scratch(subtrees.count(me, subtrees.end(me, width)));
  if (me == 0) plan.add(copy(mine(shape, Buffer::Out), at_root(shape, Buffer::In, shape.rank)));
  if (me != 0)
    for (const Place& place : subtrees.at_inner(space, me, me, subtrees.end(me, width), me == width))
      plan.add(recv(tree.parent(width), place));
  for (int reach = std::min(width / 2, tree.top()); reach >= 1; reach /= 2) {
    if (!tree.parent_at(reach)) continue;
    const int child = me + reach, end = subtrees.end(child, reach);
    plan.begin_round();
    for (const Place& place :
         me == 0 ? subtrees.at_root(Buffer::In, child, end) : subtrees.at_inner(space, me, child, end, false))
      plan.add(send(tree.child(reach), place));
  }
  plan.begin_round();
  if (me != 0 && !leaf) plan.add(copy(mine(shape, Buffer::Out), {space.buffer, space.begin, shape.parts.count(shape.rank)}));
  return plan.take(true, true);
}

Cost direct_cost(const Shape& shape, bool root_sends) {
  size_t most = 0, sum = 0, messages = 0;
  for (int r = 0; r < shape.size; ++r) {
    const size_t count = r == shape.root ? 0 : shape.parts.count(r);
    most = std::max(most, count);
    sum += count;
    messages += count > 0 ? 1 : 0;
  }
  return {.rounds = messages > 0 ? 1u : 0u, .elements_sent = root_sends ? sum : most, .messages = messages};
}

Cost tree_cost(const Shape& shape, bool downwards) {
  const Subtrees subtrees{shape};
  const auto amount = [&](int child, int reach) {
    return amounts({subtrees.at_root(Buffer::Out, child, subtrees.end(child, reach))})[0];
  };
  Cost most;
  for (int position = 0; position < shape.size; ++position) {
    Cost cost;
    const auto edge = [&](int child, int reach, bool outgoing) {
      const Amount passing = amount(child, reach);
      if (passing.places == 0) return;
      cost.elements_sent += outgoing ? passing.elements : 0;
      cost.messages += child == reach ? passing.places : 1;
    };
    int reach = 1;
    for (; reach < shape.size && position % (2 * reach) == 0; reach *= 2)
      if (position + reach < shape.size) edge(position + reach, reach, downwards);
    if (position > 0) edge(position, reach, !downwards);
    most.take_max(cost);
  }
  // Down or up is the same chain of messages in time, backwards: a parent is through with a child after all smaller ones.
  std::vector<size_t> through(static_cast<size_t>(shape.size));
  for (int position = shape.size - 1; position >= 0; --position) {
    size_t& parent = through[static_cast<size_t>(position)];
    for (int reach = 1; position + reach < shape.size && position % (2 * reach) == 0; reach *= 2)
      if (amount(position + reach, reach).places > 0)
        parent = std::max(parent, through[static_cast<size_t>(position + reach)]) + 1;
  }
  most.rounds = through[0];
  return most;
}

}  // namespace

constinit const Algorithm direct_gather = {
    .name = "direct",
    .collective = Collective::Gather,
    .make = gather_directly,
    .cost = [](const Shape& shape) { return direct_cost(shape, false); },
    .single_fold = true,
};

constinit const Algorithm direct_scatter = {
    .name = "direct",
    .collective = Collective::Scatter,
    .make = scatter_directly,
    .cost = [](const Shape& shape) { return direct_cost(shape, true); },
    .single_fold = true,
};

constinit const Algorithm tree_gather = {
    .name = "tree",
    .collective = Collective::Gather,
    .make = gather_by_tree,
    .cost = [](const Shape& shape) { return tree_cost(shape, false); },
    .single_fold = true,
    .nested = true,
};

constinit const Algorithm tree_scatter = {
    .name = "tree",
    .collective = Collective::Scatter,
    .make = scatter_by_tree,
    .cost = [](const Shape& shape) { return tree_cost(shape, true); },
    .single_fold = true,
    .nested = true,
};

}  // namespace roundel::plan
