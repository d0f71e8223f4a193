#include "engine/ticket.h"

#include <chrono>

namespace roundel::engine {

void Ticket::sleep_until_done(double seconds) {
  std::unique_lock lock(mutex_);
  has_sleeper_.store(true);
  completed_.wait_for(lock, std::chrono::duration<double>(seconds), [this] { return done_.load(); });
}

// Whoever waits says so, then looks; here it is done first, then looked for somebody who waits.
void Ticket::complete(std::exception_ptr error) {
  error_ = std::move(error);
  done_.store(true);
  if (!has_sleeper_.load()) return;
  const std::lock_guard lock(mutex_);
  completed_.notify_all();
}

void Ticket::rethrow() const {
  if (error_) std::rethrow_exception(error_);
}

}  // namespace roundel::engine
