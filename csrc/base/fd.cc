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

// A reservation that is as much longer as the start may have to move, of which the rest is given back.
Mapping::Mapping(int fd, size_t bytes) : bytes_(bytes) {
  const size_t spare = bytes >= kHugePage ? kHugePage : 0;
  void* room = ::mmap(nullptr, bytes + spare, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (room == MAP_FAILED) throw system_error(format("reserve addresses for %zu bytes of shared memory", bytes), errno);
  auto* begin = static_cast<std::byte*>(room);
  const size_t before = spare > 0 ? -reinterpret_cast<uintptr_t>(begin) % kHugePage : 0;
  const size_t page = static_cast<size_t>(::sysconf(_SC_PAGESIZE)), used = (bytes + page - 1) / page * page;
  if (before > 0) ::munmap(begin, before);
  data_ = ::mmap(begin + before, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | MAP_FIXED, fd, 0);
  const int error = errno;
  if (spare > before) ::munmap(begin + before + used, spare - before);
  if (data_ == MAP_FAILED) {
    data_ = nullptr;
    ::munmap(begin + before, used);
    throw system_error(format("map %zu bytes of shared memory", bytes), error);
  }
}

void use_huge_pages(std::byte* data, size_t bytes) {
  constexpr int kCollapse = 25;  // MADV_COLLAPSE of Linux 6.1, which older headers do not have
  const size_t begin = -reinterpret_cast<uintptr_t>(data) % kHugePage;
  for (size_t at = begin; at + kHugePage <= bytes; at += kHugePage) {
    *reinterpret_cast<volatile std::byte*>(data + at) = std::byte{0};  // the page cache must know of the range
    if (::madvise(data + at, kHugePage, kCollapse) != 0) return;
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
