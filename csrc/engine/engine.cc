#include "engine/engine.h"

#include <algorithm>

#include "base/env.h"
#include "base/error.h"
#include "base/fd.h"
#include "comm/split.h"
#include "engine/timeline.h"

namespace roundel::engine {
namespace {

std::vector<std::string> kind_names() {
  std::vector<std::string> names;
  for (int kind = 0; kind < kKinds; ++kind) names.emplace_back(name_of(static_cast<Kind>(kind)));
  return names;
}

// Rank 0's: what goes into one operation must be the same everywhere.
size_t agreed_upon(size_t setting, comm::Communicator& comm) {
  auto bytes = static_cast<int64_t>(setting);
  comm::Operation o;
  o.kind = OpKind::Broadcast;
  o.name = "engine: fusion threshold";
  o.in = o.out = {&bytes, 1, DType::Int64};
  comm.run(std::move(o));
  return static_cast<size_t>(bytes);
}

bool is_same(const Request& request, const InPlace& again) {
  if (request.tensors.size() != 1 || request.on_device) return false;
  const TensorSpec& tensor = request.tensors.front();
  return request.op == again.op && request.prescale == again.prescale && request.postscale == again.postscale &&
         tensor.dtype == again.array.dtype &&
         std::equal(tensor.shape.begin(), tensor.shape.end(), again.shape.begin(), again.shape.end());
}

}  // namespace

std::shared_ptr<Engine> Engine::open(comm::Communicator& parent) {
  if (parent.world().is_group) throw InvalidArgument("an engine is of the whole job: expected its communicator, got a group's");
  const std::shared_ptr<Engine> made(new Engine(comm::split(parent, 0, 0)), [](Engine* engine) {
    if (!in_forked_child()) delete engine;  // a forked child has no thread that a destructor could join
  });
  made->comm_->before_leaving([engine = std::weak_ptr(made)] {
    if (const auto alive = engine.lock()) alive->close();
  });
  return made;
}

Engine::Engine(std::shared_ptr<comm::Communicator> comm)
    : comm_(std::move(comm)),
      rank_(comm_->world().rank),
      size_(comm_->world().size),
      tree_(rank_, comm_->world().host),
      fusion_bytes_(env::bytes("ROUNDEL_FUSION_THRESHOLD")),
      stats_(kind_names(), size_),
      background_spin_(transport::spin_seconds(2 * static_cast<int>(comm_->world().local.size()))),
      timeout_(env::number("ROUNDEL_TIMEOUT", 0.001, 1e9)),
      stall_seconds_(env::number("ROUNDEL_STALL_CHECK_SECONDS", 0, 1e9)),
      shutdown_seconds_(env::number("ROUNDEL_STALL_SHUTDOWN_SECONDS", 0, 1e9)),
      first_bound_(timeout_),
      board_(size_, tree_.reporting) {
  for (const double bound : {stall_seconds_, shutdown_seconds_})
    if (bound > 0) first_bound_ = std::min(first_bound_, bound);
  fusion_bytes_ = agreed_upon(fusion_bytes_, *comm_);
  std::vector<int> everyone;
  for (int r = 0; r < size_; ++r) everyone.push_back(r);
  board_.add_set(0, everyone);
  sets_[0] = everyone;
  open_set(0, comm_);
  Request join;
  join.kind = Kind::Join;
  join.name = name_of(Kind::Join);
  join_ = names_.seal(std::move(join));
  std::vector<int> neighbours = tree_.children;
  if (tree_.parent >= 0) neighbours.push_back(tree_.parent);
  mailbox_ = std::make_unique<Mailbox>(comm_->transport(), neighbours);
  const std::string timeline = env::text("ROUNDEL_TIMELINE");
  if (!timeline.empty()) start_timeline(timeline, env::flag("ROUNDEL_TIMELINE_MARK_CYCLES"));
  thread_ = std::thread([this] { background(); });
}

Engine::~Engine() { close(); }

void Engine::close() {
  if (in_forked_child()) return;
  closing_ = true;
  if (is_driven_here()) return;  // by a signal handler: what is left is done by the next close()
  const std::lock_guard closing(close_mutex_);
  comm_->wake();
  if (thread_.joinable()) thread_.join();
  stop_timeline();
}

// The process has one timeline, whatever engine began it.
void Engine::start_timeline(const std::string& path, bool mark_cycles) {
  Timeline::instance().start(path, rank_, size_, mark_cycles);
}
void Engine::stop_timeline() { Timeline::instance().stop(); }

std::map<uint32_t, std::vector<int>> Engine::sets() const {
  const std::lock_guard lock(mutex_);
  return sets_;
}

// With mutex_ held.
void Engine::validate(const Request& request, const Buffers& buffers) const {
  const auto refuse = [&](const std::string& why) {
    throw InvalidArgument(format("rank %d: %s '%s': %s", rank_, name_of(request.kind), request.name.c_str(), why.c_str()));
  };
  if (request.name.size() > kLongestName)
    throw InvalidArgument(format("rank %d: %s: expected a name of at most %zu bytes, got %zu", rank_, name_of(request.kind),
                                 kLongestName, request.name.size()));
  const auto set = sets_.find(request.set);
  if (set == sets_.end()) refuse(format("there is no process set %u", request.set));
  const std::vector<int>& members = set->second;
  const auto is_member = [&](int rank) { return std::find(members.begin(), members.end(), rank) != members.end(); };
  if (!is_member(rank_))
    refuse(format("this rank is not in process set %u of rank %s", request.set, join_ranks(members).c_str()));
  if (request.kind == Kind::Broadcast && !is_member(request.root))
    refuse(format("expected a root of process set %u, which has rank %s, got %d", request.set, join_ranks(members).c_str(),
                  request.root));
  for (const int rank : request.ranks)
    if (rank < 0 || rank >= size_) refuse(format("expected ranks from 0 to %d, got %d", size_ - 1, rank));
  if (request.kind == Kind::AddSet && request.ranks.empty()) refuse("expected at least one rank, got none");
  if (request.kind == Kind::RemoveSet && (request.root == 0 || !sets_.contains(static_cast<uint32_t>(request.root))))
    refuse(request.root == 0 ? "process set 0 is the whole job and stays" : format("there is no process set %d", request.root));
  const bool reduces = request.kind == Kind::AllReduce || request.kind == Kind::ReduceScatter;
  for (size_t i = 0; i < request.tensors.size(); ++i) {
    const TensorSpec& tensor = request.tensors[i];
    if (reduces && tensor.dtype == DType::Bool && request.op == static_cast<uint8_t>(ReduceOp::Average))
      refuse("bool has no average; use sum (or), max (or), min (and) or product (and)");
    if (request.op == kAdasum && request.kind == Kind::ReduceScatter) refuse("Adasum is there for allreduce only");
    if (request.op == kAdasum && !is_floating(tensor.dtype))
      refuse(format("Adasum: expected a floating dtype, got %s", name_of(tensor.dtype)));
    if (request.kind == Kind::ReduceScatter && tensor.shape.empty()) refuse("expected at least one dimension, got a scalar");
    if (request.kind != Kind::AllReduce) continue;
    const View &in = buffers.in[i], &out = buffers.out[i];
    if (in.count != out.count || in.dtype != out.dtype)
      refuse(format("expected an output of %zu %s, got %zu %s", in.count, name_of(in.dtype), out.count, name_of(out.dtype)));
    if (in.data != out.data && in.at(0) < out.at(out.count) && out.at(0) < in.at(in.count))
      refuse("input and output overlap; expected them apart, or the same");
  }
  if (request.kind != Kind::AllToAll) return;
  if (buffers.splits.size() != members.size())
    refuse(format("expected one split for each of %zu ranks, got %zu", members.size(), buffers.splits.size()));
  size_t sum = 0;
  bool fits = true;  // a sum of huge ones may come round to anything
  for (const size_t n : buffers.splits) fits = fits && n <= buffers.rows.front() - sum, sum += fits ? n : 0;
  if (!fits || sum != buffers.rows.front())
    refuse(format("expected splits with a sum of %zu, the rows there are, got %zu", buffers.rows.front(), sum));
}

// With mutex_ held. None where rows cannot be divided evenly, or there is no such set, which validate() refuses.
std::vector<size_t> Engine::even_splits(const Request& request, size_t rows) const {
  const auto set = sets_.find(request.set);
  if (set == sets_.end()) return {};
  const size_t size = set->second.size();
  if (rows % size != 0)
    throw InvalidArgument(
        format("rank %d: alltoall '%s': expected splits, or a number of rows divisible by %zu ranks, got %zu rows", rank_,
               request.name.c_str(), size, rows));
  return std::vector<size_t>(size, rows / size);
}

// Counted for each kind and set: what one part of a program leaves out does not shift the names of another.
std::string Engine::next_name(Kind kind, uint32_t set) {
  return std::string(name_of(kind)) + kUnnamed + std::to_string(unnamed_[{kind, set}]++);
}

// With mutex_ held, which it lets go of, and the buffers in the request's slot.
std::shared_ptr<Ticket> Engine::enter(const SharedRequest& sealed, std::unique_lock<std::mutex> lock) {
  Slot& slot = *sealed->slot;
  const auto ticket = std::make_shared<Ticket>();
  slot.pending.request = sealed;
  slot.pending.ticket = ticket;
  slot.pending.since = Clock::now();
  pending_.add(slot);
  joining_ = sealed->request.kind == Kind::Join;
  ++under_way_;
  stats_.submitted(static_cast<int>(sealed->request.kind));
  incoming_.push_back(sealed);
  const bool sleeps = !has_incoming_.exchange(true);  // else whoever drives was woken and has not looked yet
  lock.unlock();
  if (sleeps) comm_->wake();
  return ticket;
}

std::shared_ptr<Ticket> Engine::submit(Request request, Buffers buffers) {
  if (in_forked_child()) throw Error(format("this process was forked from rank %d and is no rank itself", rank_));
  refuse_nested_call();
  std::unique_lock lock(mutex_);
  if (failure_) std::rethrow_exception(failure_);
  if (request.kind == Kind::AllToAll && buffers.splits.empty()) buffers.splits = even_splits(request, buffers.rows.front());
  validate(request, buffers);
  if (joining_) throw Error(format("rank %d: this rank has joined; expected no call before join() is over", rank_));
  if (request.kind == Kind::Join) request.name = name_of(Kind::Join);
  if (request.name.empty()) request.name = next_name(request.kind, request.set);
  const SharedRequest sealed = names_.seal(std::move(request));
  Pending& pending = sealed->slot->pending;
  if (pending.ticket != nullptr)
    throw DuplicateName(format("rank %d: %s '%s': a request of this name is under way; expected every name once at a time",
                               rank_, name_of(sealed->request.kind), sealed->request.name.c_str()));
  pending.buffers = std::move(buffers);
  return enter(sealed, std::move(lock));
}

std::shared_ptr<Ticket> Engine::submit_again(const InPlace& again) {
  if (in_forked_child() || is_driven_here()) return nullptr;
  std::unique_lock lock(mutex_);
  if (failure_ || joining_) return nullptr;
  const SharedRequest agreed = names_.last_agreed(Kind::AllReduce, again.set, again.name);
  if (agreed == nullptr || !is_same(agreed->request, again)) return nullptr;
  Pending& pending = agreed->slot->pending;
  if (pending.ticket != nullptr) return nullptr;
  pending.buffers.in.assign(1, again.array);
  pending.buffers.out.assign(1, again.array);
  validate(agreed->request, pending.buffers);
  return enter(agreed, std::move(lock));
}

}  // namespace roundel::engine
