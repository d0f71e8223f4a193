// Driving the engine: what its driver waits for, how the role changes hands, and how all ends.
#include <algorithm>

#include "base/error.h"
#include "base/fd.h"
#include "base/interrupt.h"
#include "base/log.h"
#include "engine/bytes.h"
#include "engine/engine.h"
#include "engine/message.h"

namespace roundel::engine {
namespace {

constexpr std::chrono::milliseconds kCheckPeriod{500};  // for stalls and timeouts
constexpr double kPatience = 1;                         // seconds after which rank 0's better text for a timeout must have come
constexpr double kHandOnEarly = 0.25;                   // of the stall time: a host tells who is ready though not all are
constexpr double kCheckInterrupts = 0.05;               // seconds between looks for signals
constexpr double kGoodbye = 1;                          // seconds for the last messages to leave

const std::string kWait = "a wait for requests";

thread_local const Engine* t_driven = nullptr;  // by a caller on this thread

}  // namespace

// The engine's thread. Leaves the driving to a caller that wants it.
void Engine::background() {
  for (;; std::this_thread::yield()) {
    {
      const std::lock_guard driver(driving_);
      if (ended_) return;
      try {
        comm_->transport().awake();
        transport::Backoff backoff(background_spin_);
        while (!closing_ && wanted_ == 0 && (round() || (under_way_ > 0 && backoff.again()))) continue;
        if (closing_) return end();
        if (wanted_ > 0) continue;
        look_around();
        if (!comm_->transport().arm([this] { return disturbed(); })) continue;
      } catch (...) {
        return fail(std::current_exception());
      }
    }
    comm_->transport().doze();
  }
}

// A caller, until its ticket is done. What it does may be others' too, so only its waits can be interrupted.
void Engine::drive(const Ticket& ticket) {
  comm_->transport().awake();
  while (!ended_ && !closing_ && !ticket.done()) {
    try {
      const NoInterrupts at_work;
      if (round()) continue;
      look_around();
      comm_->transport().sleep(Deadline::after(kCheckInterrupts), [this] { return disturbed(); });
    } catch (...) {
      return fail(std::current_exception());
    }
    comm_->check_interrupt_inside();
  }
}

// From here on whatever comes wakes the engine's thread.
void Engine::hand_back() {
  try {
    const NoInterrupts at_work;
    while (!ended_ && !closing_ && !comm_->transport().arm([this] { return disturbed(); })) round();
  } catch (...) {
    fail(std::current_exception());
  }
}

// False when somebody else drives.
bool Engine::try_to_drive(const Ticket& ticket) {
  const std::unique_lock driver(driving_, std::try_to_lock);
  if (!driver || closing_) return false;
  std::exception_ptr interrupted;
  const Engine* outer = std::exchange(t_driven, this);
  try {
    drive(ticket);
  } catch (...) {
    interrupted = std::current_exception();
  }
  t_driven = outer;
  hand_back();
  if (interrupted) std::rethrow_exception(interrupted);
  return true;
}

// A signal handler runs on a thread that drives; it must not wait for what its own thread does.
void Engine::refuse_nested_call() const {
  if (is_driven_here())
    throw Error(format("rank %d: called from inside another operation, perhaps by a signal handler", rank_));
}

bool Engine::is_driven_here() const { return t_driven == this; }

void Engine::wait(Ticket& ticket) {
  if (!ticket.done()) {
    if (in_forked_child()) throw Error(format("this process was forked from rank %d and is no rank itself", rank_));
    refuse_nested_call();
  }
  while (!ticket.done()) {
    if (try_to_drive(ticket)) continue;
    ++wanted_;
    transport::Backoff backoff(comm_->world().spin);
    try {
      while (!ticket.done() && backoff.again() && !try_to_drive(ticket)) continue;
    } catch (...) {
      --wanted_;
      throw;
    }
    --wanted_;
    if (ticket.done()) break;
    sleepers_.sleep_until_done(ticket, kCheckInterrupts);
    check_interrupt();
  }
  ticket.rethrow();
}

bool Engine::disturbed() const {
  return closing_ || has_incoming_.load(std::memory_order_acquire) || comm_->world().monitor->troubled();
}

// One look at everything. False when there was nothing to do. What has come is done before any trouble is told.
bool Engine::round() {
  bool moved = take_submissions();
  while (auto message = mailbox_->receive()) {
    handle(message->first, message->second);
    moved = true;
  }
  moved |= advance();
  comm_->attend(kWait);
  return moved || comm_->transport().poll();
}

bool Engine::take_submissions() {
  if (!has_incoming_.load(std::memory_order_acquire)) return false;
  std::vector<SharedRequest> requests;
  {
    const std::lock_guard lock(mutex_);
    requests.swap(incoming_);
    has_incoming_.store(false, std::memory_order_relaxed);
  }
  const auto now = Clock::now();
  for (const SharedRequest& request : requests)
    if (request->request.kind == Kind::Join)
      note_joined(rank_);
    else
      board_.ready(request, {&rank_, 1}, now);
  return true;
}

void Engine::handle(int from, const std::string& message) {
  if (from != tree_.parent) return handle_reports(from, message);
  if (message.empty()) {  // its goodbye
    departed_.push_back(from);
    return mailbox_->dismiss(from);
  }
  advance();  // what is complete goes first: the announcement may be of it, and its name may come again at once
  announce(message);
}

void Engine::handle_reports(int from, std::string_view message) {
  const auto child =
      static_cast<size_t>(std::find(tree_.children.begin(), tree_.children.end(), from) - tree_.children.begin());
  if (message.empty()) {
    departed_.push_back(from);
    return mailbox_->dismiss(from);
  }
  const auto now = Clock::now();
  std::vector<int> members;
  int64_t of_set = -1;
  Reader in(message);
  while (!in.done()) switch (in.number<Report>()) {
      case Report::ReadyAll: {
        const SharedRequest request = take_request(in);
        if (std::exchange(of_set, request->request.set) != request->request.set)
          members = board_.members_of(request->request, tree_.subtree[child]);
        board_.ready(request, members, now);
        break;
      }
      case Report::Ready: {
        const SharedRequest request = take_request(in);
        board_.ready(request, in.list<int>(), now);
        break;
      }
      case Report::Joined:
        note_joined(in.number<int>());
        break;
      default:
        throw CorruptFrame(format("rank %d sent a report that makes no sense", from));
    }
}

void Engine::look_around() {
  if (!departed_.empty()) refuse_departed();
  if (Clock::now() < next_check_) return;
  next_check_ = Clock::now() + kCheckPeriod;
  if (comm_->world().monitor->somebody_left()) refuse_left();
  check_stalls();
}

// As refuse_departed(), of ranks that left without a word to their neighbours, since their engine had failed.
void Engine::refuse_left() {
  std::vector<int> needed = board_.waited_for();
  {
    const std::lock_guard lock(mutex_);
    if (!pending_.empty() && tree_.parent >= 0) needed.push_back(tree_.parent);
  }
  if (tree_.parent < 0 && !joined_.empty())  // on other ranks the end of a join may still be on its way
    for (int r = 0; r < size_; ++r)
      if (std::find(joined_.begin(), joined_.end(), r) == joined_.end()) needed.push_back(r);
  comm_->transport().poll();
  std::erase_if(needed, [this](int rank) { return rank == rank_ || !comm_->transport().exhausted(rank); });
  comm_->world().monitor->raise_if_left(needed, kWait);
}

// A neighbour in the tree has left the job: that is well while nothing needs it.
void Engine::refuse_departed() {
  SharedRequest request;
  int gone = board_.waits_for_any(departed_, &request);
  if (gone < 0 && std::find(departed_.begin(), departed_.end(), tree_.parent) != departed_.end()) {
    request = board_.any();  // of other ranks of this host, perhaps
    const std::lock_guard lock(mutex_);
    if (request == nullptr && !pending_.empty()) request = (*pending_.begin())->pending.request;
    if (request != nullptr) gone = tree_.parent;
  }
  if (gone < 0) return;
  const std::string what = title(request->request);
  throw PeerLost(format("rank %d: rank %d has left, and %s needs it", rank_, gone, what.c_str()), {gone}, comm_->world().epoch,
                 what);
}

// What waits on rank 0, a join included: it waits while nothing goes on, for however long others may go on.
std::vector<Board::Stalled> Engine::stalled(double seconds) const {
  std::vector<Board::Stalled> found = board_.stalled(seconds);
  const double waited = std::chrono::duration<double>(Clock::now() - last_progress_).count();
  if (joined_.empty() || waited < seconds) return found;
  Board::Stalled& join = found.emplace_back(Board::Stalled{join_, joined_, {}, waited});
  std::sort(join.ready.begin(), join.ready.end());
  for (int r = 0; r < size_; ++r)
    if (!std::binary_search(join.ready.begin(), join.ready.end(), r)) join.missing.push_back(r);
  return found;
}

void Engine::check_stalls() {
  if (tree_.parent >= 0) {
    report(board_.take_stale(kHandOnEarly * first_bound_));
    const std::lock_guard lock(mutex_);
    for (const Slot* slot : pending_) {
      const Pending& pending = slot->pending;
      const bool join = pending.request->request.kind == Kind::Join;
      const auto since = join ? std::max(pending.since, last_progress_) : pending.since;
      const double waited = std::chrono::duration<double>(Clock::now() - since).count();
      if (waited > timeout_ + kPatience)
        throw Timeout(format("rank %d: %s timed out after %g s", rank_, title(pending.request->request).c_str(), timeout_));
    }
    return;
  }
  std::set<std::string> still;
  for (const Board::Stalled& stall : stalled(first_bound_)) {
    const std::string what = format("%s has waited %.0f s for rank %s; rank %s ready for it",
                                    title(stall.request->request).c_str(), stall.seconds, join_ranks(stall.missing).c_str(),
                                    (join_ranks(stall.ready) + (stall.ready.size() == 1 ? " is" : " are")).c_str());
    if (stall.seconds > timeout_) throw Timeout(format("rank %d: %s: ROUNDEL_TIMEOUT is %g s", rank_, what.c_str(), timeout_));
    if (shutdown_seconds_ > 0 && stall.seconds > shutdown_seconds_)
      throw Timeout(format("rank %d: %s: ROUNDEL_STALL_SHUTDOWN_SECONDS is %g s", rank_, what.c_str(), shutdown_seconds_));
    if (stall_seconds_ > 0 && stall.seconds < stall_seconds_) continue;
    if (stall_seconds_ > 0 && !warned_.contains(stall.request->encoded)) log::warning(what);
    still.insert(stall.request->encoded);
  }
  warned_ = std::move(still);
}

// An empty message to the neighbours, which may need this rank no longer.
void Engine::say_goodbye() {
  for (const int child : tree_.children) mailbox_->send(child, {});
  if (tree_.parent >= 0) mailbox_->send(tree_.parent, {});
  std::vector<int> neighbours = tree_.children;
  if (tree_.parent >= 0) neighbours.push_back(tree_.parent);
  flush(neighbours, kGoodbye);
}

// Until all that was sent to these has left this process, or for so long.
void Engine::flush(const std::vector<int>& neighbours, double seconds) {
  for (const Deadline limit = Deadline::after(seconds); !mailbox_->flushed(neighbours) && !limit.passed();) {
    comm_->attend(kWait);
    if (!comm_->transport().poll()) comm_->transport().sleep(limit, [this] { return comm_->world().monitor->troubled(); });
  }
}

void Engine::end() {
  try {
    say_goodbye();
  } catch (const Error& error) {
    log::debug(format("rank %d: left without goodbye: %s", rank_, error.what()));
  }
  end_pending(std::make_exception_ptr(Error(format("rank %d: roundel was shut down", rank_))));
}

void Engine::fail(std::exception_ptr error) {
  if (closing_) return end_pending(std::make_exception_ptr(Error(format("rank %d: roundel was shut down", rank_))));
  error = comm_->end(std::move(error), kWait);
  end_sets(error);
  end_pending(error);
}

// Members may wait there for this rank, and watch nobody else: it is lost to them, for a reason that the whole engine hears.
void Engine::end_sets(const std::exception_ptr& error) {
  std::string text = "an unknown exception";
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& e) {
    text = e.what();
  } catch (...) {
  }
  for (auto& [set, executor] : executors_) {
    if (set == 0) continue;
    const transport::World& world = executor.comm().world();
    world.monitor->report(PeerLost(text, {world.rank}, world.epoch, kWait), {world.rank});
  }
}

void Engine::end_pending(const std::exception_ptr& error) {
  ended_ = true;
  std::vector<std::shared_ptr<Ticket>> ended;
  {
    const std::lock_guard lock(mutex_);
    failure_ = error;
    while (!pending_.empty()) ended.push_back(take_pending(**pending_.begin()));
  }
  for (const auto& ticket : ended) sleepers_.complete(*ticket, error);
}

}  // namespace roundel::engine
