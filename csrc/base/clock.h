// Monotonic time and deadlines. A Deadline is passed down to every wait; nothing waits without one.
#pragma once

#include <time.h>

#include <algorithm>
#include <chrono>

namespace roundel {

using Clock = std::chrono::steady_clock;

class Deadline {
 public:
  Deadline() = default;  // passed
  static Deadline after(double seconds) {
    seconds = std::min(seconds, 1e9);  // "never" in a clock that counts nanoseconds
    return Deadline(Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds)));
  }
  // The same by a clock that costs a fifth and moves every few milliseconds: never early, some milliseconds late.
  static Deadline after_roughly(double seconds) {
    timespec now;
    ::clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    const auto at = Clock::time_point(std::chrono::seconds(now.tv_sec) + std::chrono::nanoseconds(now.tv_nsec) +
                                      std::chrono::milliseconds(10));
    return Deadline(at + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(std::min(seconds, 1e9))));
  }
  bool passed() const { return Clock::now() >= at_; }
  double seconds_left() const { return std::max(0.0, std::chrono::duration<double>(at_ - Clock::now()).count()); }
  // For poll and epoll_wait: rounded up, so that a wait does not wake just before its deadline and spin.
  int milliseconds_left(int at_most) const { return static_cast<int>(std::min<double>(at_most, seconds_left() * 1e3 + 1)); }

 private:
  explicit Deadline(Clock::time_point at) : at_(at) {}
  Clock::time_point at_{};
};

}  // namespace roundel
