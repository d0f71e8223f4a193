// Symbolic values: what the buffers of a rank hold while a plan is checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <unordered_map>
#include <utility>
#include <vector>

#include "plan/plan.h"

namespace roundel::plan {

// Ranks [begin, end), each `times` times.
struct Run {
  int begin;
  int end;
  int times;
  bool operator==(const Run&) const = default;
};

// Every sum that occurs in a check, each kept once: two are the same number exactly if the same contributions were added up in
// the same order, up to a + b = b + a, which has the same bits. (a + b) + c and a + (b + c) are different sums.
class Sums {
 public:
  using Id = uint32_t;
  static constexpr Id kNothing = 0;  // nobody has written here

  Sums() : nodes_(1) {}
  Id contribution(int rank) { return intern(~uint64_t{0}, static_cast<uint64_t>(rank), {{{rank, rank + 1, 1}}, false}); }
  Id add(Id a, Id b);
  // The sum after a step with `last` has passed over it.
  Id scaled(Id a) { return intern(a, ~uint64_t{0}, {nodes_[a].runs, true}); }
  bool is_scaled(Id a) const { return nodes_[a].scaled; }
  // One contribution of each rank of [begin, end), and nothing else.
  bool holds(Id a, int begin, int end) const { return nodes_[a].runs.size() == 1 && nodes_[a].runs[0] == Run{begin, end, 1}; }

 private:
  // A multiset of ranks, exact, and short because algorithms add up runs of ranks.
  struct Node {
    std::vector<Run> runs{};  // ascending, disjoint, merged
    bool scaled = false;
  };
  Id intern(uint64_t first, uint64_t second, Node node);
  std::vector<Node> nodes_;
  std::unordered_map<uint64_t, Id> known_;
};

// `count` elements, of which the k-th is `sum` of contributions to element origin + k.
struct Segment {
  size_t count = 0;
  size_t origin = 0;
  Sums::Id sum = Sums::kNothing;
};

// What one buffer holds; neighbours that read on are one segment, so that whoever holds all in order holds one.
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t count) {
    if (count > 0) segments_[0] = {count, 0, Sums::kNothing};
  }
  // The segments of [begin, begin + count), cut to it.
  std::vector<Segment> read(size_t begin, size_t count) const;
  void write(size_t begin, const std::vector<Segment>& segments);

 private:
  void cut_at(size_t begin);
  std::map<size_t, Segment> segments_;  // by first element; all elements are in one
};

}  // namespace roundel::plan
