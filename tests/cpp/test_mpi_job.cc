// What a job's start over MPI does when ranks stay away, with an MPI that delivers late.
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "transport/mpi_job.h"

namespace {

using namespace roundel;
using transport::Mpi;

// Rank `rank` of 3. Its requests never end; what is written to their memory is up to the test.
class LateMpi final : public Mpi {
 public:
  explicit LateMpi(int rank) : rank_(rank) {}
  struct Place {
    void* data;
    size_t bytes;
  };
  std::vector<Place> receives;

  const std::string& path() const override { return path_; }
  std::string version() const override { return "late"; }
  const char* abi() const override { return "test"; }
  bool initialized() const override { return true; }
  bool finalized() const override { return false; }
  bool initialize() override { return false; }
  transport::MpiThreads threads() const override { return transport::MpiThreads::Multiple; }
  void finalize() override {}
  Comm world() const override { return 1; }
  Comm comm_at(uintptr_t) const override { return 1; }
  int rank(Comm) const override { return rank_; }
  int size(Comm) const override { return 3; }
  int highest_tag(Comm) const override { return 32767; }
  Request send(Comm, int, int, const void*, size_t) override { return kLate; }
  Request send_when_received(Comm, int, int, const void*, size_t) override { return kLate; }
  Request receive(Comm, int, int, void* data, size_t bytes) override {
    receives.push_back({data, bytes});
    return kLate;
  }
  Request duplicate(Comm, Comm* made) override {
    *made = 2;
    return kDone;
  }
  Request barrier(Comm) override { return kLate; }
  Request allreduce(Comm, void*, size_t, DType, ReduceOp) override { return kLate; }
  bool can_reduce(DType, ReduceOp) const override { return false; }
  bool test(Request& request) override { return request == kDone; }
  void cancel(Request&) override {}

 private:
  static constexpr Request kDone = 0, kLate = 1;
  int rank_;
  std::string path_ = "libmpi.so";
};

// Whatever takes the place of freed memory would be overwritten.
bool late_messages_hurt(int rank) {
  const auto mpi = std::make_shared<LateMpi>(rank);
  static auto& reachable = *new std::vector<std::shared_ptr<LateMpi>>;  // what is kept is no leak
  reachable.push_back(mpi);
  transport::MpiJob job(mpi, 0, 1);
  CHECK_THROWS(job.gather("text", 0.01), Timeout);
  CHECK(!mpi->receives.empty());
  std::vector<std::string> others(8, std::string(3 * 4097, 'x'));
  for (const LateMpi::Place& place : mpi->receives) std::memset(place.data, 'y', place.bytes);
  for (const std::string& other : others)
    if (other.find('y') != std::string::npos) return true;
  return false;
}

TEST(mpi_job_messages_that_come_after_a_timeout_hurt_nobody) {
  CHECK(!late_messages_hurt(0));
  CHECK(!late_messages_hurt(1));
}

}  // namespace
