// Collectives among the ranks of one host, directly in shared memory: no messages, no plan.
//
// Every operation starts with a flag line: sequence number, signature and, when they fit, the data. shm.cc: one shot, in which
// everyone publishes once and everyone reads what it needs, and all-reduce in the arena, in which the owner of a slice reads
// all copies and writes all. shm_cells.cc: what flows through cells, in chunks. shm_direct.cc: what is read where it is. Which
// path is taken follows from what all ranks know, or have said in their lines; the table is in docs/algorithms.md.
//
// 16-bit sums round once; every sum is folded in rank order, so that all ranks and all runs get the same bits.
#pragma once

#include "comm/communicator.h"
#include "comm/publish.h"

namespace roundel::comm {

struct ShmRegion;
struct ShmLine;
struct Places;

class ShmCommunicator final : public Communicator {
 public:
  explicit ShmCommunicator(std::shared_ptr<transport::World> world);
  ~ShmCommunicator() override { close(); }
  const char* name() const override { return "shm"; }

 protected:
  void execute(const Operation& operation) override;
  std::vector<int> missing(const Operation& operation) const override;

 private:
  ShmLine& enter(const Operation& o);
  const ShmLine& meet(const Operation& o, int peer);
  void publish(const Operation& o, ShmLine& line);
  void await(const Operation& o, int peer, const std::atomic<uint64_t>& counter, uint64_t target);
  void ring_peers();

  void exchange(const Operation& o, ShmLine& line);
  void allreduce(const Operation& o, ShmLine& line);
  void alltoallv(const Operation& o, ShmLine& line);
  void one_shot(const Operation& o, ShmLine& line);
  int64_t place_of(const View& view) const;
  const Places& places_of(const Operation& o, int rank) const;
  int64_t offer(const Operation& o) const;
  const std::byte* mapped(int peer, int64_t place) const;
  void fetch(const Operation& o, int peer, int64_t place, void* to, size_t bytes);
  void reduce_directly(const Operation& o);
  void exchange_directly(const Operation& o);
  void reduce_in_arena(const Operation& o, const std::vector<std::byte*>& copies);
  void reduce_through_cells(const Operation& o);
  void exchange_through_cells(const Operation& o, size_t longest);
  void gather_through_cells(const Operation& o);
  void broadcast_through_cells(const Operation& o);
  void publish_bytes(DType dtype, void* to, const void* from, size_t count, double factor);
  void await_free_cell(const Operation& o, uint64_t id);
  void take_room(size_t bytes);
  uint64_t* row(int rank) const;
  void meet_all(const Operation& o);
  void finish(const Operation& o);
  void await_finish(const Operation& o);
  void meet_for_broadcast(const Operation& o);

  transport::SharedMemory& memory_;
  int rank_, size_;
  std::vector<ShmRegion*> regions_;  // by rank
  std::vector<uint64_t> entered_;    // highest operation that each rank is known to have entered
  std::vector<const void*> inputs_;  // of the reduction under way, by rank
  std::vector<std::byte> fetched_;   // parts of peers' inputs that reduce_directly() adds up
  Publisher publisher_;
  size_t depth_, once_;              // cells, and bytes for one-shot operations, that are in use: the same on all ranks, as are
  size_t once_sum_, direct_from_;    // bytes of an all-reduce: up to here in one shot, from here on perhaps directly
  size_t room_ = 0, next_room_ = 0;  // where one-shot data lie: of this operation, and of the next one
  uint64_t chunks_ = 0;              // chunks that all operations so far have moved through the cells, the same on all ranks
};

}  // namespace roundel::comm
