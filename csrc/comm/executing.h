// Which communicators this thread runs an operation of, for comm/communicator's files.
#pragma once

namespace roundel::comm {

class Communicator;

// Innermost first: a signal handler, which may run operations of other communicators, must not wait for what its own thread
// holds.
struct Executing {
  const Communicator* communicator;
  const Executing* outer;
};
inline thread_local const Executing* t_executing = nullptr;

inline bool executes_here(const Communicator* communicator) {
  for (const Executing* e = t_executing; e != nullptr; e = e->outer)
    if (e->communicator == communicator) return true;
  return false;
}

}  // namespace roundel::comm
