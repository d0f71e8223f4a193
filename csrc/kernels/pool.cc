// A helper takes part in a call only if it comes while there are items left; the caller waits for those who take part, and so
// never for a thread that is not scheduled. A forked child has no helpers: it makes itself a new pool, and leaks the old one.
#include "kernels/pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <mutex>
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
};

class Pool {
 public:
  // False when another call is under way.
  bool run(Call& call, int helpers) {
    const std::unique_lock one_at_a_time(calls_, std::try_to_lock);
    if (!one_at_a_time.owns_lock()) return false;
    start(helpers);
    std::fegetenv(&call.environment);
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

Pool& pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { g_pool = nullptr; });
  (void)registered;
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
  const auto helpers = static_cast<int>(items < static_cast<size_t>(threads) ? items : static_cast<size_t>(threads)) - 1;
  if (helpers <= 0 || !pool().run(call, helpers)) call.work();
}

}  // namespace roundel::kernels
