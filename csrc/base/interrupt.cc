#include "base/interrupt.h"

namespace roundel {
namespace {
void (*g_check)() = [] {};
thread_local int t_uninterrupted = 0;
}  // namespace

void set_interrupt_check(void (*check)()) { g_check = check; }
void check_interrupt() {
  if (t_uninterrupted == 0) g_check();
}

NoInterrupts::NoInterrupts() { ++t_uninterrupted; }
NoInterrupts::~NoInterrupts() { --t_uninterrupted; }

}  // namespace roundel
