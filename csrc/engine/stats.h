// What the engine has done so far, in numbers: roundel.stats().
//
// Threads: each counting method from one thread at a time (so that a counter is a load and a store, about a nanosecond, and not
// a locked instruction); they touch different counters, so different methods may be called by different threads at once.
// snapshot() from any thread at any time: every figure is some recent value of itself.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/clock.h"

namespace roundel::engine {

class Stats {
 public:
  // Of one kind of request ("allreduce"). Seconds are sums over requests.
  struct Kind {
    std::string name;
    uint64_t requests = 0;         // submitted on this rank; a group of tensors is one
    uint64_t tensors = 0;          // executed
    uint64_t bytes = 0;            // of those, on this rank
    uint64_t batches = 0;          // collectives run for them
    uint64_t fused = 0;            // tensors that shared a batch with others
    uint64_t failed = 0;           // requests that ended with an error
    double negotiate_seconds = 0;  // from submission until all ranks were ready
    double queue_seconds = 0;      // from then until the collective began
    double execute_seconds = 0;    // of the collectives, packing included; once per batch
    double fused_share() const { return tensors > 0 ? static_cast<double>(fused) / static_cast<double>(tensors) : 0; }
  };
  // How often a rank was the last to become ready, and how long this rank's requests had been waiting for others by then.
  struct Waited {
    uint64_t requests = 0;
    double seconds = 0;
  };
  struct Snapshot {
    std::vector<Kind> kinds;     // in the order given to the constructor
    std::vector<Waited> waited;  // by rank
    double seconds = 0;          // since the constructor or the last reset()
  };

  // `kinds`: names by index, which the counting methods take.
  Stats(const std::vector<std::string>& kinds, int size);
  ~Stats();

  // A request was submitted.
  void submitted(int kind);
  // All ranks are ready for a request, `last` being the last one that was (-1: not known), `waited` after its submission here.
  void agreed(int kind, int last, Clock::duration waited);
  // A collective was run for `tensors` tensors, which had waited for their turn `queued` in all.
  void executed(int kind, size_t tensors, size_t bytes, Clock::duration queued, Clock::duration took);
  // A request ended with an error.
  void failed(int kind);

  Snapshot snapshot() const;
  // What snapshot() counts from. Any thread.
  void reset();

 private:
  struct Counters;
  Snapshot totals() const;
  std::vector<std::string> names_;
  int size_;
  std::unique_ptr<Counters> counters_;
};

}  // namespace roundel::engine
