// How another process ended, as far as one that is not its parent can tell.
#pragma once

#include <string>

#include "base/fd.h"

namespace roundel {

// A pidfd of a process, none where it is not to be seen. Should the number have passed to another process meanwhile, it is that
// one's: whoever talks to the right one makes sure afterwards that it still does.
Fd open_process(int pid);

// The process of a pidfd, seen from here; 0 when it is not to be seen (another pid namespace).
int pid_of(const Fd& pidfd);

// "killed by signal 9 (Killed)", "exit code 3", or "" when it cannot be known. Read from /proc as long as nobody has reaped the
// process, and from the pidfd afterwards (Linux 6.15).
std::string how_it_ended(const Fd& pidfd, int pid);
// The same of one that may be ending just now: waits until it has, for at most `seconds`. "" when it lives on.
std::string how_it_ends(const Fd& pidfd, double seconds);

}  // namespace roundel
