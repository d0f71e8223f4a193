// Ranks as threads of one process, each with its own world and communicator, over shared memory, TCP and both.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "comm/communicator.h"

namespace roundel::test {

enum class Wires { Shm, Tcp, Mixed };
inline constexpr Wires kWires[] = {Wires::Shm, Wires::Tcp, Wires::Mixed};

// Hosts that are pretended decide what travels how: all alike is shared memory, all different is TCP.
inline std::string host_of(Wires wires, int rank) {
  return wires == Wires::Shm ? "one" : "host " + std::to_string(wires == Wires::Tcp ? rank : rank % 2);
}

inline std::mutex g_mutex;  // of CHECK, whose counter is not for threads

inline void expect(bool fine, const char* file, int line, const std::string& what) {
  const std::lock_guard lock(g_mutex);
  if (!fine) fail(file, line, what);
}
#define EXPECT(condition) ::roundel::test::expect((condition), __FILE__, __LINE__, #condition)

// Runs `body` as every rank of a new job, and `before`, with the rank, on its thread before it starts. The rendezvous listens
// beforehand, as under a launcher.
inline void run_ranks(
    int size, Wires wires, const std::function<void(comm::Communicator&)>& body, double timeout = 20,
    const std::function<void(int)>& before = [](int) {}) {
  const Fd listener = transport::listen_on(transport::resolve("127.0.0.1:0"));
  const std::string rendezvous = transport::local_address(listener.get()).text;
  static std::atomic<uint8_t> jobs{0};
  const uint8_t job_number = ++jobs;
  std::vector<std::thread> ranks;
  for (int r = 0; r < size; ++r)
    ranks.emplace_back([&, r] {
      transport::Job job;
      job.token.fill(job_number);
      job.rank = r;
      job.size = size;
      job.rendezvous = rendezvous;
      job.rendezvous_fd = r == 0 ? listener.get() : -1;
      job.start_timeout = timeout;
      job.host = host_of(wires, r);
      try {
        before(r);
        const auto comm = comm::Communicator::open(transport::open_world(job));
        body(*comm);
        comm->leave(timeout);
      } catch (const std::exception& error) {
        expect(false, __FILE__, __LINE__, format("rank %d: %s", r, error.what()));
      }
    });
  for (std::thread& rank : ranks) rank.join();
}

}  // namespace roundel::test
