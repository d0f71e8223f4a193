#include "comm/communicator.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "base/copy.h"
#include "base/env.h"
#include "base/error.h"
#include "base/interrupt.h"
#include "base/memory.h"
#include "base/recorder.h"
#include "comm/executing.h"
#include "comm/native.h"
#include "comm/shm.h"

namespace roundel::comm {
namespace {

constexpr size_t kTransferBytes = 1u << 20;  // a transfer travels in messages of this size
constexpr std::chrono::milliseconds kCheckPeriod{
    50};  // for what need not be looked at all the time: signals, deadlines of others

}  // namespace

void Request::wait() {
  std::unique_lock lock(mutex_);
  while (!completed_.wait_for(lock, kCheckPeriod, [this] { return done(); })) {
    lock.unlock();
    check_interrupt();
    lock.lock();
  }
  if (error_) std::rethrow_exception(error_);
}

void Request::complete(std::exception_ptr error) {
  {
    const std::lock_guard lock(mutex_);
    error_ = std::move(error);
    done_.store(true, std::memory_order_release);
  }
  completed_.notify_all();
}

std::shared_ptr<Communicator> Communicator::open(std::shared_ptr<transport::World> world) {
  const bool direct = world->size == 1 || (world->all_local && env::text("ROUNDEL_ALGORITHM").empty());
  Communicator* made = nullptr;
  if (direct && world->memory != nullptr)
    made = new ShmCommunicator(std::move(world));
  else
    made = new NativeCommunicator(std::move(world));
  // A forked child has none of the threads that a destructor would join: there it is left alone.
  return {made, [](Communicator* c) {
            if (!in_forked_child()) delete c;
          }};
}

Communicator::Communicator(std::shared_ptr<transport::World> world)
    : world_(std::move(world)),
      default_timeout_(env::number("ROUNDEL_TIMEOUT", 0.001, 1e9)),
      stall_seconds_(env::number("ROUNDEL_STALL_CHECK_SECONDS", 0, 1e9)),
      sent_(static_cast<size_t>(world_->size)),
      received_(static_cast<size_t>(world_->size)) {}

Communicator::~Communicator() {
  close();
  if (fused_ != nullptr) release(fused_);
  say_goodbye();  // dropped without leave(): that is no reason for others to fail, nor one more rank lost where all have failed
}

std::byte* Communicator::allocate(size_t bytes) {
  return world_->memory != nullptr ? world_->memory->arena().allocate(bytes) : allocate_memory(bytes);
}

void Communicator::release(std::byte* data) {
  if (in_forked_child()) return;
  if (world_->memory == nullptr || !world_->memory->arena().offset_of(data, 1)) return std::free(data);
  if (!failed_) world_->memory->arena().free(data);
}

void Communicator::prepare(Operation& operation) {
  validate(operation, world_->rank, world_->size);
  operation.signature = sign(operation);
  if (in_forked_child()) throw Error(format("this process was forked from rank %d and is no rank itself", world_->rank));
  refuse_nested_call();
  if (std::isnan(operation.timeout)) throw InvalidArgument(format("rank %d: timeout: expected seconds, got nan", world_->rank));
  if (operation.timeout <= 0) operation.timeout = default_timeout_;
  operation.deadline = Deadline::after_roughly(operation.timeout);
}

void Communicator::run(Operation operation) {
  prepare(operation);
  std::unique_lock lock(mutex_);
  const bool idle = !executing_ && collectives_.empty() && new_transfers_.empty() && transfers_.empty();
  if (operation.kind == OpKind::PointToPoint || !idle || failure_) {
    const auto request = std::make_shared<Request>();
    std::list<Queued> one;
    one.push_back({std::move(operation), request});
    enqueue(std::move(one));
    lock.unlock();
    return wait_for_queued(*request);
  }
  executing_ = true;
  operation.sequence = next_sequence_++;
  lock.unlock();
  operation.record = record(operation, recorder::State::Running);
  std::exception_ptr error;
  const Executing executing{this, t_executing};
  t_executing = &executing;
  try {
    perform(operation);
    recorder::finished(operation.record, recorder::State::Done);
  } catch (...) {
    error = fail(std::current_exception(), &operation);
  }
  t_executing = executing.outer;
  lock.lock();
  executing_ = false;
  lock.unlock();
  ready_.notify_all();
  if (error) std::rethrow_exception(error);
}

// Memory that peers can reach, where there is room left: packed there, an operation needs no staging.
std::byte* Communicator::fused_buffer(size_t bytes) {
  if (bytes <= fused_bytes_) return fused_;
  if (fused_ != nullptr) release(std::exchange(fused_, nullptr));
  fused_bytes_ = 0;
  try {
    fused_ = allocate(bytes);
  } catch (const Error&) {
    fused_ = allocate_memory(bytes);
  }
  fused_bytes_ = bytes;
  return fused_;
}

void Communicator::perform(const Operation& operation) {
  if (operation.members.empty()) return execute(operation);
  Operation fused = operation;
  fused.in.data = fused.out.data = fused_buffer(operation.bytes());
  Phases unused, &phases = operation.phases != nullptr ? *operation.phases : unused;
  size_t at = 0;
  phases.pack = Clock::now();
  for (const auto& [in, out] : operation.members) {
    copy_bytes(fused_ + at, in.data, in.bytes());
    at += in.bytes();
  }
  phases.exchange = Clock::now();
  execute(fused);
  at = 0;
  phases.unpack = Clock::now();
  for (const auto& [in, out] : operation.members) {
    copy_bytes(out.data, fused_ + at, in.bytes());
    at += in.bytes();
  }
  phases.end = Clock::now();
}

// An interrupted wait must not return before the operation is over: its buffers are the caller's.
void Communicator::wait_for_queued(Request& request) {
  try {
    request.wait();
  } catch (...) {
    if (request.done()) throw;
    interrupted_ = true;
    world_->bell().ring();
    std::unique_lock lock(request.mutex_);
    request.completed_.wait(lock, [&] { return request.done(); });
    throw;
  }
}

void Communicator::refuse_nested_call() const {
  if (executes_here(this))
    throw Error(format("rank %d: called from inside another operation, perhaps by a signal handler", world_->rank));
}

std::shared_ptr<Request> Communicator::start(Operation operation) {
  std::vector<Operation> one;
  one.push_back(std::move(operation));
  return start(std::move(one)).front();
}

std::vector<std::shared_ptr<Request>> Communicator::start(std::vector<Operation> operations) {
  for (Operation& operation : operations) prepare(operation);
  std::vector<std::shared_ptr<Request>> requests;
  std::list<Queued> queued;
  for (Operation& operation : operations) {
    requests.push_back(std::make_shared<Request>());
    queued.push_back({std::move(operation), requests.back()});
  }
  const std::lock_guard lock(mutex_);
  enqueue(std::move(queued));
  return requests;
}

// What can fail comes first; moving list nodes cannot.
void Communicator::enqueue(std::list<Queued> operations) {
  if (failure_) raise_ended();
  if (!progress_.joinable()) progress_ = std::thread([this] { progress_loop(); });
  while (!operations.empty()) {
    Operation& operation = operations.front().operation;
    const bool transfer = operation.kind == OpKind::PointToPoint;
    if (transfer) {
      auto& counter = (operation.sends_data() ? sent_ : received_)[static_cast<size_t>(operation.root)];
      operation.sequence = transport::kPointToPoint | counter++;
    } else {
      operation.sequence = next_sequence_++;
    }
    operation.record = record(operation, recorder::State::Queued);
    auto& queue = transfer ? new_transfers_ : collectives_;
    queue.splice(queue.end(), operations, operations.begin());
    if (transfer) has_new_transfers_.store(true, std::memory_order_release);
  }
  ready_.notify_one();
  world_->bell().ring();
}

void Communicator::progress_loop() {
  std::unique_lock lock(mutex_);
  for (;;) {
    ready_.wait(lock, [this] {
      return closing_ || (!executing_ && (!collectives_.empty() || !new_transfers_.empty() || !transfers_.empty()));
    });
    if (closing_) break;
    executing_ = true;
    lock.unlock();
    try {
      work();
    } catch (...) {
      fail(std::current_exception(), transfers_.empty() ? nullptr : &transfers_.front().queued.operation);
    }
    lock.lock();
    executing_ = false;
  }
  ready_.wait(lock, [this] { return !executing_; });
  const std::exception_ptr error = failure_;  // in its final words already
  lock.unlock();
  record_failure(nullptr, error);
  end_pending(error);
}

// Runs until there is nothing left to do. Called by the progress thread, which holds executing_.
void Communicator::work() {
  for (;;) {
    take_transfers();
    reap_transfers();
    Queued next;
    {
      const std::lock_guard lock(mutex_);
      if (closing_) return;
      if (collectives_.empty() && new_transfers_.empty() && transfers_.empty()) return;
      if (!collectives_.empty()) {
        next = std::move(collectives_.front());
        collectives_.pop_front();
      }
    }
    if (next.request != nullptr) {
      try {
        recorder::started(next.operation.record);
        perform(next.operation);
        recorder::finished(next.operation.record, recorder::State::Done);
        next.request->complete(nullptr);
      } catch (...) {
        next.request->complete(fail(std::current_exception(), &next.operation));
        return;
      }
    } else if (!transfers_.empty() && !world_->transport->poll()) {
      const Operation oldest = transfers_.front().queued.operation;  // a copy: by looking around it may be done and gone
      look_around(oldest, [&oldest] { return std::vector<int>{oldest.root}; });
      if (transfers_.empty()) continue;
      world_->transport->sleep(oldest.deadline, [this] {
        const std::lock_guard lock(mutex_);
        return disturbed() || !collectives_.empty();
      });
    }
  }
}

void Communicator::take_transfers() {
  if (!has_new_transfers_.load(std::memory_order_acquire)) return;
  std::vector<Transfer*> taken;
  {
    const std::lock_guard lock(mutex_);
    for (Queued& queued : new_transfers_) taken.push_back(&transfers_.emplace_back(Transfer{std::move(queued), {}}));
    new_transfers_.clear();
    has_new_transfers_.store(false, std::memory_order_release);
  }
  for (Transfer* transfer : taken) post(*transfer);  // all are in transfers_ already: if one throws, fail() finds every one
}

void Communicator::post(Transfer& transfer) {
  const Operation& o = transfer.queued.operation;
  recorder::started(o.record);
  const View& view = o.sends_data() ? o.in : o.out;
  transport::Tag tag{o.sequence, 0, o.signature};
  size_t at = 0;
  do {  // an empty transfer is one empty message
    const size_t n = std::min(kTransferBytes, view.bytes() - at);
    auto* data = static_cast<std::byte*>(view.data) + at;
    transfer.tickets.push_back(o.sends_data() ? world_->transport->send(o.root, tag, {data, n})
                                              : world_->transport->recv(o.root, tag, {data, n}));
    at += n;
    ++tag.index;
  } while (at < view.bytes());
}

void Communicator::reap_transfers() {
  transfers_.remove_if([this](Transfer& transfer) {
    std::erase_if(transfer.tickets, [this](transport::Ticket ticket) { return world_->transport->test(ticket); });
    if (!transfer.tickets.empty()) return false;
    recorder::finished(transfer.queued.operation.record, recorder::State::Done);
    transfer.queued.request->complete(nullptr);
    return true;
  });
}

void Communicator::look_around(const Operation& operation, const Needed& needed) {
  if (has_new_transfers_.load(std::memory_order_acquire)) take_transfers();
  if (!transfers_.empty()) {
    world_->transport->poll();
    reap_transfers();
  }
  if (closing_) throw Error(format("rank %d: roundel was shut down during %s", world_->rank, operation.describe().c_str()));
  if (world_->monitor->troubled()) world_->monitor->raise_trouble(operation.describe());
  if (world_->monitor->somebody_left()) {
    world_->transport->poll();
    reap_transfers();
    std::vector<int> gone = needed();
    for (const Transfer& transfer : transfers_) gone.push_back(transfer.queued.operation.root);
    std::erase_if(gone, [this](int rank) { return !world_->transport->exhausted(rank); });
    world_->monitor->raise_if_left(gone, operation.describe());
  }
  if (interrupted_) throw Error(format("rank %d: interrupted during %s", world_->rank, operation.describe().c_str()));
  if (Clock::now() - last_check_ > kCheckPeriod) {
    last_check_ = Clock::now();
    check_interrupt();
    check_deadlines();
    watch_stall(operation, needed());
  }
  if (!operation.deadline.passed()) return;
  std::vector<int> ranks = missing(operation);
  if (ranks.empty()) ranks = needed();
  throw Timeout(format("[%s] rank %d: %s timed out after %g s waiting for rank %s%s", name(), world_->rank,
                       operation.describe().c_str(), operation.timeout, join_ranks(ranks).c_str(), seen_last(ranks).c_str()));
}

void Communicator::check_interrupt_inside() const {
  const Executing executing{this, t_executing};
  t_executing = &executing;
  try {
    check_interrupt();
  } catch (...) {
    t_executing = executing.outer;
    throw;
  }
  t_executing = executing.outer;
}

// Of all that is under way or waiting its turn: none may outlive its deadline because another one is patient.
void Communicator::check_deadlines() {
  const auto check = [this](const Operation& o) {
    if (o.deadline.passed())
      throw Timeout(format("[%s] rank %d: %s timed out after %g s before its turn or its peer came", name(), world_->rank,
                           o.describe().c_str(), o.timeout));
  };
  for (const Transfer& transfer : transfers_) check(transfer.queued.operation);
  const std::lock_guard lock(mutex_);
  for (const Queued& queued : collectives_) check(queued.operation);
}

bool Communicator::disturbed() const {
  return closing_ || interrupted_ || has_new_transfers_.load(std::memory_order_acquire) || world_->monitor->troubled();
}

}  // namespace roundel::comm
