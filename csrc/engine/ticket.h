// A named request under way, as its caller holds it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <vector>

#include "base/dtype.h"

namespace roundel::engine {

// An array that the engine made: its shape was not known before.
struct Output {
  std::shared_ptr<std::byte[]> data;
  DType dtype = DType::Float32;
  std::vector<int64_t> shape;
};

// Waited for by Engine::wait(). The results are the caller's once done; the caller's arrays belong to the engine until then.
// Small, since thousands come and go.
class Ticket {
 public:
  bool done() const { return done_.load(std::memory_order_acquire); }

  std::vector<Output> outputs;   // AllGather, AllToAll, ReduceScatter: one for each tensor
  std::vector<size_t> received;  // AllToAll: rows from each rank of the set
  int64_t value = -1;            // Join: the rank that joined last; AddSet: the set

  void rethrow() const;  // what the request ended with, if it failed

 private:
  friend class Sleepers;
  std::atomic<bool> done_{false}, has_sleeper_{false};
  std::exception_ptr error_;
};

// Callers of one engine that sleep until their tickets are done.
class Sleepers {
 public:
  void sleep_until_done(Ticket& ticket, double seconds);
  // Once for every ticket, by whoever drives the engine.
  void complete(Ticket& ticket, std::exception_ptr error);

 private:
  std::mutex mutex_;
  std::condition_variable completed_;
};

}  // namespace roundel::engine
