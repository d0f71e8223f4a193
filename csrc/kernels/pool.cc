// Where the process has an OpenMP runtime with GCC's entry points (torch brings one), its team is borrowed: its threads spin
// for some milliseconds after torch's last operation, and threads of our own would have to wait for their processors meanwhile.
// Otherwise, and in a forked child, where OpenMP's threads are missing, there is a pool of our own.
//
// Every thread has a share of the items, side by side, and then helps the others from the ends of theirs: loops over memory go
// on where they were, which the processor's prefetching wants. The caller has the first share in every call, helpers theirs in
// the order in which they come.
//
// The pool: a helper takes part in a call only if it comes while there are items left; the caller waits for those who take
// part, and so never for a thread that is not scheduled. A forked child has no helpers: it makes itself a new pool, and leaks
// the old one.
#include "kernels/pool.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>

namespace roundel::kernels {
namespace {

constexpr size_t kMaxShares = 64;

// Items that nobody has taken yet.
struct alignas(64) Share {
  std::atomic<uint64_t> rest{0};  // the first one, and 2^32 times the one behind the last

  bool take(bool from_front, size_t& item) {
    uint64_t now = rest.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t begin = now & 0xffffffff, end = now >> 32;
      if (begin >= end) return false;
      if (!rest.compare_exchange_weak(now, from_front ? now + 1 : now - (uint64_t{1} << 32), std::memory_order_relaxed))
        continue;
      item = from_front ? begin : end - 1;
      return true;
    }
  }
};

class Call {
 public:
  Call(const std::function<void(size_t)>& body, size_t items, size_t threads)
      : body_(body), shares_(std::clamp<size_t>(threads, 1, kMaxShares)) {
    for (size_t s = 0; s < shares_; ++s) share_[s].rest = (items * (s + 1) / shares_) << 32 | (items * s / shares_);
    std::fegetenv(&environment_);
  }

  void work() {
    const size_t own = std::this_thread::get_id() == caller_ ? 0 : helpers_.fetch_add(1, std::memory_order_relaxed);
    for (size_t s = 0, item; s < shares_; ++s)
      while (share_[(own + s) % shares_].take(s == 0, item)) body_(item);
  }

  // On a thread of somebody else's.
  void work_and_restore() {
    std::fenv_t before;
    std::fegetenv(&before);
    take_environment();
    work();
    std::fesetenv(&before);
  }

  void take_environment() const { std::fesetenv(&environment_); }

 private:
  const std::function<void(size_t)>& body_;
  const size_t shares_;
  const std::thread::id caller_ = std::this_thread::get_id();
  std::fenv_t environment_;
  std::atomic<size_t> helpers_{1};
  Share share_[kMaxShares];
};

std::atomic<bool> g_forked{false};

using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

// GOMP_parallel of the runtime that is loaded already, torch's if there are several.
Parallel find_openmp() {
  std::string found;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto& name = *static_cast<std::string*>(data);
        const char* base = std::strrchr(info->dlpi_name, '/');
        if (base == nullptr) return 0;
        const bool openmp = std::strncmp(base, "/libgomp", 8) == 0 || std::strncmp(base, "/libomp", 7) == 0 ||
                            std::strncmp(base, "/libiomp5", 9) == 0;
        if (openmp && (name.empty() || std::strstr(info->dlpi_name, "torch") != nullptr)) name = info->dlpi_name;
        return 0;
      },
      &found);
  void* library = found.empty() ? nullptr : ::dlopen(found.c_str(), RTLD_NOLOAD | RTLD_LAZY);
  return library == nullptr ? nullptr : reinterpret_cast<Parallel>(::dlsym(library, "GOMP_parallel"));
}

bool run_by_openmp(Call& call, int threads) {
  static const Parallel parallel = find_openmp();
  if (parallel == nullptr || g_forked) return false;
  parallel([](void* data) { static_cast<Call*>(data)->work_and_restore(); }, &call, static_cast<unsigned>(threads), 0);
  return true;
}

class Pool {
 public:
  // False when another call is under way.
  bool run(Call& call, int helpers) {
    const std::unique_lock one_at_a_time(calls_, std::try_to_lock);
    if (!one_at_a_time.owns_lock()) return false;
    start(helpers);
    {
      const std::lock_guard lock(mutex_);
      call_ = &call;
      wanted_ = helpers;
    }
    wake_.notify_all();
    call.work();
    std::unique_lock lock(mutex_);
    call_ = nullptr;
    finished_.wait(lock, [this] { return active_ == 0; });
    return true;
  }

 private:
  // With signals blocked, which are for the threads that somebody else has made. Fewer threads than asked for will do.
  void start(int helpers) {
    if (started_ >= helpers) return;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; started_ < helpers; ++started_) std::thread([this] { help(); }).detach();
    } catch (const std::system_error&) {
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void help() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return call_ != nullptr && wanted_ > 0; });
      --wanted_;
      ++active_;
      Call& call = *call_;
      lock.unlock();
      call.take_environment();
      call.work();
      lock.lock();
      if (--active_ == 0) finished_.notify_one();
    }
  }

  std::mutex calls_, mutex_;
  std::condition_variable wake_, finished_;
  Call* call_ = nullptr;  // this and below: under mutex_
  int wanted_ = 0, active_ = 0;
  int started_ = 0;  // under calls_
};

std::atomic<Pool*> g_pool{nullptr};

// From the start of the process on: OpenMP's threads may be lost before there is a call of ours.
[[maybe_unused]] const int g_watching_forks = pthread_atfork(nullptr, nullptr, [] {
  g_forked = true;
  g_pool = nullptr;
});

Pool& pool() {
  if (Pool* there = g_pool.load(std::memory_order_acquire)) return *there;
  Pool* none = nullptr;
  auto* made = new Pool;  // never ends, as its threads do not
  if (g_pool.compare_exchange_strong(none, made)) return *made;
  delete made;
  return *none;
}

}  // namespace

int default_threads() {
  cpu_set_t set;
  CPU_ZERO(&set);
  const int count = ::sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 0;
  return count > 0 ? count : 1;
}

void parallel_for(size_t items, int threads, const std::function<void(size_t)>& body) {
  Call call(body, items, static_cast<size_t>(std::max(threads, 1)));
  const bool alone = items <= 1 || threads <= 1;
  if (alone || !(run_by_openmp(call, threads) || pool().run(call, threads - 1))) call.work();
}

}  // namespace roundel::kernels
