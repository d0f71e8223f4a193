// Runs one rank's plan over a transport: pieces of every range flow through the rounds independently, kWindow of them at a
// time, so that sending, receiving and reducing overlap. Memory: the plan's scratch, kept for reuse, and a piece for each
// RecvReduce under way. When run() throws, receives into freed memory may be posted still: abandon the transport before it is
// polled again.
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
  Executor(transport::Transport& transport, std::function<void()> look_around)
      : transport_(transport), look_around_(std::move(look_around)) {}

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
  std::byte* scratch(size_t bytes);

  transport::Transport& transport_;
  std::function<void()> look_around_;
  std::unique_ptr<std::byte[]> scratch_;
  size_t scratch_bytes_ = 0;
};

}  // namespace roundel::plan
