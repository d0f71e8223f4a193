// The engine: requests under names, from any thread and in any order, agreed between the ranks and carried out in one order
// everywhere.
//
// A request's way: submit() puts it among the pending; the engine's thread tells its parent in the tree (tree.h) that this rank
// is ready, which tells its own parent when its whole host is (board.h); rank 0 announces what all are ready for; announcements
// go down the tree, and every rank carries them out (execute.h) in the order in which they come. Nothing waits for a clock:
// requests that become ready while others are carried out are announced together, and so the busier the engine, the larger its
// batches. After a request was announced once, a number stands for it.
//
// Ranks that ask for different things under one name all get the same Mismatch, and the job goes on. Any other failure ends the
// engine on all ranks.
//
// Threads: all public methods from any. All else is done by whoever drives the engine, which is one thread at a time: the
// engine's own, which sleeps until there is something to do, or a caller that waits for a request anyway and so needs no other
// thread to be woken. Only the driver calls the engine's communicators.
#pragma once

#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <thread>

#include "engine/board.h"
#include "engine/execute.h"
#include "engine/mailbox.h"
#include "engine/names.h"
#include "engine/tree.h"

namespace roundel::engine {

class Reader;
class Writer;

// An all-reduce of one array in place. The texts and shapes are the caller's.
struct InPlace {
  View array;
  std::span<const int64_t> shape;
  uint8_t op;
  double prescale, postscale;
  std::string_view name;
  uint32_t set;
};

class Engine {
 public:
  // All ranks of `parent` together; costs what split() costs.
  static std::shared_ptr<Engine> open(comm::Communicator& parent);
  ~Engine();

  // Throws InvalidArgument or DuplicateName before anything is changed, and what has ended the engine.
  std::shared_ptr<Ticket> submit(Request request, Buffers buffers);
  // The same for one array that is reduced in place, as ranks have agreed to do it before: without the pains of the first time.
  // Null where they have not; then submit() it.
  std::shared_ptr<Ticket> submit_again(const InPlace& again);
  // Blocks until done; throws what the request ended with. Throws what check_interrupt() throws too: the request then goes on.
  void wait(Ticket& ticket);

  int rank() const { return rank_; }
  Stats& stats() { return stats_; }
  void start_timeline(const std::string& path, bool mark_cycles);
  void stop_timeline();

  // Process sets by number; 0 is the whole job.
  std::map<uint32_t, std::vector<int>> sets() const;

  // Ends pending requests with an error and says goodbye. Any number of times.
  void close();

 private:
  explicit Engine(std::shared_ptr<comm::Communicator> comm);

  // engine.cc: callers' side
  void validate(const Request& request, const Buffers& buffers) const;
  std::vector<size_t> even_splits(const Request& request, size_t rows) const;
  std::shared_ptr<Ticket> enter(const SharedRequest& sealed, std::unique_lock<std::mutex> lock);
  std::string next_name(Kind kind, uint32_t set);

  // drive.cc: whoever drives
  void background();
  void drive(const Ticket& ticket);
  void hand_back();
  bool try_to_drive(const Ticket& ticket);
  bool is_driven_here() const;
  void refuse_nested_call() const;
  bool round();
  bool disturbed() const;
  bool take_submissions();
  void handle(int from, const std::string& message);
  void handle_reports(int from, std::string_view reports);
  void look_around();
  void check_stalls();
  std::vector<Board::Stalled> stalled(double seconds) const;
  void refuse_departed();
  void refuse_left();
  void say_goodbye();
  void flush(const std::vector<int>& neighbours, double seconds);
  void end();
  void fail(std::exception_ptr error);
  void end_sets(const std::exception_ptr& error);
  void end_pending(const std::exception_ptr& error);

  // agree.cc: what this node knows turns into reports and announcements
  void note_joined(int rank);
  bool advance();
  void report(std::span<const Variant> variants);
  void report(const Variant& variant, Writer& out);
  std::string announcement();
  void announce(const std::string& message);
  void put_request(Writer& out, const SharedRequest& request, bool learn_it);
  SharedRequest take_request(Reader& in);
  void perform(const std::string& announcement);
  void refuse(std::string_view key, const std::string& why);
  void run(uint32_t set, std::vector<Work>& works);
  void open_set(uint32_t set, std::shared_ptr<comm::Communicator> comm);
  void add_set(const Work& work);
  void remove_set(const Work& work);
  void finish(Slot& slot, const std::exception_ptr& error, int64_t value = -1);
  void finish_all(std::span<Work* const> works);
  std::shared_ptr<Ticket> take_pending(Slot& slot);
  void catch_up(Kind kind, uint32_t set, const std::string& name);

  std::shared_ptr<comm::Communicator> comm_;
  const int rank_, size_;
  const Tree tree_;
  size_t fusion_bytes_;
  Stats stats_;
  double background_spin_, timeout_, stall_seconds_, shutdown_seconds_;
  double first_bound_;  // of a wait: before it, nobody is told

  mutable std::mutex mutex_;  // guards what follows
  Names names_;
  Roster<&Slot::pending> pending_;
  std::vector<SharedRequest> incoming_;  // what the driver has not seen yet
  std::map<uint32_t, std::vector<int>> sets_;
  std::map<std::pair<Kind, uint32_t>, uint64_t> unnamed_;
  std::exception_ptr failure_;
  bool joining_ = false;

  std::atomic<bool> has_incoming_{false}, closing_{false};
  Sleepers sleepers_;
  std::mutex close_mutex_;
  std::thread thread_;

  std::mutex driving_;             // the role of the driver
  std::atomic<int> wanted_{0};     // callers that would rather drive than wait for the engine's thread
  std::atomic<int> under_way_{0};  // requests
  bool ended_ = false;             // of the driver, as all that follows
  Board board_;
  std::unique_ptr<Mailbox> mailbox_;
  std::map<uint32_t, Executor> executors_;  // of the sets that this rank is in
  uint32_t next_set_ = 1;
  std::vector<SharedRequest> by_number_;
  std::vector<std::shared_ptr<Ticket>> finished_;  // memory that finish_all() uses again
  SharedRequest join_;                             // the same on all ranks
  std::vector<int> departed_, joined_;             // neighbours that have left; ranks that have joined, the last one last
  std::set<std::string> warned_;                   // encoded requests whose stall was told
  Clock::time_point next_check_{};
  Clock::time_point last_progress_ = Clock::now();  // when somebody joined, or anything was announced: a join waits from there
};

}  // namespace roundel::engine
