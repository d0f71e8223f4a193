// Doorbells: how a sleeping rank is woken by whoever has changed what it waits for.
//
// Invariant (Dekker): a waiter announces its sleep, fences, then looks again; a ringer changes the flag, fences, then looks
// whether somebody sleeps. One of the two always sees the other. One sleeper per doorbell; anybody may ring. Cost of ring() to
// a rank that is awake: a fence and a load.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "base/clock.h"
#include "base/fd.h"

namespace roundel::transport {

// Lives in shared memory; all zero is a valid start.
struct DoorbellState {
  std::atomic<uint32_t> word;  // futex
  std::atomic<uint32_t> mode;  // Mode
};

class Doorbell {
 public:
  Doorbell() = default;
  // `state` outlives the doorbell; `event` is an eventfd shared by all who ring.
  Doorbell(DoorbellState* state, Fd event) : state_(state), event_(std::move(event)) {}

  void ring() const;

  // Owner only. Sleeps until ready(), a ring or the deadline, and at most 100 ms; returns to let the caller look around.
  template <class Ready>
  void sleep_on_futex(Ready ready, Deadline deadline) {
    const uint32_t seen = announce(Mode::Futex);
    if (!ready()) futex_wait(seen, deadline);
    state_->mode.store(static_cast<uint32_t>(Mode::Awake), std::memory_order_relaxed);
  }

  // Owner only: rings make event() readable between these two. Look again between announce and the poll.
  void announce_event_sleep() { announce(Mode::Event); }
  void awake();
  int event() const { return event_.get(); }

 private:
  enum class Mode : uint32_t { Awake, Futex, Event };
  uint32_t announce(Mode mode);
  void futex_wait(uint32_t seen, Deadline deadline);

  DoorbellState* state_ = nullptr;
  Fd event_;
};

// How long to spin before sleeping: not at all when there are more ranks than cores, since then the spinner keeps its peer from
// running.
class Backoff {
 public:
  explicit Backoff(double spin_seconds) : spin_(spin_seconds) {}
  // True: try again at once (after a pause or a yield). False: time to sleep.
  bool again();
  void reset() { rounds_ = 0; }

 private:
  double spin_;
  uint32_t rounds_ = 0;
  Deadline until_ = Deadline::after(0);
};

// The cores of a host that a rank may use, a bit for each.
using Cores = std::array<uint64_t, 16>;
Cores own_cores();

// ROUNDEL_SPIN_MICROSECONDS, or 0 when `local_size` ranks do not each have a core among these: of all of them together, since
// a launcher may bind each to its own.
double spin_seconds(int local_size, const Cores& cores = own_cores());

}  // namespace roundel::transport
