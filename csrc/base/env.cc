#include "base/env.h"

#include <cstdlib>
#include <cstring>

#include "base/error.h"

namespace roundel::env {

const std::vector<Setting>& settings() {
  static const std::vector<Setting> table = {
      {"ROUNDEL_TIMEOUT", "600", "Seconds that one operation may wait for its peers before it raises TimeoutError."},
      {"ROUNDEL_DEAD_SECONDS", "10",
       "Seconds of silence after which a rank counts as lost (host or link gone, process stopped); the same on all ranks."},
      {"ROUNDEL_START_TIMEOUT", "60", "Seconds that init() waits for all ranks to arrive."},
      {"ROUNDEL_TRANSPORT", "auto", "auto (shm inside a host, tcp across), shm (one host only) or tcp (also inside a host)."},
      {"ROUNDEL_ALGORITHM", "",
       "Force a plan (direct, exchange, pairwise, ring, tree, doubling, halving, bruck, swing, hierarchical) where it exists; "
       "also for ranks of one host."},
      {"ROUNDEL_ISA", "", "Force the CPU kernels' path: portable, avx2 or avx512."},
      {"ROUNDEL_BUCKET_BYTES", "8M", "Size of DistributedOptimizer's gradient buckets."},
      {"ROUNDEL_ARENA_BYTES", "",
       "Address space for library-allocated buffers per rank; default: its share of the host's memory, at least 16 GiB of it."},
      {"ROUNDEL_SPIN_MICROSECONDS", "50", "How long a wait spins before it yields and sleeps, when every rank has a core."},
      {"ROUNDEL_SINGLE_COPY", "1",
       "Let ranks of a host read each other's buffers (process_vm_readv) where the kernel allows it."},
      {"ROUNDEL_CRC", "1", "Check a CRC32C of every payload that travels over TCP."},
      {"ROUNDEL_STALL_CHECK_SECONDS", "60", "Seconds that an operation waits before one warning says for whom; 0 for never."},
      {"ROUNDEL_FLIGHT_RECORD", "",
       "Where every rank writes its last 256 operations when its communicator fails: PREFIX.rank3.json."},
      {"ROUNDEL_FAILPOINT", "", "For tests: point=action@n, what this process does to itself at the n-th passing of a point."},
      {"ROUNDEL_TCP_SOCKETS", "1", "Connections to each peer on another host, 1 to 16; the same on all ranks."},
      {"ROUNDEL_INTERFACE", "",
       "Interface (eth1) or address of this host where other ranks reach this one; default: by the route to the rendezvous."},
      {"ROUNDEL_HOST_ID", "", "Ranks with equal host ids share memory; default: boot id and network namespace."},
      {"ROUNDEL_LOG_LEVEL", "warning", "error, warning, info or debug; written to stderr."},
  };
  return table;
}

std::string text(const char* name) {
  for (const Setting& setting : settings()) {
    if (std::strcmp(setting.name, name) != 0) continue;
    const char* value = std::getenv(name);
    return value != nullptr && *value != '\0' ? value : setting.fallback;
  }
  check_failed(name, __FILE__, __LINE__);
}

double number(const char* name, double low, double high) {
  const std::string value = text(name);
  char* end = nullptr;
  const double parsed = std::strtod(value.c_str(), &end);
  if (end == value.c_str() || *end != '\0' || !(parsed >= low && parsed <= high))
    throw InvalidArgument(format("%s: expected a number from %g to %g, got '%s'", name, low, high, value.c_str()));
  return parsed;
}

uint64_t bytes(const char* name) {
  const std::string value = text(name);
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
    throw InvalidArgument(format("%s: expected bytes such as 8388608, 512K or 8M, got '%s'", name, value.c_str()));
  return static_cast<uint64_t>(parsed * unit);
}

bool flag(const char* name) {
  const std::string value = text(name);
  for (const char* yes : {"1", "true", "on", "yes"})
    if (value == yes) return true;
  for (const char* no : {"0", "false", "off", "no"})
    if (value == no) return false;
  throw InvalidArgument(format("%s: expected 1 or 0, got '%s'", name, value.c_str()));
}

}  // namespace roundel::env
