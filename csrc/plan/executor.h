// Runs one rank's plan over a transport: pieces of every range flow through the rounds independently, kWindow of them at a
// time, so that sending, receiving and reducing overlap. Scratch and what a RecvReduce receives live in tiles: a piece for each
// of these places and each piece under way, kept for reuse and small enough to stay in the cache. When run() throws, receives
// into them may be posted still: abandon the transport before it is polled again.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "base/memory.h"
#include "base/view.h"
#include "kernels/kernels.h"
#include "plan/plan.h"
#include "transport/transport.h"

namespace roundel::plan {

// tag.index of the second of two plans that run under one sequence number.
inline constexpr uint32_t kSecondPlan = 1u << 31;

// Several in flight fit a 1 MB L2; below 64 KB the 64-byte frames begin to show.
inline constexpr size_t kPieceBytes = 256u << 10;

class Executor {
 public:
  // `look_around` is called whenever nothing moves: it raises whatever should end the wait (a lost peer, the deadline).
  // `disturbed`: it would raise something now (any thread may have caused it); a sleep must not begin. `piece_bytes`: the same
  // on all ranks.
  Executor(transport::Transport& transport, std::function<void()> look_around, transport::Transport::Disturbed disturbed,
           size_t piece_bytes = kPieceBytes)
      : transport_(transport),
        look_around_(std::move(look_around)),
        disturbed_(std::move(disturbed)),
        piece_bytes_(piece_bytes) {}

  // `in` and `out` as plan.h says for the collective; `in` may be empty unless it is an AllToAll. Blocks until this rank's part
  // is done: everything it sends has left, everything it receives has come. `tag.index`: where messages are counted from, 0 or
  // kSecondPlan.
  // `given`: as long as `out`, which holds nothing yet then: this is what it would hold. Not of nested plans.
  void run(const Plan& plan, const transport::Tag& tag, View in, View out, ReduceOp op, kernels::Finish finish,
           Deadline deadline, const void* given = nullptr);

 private:
  struct Lane;
  struct Job;
  void start_round(Job& job, Lane& lane);
  bool advance(Job& job, Lane& lane);
  void number_messages(Job& job);
  void find_first_writes(Job& job);
  size_t lay_out_tiles(Job& job);

  transport::Transport& transport_;
  std::function<void()> look_around_;
  transport::Transport::Disturbed disturbed_;
  size_t piece_bytes_;
  Memory tiles_;
  size_t tiles_bytes_ = 0;
};

}  // namespace roundel::plan
