#include "engine/stats.h"

#include <mutex>

namespace roundel::engine {
namespace {

// Of one writer: no locked instruction.
class Counter {
 public:
  void add(uint64_t n) { value_.store(get() + n, std::memory_order_relaxed); }
  void add(Clock::duration time) {
    const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
    if (ns > 0) add(static_cast<uint64_t>(ns));
  }
  uint64_t get() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<uint64_t> value_{0};
};

// What one thread counts of a kind lies on a line of its own.
struct KindCounters {
  struct alignas(64) {
    Counter requests;
  } submitted;
  struct alignas(64) {
    Counter nanoseconds;
  } agreed;
  struct alignas(64) {
    Counter batches, tensors, bytes, fused, queued_ns, took_ns;
  } executed;
  struct alignas(64) {
    Counter requests;
  } failed;
};

struct RankCounters {
  Counter requests, nanoseconds;
};

double seconds(uint64_t nanoseconds) { return static_cast<double>(nanoseconds) * 1e-9; }

// Counters never go back: a reset is a snapshot that later ones are counted from.
void subtract(Stats::Kind& kind, const Stats::Kind& base) {
  kind.requests -= base.requests;
  kind.tensors -= base.tensors;
  kind.bytes -= base.bytes;
  kind.batches -= base.batches;
  kind.fused -= base.fused;
  kind.failed -= base.failed;
  kind.negotiate_seconds -= base.negotiate_seconds;
  kind.queue_seconds -= base.queue_seconds;
  kind.execute_seconds -= base.execute_seconds;
}

}  // namespace

struct Stats::Counters {
  Counters(size_t kinds, size_t ranks) : kinds(kinds), ranks(ranks) {}
  std::vector<KindCounters> kinds;
  std::vector<RankCounters> ranks;  // written by agreed()
  std::mutex mutex;                 // of what follows
  Snapshot base;
  Clock::time_point since = Clock::now();
};

Stats::Stats(const std::vector<std::string>& kinds, int size)
    : names_(kinds), size_(size), counters_(std::make_unique<Counters>(kinds.size(), static_cast<size_t>(size))) {
  counters_->base.kinds.resize(kinds.size());
  counters_->base.waited.resize(static_cast<size_t>(size));
}

Stats::~Stats() = default;

void Stats::submitted(int kind) { counters_->kinds[static_cast<size_t>(kind)].submitted.requests.add(1); }

void Stats::agreed(int kind, int last, Clock::duration waited) {
  counters_->kinds[static_cast<size_t>(kind)].agreed.nanoseconds.add(waited);
  if (last < 0 || last >= size_) return;
  RankCounters& rank = counters_->ranks[static_cast<size_t>(last)];
  rank.requests.add(1);
  rank.nanoseconds.add(waited);
}

void Stats::executed(int kind, size_t tensors, size_t bytes, Clock::duration queued, Clock::duration took) {
  auto& counted = counters_->kinds[static_cast<size_t>(kind)].executed;
  counted.batches.add(1);
  counted.tensors.add(tensors);
  counted.bytes.add(bytes);
  if (tensors > 1) counted.fused.add(tensors);
  counted.queued_ns.add(queued);
  counted.took_ns.add(took);
}

void Stats::failed(int kind) { counters_->kinds[static_cast<size_t>(kind)].failed.requests.add(1); }

Stats::Snapshot Stats::totals() const {
  Snapshot all;
  for (size_t k = 0; k < names_.size(); ++k) {
    const KindCounters& from = counters_->kinds[k];
    Kind& kind = all.kinds.emplace_back();
    kind.name = names_[k];
    kind.requests = from.submitted.requests.get();
    kind.tensors = from.executed.tensors.get();
    kind.bytes = from.executed.bytes.get();
    kind.batches = from.executed.batches.get();
    kind.fused = from.executed.fused.get();
    kind.failed = from.failed.requests.get();
    kind.negotiate_seconds = seconds(from.agreed.nanoseconds.get());
    kind.queue_seconds = seconds(from.executed.queued_ns.get());
    kind.execute_seconds = seconds(from.executed.took_ns.get());
  }
  for (const RankCounters& from : counters_->ranks)
    all.waited.push_back({from.requests.get(), seconds(from.nanoseconds.get())});
  return all;
}

Stats::Snapshot Stats::snapshot() const {
  const std::lock_guard lock(counters_->mutex);
  Snapshot now = totals();
  for (size_t k = 0; k < now.kinds.size(); ++k) subtract(now.kinds[k], counters_->base.kinds[k]);
  for (size_t r = 0; r < now.waited.size(); ++r) {
    now.waited[r].requests -= counters_->base.waited[r].requests;
    now.waited[r].seconds -= counters_->base.waited[r].seconds;
  }
  now.seconds = std::chrono::duration<double>(Clock::now() - counters_->since).count();
  return now;
}

void Stats::reset() {
  const std::lock_guard lock(counters_->mutex);
  counters_->base = totals();
  counters_->since = Clock::now();
}

}  // namespace roundel::engine
