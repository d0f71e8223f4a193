// The failure detector: one thread per rank that never needs the GIL, and the one place that knows who is alive.
//
// It watches the processes of this host (a pidfd each, and a unix connection for where there is none) and the control
// connections: a star around rank 0, which passes on what any rank reports. Whatever it notices first is the job's trouble:
// every wait of every rank ends with it. A rank that leaves in order says so; only operations that still need it fail.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "transport/handshake.h"

namespace roundel::transport {

// A peer on this host: the unix connection to it and a pidfd of its process (none where the kernel has none or hides the pid).
struct Watch {
  int rank;
  Fd connection;
  Fd process;
};

struct ControlMessage;

class Monitor {
 public:
  // `controls`: on rank 0 a connection to every other rank, elsewhere one to rank 0. `wake` is called from the monitor's thread
  // after every change.
  Monitor(const Identity& identity, std::map<int, Fd> controls, std::vector<Watch> watches, std::function<void()> wake);
  ~Monitor();

  // Any thread; a relaxed load each while all is well.
  bool troubled() const { return troubled_.load(std::memory_order_acquire); }
  bool somebody_left() const { return left_count_.load(std::memory_order_acquire) > 0; }

  // Throws the job's trouble as PeerLost, Mismatch, ..., or returns. `during`: "all-reduce 'fc.weight' (operation 17)".
  void raise_trouble(const std::string& during) const;
  // Throws PeerLost when one of `needed` has left.
  void raise_if_left(const std::vector<int>& needed, const std::string& during) const;

  // A peer has closed its connection or left: perhaps because of a loss of which the report is still on its way. Waits a moment
  // for that report and throws it.
  void await_trouble(const std::string& during) const;

  // Makes an error of this rank everybody's, this rank's later operations included. The first one stays.
  void report(const Error& error, const std::vector<int>& ranks);

  // Says goodbye. Rank 0, which passes messages on, stays until the others have left too or the deadline passes.
  void leave(Deadline deadline);

 private:
  struct Trouble {
    ErrorKind kind;
    std::vector<int> ranks;  // lost ones, ascending
    std::string text;
  };
  void watch();
  void lost(int rank, const char* how);
  void mark_left(int rank);
  void pass_on(const ControlMessage& message, int except);
  void accept_trouble(const Trouble& trouble);
  void read_control(int rank, Fd& fd);
  void read_watch(Watch& watch, bool process_ended);

  Member identity_;
  std::map<int, Fd> controls_;
  std::vector<Watch> watches_;
  std::function<void()> wake_;
  Fd stop_event_;
  std::atomic<bool> stop_{false};
  std::atomic<bool> troubled_{false};
  std::atomic<int> left_count_{0};
  mutable std::mutex mutex_;  // guards trouble_, left_, sending on and closing of connections
  Trouble trouble_;
  std::vector<bool> left_;
  std::thread thread_;
};

}  // namespace roundel::transport
