// Plans: collective algorithms as data. A plan says which ranges of which buffers one rank sends, receives and reduces, in
// rounds.
//
// Steps of one round run concurrently and touch disjoint memory (sends may share what they only read); a round starts when the
// one before it is done on this rank. The k-th send from rank a to rank b meets the k-th receive of b from a.
//
// Any two ranges of one buffer in one plan are equal or disjoint, so that the executor can run each plan in pieces: piece j of
// every range depends on piece j of other ranges only, and successive pieces overlap sending, receiving and reducing. Plans
// that say that they are `nested` are free of this: one message takes up what several brought. They are run in one piece.
//
// All of this is proved by check.cc for every plan, not assumed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/dtype.h"

namespace roundel::plan {

// In: what the caller gave, never written. Out: the result. Scratch: private to the plan, Plan::scratch elements.
// Reductions work in place in Out, into which the caller has put its own contribution first.
enum class Buffer : uint8_t { In, Out, Scratch };

struct Place {
  Buffer buffer = Buffer::Out;
  size_t begin = 0;  // elements
  size_t count = 0;
};

enum class Action : uint8_t {
  Send,        // `place` to peer
  Recv,        // peer's message into `place`
  RecvReduce,  // place = place op (peer's message)
  Fold,        // place = from[0] op from[1] op ... in this order; a 16-bit sum rounds once
  Copy,        // place = from[0]
};

struct Step {
  Action action;
  int peer = -1;  // Send, Recv, RecvReduce
  int round = 0;
  bool last = false;  // RecvReduce, Fold: every contribution is in; scale and divide in this pass
  Place place;
  std::vector<Place> from = {};  // Fold, Copy; Fold's may include `place` itself
};

struct Plan {
  std::vector<Step> steps;  // rounds ascending
  size_t scratch = 0;       // elements
  // 16-bit types may run as they are: every Fold has all contributions at once, in rank order, so that a sum rounds once, or
  // nothing is summed at all. Other plans are run in float32 for 16-bit types. The same on every rank.
  bool single_fold = false;
  // Ranges may overlap in part: run in one piece. The same on every rank.
  bool nested = false;
};

// Which part of a buffer belongs to which rank: part r is [begin(r), begin(r) + count(r)).
class Parts {
 public:
  // n elements over `size` ranks, as even as possible, the first n % size one longer.
  static Parts even(size_t n, int size);
  static Parts of(const std::vector<size_t>& counts);
  // n elements for each.
  static Parts equal(size_t n, int size);
  size_t begin(int r) const { return offsets_[static_cast<size_t>(r)]; }
  size_t count(int r) const { return offsets_[static_cast<size_t>(r) + 1] - begin(r); }
  size_t total() const { return offsets_.empty() ? 0 : offsets_.back(); }
  int size() const { return std::max(static_cast<int>(offsets_.size()), 1) - 1; }
  const std::vector<size_t>& offsets() const { return offsets_; }
  Place operator[](int r) const { return {Buffer::Out, begin(r), count(r)}; }
  // Parts [first, last) in one.
  Place run(int first, int last) const {
    return {Buffer::Out, begin(first), offsets_[static_cast<size_t>(last)] - begin(first)};
  }

