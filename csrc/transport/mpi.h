// MPI messages as a way for frames: what a job's fabric is best used by.
//
// A frame travels as a message of its own, with the beginning of its payload; what is left of a short one follows in more
// messages of that kind. Receives for these are posted at all times, and they do not overtake each other. A long payload goes
// from its place to its place, on a tag that the frame names and that is its own until it has been taken: if nobody waits for
// it yet, its sender holds it.
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
