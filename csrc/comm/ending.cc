// How a communicator ends: closed, left in order, or by a failure, which then is everybody's.
#include <poll.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "base/error.h"
#include "comm/communicator.h"
#include "comm/executing.h"

namespace roundel::comm {

void Communicator::close() {
  if (in_forked_child()) return;
  const bool nested = executes_here(this);
  std::unique_lock closing(close_mutex_, std::defer_lock);
  if (!nested) closing.lock();
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
    if (!failure_) failure_ = std::make_exception_ptr(Error(format("rank %d: roundel was shut down", world_->rank)));
  }
  ready_.notify_all();
  world_->bell().ring();
  if (nested) return;  // the operation around this call ends with an error; what is left is done by the next close()
  if (progress_.joinable()) progress_.join();
  std::unique_lock lock(mutex_);
  ready_.wait(lock, [this] { return !executing_; });  // a blocking call on another thread is about to notice closing_
}

// Everybody's goodbye comes before anybody's wait: two ranks that wait in groups of their own wait for each other's.
void Communicator::leave(double seconds) {
  if (in_forked_child()) return;
  const Deadline deadline = Deadline::after(seconds);
  std::vector<std::shared_ptr<Communicator>> groups;  // innermost last
  const auto collect = [&groups](Communicator& from) {
    const std::lock_guard lock(from.mutex_);
    for (const auto& each : from.children_)
      if (auto child = each.lock()) groups.push_back(std::move(child));
    from.children_.clear();
  };
  collect(*this);
  for (size_t i = 0; i < groups.size(); ++i) collect(*groups[i]);
  for (const auto& group : groups) {
    std::unique_lock lock(group->mutex_);
    const std::function<void()> hook = group->before_leaving_;
    lock.unlock();
    if (hook) hook();
  }
  for (auto group = groups.rbegin(); group != groups.rend(); ++group) (*group)->say_goodbye();
  say_goodbye();
  for (auto group = groups.rbegin(); group != groups.rend(); ++group) (*group)->await_goodbyes(deadline);
  await_goodbyes(deadline);
}

void Communicator::say_goodbye() {
  close();
  if (executes_here(this)) return world_->monitor->leave(Deadline::after(0));
  const std::lock_guard closing(close_mutex_);
  if (std::exchange(said_goodbye_, true)) return;
  world_->transport.reset();  // closes the sockets: peers that still need this rank find the end of what it has sent
  world_->monitor->leave(Deadline::after(0));
}

void Communicator::await_goodbyes(Deadline deadline) {
  if (executes_here(this)) return;
  const std::lock_guard closing(close_mutex_);
  if (world_->monitor == nullptr) return;
  world_->monitor->await_others(deadline);
  world_->monitor.reset();
}

void Communicator::adopt(const std::shared_ptr<Communicator>& child) {
  const std::lock_guard lock(mutex_);
  std::erase_if(children_, [](const auto& each) { return each.expired(); });
  children_.push_back(child);
  child->job_ = world_->is_group ? job_ : weak_from_this();
}

void Communicator::before_leaving(std::function<void()> hook) {
  const std::lock_guard lock(mutex_);
  before_leaving_ = std::move(hook);
}

void Communicator::attend(const std::string& during) const {
  if (closing_) throw Error(format("rank %d: roundel was shut down", world_->rank));
  if (world_->monitor->troubled()) world_->monitor->raise_trouble(during);
}

// Outside of operations nothing keeps another thread from leaving.
void Communicator::attend_all(const std::string& during) try {
  const std::unique_lock staying(close_mutex_, std::try_to_lock);
  if (closing_) throw Error(format("rank %d: roundel was shut down", world_->rank));
  if (!staying) return;  // for now
  world_->monitor->raise_trouble(during);
  std::vector<int> all(static_cast<size_t>(world_->size));
  std::iota(all.begin(), all.end(), 0);
  world_->monitor->raise_if_left(all, during);
} catch (const PeerLost& loss) {
  std::rethrow_exception(last_word(loss, during));
}

std::exception_ptr Communicator::end(std::exception_ptr error, const std::string& during) {
  return fail(std::move(error), nullptr, during);
}

PeerLost Communicator::in_terms_of_job(const PeerLost& loss) const {
  std::vector<int> ranks;
  for (const int r : loss.ranks) ranks.push_back(world_->members[static_cast<size_t>(r)]);
  std::sort(ranks.begin(), ranks.end());
  return {loss.what(), ranks, loss.epoch, loss.op};
}

// Throws what has befallen this communicator, in ranks of the job; a loss in a group only as the `last` word.
void Communicator::raise_trouble(const std::string& during, bool last) {
  const std::unique_lock staying(close_mutex_, std::try_to_lock);  // whoever leaves takes the monitor away
  if (!staying || world_->monitor == nullptr) return;
  try {
    world_->monitor->raise_trouble(during);
  } catch (const PeerLost& loss) {
    if (last || !world_->is_group) throw in_terms_of_job(loss);
  }
}

