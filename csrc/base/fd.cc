#include "base/fd.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>

#include "base/error.h"

namespace roundel {
namespace {

// Open descriptors, as flags by number. Plain atomics: the fork handler may take no lock.
constexpr int kMaxFd = 1 << 16;
std::atomic<bool> g_open[kMaxFd];
std::atomic<bool> g_forked{false};

void close_all_in_child() {
  for (int fd = 0; fd < kMaxFd; ++fd)
    if (g_open[fd].exchange(false, std::memory_order_relaxed)) {
      ::close(fd);
      g_forked = true;
    }
}

void set_open(int fd, bool open) {
  static const int registered = pthread_atfork(nullptr, nullptr, close_all_in_child);
  (void)registered;
  if (fd < kMaxFd) g_open[fd].store(open, std::memory_order_relaxed);
}

}  // namespace

Fd::Fd(int fd) : fd_(fd) {
  if (fd_ >= 0) set_open(fd_, true);
}

void Fd::reset() {
  const int fd = std::exchange(fd_, -1);
  if (fd < 0 || in_forked_child()) return;  // in a child the number may already be somebody else's
  set_open(fd, false);
  ::close(fd);
}

bool in_forked_child() { return g_forked.load(std::memory_order_relaxed); }

Mapping::Mapping(int fd, size_t bytes) : bytes_(bytes) {
  data_ = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (data_ == MAP_FAILED) {
    data_ = nullptr;
    throw system_error(format("map %zu bytes of shared memory", bytes), errno);
  }
}

Mapping::~Mapping() {
  if (data_ != nullptr) ::munmap(data_, bytes_);
}

std::string read_line(const char* path) {
  std::string line;
  if (std::FILE* file = std::fopen(path, "re")) {
    char buffer[256];
    if (std::fgets(buffer, sizeof buffer, file) != nullptr) line = buffer;
    std::fclose(file);
  }
  while (!line.empty() && line.back() == '\n') line.pop_back();
  return line;
}

}  // namespace roundel
