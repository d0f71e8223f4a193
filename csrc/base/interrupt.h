// Ctrl-C in waits. The core knows no Python; bind/ sets a check that throws when a signal is pending, and every wait that a
// caller may sit in calls it a few times a second.
#pragma once

namespace roundel {

// `check` does nothing on threads that no signal is for. Set once, before anything waits.
void set_interrupt_check(void (*check)());
void check_interrupt();

// While one of these lives, check_interrupt() does nothing on its thread: for work on behalf of others.
class NoInterrupts {
 public:
  NoInterrupts();
  ~NoInterrupts();
  NoInterrupts(const NoInterrupts&) = delete;
  NoInterrupts& operator=(const NoInterrupts&) = delete;
};

}  // namespace roundel
