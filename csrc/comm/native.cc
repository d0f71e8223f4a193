#include "comm/native.h"

#include "base/copy.h"
#include "base/env.h"
#include "base/error.h"
#include "base/memory.h"

namespace roundel::comm {
namespace {

// Starting values of the selector's table, to be replaced by a fit at start. Loopback TCP and rings on two cores; see bench/.
// Per round, byte, byte that leaves a host, message, byte added up.
constexpr plan::LinkCost kRingCost = {2e-6, 1 / 5e9, 0, 0.3e-6, 1 / 10e9};
constexpr plan::LinkCost kTcpCost = {7e-6, 1 / 1.8e9, 0, 2e-6, 1 / 10e9};
constexpr plan::LinkCost kMpiCost = {4e-6, 1 / 4e9, 0, 1e-6, 1 / 35e9};
constexpr plan::LinkCost kMixedCost = {7e-6, 1 / 5e9, 1 / 1.8e9, 2e-6, 1 / 10e9};
// A message takes MPI libraries some microseconds at either end, and what it holds they copy at once from one rank's memory to
// the other's, or a fabric does. Larger pieces for fewer ranks: there is a tile for each of them.
constexpr size_t kMpiPiecesOfAll = 16u << 20;
constexpr size_t kWorthReadingInPlace = 32u << 10;  // below, a copy takes less time than finding out what to read where
constexpr int kDirectBarrier = 64;                  // ranks: above, as many messages take longer than a few rounds
constexpr size_t kMaxChoices =
    256;  // a training job repeats a few dozen shapes; whoever never repeats one pays little for this

plan::Collective collective_of(OpKind kind) {
  switch (kind) {
    case OpKind::ReduceScatter:
      return plan::Collective::ReduceScatter;
    case OpKind::AllGather:
      return plan::Collective::AllGather;
    case OpKind::Broadcast:
      return plan::Collective::Broadcast;
    case OpKind::AllToAll:
      return plan::Collective::AllToAll;
    case OpKind::Reduce:
      return plan::Collective::Reduce;
    case OpKind::Gather:
      return plan::Collective::Gather;
    case OpKind::Scatter:
      return plan::Collective::Scatter;
    case OpKind::AllToAllV:
      return plan::Collective::AllToAllV;
    default:
      return plan::Collective::AllReduce;
  }
}

size_t piece_bytes(const transport::World& world) {
  if (!world.by_mpi || world.mixed) return plan::kPieceBytes;
  return std::max(plan::kPieceBytes, kMpiPiecesOfAll / static_cast<size_t>(world.size));
}

void copy_in(View to, const View& from, double prescale) {
  if (prescale != 1)
    kernels::scale(to.dtype, to.data, from.data, to.count, prescale);
  else
    copy_bytes(to.data, from.data, to.bytes());
}

}  // namespace

NativeCommunicator::NativeCommunicator(std::shared_ptr<transport::World> world)
    : Communicator(std::move(world)),
      forced_(env::text("ROUNDEL_ALGORITHM")),
      cost_(world_->all_local ? kRingCost
            : world_->mixed   ? kMixedCost
            : world_->by_mpi  ? kMpiCost
                              : kTcpCost) {
  if (forced_ == "mpi") {
    require_mpi();
    forced_by_mpi_ = true;
    forced_.clear();
  }
  // Refuse an unknown name now rather than in the first operation.
  plan::select(plan::Collective::AllReduce, {0, world_->size, plan::Parts::even(1, world_->size), 0, world_->host},
               DType::Float32, cost_, forced_);
  executor_ = std::make_unique<plan::Executor>(
      *world_->transport, [this] { look_around(*current_, [this] { return world_->transport->waiting_for(); }); },
      [this] { return disturbed(); }, piece_bytes(*world_));
}

const char* NativeCommunicator::name() const {
  if (world_->all_local) return "shm rings";
  if (world_->by_mpi) return world_->memory != nullptr ? "shm+mpi" : "mpi";
  return world_->memory != nullptr ? "shm+tcp" : "tcp";
}

void NativeCommunicator::execute(const Operation& o) {
  current_ = &o;
  const View none{nullptr, 0, o.dtype()};
  const bool at_root = world_->rank == o.root;
  switch (o.kind) {
    case OpKind::Barrier:
      return barrier(o);
    case OpKind::AllReduce:
      return is_mpis_own(o) ? allreduce_by_mpi(o) : run_plan(o, none, o.out, &o.in);
    case OpKind::Reduce: {
      const View work = at_root ? o.out : View{workspace(o.in.bytes()), o.in.count, o.in.dtype};
      return run_plan(o, none, work, &o.in);
    }
    case OpKind::ReduceScatter: {
      const View work{workspace(o.in.bytes()), o.in.count, o.in.dtype};
      run_plan(o, none, work, &o.in);
      return copy_in(o.out, {work.at(o.parts.begin(world_->rank)), o.out.count, o.out.dtype}, 1);
    }
    case OpKind::AllGather:
      copy_in({o.out.at(o.parts.begin(world_->rank)), o.in.count, o.in.dtype}, o.in, 1);
      return run_plan(o, none, o.out);
    case OpKind::Broadcast:
      if (at_root) copy_in(o.out, o.in, 1);
      return run_plan(o, none, o.out);
    case OpKind::Gather:
      return run_plan(o, o.in, at_root ? o.out : none);
    case OpKind::Scatter:
      return run_plan(o, at_root ? o.in : none, o.out);
    case OpKind::AllToAll:
      return run_plan(o, o.in, o.out);
    case OpKind::AllToAllV:
      return alltoallv(o);
    case OpKind::PointToPoint:
      ROUNDEL_CHECK(false);
  }
}

const NativeCommunicator::Choice& NativeCommunicator::choose(plan::Collective collective, const plan::Shape& shape, DType dtype,
                                                             bool own_parts) {
  std::vector<size_t> counts{shape.parts.total()};
  for (int r = 0; own_parts && r < shape.size; ++r) counts.push_back(shape.parts.count(r));
  const ChoiceKey key{collective, dtype, shape.root, std::move(counts)};
  const auto found = choices_.find(key);
  if (found != choices_.end()) return found->second;
  if (choices_.size() >= kMaxChoices) choices_.clear();
  const plan::Algorithm& algorithm = plan::select(collective, shape, dtype, cost_, forced_);
  const auto number = static_cast<uint8_t>(&algorithm - plan::algorithms().data());
  return choices_.emplace(key, Choice{algorithm.make(shape), number}).first->second;
}

plan::Shape NativeCommunicator::shape_of(const Operation& o, plan::Parts parts) const {
  plan::Shape shape;
  shape.rank = world_->rank;
  shape.size = world_->size;
  shape.root = o.root;
  shape.host = world_->host;
  shape.parts = std::move(parts);
  return shape;
}

void NativeCommunicator::run_plan(const Operation& o, View in, View out, const View* addend) {
  const plan::Shape shape = shape_of(o, has_parts(o.kind) ? o.parts : plan::Parts::even(o.in.count, world_->size));
  const Choice& choice = choose(collective_of(o.kind), shape, out.dtype, has_parts(o.kind));
  const plan::Plan& plan = choice.plan;
  transport::Tag tag{o.sequence, 0, o.signature};
  tag.signature.algorithm = choice.algorithm;
  const ReduceOp op = o.kernel_op();
  const bool adds = reduces(o.kind) && (op == ReduceOp::Sum || op == ReduceOp::Product);
  const bool as_it_is = !is_half(out.dtype) || plan.single_fold || !adds;
  // A plan of several ranks writes all of the result that counts; what it reads before that it can read where it is.
  const bool copies = addend != nullptr && (!as_it_is || plan.nested || world_->size == 1 || o.prescale != 1 ||
                                            addend->data == out.data || out.bytes() < kWorthReadingInPlace);
  if (copies) copy_in(out, *addend, o.prescale);
  if (as_it_is) {
    executor_->run(plan, tag, in, out, op, o.finish(world_->size), o.deadline,
                   addend != nullptr && !copies ? addend->data : nullptr);
    return world_->transport->retire(tag);
  }

  std::unique_ptr<std::byte[]> wide_bytes(new std::byte[out.count * sizeof(float)]);
  const View wide{wide_bytes.get(), out.count, DType::Float32};
  kernels::cast(wide.dtype, wide.data, out.dtype, out.data, out.count);
  executor_->run(plan, tag, in, wide, op, o.finish(world_->size), o.deadline);
  kernels::cast(out.dtype, out.data, wide.dtype, wide.data, out.count);
  world_->transport->retire(tag);
}

// Two plans under one sequence number. First every rank tells every other how much it sends: a pair that does not agree finds
// out instead of waiting for what will never come.
void NativeCommunicator::alltoallv(const Operation& o) {
  const auto size = static_cast<size_t>(world_->size), rank = static_cast<size_t>(world_->rank);
  std::vector<uint64_t> ours(size), theirs(size);
  plan::Shape shape = shape_of(o, plan::Parts::even(size, world_->size));
  for (size_t r = 0; r < size; ++r) ours[r] = o.sends.count(static_cast<int>(r));
  const Choice& counts = choose(plan::Collective::AllToAll, shape, DType::Int64, false);
  transport::Tag tag{o.sequence, 0, o.signature};
  executor_->run(counts.plan, tag, {ours.data(), size, DType::Int64}, {theirs.data(), size, DType::Int64}, ReduceOp::Sum, {},
                 o.deadline);
  for (size_t r = 0; r < size; ++r)
    if (theirs[r] != o.parts.count(static_cast<int>(r)))
      throw Mismatch(format("[%s] rank %d: %s: expected %zu elements from rank %zu, which sends %llu", name(), world_->rank,
                            o.describe().c_str(), o.parts.count(static_cast<int>(r)), r,
                            static_cast<unsigned long long>(theirs[r])));

  shape.sends.resize(size * size);
  for (size_t r = 0; r < size; ++r) {
    shape.sends[rank * size + r] = ours[r];
    shape.sends[r * size + rank] = theirs[r];
  }
  const plan::Algorithm* pairwise = plan::find_algorithm(plan::Collective::AllToAllV, "pairwise");
  tag.index = plan::kSecondPlan;
  executor_->run(pairwise->make(shape), tag, o.in, o.out, ReduceOp::Sum, {}, o.deadline);
  world_->transport->retire(tag);
}

// A byte from everyone to everyone: nobody is done before all have come. In a job of a usual size directly, so that whoever
// waits knows for whom.
void NativeCommunicator::barrier(const Operation& o) {
  const transport::Tag tag{o.sequence, 0, o.signature};
  meet(o, tag);
  world_->transport->retire(tag);
}

void NativeCommunicator::meet(const Operation& o, const transport::Tag& tag) {
  std::vector<uint8_t> bytes(static_cast<size_t>(world_->size));
  const plan::Shape shape = shape_of(o, plan::Parts::even(bytes.size(), world_->size));
  if (world_->size <= kDirectBarrier && barrier_.steps.empty())
    barrier_ = plan::find_algorithm(plan::Collective::AllGather, "direct")->make(shape);
  const bool direct = world_->size <= kDirectBarrier;
  const plan::Plan& plan = direct ? barrier_ : choose(plan::Collective::AllGather, shape, DType::UInt8, false).plan;
  executor_->run(plan, tag, {}, {bytes.data(), bytes.size(), DType::UInt8}, ReduceOp::Sum, {}, o.deadline);
}

std::byte* NativeCommunicator::workspace(size_t bytes) {
  if (bytes > workspace_bytes_) {
    workspace_.reset();
    workspace_.reset(allocate_memory(bytes));
    workspace_bytes_ = bytes;
  }
  return workspace_.get();
}

}  // namespace roundel::comm
