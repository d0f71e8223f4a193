// A job's ranks as MPI knows them: a communicator of our own, a duplicate of MPI_COMM_WORLD or of what the user gave, and what
// is said over it before the ranks have met: where they meet, and the job's token.
//
// MPI is initialized here unless somebody has, and then finalized by finish_mpi() at the end of the process. Waits here end at
// a deadline or by Ctrl-C, never in MPI itself.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "base/clock.h"
#include "transport/mpi_library.h"

namespace roundel::transport {

class MpiJob {
 public:
  // `comm_address`: of a handle in memory, such as mpi4py's; 0: MPI_COMM_WORLD. All its ranks call this. Throws Timeout, Error.
  MpiJob(std::shared_ptr<Mpi> mpi, uintptr_t comm_address, double seconds);

  Mpi& mpi() const { return *mpi_; }
  Mpi::Comm comm() const { return comm_; }
  int rank() const { return rank_; }
  int size() const { return size_; }
  // Whether other threads than the one that initialized MPI may call it, as data over it needs.
  bool carries_data() const { return mpi_->threads() >= MpiThreads::Serialized; }
  std::string describe() const;  // "MPICH Version: 5.0.2 (libmpi.so.12, MPICH ABI, MPI_THREAD_MULTIPLE)"

  // Every rank's text, on every rank. Throws Timeout naming who did not come.
  std::vector<std::string> gather(const std::string& mine, double seconds);

  // Numbers that tell the messages of worlds apart: each is proposed by a world's ranks, the highest is taken by all of them.
  uint32_t propose_number();
  // Throws Error when this rank uses it already or MPI has no tags left.
  void take_number(uint32_t number);
  void give_back_number(uint32_t number);

 private:
  void exchange(std::string& all, double seconds);
  void await(Mpi::Request& request, Deadline deadline, const std::string& what);

  std::shared_ptr<Mpi> mpi_;
  Mpi::Comm comm_ = 0;
  int rank_ = 0, size_ = 1;
  std::mutex mutex_;  // guards the numbers
  uint32_t highest_number_ = 0;
  std::set<uint32_t> numbers_;
};

// At the end of the process: finalizes MPI when it was initialized here, nobody else has, and all ranks come to do the same
// within `seconds`; else leaves it be. Never throws.
void finish_mpi(double seconds);

// Each world sends on this many tags.
inline constexpr int kTagsPerWorld = 16;

}  // namespace roundel::transport
