// Copying what peers are about to read, through the caches or past them, whichever makes operations faster between the cores
// that this job has.
//
// A store to a line that a peer's cache holds has to fetch it from there first. Between threads of one core that costs nothing,
// between cores of one L3 about 7 ns a line, between sockets or L3s 30 ns: there, going through memory is up to five times
// faster in all. Under a hypervisor the distance changes from one second to the next. So of every kind and size of operation
// two in 64 are timed as a whole, one each way, on all ranks the same ones. docs/adr/0005.
#pragma once

#include <algorithm>
#include <bit>

#include "base/clock.h"
#include "base/copy.h"
#include "base/signature.h"

namespace roundel::comm {

class Publisher {
 public:
  static constexpr size_t kLeast = 2048;  // bytes; smaller operations are not timed

  // `own_cores`: every rank has a core; else times say more about the scheduler than about caches, and caches it is.
  explicit Publisher(bool own_cores) : chooses_(own_cores) {}

  // Chooses for the operation that begins here. `bytes`: the same on all ranks.
  void begin(OpKind kind, size_t bytes) {
    streams_ = false;
    timed_ = nullptr;
    if (!chooses_ || bytes < kLeast) return;
    Costs& costs = costs_[static_cast<int>(kind)][std::min<int>(std::bit_width(bytes / kLeast), kSizes) - 1];
    const unsigned turn = costs.uses++ % kPeriod;
    streams_ = turn == kTryCached ? false : turn == kTryStreaming ? true : costs.streams;
    if (turn != kTryCached && turn != kTryStreaming) return;
    timed_ = &costs;
    bytes_ = bytes;
    begin_ = Clock::now();
  }

  // Whether this operation is timed. Then it must not end before its readers have read.
  bool timing() const { return timed_ != nullptr; }

  void end() {
    if (timed_ == nullptr) return;
    timed_->add(streams_, std::chrono::duration<double>(Clock::now() - begin_).count() / static_cast<double>(bytes_));
    timed_ = nullptr;
  }

  void copy(void* to, const void* from, size_t bytes) const {
    if (streams_)
      copy_bytes_streaming(to, from, bytes);
    else
      copy_bytes(to, from, bytes);
  }

 private:
  static constexpr int kSizes = 14;  // by powers of two from kLeast; from 16 MB on all are alike
  static constexpr unsigned kPeriod = 64, kTryCached = 2, kTryStreaming = 4;  // early, after the memory was touched

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
  Costs costs_[kOpKinds][kSizes];
  bool chooses_;
  bool streams_ = false;
  Costs* timed_ = nullptr;
  size_t bytes_ = 0;
  Clock::time_point begin_{};
};

}  // namespace roundel::comm
