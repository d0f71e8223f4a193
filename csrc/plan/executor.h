// Runs one rank's plan over a transport: pieces of every range flow through the rounds independently, kWindow of them at a
// time, so that sending, receiving and reducing overlap. Scratch and what a RecvReduce receives live in tiles: a piece for each
// of these places and each piece under way, kept for reuse and small enough to stay in the cache. When run() throws, receives
// into them may be posted still: abandon the transport before it is polled again.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "base/view.h"
#include "kernels/kernels.h"
#include "plan/plan.h"
#include "transport/transport.h"

namespace roundel::plan {

// tag.index of the second of two plans that run under one sequence number.
inline constexpr uint32_t kSecondPlan = 1u << 31;

class Executor {
 public:
  // `look_around` is called whenever nothing moves: it raises whatever should end the wait (a lost peer, the deadline).
  // `disturbed`: it would raise something now (any thread may have caused it); a sleep must not begin.
  Executor(transport::Transport& transport, std::function<void()> look_around, transport::Transport::Disturbed disturbed)
      : transport_(transport), look_around_(std::move(look_around)), disturbed_(std::move(disturbed)) {}

  // `in` and `out` as plan.h says for the collective; `in` may be empty unless it is an AllToAll. Blocks until this rank's part
  // is done: everything it sends has left, everything it receives has come. `tag.index`: where messages are counted from, 0 or
  // kSecondPlan.
  void run(const Plan& plan, const transport::Tag& tag, View in, View out, ReduceOp op, kernels::Finish finish,
           Deadline deadline);

 private:
  struct Lane;
  struct Job;
  void start_round(Job& job, Lane& lane);
  bool advance(Job& job, Lane& lane);
  void number_messages(Job& job);
  size_t lay_out_tiles(Job& job);

  transport::Transport& transport_;
  std::function<void()> look_around_;
  transport::Transport::Disturbed disturbed_;
  std::unique_ptr<std::byte[]> tiles_;
  size_t tiles_bytes_ = 0;
};

}  // namespace roundel::plan
