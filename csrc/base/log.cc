#include "base/log.h"

#include <unistd.h>

#include <atomic>

#include "base/env.h"
#include "base/error.h"

namespace roundel::log {
namespace {

std::atomic<int> g_rank{-1};

Level level_from_environment() {
  const std::string name = env::text("ROUNDEL_LOG_LEVEL");
  const char* names[] = {"error", "warning", "info", "debug"};
  for (int i = 0; i < 4; ++i)
    if (name == names[i]) return static_cast<Level>(i);
  throw InvalidArgument(format("ROUNDEL_LOG_LEVEL: expected error, warning, info or debug, got '%s'", name.c_str()));
}

}  // namespace

void set_rank(int rank) {
  static std::atomic_flag told;
  g_rank = rank;
  if (rank != 0 || told.test_and_set()) return;
  std::string all;
  for (const std::string& note : env::borrowed()) all += (all.empty() ? "" : ", ") + note;
  if (!all.empty()) warning("read from the environment: " + all);
}

void write(Level level, const std::string& text) {
  static const Level limit = level_from_environment();
  if (level > limit) return;
  const char* names[] = {"error", "warning", "info", "debug"};
  const int rank = g_rank;
  const std::string who = rank >= 0 ? format("roundel [%d]", rank) : "roundel";
  const std::string line = who + " " + names[static_cast<int>(level)] + ": " + text + "\n";
  [[maybe_unused]] const ssize_t written = ::write(2, line.data(), line.size());  // one write: lines of ranks do not mix
}

}  // namespace roundel::log
