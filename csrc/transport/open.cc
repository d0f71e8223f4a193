#include "transport/open.h"

#include <poll.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <filesystem>

#include "base/env.h"
#include "base/error.h"
#include "base/failpoint.h"
#include "base/log.h"
#include "transport/mpi.h"
#include "transport/stream.h"
#include "transport/tcp.h"

namespace roundel::transport {
namespace {

constexpr char kStart[] = "the start";
constexpr double kGiveUpSeconds = 0.1;

enum class Mode { Auto, Shm, Tcp, Mpi, ShmTcp, ShmMpi };

// Interconnects that MPI libraries drive past the kernel: InfiniBand and RoCE, Slingshot, Omni-Path.
constexpr const char* kFabrics[] = {"/sys/class/infiniband", "/sys/class/cxi", "/sys/class/hfi1"};

Mode mode_from_environment() {
  const std::string mode = env::text("ROUNDEL_TRANSPORT");
  if (mode == "auto") return Mode::Auto;
  if (mode == "shm") return Mode::Shm;
  if (mode == "tcp") return Mode::Tcp;
  if (mode == "mpi") return Mode::Mpi;
  if (mode == "shm+tcp") return Mode::ShmTcp;
  if (mode == "shm+mpi") return Mode::ShmMpi;
  throw InvalidArgument("ROUNDEL_TRANSPORT: expected auto, shm, tcp, mpi, shm+tcp or shm+mpi, got '" + mode + "'");
}

bool uses_memory(Mode mode) { return mode != Mode::Tcp && mode != Mode::Mpi; }

bool has_fabric() {
  return std::any_of(std::begin(kFabrics), std::end(kFabrics), [](const char* path) {
    std::error_code none;
    return std::filesystem::is_directory(path, none) && !std::filesystem::is_empty(path, none);
  });
}

// What this rank says of MPI to the others.
Job with_mpi(Job job, Mode mode) {
  const bool demanded = mode == Mode::Mpi || mode == Mode::ShmMpi;
  if (demanded && job.mpi == nullptr && job.size > 1)
    throw InvalidArgument(format("rank %d: ROUNDEL_TRANSPORT=%s, but neither mpirun nor init(comm=...) has started this job",
                                 job.rank, env::text("ROUNDEL_TRANSPORT").c_str()));
  if (job.mpi == nullptr) return job;
  if (demanded && !job.mpi->carries_data())
    throw InvalidArgument(
        format("rank %d: ROUNDEL_TRANSPORT=%s needs MPI_THREAD_SERIALIZED at least, but %s was initialized "
               "with less; initialize it with MPI_THREAD_MULTIPLE, or leave that to Roundel",
               job.rank, env::text("ROUNDEL_TRANSPORT").c_str(), job.mpi->describe().c_str()));
  if (!job.mpi->carries_data() || !(demanded || mode == Mode::Auto)) return job;
  job.mpi_number = job.mpi->propose_number();
  job.prefers_mpi = demanded || has_fabric();
  return job;
}

// The same answer on every rank.
bool all_prefer_mpi(const Rendezvous& met) {
  return std::all_of(met.peers.begin(), met.peers.end(),
                     [](const Peer& peer) { return peer.mpi_number > 0 && peer.prefers_mpi; });
}

uint32_t highest_number(const Rendezvous& met) {
  uint32_t highest = 0;
  for (const Peer& peer : met.peers) highest = std::max(highest, peer.mpi_number);
  return highest;
}

Cores cores_of(const std::vector<int>& ranks, const Rendezvous& met) {
  Cores all{};
  for (const int r : ranks)
    for (size_t i = 0; i < all.size(); ++i) all[i] |= met.peers[static_cast<size_t>(r)].cores[i];
  return all;
}

// One line of what was chosen, and why.
std::string describe(const World& world, Mode mode) {
  const std::string across = world.by_mpi ? "MPI" : "tcp";
  std::string text = world.all_local ? "shared memory" : world.mixed ? "shared memory and " + across : across;
  if (mode != Mode::Auto)
    text += " (ROUNDEL_TRANSPORT=" + env::text("ROUNDEL_TRANSPORT") + ")";
  else if (world.mpi != nullptr && !world.all_local && !world.by_mpi)
    text += world.mpi->carries_data()
                ? " (not MPI: not every host has a fabric that needs it; ROUNDEL_TRANSPORT=shm+mpi forces it)"
                : " (not MPI: it was initialized for one thread)";
  else if (world.by_mpi)
    text += " (every host has a fabric)";
  if (world.mpi != nullptr) text += "; started by way of " + world.mpi->describe();
  return text;
}

void check_job(const Job& job) {
  if (job.size < 1 || job.rank < 0 || job.rank >= job.size)
    throw InvalidArgument(format("expected a rank from 0 to size - 1, got rank %d of size %d", job.rank, job.size));
  if (job.size > 1 && job.rendezvous.empty())
    throw InvalidArgument("a job of several ranks needs a rendezvous address, got none");
}

// Ranks that this one shares no memory with.
std::vector<int> far_ranks(const World& world) {
  std::vector<int> far;
  for (int r = 0; r < world.size; ++r) {
    const bool shared =
        world.memory != nullptr && world.host[static_cast<size_t>(r)] == world.host[static_cast<size_t>(world.rank)];
    if (r != world.rank && !shared) far.push_back(r);
  }
  return far;
}

std::map<int, StreamTransport::Channels> open_sockets(const World& world, const Identity& identity, const Rendezvous& met,
                                                      const Patience& patience) {
  std::map<int, Address> lower;
  std::vector<int> higher;
  for (const int r : far_ranks(world)) {
    if (r < world.rank)
      lower[r] = met.peers[static_cast<size_t>(r)].address;
    else
      higher.push_back(r);
  }
  return open_tcp(identity, met.data_listener.get(), lower, higher, patience);
}

// Memory and connections to all others.
void open_ways(World& world, const Identity& identity, const Rendezvous& met, bool shares_memory, const Patience& patience) {
  if (shares_memory) {
    world.memory = std::make_unique<SharedMemory>(identity, world.local, world.is_group);
    world.memory->meet(identity, patience);
  } else {
    world.private_bell_state = std::make_unique<DoorbellState>();
    Fd event(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!event) throw system_error("eventfd", errno);
    world.private_bell = std::make_unique<Doorbell>(world.private_bell_state.get(), std::move(event));
  }
  std::vector<StreamTransport::Channels> channels(static_cast<size_t>(world.size));
  if (!world.by_mpi)
    for (auto& [rank, sockets] : open_sockets(world, identity, met, patience))
      channels[static_cast<size_t>(rank)] = std::move(sockets);
  if (world.memory != nullptr)
    for (int i = 0; i < world.memory->size(); ++i)
      if (i != world.memory->index())
        channels[static_cast<size_t>(world.local[static_cast<size_t>(i)])].push_back(world.memory->channel(i));
  auto transport = std::make_unique<StreamTransport>(identity, std::move(channels), &world.bell(), world.spin);
  if (world.by_mpi) {
    const auto number = std::make_shared<MpiNumber>(world.mpi, highest_number(met));
    for (auto& stripe : open_mpi(identity, number, far_ranks(world), world.members)) transport->add(std::move(stripe));
  }
  world.transport = std::move(transport);
}

// What ends the start of one rank ends everybody's, with the same word.
void report_current(const Identity& identity, Monitor& monitor) {
  try {
    throw;
  } catch (const PeerLost& error) {
    monitor.report(error, error.ranks);
    throw;
  } catch (const Error& error) {
    monitor.await_trouble(kStart);  // perhaps another one's end, of which the report is on its way
    monitor.report(error, {});
    throw;
  } catch (const std::exception& error) {  // such as Ctrl-C
    monitor.report(Error(format("rank %d: %s", identity.rank, error.what())), {});
    throw;
  }
}

// The others hear of it before they see connections end.
void give_up(Monitor& monitor) {
  monitor.leave(Deadline::after(0));
  ::poll(nullptr, 0, static_cast<int>(kGiveUpSeconds * 1000));
}

}  // namespace

std::unique_ptr<World> open_world(const Job& wanted) {
  check_job(wanted);
  failpoint::configure();
  const Mode mode = mode_from_environment();
  const Job job = with_mpi(wanted, mode);
  const Deadline deadline = Deadline::after(job.start_timeout);
  const Identity identity(job.token, job.rank, job.size, job.epoch);
  if (job.members.empty()) log::set_rank(job.rank);  // a group's ranks keep the job's numbers

  Rendezvous met = meet(job, identity, {deadline, job.look});
  auto world = std::make_unique<World>();
  world->group_key = identity.group_key();
  world->is_group = !job.members.empty();
  if (static std::atomic<uint32_t> groups = 0; world->is_group) world->group = ++groups;
  if (met.data_listener) world->address = local_address(met.data_listener.get());
  world->rank = job.rank;
  world->size = job.size;
  world->epoch = job.epoch;
  for (int r = 0; r < job.size; ++r) {
    world->host.push_back(met.peers[static_cast<size_t>(r)].host);
    world->members.push_back(world->is_group ? job.members[static_cast<size_t>(r)] : r);
    if (met.peers[static_cast<size_t>(r)].host == met.peers[static_cast<size_t>(job.rank)].host) world->local.push_back(r);
  }
  const bool one_host = static_cast<int>(world->local.size()) == job.size;
  if (mode == Mode::Shm && !one_host)
    throw Error(format("rank %d: ROUNDEL_TRANSPORT=shm, but the ranks are on several hosts; use auto", job.rank));
  world->mpi = job.mpi;
  world->all_local = one_host && uses_memory(mode);
  world->by_mpi = !world->all_local && job.size > 1 && all_prefer_mpi(met);
  world->mixed = !one_host && uses_memory(mode) && *std::max_element(world->host.begin(), world->host.end()) + 1 < job.size;
  world->spin = spin_seconds(static_cast<int>(world->local.size()), cores_of(world->local, met));

  // The failure detector comes first: whoever dies from now on is noticed by all that still wait for something.
  const auto bell = std::make_shared<std::atomic<const Doorbell*>>(nullptr);
  world->monitor = std::make_unique<Monitor>(
      identity, std::move(met.controls),
      [bell] {
        if (const Doorbell* ready = bell->load(std::memory_order_acquire)) ready->ring();
      },
      MonitorTimes::from_settings(job.start_timeout));
  try {
    failpoint::pass(failpoint::Point::StartVerdict);
    // Shared memory even for one rank alone where nothing crosses hosts: its arena is where buffers live.
    open_ways(*world, identity, met, uses_memory(mode) && (world->local.size() > 1 || job.size == 1),
              {deadline, [&] {
                 world->monitor->raise_trouble(kStart);
                 if (job.look) job.look();
               }});
  } catch (...) {
    try {
      report_current(identity, *world->monitor);
    } catch (...) {
      give_up(*world->monitor);
      throw;
    }
  }
  bell->store(&world->bell(), std::memory_order_release);
  if (world->memory != nullptr) world->monitor->add(world->memory->take_watches());
  log::info(format("%d ranks on %d hosts, %zu here, %s", job.size,
                   *std::max_element(world->host.begin(), world->host.end()) + 1, world->local.size(),
                   describe(*world, mode).c_str()));
  return world;
}

}  // namespace roundel::transport