// Those of the lost that have not left in order, in ranks of the job.
std::vector<int> Communicator::without_goodbye(const PeerLost& loss) {
  const std::unique_lock staying(close_mutex_, std::try_to_lock);
  std::vector<int> ranks = loss.ranks;
  if (staying && world_->monitor != nullptr) std::erase_if(ranks, [&](int r) { return world_->monitor->has_left(r); });
  return in_terms_of_job({loss.what(), ranks, loss.epoch}).ranks;
}

// Whoever hears of a loss leaves, and is missed in turn by those who have not heard of it yet: so there is a moment for the
// reports that are still on their way. What the job says stands where it explains everyone: who has not said goodbye is dead,
// and the job has to know of that, too, since it may have had other troubles before. A group's own word of a loss is the last
// only where the job has none: the dead rank need not have been in the group, nor the group's rank 0 have stayed to pass its
// report on.
std::exception_ptr Communicator::last_word(const PeerLost& loss, const std::string& during) {
  const Deadline deadline = Deadline::after(transport::Monitor::kVerdictSeconds);
  try {
    for (bool last = false; !last; ::poll(nullptr, 0, 1)) {
      last = closing_ || deadline.passed();
      if (const auto job = job_.lock()) {
        const std::vector<int> dead = without_goodbye(loss);
        try {
          job->raise_trouble(during, last);
        } catch (const PeerLost& e) {
          if (std::ranges::includes(e.ranks, dead)) throw;
        } catch (const Error&) {
          if (dead.empty()) throw;
        }
      }
      raise_trouble(during, last);
    }
    const std::string how = format("[%s] rank %d: %s during %s", name(), world_->rank, loss.what(), during.c_str());
    throw in_terms_of_job({loss.op.empty() ? how : loss.what(), loss.ranks, loss.epoch, during});
  } catch (const PeerLost& e) {
    if (!world_->is_group) return std::current_exception();
    std::vector<int> left;
    std::ranges::set_difference(in_terms_of_job(loss).ranks, e.ranks, std::back_inserter(left));
    const std::string text = format(
        "%s (in a group of the job's ranks %s%s; lost: rank %s of the job)", e.what(), join_ranks(world_->members).c_str(),
        left.empty() ? "" : format(", which rank %s has left", join_ranks(left).c_str()).c_str(), join_ranks(e.ranks).c_str());
    return std::make_exception_ptr(PeerLost(text, e.ranks, e.epoch, e.op));
  } catch (const Error&) {
    return std::current_exception();
  }
}

// Ends everything with this error, after giving it the operation's name where it has none. Called by whoever holds executing_.
std::exception_ptr Communicator::fail(std::exception_ptr error, const Operation* operation, const std::string& during) {
  const std::string op = operation != nullptr ? operation->describe() : during;
  std::exception_ptr shared;
  try {
    std::rethrow_exception(error);
  } catch (const PeerLost& e) {
    error = last_word(e, e.op.empty() ? op : e.op);
    if (!closing_) world_->monitor->report(e, e.ranks);
  } catch (const Diverged& e) {
    try {
      world_->monitor->await_trouble(op);
    } catch (const Error&) {
      error = std::current_exception();
    }
    if (!closing_) world_->monitor->report(e, {});
  } catch (const CorruptFrame& e) {
    error =
        std::make_exception_ptr(CorruptFrame(format("[%s] rank %d: %s during %s", name(), world_->rank, e.what(), op.c_str())));
    if (!closing_) world_->monitor->report(e, {});
  } catch (const Error& e) {
    if (!closing_) world_->monitor->report(e, {});
  } catch (const std::exception& e) {  // such as Ctrl-C: this caller's alone, the others get its text
    const Error told(format("rank %d: %s", world_->rank, e.what()));
    if (!closing_) world_->monitor->report(told, {});
    shared = std::make_exception_ptr(told);
  }
  if (shared == nullptr) shared = error;
  record_failure(operation, shared);
  if (!closing_) failed_ = true;
  {
    const std::lock_guard lock(mutex_);
    if (!failure_) failure_ = shared;
  }
  end_pending(shared);
  return error;
}

// Called by whoever holds executing_, or by the last that could: nothing more is enqueued.
void Communicator::end_pending(const std::exception_ptr& error) {
  world_->transport->abandon();
  for (Transfer& transfer : transfers_) transfer.queued.request->complete(error);
  std::list<Queued> ended;
  {
    const std::lock_guard lock(mutex_);
    transfers_.clear();
    ended.splice(ended.end(), collectives_);
    ended.splice(ended.end(), new_transfers_);
  }
  for (Queued& queued : ended) {
    recorder::finished(queued.operation.record, recorder::State::Failed);
    queued.request->complete(error);
  }
}

// The same error as the first, so that whoever asks later still learns which rank is lost.
void Communicator::raise_ended() { std::rethrow_exception(failure_); }

}  // namespace roundel::comm
