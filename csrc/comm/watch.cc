// What a communicator says about its own operations while they wait and after they failed: the flight record, the stall
// warning.
#include <algorithm>

#include "base/env.h"
#include "base/error.h"
#include "base/log.h"
#include "comm/communicator.h"

namespace roundel::comm {
namespace {

constexpr double kAskAfter = 0.5;  // seconds that an operation waits before others are asked what they do
constexpr std::chrono::milliseconds kAskPeriod{1000};
constexpr size_t kAskAtMost = 4;  // ranks; of more, a text would say less

}  // namespace

// Of an operation that waits: whom it waits for goes into the flight record, what those are doing is asked for, and after
// ROUNDEL_STALL_CHECK_SECONDS one warning tells all of it.
void Communicator::watch_stall(const Operation& operation, const std::vector<int>& waited_for) {
  recorder::waiting(operation.record, waited_for);
  const bool collective = operation.kind != OpKind::PointToPoint;  // a transfer's number is its pair's alone
  if (collective) world_->monitor->set_waiting(operation.sequence, operation.signature);
  const double waited = operation.timeout - operation.deadline.seconds_left();
  if (waited < kAskAfter || waited_for.empty()) return;
  if (Clock::now() - last_asked_ > kAskPeriod) {
    last_asked_ = Clock::now();
    for (size_t i = 0; i < waited_for.size() && i < kAskAtMost; ++i) world_->monitor->ask(waited_for[i]);
  }
  if (collective) refuse_other_calls(operation, waited_for);
  if (stall_seconds_ <= 0 || waited < stall_seconds_ || warned_ == operation.record) return;
  warned_ = operation.record;
  log::warning(format("%s has waited %.0f s for rank %s%s; it times out after %g s", operation.describe().c_str(), waited,
                      join_ranks(waited_for).c_str(), seen_last(waited_for).c_str(), operation.timeout));
}

// Ranks that call different things find out from the first message, but a gather to two roots, say, has none: everyone only
// receives. Their answers tell.
void Communicator::refuse_other_calls(const Operation& operation, const std::vector<int>& waited_for) const {
  for (const int rank : waited_for) {
    const std::optional<Signature> theirs = world_->monitor->called_by(rank, operation.sequence);
    if (theirs && *theirs != operation.signature)
      throw Mismatch(format("[%s] rank %d called %s where rank %d called %s (operation %llu)", name(), world_->rank,
                            operation.signature.describe().c_str(), rank, theirs->describe().c_str(),
                            static_cast<unsigned long long>(operation.sequence)));
  }
}

// "; rank 2 is in no operation; its last, all-reduce (operation 16), ended 3.1 s ago", as far as they have answered.
std::string Communicator::seen_last(const std::vector<int>& ranks) const {
  std::string text;
  for (size_t i = 0; i < ranks.size() && i < kAskAtMost; ++i) {
    const std::string answer = world_->monitor->answer_of(ranks[i]);
    if (!answer.empty()) text += format("; rank %d %s", ranks[i], answer.c_str());
  }
  return text;
}

uint64_t Communicator::record(const Operation& o, recorder::State state) const {
  return recorder::begin(o.sequence, world_->epoch, o.signature, std::max(o.in.bytes(), o.out.bytes()), o.name, state,
                         world_->group);
}

// What was under way is marked as failed; where the user asked for it, the record is written. Never throws.
void Communicator::record_failure(const Operation* during, const std::exception_ptr& error) const {
  if (during != nullptr) recorder::finished(during->record, recorder::State::Failed);
  for (const Transfer& transfer : transfers_) recorder::finished(transfer.queued.operation.record, recorder::State::Failed);
  try {
    const std::string prefix = env::text("ROUNDEL_FLIGHT_RECORD");
    if (prefix.empty() || closing_) return;
    try {
      std::rethrow_exception(error);
    } catch (const std::exception& e) {
      recorder::write(prefix, world_->members[static_cast<size_t>(world_->rank)], world_->size, e.what());
    }
  } catch (const std::exception& e) {
    log::warning(e.what());
  }
}

}  // namespace roundel::comm
