// Where the process has an OpenMP runtime with GCC's entry points (torch brings one), its team is borrowed: its threads spin
// for some milliseconds after torch's last operation, and threads of our own would have to wait for their processors meanwhile.
// Otherwise, and in a forked child, where OpenMP's threads are missing, there is a pool of our own.
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

struct Call {
  const std::function<void(size_t)>& body;
  size_t items;
  std::fenv_t environment;
  std::atomic<size_t> next{0};

  void work() {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(i);
  }

  // On a thread of somebody else's.
  void work_and_restore() {
    std::fenv_t before;
    std::fegetenv(&before);
    std::fesetenv(&environment);
    work();
    std::fesetenv(&before);
  }
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
      std::fesetenv(&call.environment);
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
  Call call{body, items, {}};
  std::fegetenv(&call.environment);
  const bool alone = items <= 1 || threads <= 1;
  if (alone || !(run_by_openmp(call, threads) || pool().run(call, threads - 1))) call.work();
}

}  // namespace roundel::kernels
