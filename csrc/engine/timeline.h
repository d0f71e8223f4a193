// Timeline: what happened to every tensor and when, as a Chrome trace (chrome://tracing, ui.perfetto.dev): a process per rank,
// a row per tensor, a span per phase. Times are unix time, in microseconds since the base that torch.profiler's traces have:
// such a trace and this one line up in one view, and a double holds their nanoseconds. The file says which base that is.
//
// Threads: span() and instant() from any thread, without a lock: they copy the event into a ring, from which a thread of the
// timeline's own writes the file. When the ring is full, events are dropped and counted. start() and stop() from any thread.
// A file that ends anywhere, since its process did, is complete up to its last line; stop() closes the array.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <thread>

#include "base/clock.h"

namespace roundel::engine {

// What a span carries beside its time; what is not set is not written. Texts are literals or live as long as the process.
struct Details {
  size_t bytes = 0;
  const char* dtype = nullptr;           // "float32"
  const char* how = nullptr;             // transport or algorithm: "shm", "tcp"
  std::span<const int> waited_for = {};  // ranks, copied, at most 8 of them; {-1}: not known
  size_t fused = 0;                      // tensors in the same batch, this one included
};

class Timeline {
 public:
  // One per process; never destroyed, so that threads that outlive main() may still ask on().
  static Timeline& instance();

  // Opens `path` with {rank} replaced or, where it holds none, with .rank3 put before its extension, and goes on. Throws
  // InvalidArgument when the file cannot be written, or when the timeline is on already.
  void start(const std::string& path, int rank, int size, bool mark_cycles = false);
  // Writes what is in the ring, closes the file. No effect when off.
  void stop();

  bool on() const noexcept { return on_.load(std::memory_order_relaxed); }
  bool marks_cycles() const noexcept { return on() && marks_cycles_.load(std::memory_order_relaxed); }

  // A phase of a tensor's life. `phase` lives as long as the process. No effect when off.
  void span(std::string_view tensor, const char* phase, Clock::time_point begin, Clock::time_point end,
            const Details& details = {}) noexcept;
  // A moment on the rank's own row: "batch", "stall", ...
  void instant(std::string_view what) noexcept;

  uint64_t dropped() const noexcept { return dropped_.load(std::memory_order_relaxed); }  // events, since the last start()
  std::string path() const;                                                               // of the file being written, or ""

 private:
  struct Event;
  class Ring;
  class Writer;
  Timeline() = default;
  ~Timeline() = delete;

  void put(Event& event, std::string_view text, std::span<const int> ranks) noexcept;

  std::atomic<bool> on_{false}, marks_cycles_{false}, forked_{false};
  std::atomic<uint64_t> dropped_{0};
  std::atomic<uint32_t> session_{0};
  std::atomic<Ring*> ring_{nullptr};  // made by the first start() and never freed: some thread may be about to write there
  mutable std::mutex mutex_;          // of start(), stop() and path()
  std::unique_ptr<Writer> writer_;
};

}  // namespace roundel::engine
