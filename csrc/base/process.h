// How another process ended, as far as one that is not its parent can tell.
#pragma once

#include <string>

#include "base/fd.h"

namespace roundel {

// The process of a pidfd, seen from here; 0 when it is not to be seen (another pid namespace).
int pid_of(const Fd& pidfd);

// "killed by signal 9 (Killed)", "exit code 3", or "" when it cannot be known. Read from /proc as long as nobody has reaped the
// process, and from the pidfd afterwards (Linux 6.15).
std::string how_it_ended(const Fd& pidfd, int pid);

}  // namespace roundel
