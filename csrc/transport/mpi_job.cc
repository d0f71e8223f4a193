#include "transport/mpi_job.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <list>

#include "base/error.h"
#include "base/interrupt.h"
#include "base/log.h"

namespace roundel::transport {
namespace {

constexpr int kGatherTag = 0, kAnswerTag = 1;  // below the tags of worlds, whose numbers begin at 1
constexpr useconds_t kPauseMicroseconds = 200;
constexpr size_t kMostText = 4096;  // of a rank, before the ranks have met
constexpr size_t kRow = kMostText + 1;

std::atomic<bool> g_ours{false};          // MPI was initialized here
std::atomic<Mpi::Comm> g_finish_comm{0};  // of all of MPI_COMM_WORLD, for the end
std::atomic<pid_t> g_process{0};

}  // namespace

void MpiJob::await(Mpi::Request& request, Deadline deadline, const std::string& what) {
  while (!mpi_->test(request)) {
    check_interrupt();
    if (deadline.passed()) throw Timeout(format("[mpi] rank %d: %s in time", rank_, what.c_str()));
    ::usleep(kPauseMicroseconds);
  }
}

MpiJob::MpiJob(std::shared_ptr<Mpi> mpi, uintptr_t comm_address, double seconds) : mpi_(std::move(mpi)) {
  if (mpi_->initialize()) {
    g_ours = true;
    g_process = ::getpid();
  }
  const Deadline deadline = Deadline::after(seconds);
  const Mpi::Comm from = comm_address == 0 ? mpi_->world() : mpi_->comm_at(comm_address);
  rank_ = mpi_->rank(from);
  size_ = mpi_->size(from);
  // A thread of an abandoned wait may still complete these: they stay.
  static std::list<Mpi::Comm> made;
  static std::mutex making;
  const auto duplicate = [&](Mpi::Comm comm) {
    Mpi::Comm* place;
    {
      const std::lock_guard lock(making);
      place = &made.emplace_back();
    }
    Mpi::Request request = mpi_->duplicate(comm, place);
    await(request, deadline, "not all ranks have duplicated their communicator");
    return *place;
  };
  comm_ = duplicate(from);
  if (g_ours && g_finish_comm == 0 && comm_address == 0) g_finish_comm = comm_;
}

std::string MpiJob::describe() const {
  const std::string& path = mpi_->path();
  return format("%s (%s, %s ABI, %s)", mpi_->version().c_str(), path.substr(path.rfind('/') + 1).c_str(), mpi_->abi(),
                name_of(mpi_->threads()));
}

std::vector<std::string> MpiJob::gather(const std::string& mine, double seconds) {
  if (mine.size() > kMostText) throw InvalidArgument(format("rank %d: a text of %zu bytes is too long", rank_, mine.size()));
  const auto size = static_cast<size_t>(size_);
  auto rows = std::make_unique<std::string>(size * kRow, '\0');
  std::string& all = *rows;
  std::copy(mine.begin(), mine.end(), all.begin() + static_cast<ptrdiff_t>(static_cast<size_t>(rank_) * kRow));
  try {
    exchange(all, seconds);
  } catch (...) {
    static_cast<void>(rows.release());  // MPI may still write to it, or read from it: it stays
    throw;
  }
  std::vector<std::string> texts;
  for (size_t r = 0; r < size; ++r) texts.emplace_back(all.c_str() + r * kRow);
  std::fill(all.begin(), all.end(), '\0');  // the token was in there
  return texts;
}

// To rank 0 and back: few ranks are started before anything is known of them, and it says who is missing.
void MpiJob::exchange(std::string& all, double seconds) {
  const Deadline deadline = Deadline::after(seconds);
  const auto size = static_cast<size_t>(size_);
  if (rank_ == 0) {
    std::vector<Mpi::Request> requests(size);
    for (size_t r = 1; r < size; ++r)
      requests[r] = mpi_->receive(comm_, static_cast<int>(r), kGatherTag, all.data() + r * kRow, kRow);
    std::vector<int> missing(size - 1);
    for (size_t r = 1; r < size; ++r) missing[r - 1] = static_cast<int>(r);
    for (;;) {
      std::erase_if(missing, [&](int r) { return mpi_->test(requests[static_cast<size_t>(r)]); });
      if (missing.empty()) break;
      check_interrupt();
      if (deadline.passed())
        throw Timeout(format("[mpi] rank 0: %zu of %d ranks did not arrive within %g s: rank %s", missing.size(), size_,
                             seconds, join_ranks(missing).c_str()));
      ::usleep(kPauseMicroseconds);
    }
    for (size_t r = 1; r < size; ++r) requests[r] = mpi_->send(comm_, static_cast<int>(r), kAnswerTag, all.data(), all.size());
    for (size_t r = 1; r < size; ++r) await(requests[r], deadline, format("rank %zu has not taken the table of ranks", r));
  } else {
    Mpi::Request given = mpi_->send(comm_, 0, kGatherTag, all.data() + static_cast<size_t>(rank_) * kRow, kRow);
    Mpi::Request answer = mpi_->receive(comm_, 0, kAnswerTag, all.data(), all.size());
    await(given, deadline, "rank 0 has not come");
    await(answer, deadline, "rank 0 has not sent the table of ranks");
  }
}

uint32_t MpiJob::propose_number() {
  const std::lock_guard lock(mutex_);
  return ++highest_number_;
}

void MpiJob::take_number(uint32_t number) {
  const std::lock_guard lock(mutex_);
  if (numbers_.contains(number))
    throw Error(format("rank %d: two groups of the same ranks were made at the same time; make one after the other", rank_));
  if ((static_cast<uint64_t>(number) + 1) * kTagsPerWorld > static_cast<uint64_t>(mpi_->highest_tag(comm_)))
    throw Error(format("rank %d: MPI has tags for %d groups only", rank_, mpi_->highest_tag(comm_) / kTagsPerWorld - 1));
  numbers_.insert(number);
  highest_number_ = std::max(highest_number_, number);
}

void MpiJob::give_back_number(uint32_t number) {
  const std::lock_guard lock(mutex_);
  numbers_.erase(number);
}

void finish_mpi(double seconds) {
  const std::shared_ptr<Mpi> mpi = Mpi::opened();
  if (mpi == nullptr || !g_ours || g_process != ::getpid()) return;
  try {
    if (!mpi->initialized() || mpi->finalized()) return;
    // MPI_Finalize waits for all ranks, for ever: only when all will come. Rank by rank the answer may differ at the deadline's
    // edge; the launcher ends a job whose ranks end without it.
    if (const Mpi::Comm comm = g_finish_comm; comm != 0) {
      const Deadline deadline = Deadline::after(seconds);
      Mpi::Request request = mpi->barrier(comm);
      while (!mpi->test(request)) {
        if (deadline.passed()) return log::info("MPI is not finalized: not all ranks have come to their end");
        ::usleep(kPauseMicroseconds);
      }
    }
    mpi->finalize();
  } catch (const std::exception& error) {
    log::info(format("MPI is not finalized: %s", error.what()));
  }
}

}  // namespace roundel::transport
