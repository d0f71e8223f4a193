// MPI messages as a way for frames: what a job's fabric is best used by.
//
// A frame travels as a message of its own, with a payload of up to kTogether bytes in it; a longer payload follows as a second
// message, from its place to its place. Messages between two ranks on one tag do not overtake each other, so that a payload's
// message is the one that its header announced. Receives for headers are posted at all times.
//
// MPI has no end of a connection: whoever leaves says so in a message, whoever dies is the monitor's.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "transport/handshake.h"
#include "transport/mpi_job.h"
#include "transport/stripe.h"

namespace roundel::transport {

// The number by which a world's messages are known, as long as this lives.
class MpiNumber {
 public:
  MpiNumber(std::shared_ptr<MpiJob> job, uint32_t number);
  ~MpiNumber();
  MpiNumber(const MpiNumber&) = delete;
  MpiNumber& operator=(const MpiNumber&) = delete;
  MpiJob& job() const { return *job_; }
  int tag(int index) const { return static_cast<int>(number_) * kTagsPerWorld + index; }

 private:
  std::shared_ptr<MpiJob> job_;
  uint32_t number_;
};

// Stripes to all `peers`, rank r of which is members[r] of the job's MPI ranks.
std::vector<std::unique_ptr<Stripe>> open_mpi(const Identity& identity, const std::shared_ptr<MpiNumber>& number,
                                              const std::vector<int>& peers, const std::vector<int>& members);

}  // namespace roundel::transport
