// Copying what peers are about to read, through the caches or past them, whichever makes operations faster between the cores
// that this job has.
//
// A store to a line that a peer's cache holds has to fetch it from there first. Between threads of one core that costs nothing,
// between cores of one L3 about 7 ns a line, between sockets or L3s 30 ns: there, going through memory is up to five times
// faster in all. Under a hypervisor the distance changes from one second to the next. So of every kind and size of operation
// two in 64 are timed as a whole, one each way, on all ranks the same ones. docs/adr/0005.
#pragma once

#include <algorithm>
#include <exception>

#include "base/clock.h"
#include "base/copy.h"
#include "base/signature.h"

namespace roundel::comm {

class Publisher {
  struct Costs;

 public:
  // One operation, from here to the end of the scope.
  class Operation {
   public:
    // `bytes`: the same on all ranks. Not for operations with a root, whose time does not contain that of its readers.
    Operation(Publisher& publisher, OpKind kind, size_t bytes) : publisher_(publisher), bytes_(bytes) {
      publisher_.streams_ = false;
      if (!publisher_.chooses_ || bytes < kLeast || has_root(kind)) return;
      Costs& costs = publisher_.costs_[static_cast<int>(kind)][bytes <= kSmall ? 0 : bytes <= kMedium ? 1 : 2];
      const unsigned turn = costs.uses++ % kPeriod;
      publisher_.streams_ = turn == kTryCached ? false : turn == kTryStreaming ? true : costs.streams;
      if (turn != kTryCached && turn != kTryStreaming) return;
      timed_ = &costs;
      begin_ = Clock::now();
    }
    ~Operation() {
      if (timed_ == nullptr || std::uncaught_exceptions() > 0) return;
      const double seconds = std::chrono::duration<double>(Clock::now() - begin_).count();
      timed_->add(publisher_.streams_, seconds / static_cast<double>(bytes_));
    }
    Operation(const Operation&) = delete;
    Operation& operator=(const Operation&) = delete;

   private:
    Publisher& publisher_;
    size_t bytes_;
    Costs* timed_ = nullptr;
    Clock::time_point begin_{};
  };

  // `own_cores`: every rank has a core; else times say more about the scheduler than about caches, and caches it is.
  explicit Publisher(bool own_cores) : chooses_(own_cores) {}

  void copy(void* to, const void* from, size_t bytes) const {
    if (streams_)
      copy_bytes_streaming(to, from, bytes);
    else
      copy_bytes(to, from, bytes);
  }

 private:
  static constexpr size_t kLeast = 2048, kSmall = 32u << 10, kMedium = 1u << 20;  // caches make three classes of sizes
  static constexpr unsigned kPeriod = 64, kTryCached = 2, kTryStreaming = 4;      // early, after the memory was touched

  // Seconds per byte. Waiting for a late rank makes samples long, never short: so the least counts, and is forgotten slowly.
  struct Costs {
    double cached = 0, streaming = 0;
    unsigned uses = 0;
    bool streams = false;
    void add(bool streamed, double sample) {
      double& cost = streamed ? streaming : cached;
      cost = cost == 0 ? sample : std::min(sample, 1.2 * cost);
      streams = cached > 0 && streaming > 0 && streaming < 0.9 * cached;
    }
  };
  Costs costs_[kOpKinds][3];
  bool chooses_;
  bool streams_ = false;
};

}  // namespace roundel::comm
