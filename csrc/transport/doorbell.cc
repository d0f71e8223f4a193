#include "transport/doorbell.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <bit>
#include <ctime>
#include <numeric>

#include "base/env.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace roundel::transport {
namespace {

constexpr uint32_t kYields = 4;  // enough to let a peer on the same core finish what it has begun, before paying for a sleep

void pause_processor() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

}  // namespace

void Doorbell::ring() const {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  const auto mode = static_cast<Mode>(state_->mode.load(std::memory_order_relaxed));
  if (mode == Mode::Futex) {
    state_->word.fetch_add(1, std::memory_order_seq_cst);
    ::syscall(SYS_futex, &state_->word, FUTEX_WAKE, 1, nullptr, nullptr, 0);
  } else if (mode == Mode::Event) {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = ::write(event_.get(), &one, sizeof one);  // full means already rung
  }
}

uint32_t Doorbell::announce(Mode mode) {
  const uint32_t seen = state_->word.load(std::memory_order_relaxed);
  state_->mode.store(static_cast<uint32_t>(mode), std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  return seen;
}

void Doorbell::awake() {
  state_->mode.store(static_cast<uint32_t>(Mode::Awake), std::memory_order_relaxed);
  uint64_t rings;
  [[maybe_unused]] const ssize_t got = ::read(event_.get(), &rings, sizeof rings);  // non-blocking: drains what was rung
}

void Doorbell::futex_wait(uint32_t seen, Deadline deadline) {
  const double seconds = std::min(0.1, deadline.seconds_left());
  timespec limit{0, static_cast<long>(seconds * 1e9)};
  ::syscall(SYS_futex, &state_->word, FUTEX_WAIT, seen, &limit, nullptr, 0);
}

bool Backoff::again() {
  if (spin_ > 0) {
    if (rounds_ == 0) until_ = Deadline::after(spin_);
    if (++rounds_ % 64 != 0 || !until_.passed()) {
      pause_processor();
      return true;
    }
    return false;
  }
  if (rounds_ >= kYields) return false;
  ++rounds_;
  ::sched_yield();
  return true;
}

Cores own_cores() {
  Cores cores{};
  cpu_set_t allowed;
  if (::sched_getaffinity(0, sizeof allowed, &allowed) != 0) return cores;
  for (size_t i = 0; i < 64 * cores.size(); ++i)
    if (CPU_ISSET(i, &allowed)) cores[i / 64] |= uint64_t{1} << i % 64;
  return cores;
}

double spin_seconds(int local_size, const Cores& cores) {
  const int count =
      std::accumulate(cores.begin(), cores.end(), 0, [](int sum, uint64_t word) { return sum + std::popcount(word); });
  return local_size <= count ? env::number("ROUNDEL_SPIN_MICROSECONDS", 0, 1e6) * 1e-6 : 0.0;
}

}  // namespace roundel::transport
