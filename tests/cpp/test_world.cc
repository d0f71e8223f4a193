// Whole worlds in one process: ranks are threads, each with its own world and communicator, over shared memory, TCP and both.
// This is what the sanitizers look at: every layer from the rendezvous to the collectives, under every thread that calls them.
#include <sched.h>
#include <unistd.h>

#include "comm/split.h"
#include "ranks.h"

using namespace roundel;
using namespace roundel::test;
using comm::Communicator;
using comm::Operation;

namespace {

View view(std::vector<float>& v) { return {reinterpret_cast<std::byte*>(v.data()), v.size(), DType::Float32}; }

Operation allreduce(std::vector<float>& in, std::vector<float>& out) {
  Operation o;
  o.kind = OpKind::AllReduce;
  o.in = view(in);
  o.out = view(out);
  return o;
}

Operation transfer(std::vector<float>& data, int peer, bool sends) {
  Operation o;
  o.kind = OpKind::PointToPoint;
  (sends ? o.in : o.out) = view(data);
  o.root = peer;
  return o;
}

Operation barrier(double timeout = 0) {
  Operation o;
  o.timeout = timeout;
  return o;
}

float rank_sum(int size) { return static_cast<float>(size * (size + 1) / 2); }

void sum_of_ones_and_more(Communicator& comm, size_t count) {
  std::vector<float> in(count, static_cast<float>(comm.world().rank + 1)), out(count);
  comm.run(allreduce(in, out));
  EXPECT(out == std::vector<float>(count, rank_sum(comm.world().size)));
}

void mixed_collectives(Communicator& comm) {
  const int rank = comm.world().rank, size = comm.world().size;
  for (const size_t count : {0, 1, 7, 3000, 70'000}) {
    sum_of_ones_and_more(comm, count);
    std::vector<float> data(count, static_cast<float>(rank));
    Operation broadcast = allreduce(data, data);
    broadcast.kind = OpKind::Broadcast;
    broadcast.root = size - 1;
    comm.run(broadcast);
    EXPECT(data == std::vector<float>(count, static_cast<float>(size - 1)));

    std::vector<float> whole(count * static_cast<size_t>(size)), part(count, static_cast<float>(rank));
    Operation gather = allreduce(part, whole);
    gather.kind = OpKind::AllGather;
    gather.parts = plan::Parts::even(whole.size(), size);
    comm.run(gather);
    for (int r = 0; r < size && count > 0; ++r) EXPECT(whole[count * static_cast<size_t>(r)] == static_cast<float>(r));

    std::vector<float> swapped(whole.size());
    Operation alltoall = allreduce(whole, swapped);
    alltoall.kind = OpKind::AllToAll;
    alltoall.parts = plan::Parts::even(whole.size(), size);
    comm.run(alltoall);
    EXPECT(count == 0 || swapped.back() == static_cast<float>(rank));

    Operation scatter = allreduce(whole, part);
    scatter.kind = OpKind::ReduceScatter;
    scatter.parts = gather.parts;
    comm.run(scatter);
    EXPECT(part == std::vector<float>(count, static_cast<float>(rank * size)));
    comm.run(barrier());
  }
}

// An error that some rank meets; every rank gets one of this type.
template <class Expected>
void expect_error(Communicator& comm, Operation operation, int line) {
  try {
    comm.run(std::move(operation));
    expect(false, __FILE__, line, "no error");
  } catch (const Expected&) {
  }
}

}  // namespace

TEST(ranks_as_threads_run_mixed_collectives) {
  for (const Wires wires : kWires)
    for (const int size : {1, 2, 4}) run_ranks(size, wires, mixed_collectives);
}

TEST(ranks_as_threads_reduce_in_the_arena) {
  for (const Wires wires : kWires)
    run_ranks(3, wires, [](Communicator& comm) {
      constexpr size_t kCount = 50'000;
      auto* data = reinterpret_cast<float*>(comm.allocate(kCount * sizeof(float)));
      for (int round = 0; round < 3; ++round) {
        std::fill_n(data, kCount, static_cast<float>(comm.world().rank + 1));
        Operation o;
        o.kind = OpKind::AllReduce;
        o.in = o.out = {reinterpret_cast<std::byte*>(data), kCount, DType::Float32};
        comm.run(o);
        EXPECT(data[0] == 6 && data[kCount - 1] == 6);
      }
      comm.run(barrier());
      comm.release(reinterpret_cast<std::byte*>(data));
    });
}

TEST(memory_of_the_arena_is_zero_when_it_comes_and_comes_again) {
  run_ranks(2, kWires[0], [](Communicator& comm) {
    for (const size_t bytes : {size_t{100'000}, size_t{5} << 20})  // small pages, huge ones and small ones
      for (int round = 0; round < 2; ++round) {
        std::byte* data = comm.allocate(bytes);
        EXPECT(std::all_of(data, data + bytes, [](std::byte b) { return b == std::byte{0}; }));
        std::fill_n(data, bytes, std::byte{1});
        comm.release(data);
      }
  });
}

TEST(ranks_as_threads_start_operations_from_several_threads) {
  for (const Wires wires : kWires)
    run_ranks(3, wires, [](Communicator& comm) {
      constexpr int kThreads = 3, kRounds = 20;
      std::mutex order;  // the order of collectives is the caller's to keep: all are alike here
      std::vector<std::thread> threads;
      for (int t = 0; t < kThreads; ++t)
        threads.emplace_back([&] {
          std::vector<float> in(2000, static_cast<float>(comm.world().rank + 1)), out(in.size());
          for (int i = 0; i < kRounds; ++i) {
            try {
              std::shared_ptr<comm::Request> request;
              {
                const std::lock_guard lock(order);
                request = comm.start(allreduce(in, out));
              }
              request->wait();
            } catch (const std::exception& error) {
              expect(false, __FILE__, __LINE__, error.what());
            }
            EXPECT(out == std::vector<float>(in.size(), rank_sum(3)));
          }
        });
      for (std::thread& thread : threads) thread.join();
    });
}

TEST(ranks_as_threads_pass_messages_beside_collectives) {
  for (const Wires wires : kWires)
    run_ranks(4, wires, [](Communicator& comm) {
      const int rank = comm.world().rank, size = comm.world().size;
      for (const size_t count : {0, 5, 400'000}) {
        std::vector<float> mine(count, static_cast<float>(rank)), theirs(count);
        mine.reserve(1);  // a null pointer would say that this is no send
        theirs.reserve(1);
        const auto sent = comm.start(transfer(mine, (rank + 1) % size, true));
        const auto received = comm.start(transfer(theirs, (rank + size - 1) % size, false));
        sum_of_ones_and_more(comm, 1000);
        sent->wait();
        received->wait();
        EXPECT(theirs == std::vector<float>(count, static_cast<float>((rank + size - 1) % size)));
      }
    });
}

TEST(ranks_as_threads_are_told_of_a_rank_that_vanishes) {
  for (const Wires wires : kWires) {
    std::atomic<int> told{0};
    run_ranks(4, wires, [&](Communicator& comm) {
      sum_of_ones_and_more(comm, 100);
      if (comm.world().rank == 3) return;  // leaves, in order, where the others still need it
      expect_error<PeerLost>(comm, barrier(10), __LINE__);
      expect_error<PeerLost>(comm, barrier(10), __LINE__);  // and for ever
      ++told;
    });
    CHECK_EQ(told.load(), 3);
  }
}

// Rank 1 tells the job that it has lost rank 2, and leaves; rank 0 only sees it leave their group.
TEST(ranks_as_threads_of_a_group_name_whom_the_job_has_lost) {
  for (const Wires wires : kWires) {
    std::atomic<int> told{0};
    run_ranks(3, wires, [&](Communicator& comm) {
      const int rank = comm.world().rank;
      const auto group = comm::split(comm, rank < 2 ? 0 : -1, 0);
      const auto inner = group == nullptr ? nullptr : comm::split(*group, 0, 0);
      if (rank == 1) {
        comm.end(std::make_exception_ptr(PeerLost("a test has lost rank 2", {2}, 1)), "a test");
        return comm.leave(0);
      }
      try {
        (rank == 0 ? *inner : comm).run(barrier(10));
        EXPECT(!"ended without an error");
      } catch (const PeerLost& lost) {
        EXPECT(lost.ranks == std::vector<int>{2});
        ++told;
      }
    });
    CHECK_EQ(told.load(), 2);
  }
}

TEST(ranks_as_threads_are_told_of_a_mismatch) {
  for (const Wires wires : kWires)
    run_ranks(3, wires, [&](Communicator& comm) {
      std::vector<float> data(comm.world().rank == 1 ? 12 : 10), out(data.size());
      expect_error<Mismatch>(comm, allreduce(data, out), __LINE__);
    });
}

TEST(ranks_as_threads_end_pending_operations_when_closed) {
  for (const Wires wires : kWires)
    run_ranks(2, wires, [&](Communicator& comm) {
      if (comm.world().rank == 0) return;
      std::vector<float> data(10);
      const auto pending = comm.start(transfer(data, 0, false));
      std::thread closer([&] { comm.close(); });
      try {
        pending->wait();
        EXPECT(!"ended without an error");
      } catch (const Error&) {
      }
      closer.join();
    });
}

TEST(ranks_as_threads_time_out_together) {
  for (const Wires wires : kWires)
    run_ranks(2, wires, [&](Communicator& comm) {
      if (comm.world().rank == 0) return expect_error<Timeout>(comm, barrier(0.1), __LINE__);
      ::usleep(300'000);
      try {
        comm.run(barrier());  // may succeed: rank 0 had come
      } catch (const Timeout&) {
      }
      expect_error<Timeout>(comm, barrier(), __LINE__);
    });
}

// mpirun binds each rank to a core of its own.
TEST(ranks_spin_where_each_has_a_core_whoever_bound_them) {
  const transport::Cores allowed = transport::own_cores();
  std::vector<int> cores;
  for (int i = 0; i < CPU_SETSIZE; ++i)
    if (const auto n = static_cast<size_t>(i); (allowed[n / 64] >> n % 64 & 1) != 0) cores.push_back(i);
  if (cores.size() < 2) return;
  const auto bind = [&](int core) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(core, &one);
    CHECK_EQ(::sched_setaffinity(0, sizeof one, &one), 0);
  };
  for (const Wires wires : {Wires::Shm, Wires::Tcp}) {
    const bool shares_host = wires == Wires::Shm;
    run_ranks(2, wires, [](Communicator& comm) { EXPECT(comm.world().spin > 0); }, 20, [&](int r) { bind(cores[r]); });
    run_ranks(
        2, wires, [&](Communicator& comm) { EXPECT((comm.world().spin > 0) != shares_host); }, 20,
        [&](int) { bind(cores[0]); });
  }
}