 private:
  std::vector<size_t> offsets_;  // size() + 1 of them, or none
};

enum class Collective : uint8_t {
  AllReduce,
  ReduceScatter,
  AllGather,
  Broadcast,
  AllToAll,
  Reduce,
  Gather,
  Scatter,
  AllToAllV
};
inline constexpr int kCollectives = 9;
const char* name_of(Collective collective);

// What a plan is made for. Buffers by collective:
//   AllReduce      Out: parts.total() elements, own contribution in, sum out
//   ReduceScatter  Out: parts.total() elements, own contribution in; part `rank` holds the sum at the end, the rest undefined
//   AllGather      Out: parts.total() elements, part `rank` filled in
//   Broadcast      Out: parts.total() elements, filled in at root
//   AllToAll       In and Out: parts.total() elements, equal parts; part r of In goes to rank r, part r of Out is from rank r
//   Reduce         Out: parts.total() elements, own contribution in; at root the sum at the end, elsewhere undefined
//   Gather         In: parts.count(rank) elements; Out: parts.total() elements, at root only
//   Scatter        In: parts.total() elements, at root only; Out: parts.count(rank) elements
//   AllToAllV      In: what goes to rank 0, to rank 1, ...; Out: what comes from rank 0, from rank 1, ...; lengths by `sends`
struct Shape {
  int rank = 0;
  int size = 1;
  Parts parts;                  // AllReduce, Broadcast, Reduce: Parts::even
  int root = 0;                 // Broadcast, Reduce, Gather, Scatter
  std::vector<int> host{};      // host[r] of every rank, numbered from 0 in order of first appearance; empty: all on one
  std::vector<size_t> sends{};  // AllToAllV: elements from rank a to rank b at [a * size + b]; make() looks at its rank's row
                                // and column only

  size_t sent(int from, int to) const {
    return sends[static_cast<size_t>(from) * static_cast<size_t>(size) + static_cast<size_t>(to)];
  }
};

// What plans cost the rank that it costs most; each figure by itself, so that they may be of different ranks.
struct Cost {
  size_t rounds = 0;  // that send or receive
  size_t elements_sent = 0;
  size_t messages = 0;        // sent or received
  size_t elements_added = 0;  // to others, one by one

  bool operator==(const Cost&) const = default;
  void take_max(const Cost& other);
};

// One row per algorithm, written at the foot of its plan file and listed in registry.cc.
struct Algorithm {
  const char* name;  // "ring"
  Collective collective;
  Plan (*make)(const Shape&);
  // Exact, also for uneven and empty parts, and independent of Shape::rank; the checker holds plans to it.
  Cost (*cost)(const Shape&);
  bool single_fold;     // Plan::single_fold of its plans; those for size 1 have it in any case
  bool nested = false;  // Plan::nested of its plans; those for size 1 need not have it
};

const std::vector<Algorithm>& algorithms();
// nullptr where there is none of that name for that collective.
const Algorithm* find_algorithm(Collective collective, const std::string& name);

// The constants of the linear model by which algorithms are compared.
struct LinkCost {
  double seconds_per_round;
  double seconds_per_byte;              // of the rank that sends most
  double seconds_per_leaving_byte = 0;  // of the busiest host; only where hosts have several ranks, whose link they share
  double seconds_per_message = 0;       // of the rank that sends and receives most
  double seconds_per_added_byte = 0;    // of the rank that adds up most; nested plans also for every byte sent
};

// The algorithm of least cost by that model. `forced` (ROUNDEL_ALGORITHM) wins when it exists for this collective; a name that
// no collective knows is InvalidArgument. 16-bit types count twice their bytes where the plan is not single_fold. Between equal
// costs the earlier row of the table wins. Pure: every rank must come to the same choice, so pass rank-independent shapes (rank
// is ignored). For AllToAllV that means that `sends` must be the same everywhere or empty; then the first row is taken.
const Algorithm& select(Collective collective, const Shape& shape, DType dtype, const LinkCost& cost,
                        const std::string& forced);

// Runs all ranks of an algorithm symbolically in one process (shape.rank is ignored). Returns "" when every rank ends with
// every contribution exactly once, nothing deadlocks (even if no send completes before its receive is posted), no message is
// left over, `last` is set exactly on completed sums, ranges are equal or disjoint, steps of a round do not conflict,
// single_fold and nested are true to their word, sums are added up in the same order for every rank, and the cost is the row's.
// Otherwise says what is wrong and where.
std::string check(const Algorithm& algorithm, const Shape& shape);

}  // namespace roundel::plan
