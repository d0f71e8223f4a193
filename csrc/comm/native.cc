#include "comm/native.h"

#include "base/copy.h"
#include "base/env.h"
#include "base/error.h"

namespace roundel::comm {
namespace {

// Starting values of the selector's table, to be replaced by a fit at start. Loopback TCP and rings on two cores; see bench/.
constexpr plan::LinkCost kRingCost = {2e-6, 1 / 5e9};
constexpr plan::LinkCost kTcpCost = {20e-6, 1 / 1.2e9};
constexpr plan::LinkCost kMixedCost = {20e-6, 1 / 5e9, 1 / 1.2e9};
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
    default:
      return plan::Collective::AllReduce;
  }
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
                              : kTcpCost) {
  // Refuse an unknown name now rather than in the first operation.
  plan::select(plan::Collective::AllReduce, {0, world_->size, plan::Parts::even(1, world_->size), 0, world_->host},
               DType::Float32, cost_, forced_);
  executor_ = std::make_unique<plan::Executor>(
      *world_->transport, [this] { look_around(*current_, [this] { return world_->transport->waiting_for(); }); },
      [this] { return disturbed(); });
}

const char* NativeCommunicator::name() const {
  if (world_->all_local) return "shm rings";
  return world_->memory != nullptr ? "shm+tcp" : "tcp";
}

void NativeCommunicator::execute(const Operation& o) {
  current_ = &o;
  const plan::Collective collective = collective_of(o.kind);
  switch (o.kind) {
    case OpKind::Barrier:
      return barrier(o);
    case OpKind::AllReduce:
      copy_in(o.out, o.in, o.prescale);
      return run_plan(o, collective, {}, o.out);
    case OpKind::ReduceScatter: {
      const View work{workspace(o.in.bytes()), o.in.count, o.in.dtype};
      copy_in(work, o.in, o.prescale);
      run_plan(o, collective, {}, work);
      return copy_in(o.out, {work.at(o.parts.begin(world_->rank)), o.out.count, o.out.dtype}, 1);
    }
    case OpKind::AllGather:
      copy_in({o.out.at(o.parts.begin(world_->rank)), o.in.count, o.in.dtype}, o.in, 1);
      return run_plan(o, collective, {}, o.out);
    case OpKind::Broadcast:
      if (world_->rank == o.root) copy_in(o.out, o.in, 1);
      return run_plan(o, collective, {}, o.out);
    case OpKind::AllToAll:
      return run_plan(o, collective, o.in, o.out);
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

void NativeCommunicator::run_plan(const Operation& o, plan::Collective collective, View in, View out) {
  plan::Shape shape;
  shape.rank = world_->rank;
  shape.size = world_->size;
  shape.root = o.root;
  shape.host = world_->host;
  const bool own_parts = o.kind == OpKind::ReduceScatter || o.kind == OpKind::AllGather;
  shape.parts = own_parts ? o.parts : plan::Parts::even(out.count, world_->size);
  const Choice& choice = choose(collective, shape, out.dtype, own_parts);
  const plan::Plan& plan = choice.plan;
  transport::Tag tag{o.sequence, 0, o.signature};
  tag.signature.algorithm = choice.algorithm;
  const ReduceOp op = o.kernel_op();
  const bool adds =
      (o.kind == OpKind::AllReduce || o.kind == OpKind::ReduceScatter) && (op == ReduceOp::Sum || op == ReduceOp::Product);
  if (!is_half(out.dtype) || plan.single_fold || !adds) {
    executor_->run(plan, tag, in, out, op, o.finish(world_->size), o.deadline);
    return world_->transport->retire(tag);
  }

  std::unique_ptr<std::byte[]> wide_bytes(new std::byte[out.count * sizeof(float)]);
  const View wide{wide_bytes.get(), out.count, DType::Float32};
  kernels::cast(wide.dtype, wide.data, out.dtype, out.data, out.count);
  executor_->run(plan, tag, in, wide, op, o.finish(world_->size), o.deadline);
  kernels::cast(out.dtype, out.data, wide.dtype, wide.data, out.count);
  world_->transport->retire(tag);
}

// A one-byte all-reduce: nobody gets everyone's byte before everyone has come.
void NativeCommunicator::barrier(const Operation& o) {
  uint8_t byte = 0;
  run_plan(o, plan::Collective::AllReduce, {}, {&byte, 1, DType::UInt8});
}

std::byte* NativeCommunicator::workspace(size_t bytes) {
  if (bytes > workspace_bytes_) {
    workspace_.reset();
    workspace_.reset(new std::byte[bytes]);
    workspace_bytes_ = bytes;
  }
  return workspace_.get();
}

}  // namespace roundel::comm
