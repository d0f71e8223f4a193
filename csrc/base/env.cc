#include "base/env.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "base/error.h"

namespace roundel::env {
namespace {

using Converted = std::optional<std::string>;

bool is_on(const std::string& value) { return std::atoi(value.c_str()) > 0; }  // as Horovod reads its switches

Converted zero_when_on(const std::string& value) { return is_on(value) ? Converted("0") : Converted(); }
Converted one_or_zero(const std::string& value) { return is_on(value) ? "1" : "0"; }

// Horovod's levels have one more at either end.
Converted log_level(const std::string& level) {
  std::string value = level;
  std::transform(value.begin(), value.end(), value.begin(), [](unsigned char c) { return std::tolower(c); });
  if (value == "trace") return "debug";
  if (value == "fatal") return "error";
  return value;
}

// Horovod's is one file, ours is the start of each rank's; DYNAMIC says that start_timeline() will be called.
Converted timeline_prefix(const std::string& value) {
  if (value == "DYNAMIC") return {};
  return value.ends_with(".json") ? value.substr(0, value.size() - 5) : value;
}

}  // namespace

const std::vector<Setting>& settings() {
  static const std::vector<Setting> table = {
      {"ROUNDEL_TIMEOUT",
       "600",
       "Seconds that one operation may wait for its peers before it raises TimeoutError.",
       {{"HOROVOD_GLOO_TIMEOUT_SECONDS"}}},
      {"ROUNDEL_DEAD_SECONDS", "10",
       "Seconds of silence after which a rank counts as lost (host or link gone, process stopped); the same on all ranks."},
      {"ROUNDEL_START_TIMEOUT", "60", "Seconds that init() waits for all ranks to arrive.", {{"HOROVOD_START_TIMEOUT"}}},
      {"ROUNDEL_TRANSPORT", "auto",
       "auto (shm inside a host; across, mpi where mpirun has started the job through MPI and every host has a fabric, else "
       "tcp), "
       "shm (one host only), tcp or mpi (also inside a host), shm+tcp or shm+mpi."},
      {"ROUNDEL_MPI_LIBRARY", "",
       "The MPI library to open, a path or a name; default: the one that the process has loaded, else that of the Python "
       "environment or the loader's path."},
      {"ROUNDEL_ALGORITHM", "",
       "Force a plan (direct, exchange, pairwise, ring, tree, doubling, halving, bruck, swing, hierarchical) where it exists, "
       "also for ranks of one host; mpi: MPI's own all-reduce in jobs that were started through MPI."},
      {"ROUNDEL_ISA", "", "Force the CPU kernels' path: portable, avx2 or avx512."},
      {"ROUNDEL_BUCKET_BYTES", "8M", "Size of DistributedOptimizer's gradient buckets."},
      {"ROUNDEL_FUSION_THRESHOLD",
       "8M",
       "The most bytes of named tensors that travel together as one operation; 0: each travels alone.",
       {{"HOROVOD_FUSION_THRESHOLD"}}},
      {"ROUNDEL_ARENA_BYTES", "",
       "Address space for library-allocated buffers per rank; default: its share of the host's memory, at least 16 GiB of it."},
      {"ROUNDEL_SPIN_MICROSECONDS", "50", "How long a wait spins before it yields and sleeps, when every rank has a core."},
      {"ROUNDEL_SINGLE_COPY", "1",
       "Let ranks of a host read each other's buffers (process_vm_readv) where the kernel allows it."},
      {"ROUNDEL_CRC", "1", "Check a CRC32C of every payload that travels over TCP."},
      {"ROUNDEL_STALL_CHECK_SECONDS",
       "60",
       "Seconds that an operation waits before one warning says for whom; 0 for never.",
       {{"HOROVOD_STALL_CHECK_DISABLE", zero_when_on}, {"HOROVOD_STALL_CHECK_TIME_SECONDS"}}},
      {"ROUNDEL_STALL_SHUTDOWN_SECONDS",
       "0",
       "Seconds that a named tensor waits for other ranks before the job ends with TimeoutError; 0 for never.",
       {{"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"}}},
      {"ROUNDEL_TIMELINE",
       "",
       "Where every rank writes its timeline from init() on (Chrome trace format): PREFIX.rank3.json.",
       {{"HOROVOD_TIMELINE", timeline_prefix}}},
      {"ROUNDEL_TIMELINE_MARK_CYCLES",
       "0",
       "Mark in the timeline when batches of tensors were agreed on.",
       {{"HOROVOD_TIMELINE_MARK_CYCLES", one_or_zero}}},
      {"ROUNDEL_FLIGHT_RECORD", "",
       "Where every rank writes its last 256 operations when its communicator fails: PREFIX.rank3.json."},
      {"ROUNDEL_FAILPOINT", "", "For tests: point=action@n, what this process does to itself at the n-th passing of a point."},
      {"ROUNDEL_TCP_SOCKETS", "1", "Connections to each peer on another host, 1 to 16; the same on all ranks."},
      {"ROUNDEL_INTERFACE",
       "",
       "Interface (eth1) or address of this host where other ranks reach this one; default: by the route to the rendezvous.",
       {{"HOROVOD_GLOO_IFACE"}}},
      {"ROUNDEL_HOST_ID", "", "Ranks with equal host ids share memory; default: boot id and network namespace."},
      {"ROUNDEL_LOG_LEVEL", "warning", "error, warning, info or debug; written to stderr.", {{"HOROVOD_LOG_LEVEL", log_level}}},
  };
  return table;
}

namespace {

const char* variable(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : nullptr;
}

struct Found {
  std::string value;
  const char* from;  // the variable that it came from
};

Found find(const Setting& setting) {
  if (const char* value = variable(setting.name)) return {value, setting.name};
  for (const Alias& alias : setting.aliases)
    if (const char* value = variable(alias.name))
      if (Converted converted = alias.convert == nullptr ? Converted(value) : alias.convert(value))
        return {std::move(*converted), alias.name};
  return {setting.fallback, setting.name};
}

Found find(const char* name) {
  for (const Setting& setting : settings())
    if (std::strcmp(setting.name, name) == 0) return find(setting);
  check_failed(name, __FILE__, __LINE__);
}

}  // namespace

std::string text(const char* name) { return find(name).value; }

std::vector<std::string> borrowed() {
  std::vector<std::string> notes;
  for (const Setting& setting : settings())
    if (const Found found = find(setting); found.from != setting.name)
      notes.push_back(format("%s as %s=%s", found.from, setting.name, found.value.c_str()));
  return notes;
}

double number(const char* name, double low, double high) {
  const auto [value, from] = find(name);
  char* end = nullptr;
  const double parsed = std::strtod(value.c_str(), &end);
  if (end == value.c_str() || *end != '\0' || !(parsed >= low && parsed <= high))
    throw InvalidArgument(format("%s: expected a number from %g to %g, got '%s'", from, low, high, value.c_str()));
  return parsed;
}

uint64_t bytes(const char* name) {
  const auto [value, from] = find(name);
  char* end = nullptr;
  const double parsed = std::strtod(value.c_str(), &end);
  double unit = 1;
  switch (*end) {
    case 'k':
    case 'K':
      unit = 1024.0;
      ++end;
      break;
    case 'm':
    case 'M':
      unit = 1024.0 * 1024;
      ++end;
      break;
    case 'g':
    case 'G':
      unit = 1024.0 * 1024 * 1024;
      ++end;
      break;
    default:
      break;
  }
  if (end == value.c_str() || *end != '\0' || !(parsed >= 0 && parsed * unit < 9e18))
    throw InvalidArgument(format("%s: expected bytes such as 8388608, 512K or 8M, got '%s'", from, value.c_str()));
  return static_cast<uint64_t>(parsed * unit);
}

bool flag(const char* name) {
  const auto [value, from] = find(name);
  for (const char* yes : {"1", "true", "on", "yes"})
    if (value == yes) return true;
  for (const char* no : {"0", "false", "off", "no"})
    if (value == no) return false;
  throw InvalidArgument(format("%s: expected 1 or 0, got '%s'", from, value.c_str()));
}

}  // namespace roundel::env
