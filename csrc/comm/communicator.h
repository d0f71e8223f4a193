// Communicators: ordered collectives among all ranks of a world. All ranks call the same operations in the same order.
//
// Threads: any thread may call. A blocking call runs on its caller's thread when nothing is under way (no hand-off, about a
// microsecond); otherwise, and for start(), the communicator's progress thread runs it in the order of arrival. Point-to-point
// transfers start at once and run beside collectives. Whoever executes holds `executing_`; transports see one thread at a time.
//
// The first failure ends the communicator: it is reported to all ranks, and every pending and later call throws it.
// InvalidArgument is not a failure: it is thrown before anything is changed.
#pragma once

#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <thread>

#include "base/error.h"
#include "base/recorder.h"
#include "comm/operation.h"
#include "transport/open.h"

namespace roundel::comm {

// The state of an operation that was started. wait() from any thread; the buffers belong to the operation until done().
class Request {
 public:
  bool done() const { return done_.load(std::memory_order_acquire); }
  // Blocks until done; throws what the operation threw. Throws what check_interrupt() throws too: the operation then goes on.
  void wait();

 private:
  friend class Communicator;
  void complete(std::exception_ptr error);
  std::atomic<bool> done_{false};
  std::exception_ptr error_;
  std::mutex mutex_;
  std::condition_variable completed_;
};

class Communicator : public std::enable_shared_from_this<Communicator> {
 public:
  // Shared memory for ranks of one host, plans over the transport otherwise (or when ROUNDEL_ALGORITHM forces one).
  static std::shared_ptr<Communicator> open(std::shared_ptr<transport::World> world);
  virtual ~Communicator();

  void run(Operation operation);
  std::shared_ptr<Request> start(Operation operation);
  // All or none: nothing is started when one of them is refused.
  std::vector<std::shared_ptr<Request>> start(std::vector<Operation> operations);

  // For split(): the next group's token, and who leaves before this communicator does; between its operations, while it needs
  // all ranks, throws what should end that.
  transport::Token token_of_group(int color) { return transport::token_of_group(world_->group_key, world_->splits++, color); }
  void adopt(const std::shared_ptr<Communicator>& child);
  void attend_all(const std::string& during);

  // Memory that peers of this host can reach, where there is any: collectives on it need no staging. Freed by release(), which
  // after a failure keeps it until the communicator goes: a peer that comes late may still write there. release() takes private
  // memory from aligned_alloc() too.
  std::byte* allocate(size_t bytes);
  void release(std::byte* data);

  // Ends pending operations with an error and stops the progress thread. Any thread, any number of times; from inside an
  // operation (a signal handler) it only marks the end. In a forked child, as leave(), it does nothing.
  void close();

  // close(), says goodbye to the other ranks, and closes all connections; the same for the groups made of this communicator. A
  // rank 0, of the job or of a group, then waits for the others to leave too: up to `seconds` in all, not for each group.
  void leave(double seconds);

  // For the engine, the only caller of its communicators, which waits for control messages of its own between operations:
  transport::Transport& transport() { return *world_->transport; }
  void wake() { world_->bell().ring(); }
  // check_interrupt(), as from inside an operation: a signal handler may end this communicator, but not call or destroy it.
  void check_interrupt_inside() const;
  // Throws what should end a wait, such as `during`.
  void attend(const std::string& during) const;
  // Ends the communicator with an error, and returns it in its final words.
  std::exception_ptr end(std::exception_ptr error, const std::string& during);
  // `hook` is called when a communicator above this one is left, before anything of this one ends.
  void before_leaving(std::function<void()> hook);

  virtual const char* name() const = 0;  // "shm", "shm+tcp", ...
  const transport::World& world() const { return *world_; }

 protected:
  explicit Communicator(std::shared_ptr<transport::World> world);

  // Runs one collective, blocking. Must call look_around() in every wait.
  virtual void execute(const Operation& operation) = 0;

  // Ranks that have not begun this operation, as far as can be seen from here.
  virtual std::vector<int> missing(const Operation&) const { return {}; }

  // Raises what should end the current wait (trouble, shutdown, deadline) and keeps point-to-point transfers moving.
  // `needed`: the ranks that the wait needs, asked for only when it matters; one that has left ends it.
  using Needed = std::function<std::vector<int>()>;
  void look_around(const Operation& operation, const Needed& needed);

  // Something that look_around() acts on has happened: a sleep must not begin.
  bool disturbed() const;

  std::shared_ptr<transport::World> world_;

 private:
  struct Queued {
    Operation operation;
    std::shared_ptr<Request> request;
  };
  struct Transfer {
    Queued queued;
    std::vector<transport::Ticket> tickets;
  };

  void prepare(Operation& operation);
  void perform(const Operation& operation);
  std::byte* fused_buffer(size_t bytes);
  void refuse_nested_call() const;
  void wait_for_queued(Request& request);
  void check_deadlines();
  void watch_stall(const Operation& operation, const std::vector<int>& waited_for);
  void refuse_other_calls(const Operation& operation, const std::vector<int>& waited_for) const;
  std::string seen_last(const std::vector<int>& ranks) const;
  uint64_t record(const Operation& operation, recorder::State state) const;
  void record_failure(const Operation* during, const std::exception_ptr& error) const;
  void enqueue(std::list<Queued> operations);  // all or none; with mutex_ held
  void progress_loop();
  void work();
  void post(Transfer& transfer);
  void take_transfers();
  void reap_transfers();
  PeerLost in_terms_of_job(const PeerLost& loss) const;
  void raise_trouble(const std::string& during, bool last);
  std::vector<int> without_goodbye(const PeerLost& loss);
  std::exception_ptr last_word(const PeerLost& loss, const std::string& during);
  std::exception_ptr fail(std::exception_ptr error, const Operation* operation, const std::string& during = "an operation");
  void end_pending(const std::exception_ptr& error);
  void say_goodbye();
  void await_goodbyes(Deadline deadline);
  [[noreturn]] void raise_ended();

  std::mutex mutex_;  // guards the queues, executing_, failure_ and sequence numbers
  std::condition_variable ready_;
  std::list<Queued> collectives_, new_transfers_;
  std::atomic<bool> has_new_transfers_{false};
  bool executing_ = false;
  std::exception_ptr failure_;
  std::atomic<bool> closing_{false};
  std::thread progress_;
  Clock::time_point last_check_{}, last_asked_{};  // of whoever holds executing_
  uint64_t warned_ = 0;                            // the operation whose stall was warned of last
  std::atomic<bool> interrupted_{false};
  std::atomic<bool> failed_{false};
  std::mutex close_mutex_;
  bool said_goodbye_ = false;                          // guarded by close_mutex_
  std::vector<std::weak_ptr<Communicator>> children_;  // guarded by mutex_
  std::function<void()> before_leaving_;               // as well
  std::weak_ptr<Communicator> job_;                    // that a group is of; set by adopt()
  double default_timeout_, stall_seconds_;
  uint64_t next_sequence_ = 1;

  std::byte* fused_ = nullptr;  // where fused operations are packed; of whoever holds executing_
  size_t fused_bytes_ = 0;
  std::list<Transfer> transfers_;  // of whoever holds executing_
  std::vector<uint64_t> sent_, received_;
};

}  // namespace roundel::comm
