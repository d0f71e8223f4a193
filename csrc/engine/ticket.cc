#include "engine/ticket.h"

#include <chrono>

#include "base/interrupt.h"

namespace roundel::engine {
namespace {

constexpr std::chrono::milliseconds kCheckPeriod{50};  // for signals

}  // namespace

void Ticket::wait() {
  std::unique_lock lock(mutex_);
  while (!completed_.wait_for(lock, kCheckPeriod, [this] { return done(); })) {
    lock.unlock();
    check_interrupt();
    lock.lock();
  }
  if (error_) std::rethrow_exception(error_);
}

void Ticket::complete(std::exception_ptr error) {
  {
    const std::lock_guard lock(mutex_);
    error_ = std::move(error);
    done_.store(true, std::memory_order_release);
  }
  completed_.notify_all();
}

}  // namespace roundel::engine
