// Collectives as plans over the world's transport: any mix of shared-memory rings and sockets, any algorithm of the registry.
// 16-bit sums on plans that fold more than once run in float32 and round once at the end.
#pragma once

#include <map>
#include <memory>
#include <tuple>

#include "base/memory.h"
#include "comm/communicator.h"
#include "plan/executor.h"

namespace roundel::comm {

class NativeCommunicator final : public Communicator {
 public:
  explicit NativeCommunicator(std::shared_ptr<transport::World> world);
  ~NativeCommunicator() override { close(); }
  const char* name() const override;

 protected:
  void execute(const Operation& operation) override;

 private:
  // A plan and the number of its algorithm, made once for each shape that comes again and again.
  struct Choice {
    plan::Plan plan;
    uint8_t algorithm;
  };
  using ChoiceKey =
      std::tuple<plan::Collective, DType, int, std::vector<size_t>>;  // root; elements, and of each part when parts differ
  const Choice& choose(plan::Collective collective, const plan::Shape& shape, DType dtype, bool own_parts);

  plan::Shape shape_of(const Operation& o, plan::Parts parts) const;
  // `addend`: what goes into `out` first, of reductions.
  void run_plan(const Operation& o, View in, View out, const View* addend = nullptr);
  void alltoallv(const Operation& o);
  void barrier(const Operation& o);
  void meet(const Operation& o, const transport::Tag& tag);
  void require_mpi() const;
  bool is_mpis_own(const Operation& o) const;
  void allreduce_by_mpi(const Operation& o);
  std::byte* workspace(size_t bytes);

  std::unique_ptr<plan::Executor> executor_;
  const Operation* current_ = nullptr;  // for the executor's look_around
  std::string forced_;
  bool forced_by_mpi_ = false;
  plan::LinkCost cost_;
  std::map<ChoiceKey, Choice> choices_;
  plan::Plan barrier_;
  Memory workspace_;
  size_t workspace_bytes_ = 0;
};

}  // namespace roundel::comm
