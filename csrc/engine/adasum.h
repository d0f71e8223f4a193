// Adasum: adaptive summation of gradients. Two are combined as
//
//   adasum(a, b) = (1 - a.b / 2|a|^2) a + (1 - a.b / 2|b|^2) b
//
// which is their sum where they are orthogonal and their mean where they are equal. Maleki et al., "Scaling distributed
// training with adaptive summation", MLSys 2021 (arXiv:2006.02924).
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "base/view.h"
#include "comm/communicator.h"
#include "kernels/kernels.h"

namespace roundel::engine {

// One round of the tree in which ranks' gradients are combined: `into` becomes adasum(into, from), `into` < `from`.
struct AdasumPair {
  int into, from;
};

// The tree for any number of ranks, as rounds of pairs; the result is rank 0's. With P' the largest power of two in `size`, the
// last `size - P'` ranks first go into those just before them; then neighbours are combined, and neighbours of those, ...
std::vector<std::vector<AdasumPair>> adasum_tree(int size);

// Memory that peers can reach where there is room for it, kept for the next call.
class Workspace {
 public:
  explicit Workspace(comm::Communicator& comm) : comm_(comm) {}
  Workspace(const Workspace&) = delete;
  ~Workspace();
  std::byte* at_least(size_t bytes);

 private:
  comm::Communicator& comm_;
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

// Of one communicator, whose operations the same thread calls. Cheap to have: it takes memory in the first run().
class Adasum {
 public:
  explicit Adasum(comm::Communicator& comm);

  // Combines every tensor (in, out; out may be in) over all ranks, each with coefficients of its own, and multiplies by
  // prescale and postscale. Tensors are float16, bfloat16, float32 or float64, all of one dtype; anything else is
  // InvalidArgument. All ranks pass the same counts in the same order and get the same bits. 16-bit types are combined in
  // float32 and rounded once. A tensor of norm 0 has coefficient 1. Blocks. `name` is for error texts.
  void run(const std::vector<std::pair<View, View>>& tensors, double prescale, double postscale, const std::string& name);

 private:
  struct Call;
  void combine_whole(const Call& call);
  void combine_slices(const Call& call);
  void go_up(const Call& call, View slices, View out, size_t begin, bool shared);
  void sum_over_ranks(const Call& call, std::vector<kernels::Dots>& dots);

  comm::Communicator& comm_;
  const std::vector<std::vector<AdasumPair>> tree_;
  Workspace packed_, slices_, wide_;
};

}  // namespace roundel::engine
