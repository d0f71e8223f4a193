// The flight recorder: what this process did last, in 256 entries of fixed memory, for the time after a failure.
//
// One recorder per process. begin() from any thread; started(), waiting() and finished() from whoever executes the operation;
// entries() and doing() from any thread at any time: an entry that is being overwritten meanwhile is left out. The times are
// the processor's ticks, which cost a third of a clock call; they become seconds only when somebody reads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/signature.h"

namespace roundel::recorder {

inline constexpr size_t kEntries = 256;
inline constexpr size_t kNameBytes = 48;  // of the tensor's name, the rest is cut off

enum class State : uint32_t { Queued, Running, Done, Failed };
const char* name_of(State state);

// As it is read. Times are seconds since 1970, 0 for "not yet".
struct Entry {
  uint64_t number = 0;  // counts all operations of this process, from 1
  uint64_t sequence = 0;
  uint32_t epoch = 0;
  uint32_t group = 0;  // which communicator of the process
  Signature signature;
  uint64_t bytes = 0;
  std::string name;
  double queued = 0, started = 0, finished = 0;
  State state = State::Queued;
  std::vector<int> waiting_for;  // ranks, the first 64 of them, as seen last
};

// What is known when an operation comes. Returns its number.
uint64_t begin(uint64_t sequence, uint32_t epoch, const Signature& signature, uint64_t bytes, const std::string& name,
               State state, uint32_t group = 0);
void started(uint64_t number);
void finished(uint64_t number, State state);
void waiting(uint64_t number, const std::vector<int>& ranks);

// Oldest first.
std::vector<Entry> entries();

// The last entry in words: "in all-reduce 'fc.weight' (operation 17) for 3.2 s, waiting for rank 2".
std::string doing();

// One line of JSON per entry under a head line, to `prefix`.rank3.json, written beside and renamed. Throws Error.
void write(const std::string& prefix, int rank, int size, const std::string& why);

}  // namespace roundel::recorder
