// Descriptors and mappings with an owner.
//
// Every descriptor held here is closed in a forked child (pthread_atfork), so that a DataLoader worker that outlives its parent
// does not keep the parent's sockets open, which would hide the parent's death from its peers.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <string>
#include <utility>

namespace roundel {

class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd);  // takes ownership; fd < 0 is "none"
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Fd() { reset(); }
  void reset();
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

// True in a child forked from a process that held descriptors here: its copies are closed and it is no rank.
bool in_forked_child();

inline constexpr size_t kHugePage = 2u << 20;

// Shared mapping of a descriptor, unmapped at the end. From kHugePage up it starts at a multiple of it, so that all processes
// can map what lies in a huge page as one.
class Mapping {
 public:
  Mapping() = default;
  Mapping(int fd, size_t bytes);  // throws Error
  Mapping(Mapping&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Mapping();
  std::byte* data() const { return static_cast<std::byte*>(data_); }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Backs the huge pages inside fresh shared memory by such, whatever the system's setting for memory that is not asked for.
// Quick, unlike the faults that it saves; where it fails, memory has small pages. The memory reads as zero.
void use_huge_pages(std::byte* data, size_t bytes);

// The first line of a small file such as /proc/sys/kernel/random/boot_id; "" when unreadable.
std::string read_line(const char* path);

}  // namespace roundel
