#include "base/interrupt.h"

namespace roundel {
namespace {
void (*g_check)() = [] {};
}

void set_interrupt_check(void (*check)()) { g_check = check; }
void check_interrupt() { g_check(); }

}  // namespace roundel
