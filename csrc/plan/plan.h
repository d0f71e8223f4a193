// Plans: collective algorithms as data. A plan says which ranges of which buffers one rank sends, receives and reduces, in
// rounds.
//
// Steps of one round run concurrently and touch disjoint memory (sends may share what they only read); a round starts when the
// one before it is done on this rank. The k-th send from rank a to rank b meets the k-th receive of b from a.
//
// Any two ranges of one buffer in one plan are equal or disjoint, so that the executor can run each plan in pieces: piece j of
// every range depends on piece j of other ranges only, and successive pieces overlap sending, receiving and reducing.
//
// All of this is proved by check.cc for every plan, not assumed.
#pragma once

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
};

// Which part of a buffer belongs to which rank: part r is [begin(r), begin(r) + count(r)).
class Parts {
 public:
  // n elements over `size` ranks, as even as possible, the first n % size one longer.
  static Parts even(size_t n, int size);
  static Parts of(const std::vector<size_t>& counts);
  size_t begin(int r) const { return offsets_[static_cast<size_t>(r)]; }
  size_t count(int r) const { return offsets_[static_cast<size_t>(r) + 1] - begin(r); }
  size_t total() const { return offsets_.back(); }
  int size() const { return static_cast<int>(offsets_.size()) - 1; }
  Place operator[](int r) const { return {Buffer::Out, begin(r), count(r)}; }

 private:
  std::vector<size_t> offsets_{0};
};

enum class Collective : uint8_t { AllReduce, ReduceScatter, AllGather, Broadcast, AllToAll };
inline constexpr int kCollectives = 5;
const char* name_of(Collective collective);

// What a plan is made for. Buffers by collective:
//   AllReduce      Out: parts.total() elements, own contribution in, sum out
//   ReduceScatter  Out: parts.total() elements, own contribution in; part `rank` holds the sum at the end, the rest undefined
//   AllGather      Out: parts.total() elements, part `rank` filled in
//   Broadcast      Out: parts.total() elements, filled in at root
//   AllToAll       In and Out: parts.total() elements, equal parts; part r of In goes to rank r, part r of Out is from rank r
struct Shape {
  int rank = 0;
  int size = 1;
  Parts parts;              // AllReduce, Broadcast: Parts::even
  int root = 0;             // Broadcast
  std::vector<int> host{};  // host[r] of every rank, numbered from 0 in order of first appearance; empty: all on one
};

// One row per algorithm, written at the foot of its plan file and listed in registry.cc. Costs are the worst rank's, do not
// depend on Shape::rank and are exact, also for uneven and empty parts; the checker holds plans to them.
struct Algorithm {
  const char* name;  // "ring"
  Collective collective;
  Plan (*make)(const Shape&);
  size_t (*rounds)(const Shape&);         // rounds that send or receive
  size_t (*elements_sent)(const Shape&);  // by the rank that sends most
  bool single_fold;                       // Plan::single_fold of its plans; those for size 1 have it in any case
};

const std::vector<Algorithm>& algorithms();
// nullptr where there is none of that name for that collective.
const Algorithm* find_algorithm(Collective collective, const std::string& name);

// Cheapest algorithm by  rounds * latency + bytes * (time per byte) + bytes leaving the busiest host * (time per such byte) for
// the transport in use; the last term only where hosts have several ranks, whose link they share. `forced` (ROUNDEL_ALGORITHM)
// wins when it exists for this collective; a name that no collective knows is InvalidArgument. 16-bit types count twice their
// bytes where the plan is not single_fold. Between equal costs the earlier row of the table wins. Pure: every rank must come to
// the same choice, so pass rank-independent shapes (rank is ignored).
struct LinkCost {
  double seconds_per_round;
  double seconds_per_byte;
  double seconds_per_leaving_byte = 0;
};
const Algorithm& select(Collective collective, const Shape& shape, DType dtype, const LinkCost& cost,
                        const std::string& forced);

// Runs all ranks of an algorithm symbolically in one process (shape.rank is ignored). Returns "" when every rank ends with
// every contribution exactly once, nothing deadlocks (even if no send completes before its receive is posted), no message is
// left over, `last` is set exactly on completed sums, ranges are equal or disjoint, steps of a round do not conflict,
// single_fold is true to its word, sums are added up in the same order for every rank, and rounds and elements sent are the
// row's. Otherwise says what is wrong and where.
std::string check(const Algorithm& algorithm, const Shape& shape);

}  // namespace roundel::plan
