// The only factory: makes a rank's world from how it was started. Everything above asks the world, nobody asks a socket.
#pragma once

#include <memory>
#include <vector>

#include "transport/bootstrap.h"
#include "transport/monitor.h"
#include "transport/shm.h"
#include "transport/transport.h"

namespace roundel::transport {

struct World {
  Secret group_key;          // from which the tokens of groups derive
  std::vector<int> members;  // the rank in the whole job of every rank: 0, 1, ... unless this is a group
  bool is_group = false;
  uint32_t group = 0;   // which group of this process, for the flight recorder; 0: the whole job
  Address address;      // of the interface that leads to the others, where there are others
  uint64_t splits = 0;  // groups made of this world so far
  int rank = 0;
  int size = 1;
  uint32_t epoch = 1;
  std::vector<int> host;        // host[r], numbered in order of first appearance
  std::vector<int> local;       // global ranks on this host, ascending
  bool all_local = true;        // every pair talks through shared memory
  bool mixed = false;           // some pairs do, others do not; the same on every rank, unlike memory != nullptr
  bool by_mpi = false;          // those that do not use MPI's messages, not tcp
  std::shared_ptr<MpiJob> mpi;  // of the whole job
  double spin = 0;              // seconds, see Backoff

  // Destroyed in reverse order: the monitor's thread first of all.
  std::unique_ptr<DoorbellState> private_bell_state;
  std::unique_ptr<Doorbell> private_bell;  // where there is no shared memory
  std::unique_ptr<SharedMemory> memory;    // none when this rank is alone on its host or tcp is forced
  std::unique_ptr<Transport> transport;
  std::unique_ptr<Monitor> monitor;

  Doorbell& bell() { return memory != nullptr ? memory->bell() : *private_bell; }
};

// Meets all ranks and opens shared memory and sockets to them. Blocks until all are there; throws Timeout, HandshakeError,
// Error.
std::unique_ptr<World> open_world(const Job& job);

}  // namespace roundel::transport
