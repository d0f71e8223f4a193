// The failure detector: one thread per rank that never needs the GIL, and the one place that knows who is alive.
//
// It watches the processes of this host (a pidfd each, and a unix connection for where there is none) and the control
// connections: a star around rank 0, which passes on what any rank reports. Whatever it notices first is the job's trouble:
// every wait of every rank ends with it. A rank that leaves in order says so; only operations that still need it fail.
//
// Silence: heartbeats travel both ways on every control connection. Whom rank 0 has not heard for dead_seconds is excluded: the
// others raise PeerLost, and the excluded rank, should it still live, finds word of it and raises Fenced. A rank that has not
// heard rank 0 for as long fences itself. So of two sides of a cut the one with rank 0 is the job. A rank that is merely slow
// is never excluded: this thread beats however long the others compute, hold the GIL or wait.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/signature.h"
#include "transport/handshake.h"

namespace roundel::transport {

// A peer on this host: the unix connection to it and a pidfd of its process (none where the kernel has none or hides the pid).
struct Watch {
  int rank;
  Fd connection;
  Fd process;
};

// A control connection, and a pidfd of the process at its other end where that is on this host: it tells how it ended.
struct ControlLink {
  Fd connection;
  Fd process;
};

struct MonitorTimes {
  double dead_seconds = 10;   // of silence, after which a rank counts as lost
  double start_seconds = 60;  // how long a peer's first heartbeat may take: its sockets may open later than ours
  static MonitorTimes from_settings(double start_seconds);
};

// Control connections carry nothing but these, whole.
struct ControlMessage {
  static constexpr uint32_t kMagic = 0x4c544352;  // "RCTL"
  enum class Type : uint8_t { Beat, Trouble, Left, Ask, Told };
  static constexpr int kMaxRanks = 24;  // more than these in one report are counted in its text only

  uint32_t magic = kMagic;
  uint32_t epoch = 0;
  int32_t about = -1;  // Left, Ask, Told: who
  Type type = Type::Beat;
  ErrorKind kind = ErrorKind::Generic;
  uint16_t rank_count = 0;
  int32_t ranks[kMaxRanks] = {};  // Trouble: the lost ones; Ask, Told: who asked
  uint64_t sequence = 0;          // Told: the operation in which the answering rank has waited last, 0 for none
  Signature signature;            // of that operation
  char text[376] = {};
};
static_assert(sizeof(ControlMessage) == 512);

class Monitor {
 public:
  static constexpr double kVerdictSeconds = 0.3;  // for a report on its way: by way of rank 0 it takes milliseconds

  // `controls`: on rank 0 a connection to every other rank, elsewhere one to rank 0. `wake` is called from the monitor's thread
  // after every change.
  Monitor(const Identity& identity, std::map<int, ControlLink> controls, std::function<void()> wake, MonitorTimes times = {});
  ~Monitor();

  // Watches these as well; once, before leave().
  void add(std::vector<Watch> watches);

  // Any thread; a relaxed load each while all is well.
  bool troubled() const { return troubled_.load(std::memory_order_acquire); }
  bool has_left(int rank) const;
  bool somebody_left() const { return left_count_.load(std::memory_order_acquire) > 0; }

  // Throws the job's trouble as PeerLost, Mismatch, ..., or returns. `during`: "all-reduce 'fc.weight' (operation 17)".
  void raise_trouble(const std::string& during) const;
  // Throws PeerLost when one of `needed` has left.
  void raise_if_left(const std::vector<int>& needed, const std::string& during) const;

  // Somebody has told what may follow from a loss of which the report is still on its way. Waits a moment for that report and
  // throws it.
  void await_trouble(const std::string& during) const;

  // Makes an error of this rank everybody's, this rank's later operations included. The first one stays.
  void report(const Error& error, const std::vector<int>& ranks);

  // Asks the monitor of another rank what that rank is doing; what it said within the last seconds, or "". The answer comes
  // by way of rank 0, also from a rank that computes or holds the GIL. Any thread.
  void ask(int rank);
  std::string answer_of(int rank) const;

  // In which collective this rank waits, for whoever asks; and what another rank, by its last answer, has called as the
  // operation of this number, nothing when it has not said. Two ranks that both only receive find out this way that they wait
  // in vain.
  void set_waiting(uint64_t sequence, const Signature& signature);
  std::optional<Signature> called_by(int rank, uint64_t sequence) const;

  // Says goodbye. Rank 0, which passes messages on, stays until the others have left too or the deadline passes.
  void leave(Deadline deadline);
  void await_others(Deadline deadline) const;  // its second part

 private:
  struct Trouble {
    ErrorKind kind;
    std::vector<int> ranks;  // lost ones, ascending
    std::string text;
  };
  struct Control {
    Fd fd;
    Fd process;
    int pid = 0;
    Clock::time_point heard;  // when the peer said something last
    std::atomic<bool> excluded{false};
    size_t got = 0;  // of `incoming`
    ControlMessage incoming;
  };
  struct WatchedProcess {
    Watch watch;
    int pid;  // to say how it ended; 0 where it is not to be seen
  };

  struct Wait {
    uint64_t sequence = 0;
    Signature signature;
  };
  struct Answer {
    std::string text;
    Wait wait;
    Clock::time_point told;
  };

  struct Suspect {
    int rank;
    std::string how;
    Clock::time_point due;  // then it counts as lost, if nobody has told more by then
  };

  void watch();
  void poke();
  void take_added();
  double attend(Clock::time_point now);
  void judge_silence(Clock::time_point now);
  void exclude(const std::vector<int>& ranks);
  void fence();
  void lost(int rank, const std::string& how);
  void lost_soon(int rank, const std::string& how);
  void lose_suspects(Clock::time_point now);
  std::string cause_of(int rank) const;
  bool is_known_lost(int rank) const;
  void mark_left(int rank);
  void read_control(int rank, Control& control);
  void handle(int rank, ControlMessage message);
  void read_watch(WatchedProcess& watched, bool process_ended);
  bool send(const Control& to, const ControlMessage& message, Deadline deadline);
  void offer(int rank, const ControlMessage& message);
  void pass_on(const ControlMessage& message, int except);
  void accept_trouble(const Trouble& trouble);
  ControlMessage make_message() const;

  Member identity_;
  MonitorTimes times_;
  std::map<int, Control> controls_;      // the map itself never changes
  std::vector<WatchedProcess> watches_;  // the thread's; changed under sending_
  std::vector<WatchedProcess> added_;    // for it to take; guarded by sending_
  std::function<void()> wake_;
  Fd event_;  // wakes the thread
  std::atomic<bool> stop_{false};
  std::atomic<bool> troubled_{false};
  std::atomic<int> left_count_{0};
  std::vector<Suspect> suspects_;             // of the thread
  Clock::time_point next_beat_, last_round_;  // of the thread
  std::mutex sending_;                        // one message at a time; also held to close a connection
  mutable std::mutex mutex_;                  // guards trouble_, left_, waiting_ and answers_; never held while sending
  Trouble trouble_;
  std::vector<bool> left_;
  Wait waiting_;
  std::map<int, Answer> answers_;
  std::thread thread_;
};

}  // namespace roundel::transport
