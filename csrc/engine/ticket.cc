#include "engine/ticket.h"

#include <chrono>

namespace roundel::engine {

void Sleepers::sleep_until_done(Ticket& ticket, double seconds) {
  std::unique_lock lock(mutex_);
  ticket.has_sleeper_.store(true);
  completed_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return ticket.done_.load(); });
}

// Whoever waits says so, then looks; here it is done first, then looked for somebody who waits.
void Sleepers::complete(Ticket& ticket, std::exception_ptr error) {
  ticket.error_ = std::move(error);
  ticket.done_.store(true);
  if (!ticket.has_sleeper_.load()) return;
  const std::lock_guard lock(mutex_);
  completed_.notify_all();
}

void Ticket::rethrow() const {
  if (error_) std::rethrow_exception(error_);
}

}  // namespace roundel::engine
