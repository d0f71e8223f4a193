// MPI's own all-reduce in place of a plan, where ROUNDEL_ALGORITHM=mpi asks for it; never selected unasked: MPI does not
// promise the same bits on every rank.
//
// MPI would hang, or worse, where ranks disagree about a call. So the ranks first exchange a message of ours with the
// operation's signature. What MPI has begun cannot be withdrawn: it works in memory of this communicator's, which after a
// failure stays with MPI.
#include <algorithm>

#include "base/copy.h"
#include "base/error.h"
#include "comm/native.h"
#include "transport/mpi_job.h"

namespace roundel::comm {
namespace {

constexpr size_t kAtATime = 1u << 28;  // elements; MPI counts in an int
constexpr uint8_t kMpisOwn = 255;      // in a signature, in place of a plan's number

}  // namespace

void NativeCommunicator::require_mpi() const {
  if (world_->size > 1 && (world_->mpi == nullptr || !world_->mpi->carries_data()))
    throw InvalidArgument(
        format("rank %d: ROUNDEL_ALGORITHM=mpi needs a job that was started through MPI, initialized for several threads",
               world_->rank));
}

bool NativeCommunicator::is_mpis_own(const Operation& o) const {
  return forced_by_mpi_ && o.kind == OpKind::AllReduce && o.in.count > 0 && !world_->is_group && world_->size > 1 &&
         world_->mpi->mpi().can_reduce(o.dtype(), o.kernel_op());
}

void NativeCommunicator::allreduce_by_mpi(const Operation& o) {
  transport::Tag tag{o.sequence, 0, o.signature};
  tag.signature.algorithm = kMpisOwn;
  meet(o, tag);
  transport::Mpi& mpi = world_->mpi->mpi();
  const View work{workspace(o.out.bytes()), o.out.count, o.out.dtype};
  if (o.prescale != 1)
    kernels::scale(work.dtype, work.data, o.in.data, work.count, o.prescale);
  else
    copy_bytes(work.data, o.in.data, work.bytes());
  for (size_t at = 0; at < work.count; at += kAtATime) {
    transport::Mpi::Request request =
        mpi.allreduce(world_->mpi->comm(), work.at(at), std::min(kAtATime, work.count - at), work.dtype, o.kernel_op());
    try {
      while (!mpi.test(request)) {
        world_->transport->poll();
        look_around(o, [] { return std::vector<int>(); });
        world_->transport->sleep(o.deadline, [this] { return disturbed(); });
      }
    } catch (...) {
      static_cast<void>(workspace_.release());
      workspace_bytes_ = 0;
      throw;
    }
  }
  const void* sum = work.data;
  kernels::reduce(o.kernel_op(), work.dtype, o.out.data, {&sum, 1}, work.count, o.finish(world_->size));
  world_->transport->retire(tag);
}

}  // namespace roundel::comm
