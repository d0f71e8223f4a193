// Copying what peers are about to read, through the cache or past it, whichever is cheaper between the cores that this job has.
//
// A store to a line that a peer's cache holds has to fetch it from there first. Between threads of one core that costs nothing,
// between cores of one L3 about 7 ns a line, between sockets or L3s 30 ns: there, going through memory is up to five times
// faster in all. Under a hypervisor the distance changes from one second to the next, so it is not measured once but all the
// time: both ways are timed now and then. docs/adr/0005.
#pragma once

#include <array>
#include <cstddef>

#include "base/clock.h"
#include "base/copy.h"

namespace roundel::comm {

class Publisher {
 public:
  void copy(void* to, const void* from, size_t bytes) {
    if (bytes < kLeast) return copy_bytes(to, from, bytes);
    Costs& costs = costs_[bytes <= kSmall ? 0 : 1];
    const unsigned use = ++costs.uses;
    const bool streams = costs.streams(bytes) != (use % kTryOther == 0);
    if (use % kTime != 0) return copy_one_way(to, from, bytes, streams);
    const Clock::time_point begin = Clock::now();
    copy_one_way(to, from, bytes, streams);
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    (streams ? costs.streaming : costs.cached).add(seconds / static_cast<double>(bytes));
  }

 private:
  static constexpr size_t kLeast = 2048;       // below, the clock would cost more than there is to gain
  static constexpr size_t kSmall = 32u << 10;  // two classes of sizes, since the first level cache makes small copies cheaper
  static constexpr unsigned kTime = 8;         // reading the clock costs as much as copying 2 KB
  static constexpr unsigned kTryOther = 64;

  static void copy_one_way(void* to, const void* from, size_t bytes, bool streams) {
    if (streams)
      copy_bytes_streaming(to, from, bytes);
    else
      copy_bytes(to, from, bytes);
  }

  // Seconds per byte, recent ones counting most. A copy that was interrupted does not count for more than a slow one.
  struct Cost {
    double value = 0;
    void add(double sample) { value = value == 0 ? sample : value + (std::min(sample, 4 * value) - value) / 8; }
  };
  struct Costs {
    Cost cached, streaming;
    unsigned uses = 0;
    // What it costs the reader to fetch from memory what was streamed is not seen here: measured, 37 ps a byte and a latency.
    bool streams(size_t bytes) const {
      return streaming.value > 0 && cached.value - streaming.value > 37e-12 + 0.4e-6 / static_cast<double>(bytes);
    }
  };
  std::array<Costs, 2> costs_;
};

}  // namespace roundel::comm
