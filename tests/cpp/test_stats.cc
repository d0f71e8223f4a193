// engine/stats: what was counted is what is told, also beside threads that count and after a reset.
#include "engine/stats.h"

#include <cmath>
#include <thread>

#include "check.h"

using namespace roundel;
using engine::Stats;
using namespace std::chrono_literals;

TEST(stats_count_by_kind_and_by_rank) {
  Stats stats({"allreduce", "broadcast"}, 3);
  for (int i = 0; i < 5; ++i) stats.submitted(0);
  stats.submitted(1);
  stats.agreed(0, 2, 10ms);
  stats.agreed(0, 2, 20ms);
  stats.agreed(1, 0, 5ms);
  stats.agreed(1, -1, 1ms);  // nobody knows who was last
  stats.executed(0, 4, 4000, 3ms, 8ms);
  stats.executed(0, 1, 50, 1ms, 2ms);
  stats.failed(1);
  const Stats::Snapshot now = stats.snapshot();
  CHECK_EQ(now.kinds.size(), 2u);
  const Stats::Kind &sums = now.kinds[0], &casts = now.kinds[1];
  CHECK_EQ(sums.name, "allreduce");
  CHECK_EQ(sums.requests, 5u);
  CHECK_EQ(sums.batches, 2u);
  CHECK_EQ(sums.tensors, 5u);
  CHECK_EQ(sums.bytes, 4050u);
  CHECK_EQ(sums.fused, 4u);
  CHECK(std::fabs(sums.fused_share() - 0.8) < 1e-12);
  CHECK(std::fabs(sums.negotiate_seconds - 0.030) < 1e-9);
  CHECK(std::fabs(sums.queue_seconds - 0.004) < 1e-9);
  CHECK(std::fabs(sums.execute_seconds - 0.010) < 1e-9);
  CHECK_EQ(sums.failed, 0u);
  CHECK_EQ(casts.failed, 1u);
  CHECK_EQ(casts.fused_share(), 0.0);
  CHECK_EQ(now.waited.size(), 3u);
  CHECK_EQ(now.waited[2].requests, 2u);
  CHECK(std::fabs(now.waited[2].seconds - 0.030) < 1e-9);
  CHECK(std::fabs(now.waited[0].seconds - 0.005) < 1e-9);
  CHECK_EQ(now.waited[1].requests, 0u);
  CHECK(now.seconds > 0);
}

TEST(stats_count_from_the_last_reset) {
  Stats stats({"allreduce"}, 2);
  stats.submitted(0);
  stats.agreed(0, 1, 7ms);
  stats.executed(0, 2, 10, 1ms, 1ms);
  stats.reset();
  stats.executed(0, 1, 32, 0ms, 2ms);
  stats.agreed(0, 0, 4ms);
  const Stats::Snapshot now = stats.snapshot();
  CHECK_EQ(now.kinds[0].requests, 0u);
  CHECK_EQ(now.kinds[0].tensors, 1u);
  CHECK_EQ(now.kinds[0].bytes, 32u);
  CHECK_EQ(now.kinds[0].fused, 0u);
  CHECK(std::fabs(now.kinds[0].execute_seconds - 0.002) < 1e-9);
  CHECK_EQ(now.waited[0].requests, 1u);
  CHECK_EQ(now.waited[1].requests, 0u);
}

TEST(stats_are_read_beside_the_threads_that_count) {
  constexpr uint64_t kTimes = 20'000;
  Stats stats({"allreduce"}, 1);
  std::thread submits([&] {
    for (uint64_t i = 0; i < kTimes; ++i) stats.submitted(0);
  });
  std::thread executes([&] {
    for (uint64_t i = 0; i < kTimes; ++i) stats.executed(0, 1, 8, 1ns, 1ns);
  });
  uint64_t last = 0;
  while (last < kTimes) {
    const uint64_t requests = stats.snapshot().kinds[0].requests;
    CHECK(requests >= last);
    last = requests;
  }
  submits.join();
  executes.join();
  CHECK_EQ(stats.snapshot().kinds[0].tensors, kTimes);
}
