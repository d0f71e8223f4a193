// Carrying out what the ranks have agreed on: announced requests as operations on their process set's communicator.
//
// Every rank of the set does the same steps in the same order: how requests are put together follows from what was announced
// and from settings that are the same everywhere, never from what one rank has. A rank that has joined takes part with neutral
// elements and empty parts.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "base/view.h"
#include "comm/communicator.h"
#include "engine/adasum.h"
#include "engine/request.h"
#include "engine/stats.h"
#include "engine/ticket.h"

namespace roundel::engine {

// One announced request. `buffers` and `ticket` are this rank's, or null where it has joined.
struct Work {
  SharedRequest sealed;
  const Request& request() const { return sealed->request; }
  Buffers* buffers = nullptr;
  Ticket* ticket = nullptr;
  Clock::time_point submitted, agreed;
  int last = -1;          // the rank that became ready last
  size_t parts_left = 0;  // operations that carry some of it
};

// Runs announced requests of one process set. All-reduces that go together travel together, `fusion_bytes` at most.
class Executor {
 public:
  using Done = std::function<void(std::span<Work* const>)>;
  // `done` is called with every request as soon as it is carried out.
  Executor(std::shared_ptr<comm::Communicator> comm, size_t fusion_bytes, Stats& stats, Done done)
      : comm_(std::move(comm)), adasum_(*comm_), fusion_bytes_(fusion_bytes), stats_(stats), done_(std::move(done)) {}
  void run(std::vector<Work>& works);
  comm::Communicator& comm() { return *comm_; }

 private:
  struct Fused {
    comm::Operation operation;
    std::vector<Work*> works;  // one entry for each member
  };
  void carry_out(Work& work);
  void note(const Work& work, size_t bytes, Clock::time_point begin, Clock::time_point end) const;
  void add_allreduce(Work& work);
  void flush(Fused& fused);
  void flush_all();
  void run_adasum(Work& work);
  void allgather(Work& work);
  void broadcast(Work& work);
  void alltoall(Work& work);
  void reduce_scatter(Work& work);
  std::pair<View, View> views_of(const Work& work, size_t tensor);
  View neutral(const Request& request, size_t tensor);
  std::byte* scratch(size_t bytes);

  std::shared_ptr<comm::Communicator> comm_;
  Adasum adasum_;
  size_t fusion_bytes_;
  Stats& stats_;
  Done done_;
  std::vector<Fused> open_;
  std::vector<std::unique_ptr<std::byte[]>> scratch_;  // of a rank that has joined
};

}  // namespace roundel::engine
