// The rendezvous: every rank meets rank 0, tells where it is, and gets the table of all.
#pragma once

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "transport/doorbell.h"
#include "transport/monitor.h"
#include "transport/patience.h"

namespace roundel::transport {

class MpiJob;

// How this process finds its job; from the launcher's environment (python/roundel/launch/detect.py).
struct Job {
  Token token{};
  int rank = 0;
  int size = 1;
  uint32_t epoch = 1;
  std::string rendezvous;  // "host:port" of rank 0
  int rendezvous_fd = -1;  // rank 0: a listening socket inherited from the launcher, which stays the launcher's
  double start_timeout = 60;
  std::vector<int> members;     // of a group: the rank in the whole job of every rank; empty: this is the whole job
  std::function<void()> look;   // called several times a second while the start waits; may throw a plain Error to end it
  std::shared_ptr<MpiJob> mpi;  // the ranks as MPI knows them, where it was used to start
  uint32_t mpi_number = 0;      // this rank's proposal, where MPI can carry bytes between the ranks
  bool prefers_mpi = false;
  std::string host;  // ranks with equal ones share memory; empty: ROUNDEL_HOST_ID, else this machine and network namespace
};

struct Peer {
  int host = 0;  // numbered in order of first appearance
  Address address;
  uint32_t mpi_number = 0;
  bool prefers_mpi = false;
  Cores cores{};
};

struct Rendezvous {
  std::vector<Peer> peers;
  std::map<int, ControlLink> controls;  // rank 0: all others; elsewhere: rank 0
  Fd data_listener;                     // what peers[rank].address says
};

// Throws Timeout naming the ranks that did not arrive (on every rank that did), PeerLost naming one that arrived and went away,
// HandshakeError, or Error when ranks were started with different versions or settings.
Rendezvous meet(const Job& job, const Identity& identity, const Patience& patience);

}  // namespace roundel::transport
