#include "base/recorder.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstring>

#include "base/error.h"
#include "base/fd.h"
#include "base/text.h"

#if defined(__x86_64__)
#include <x86intrin.h>
#endif

namespace roundel::recorder {
namespace {

// An entry as it is kept: words, so that a reader beside the writer sees old or new ones and never undefined behaviour.
struct Fixed {
  uint64_t sequence;
  uint32_t epoch, group;
  Signature signature;
  uint64_t bytes;
  uint64_t queued;
  char name[kNameBytes];
};
constexpr size_t kWords = sizeof(Fixed) / sizeof(uint64_t);
constexpr size_t kNameWord = offsetof(Fixed, name) / sizeof(uint64_t);
static_assert(sizeof(Fixed) % sizeof(uint64_t) == 0);

// `number` is 0 while `fixed` is written. What changes during the operation has words of its own.
struct alignas(64) Slot {
  std::atomic<uint64_t> number;
  std::atomic<uint64_t> fixed[kWords];
  std::atomic<uint64_t> started, finished, waiting_mask;
  std::atomic<State> state;
};

Slot g_slots[kEntries];
std::atomic<uint64_t> g_last{0};

uint64_t ticks() {
#if defined(__x86_64__)
  return __rdtsc();
#else
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
#endif
}

double unix_seconds() { return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count(); }

// Two moments on both clocks give the rate: the library's load, and now.
struct Moment {
  uint64_t tick = ticks();
  double second = unix_seconds();
};

const Moment g_first;  // when the library was loaded

class Seconds {
 public:
  double operator()(uint64_t tick) const {
    if (tick == 0) return 0;
    return now_.second - static_cast<double>(static_cast<int64_t>(now_.tick - tick)) * rate_;
  }

 private:
  const Moment now_ = later();
  const double rate_ = (now_.second - g_first.second) / static_cast<double>(now_.tick - g_first.tick);
  static Moment later() {  // far enough from the first for a rate
    Moment now;
    while (now.second - g_first.second < 1e-3) now = Moment();
    return now;
  }
};

Slot* slot_of(uint64_t number) {
  Slot& slot = g_slots[number % kEntries];
  return slot.number.load(std::memory_order_relaxed) == number ? &slot : nullptr;  // or the recorder has moved on
}

bool read(const Slot& slot, const Seconds& seconds, Entry& entry) {
  entry.number = slot.number.load(std::memory_order_acquire);
  if (entry.number == 0) return false;
  uint64_t words[kWords];
  for (size_t i = 0; i < kWords; ++i) words[i] = slot.fixed[i].load(std::memory_order_relaxed);
  const uint64_t started = slot.started.load(std::memory_order_relaxed);
  const uint64_t finished = slot.finished.load(std::memory_order_relaxed);
  const uint64_t mask = slot.waiting_mask.load(std::memory_order_relaxed);
  entry.state = slot.state.load(std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_acquire);
  if (slot.number.load(std::memory_order_relaxed) != entry.number) return false;
  Fixed fixed;
  std::memcpy(static_cast<void*>(&fixed), words, sizeof fixed);
  entry.sequence = fixed.sequence;
  entry.epoch = fixed.epoch;
  entry.group = fixed.group;
  entry.signature = fixed.signature;
  entry.bytes = fixed.bytes;
  entry.name = cut_text({fixed.name, ::strnlen(fixed.name, kNameBytes)}, kNameBytes - 1);
  entry.queued = seconds(fixed.queued);
  entry.started = seconds(started);
  entry.finished = seconds(finished);
  entry.waiting_for.clear();
  for (int r = 0; r < 64; ++r)
    if ((mask >> r & 1) != 0 && entry.state != State::Done) entry.waiting_for.push_back(r);
  return true;
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\')
      out += format("\\%c", c);
    else if (static_cast<unsigned char>(c) < 0x20)
      out += format("\\u%04x", c);
    else
      out += c;
  }
  return out + "\"";
}

std::string line_of(const Entry& e) {
  std::string ranks;
  for (const int r : e.waiting_for) ranks += (ranks.empty() ? "" : ", ") + std::to_string(r);
  return format(
      "{\"number\": %llu, \"sequence\": %llu, \"epoch\": %u, \"group\": %u, \"kind\": %s, \"what\": %s, \"name\": %s, "
      "\"dtype\": \"%s\", \"bytes\": %llu, \"queued\": %.6f, \"started\": %.6f, \"finished\": %.6f, \"state\": \"%s\", "
      "\"waiting_for\": [%s]}\n",
      static_cast<unsigned long long>(e.number), static_cast<unsigned long long>(e.sequence), e.epoch, e.group,
      quoted(name_of(e.signature.kind)).c_str(), quoted(e.signature.describe()).c_str(), quoted(e.name).c_str(),
      name_of(e.signature.dtype), static_cast<unsigned long long>(e.bytes), e.queued, e.started, e.finished, name_of(e.state),
      ranks.c_str());
}

}  // namespace

const char* name_of(State state) {
  const char* names[] = {"queued", "running", "done", "failed"};
  return names[static_cast<size_t>(state)];
}

uint64_t begin(uint64_t sequence, uint32_t epoch, const Signature& signature, uint64_t bytes, const std::string& name,
               State state, uint32_t group) {
  const uint64_t number = g_last.fetch_add(1, std::memory_order_relaxed) + 1;
  const uint64_t now = ticks();
  Slot& slot = g_slots[number % kEntries];
  slot.number.store(0, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_release);
  const Fixed fixed{sequence, epoch, group, signature, bytes, now, {}};
  uint64_t words[kNameWord];
  std::memcpy(words, &fixed, sizeof words);
  for (size_t i = 0; i < kNameWord; ++i) slot.fixed[i].store(words[i], std::memory_order_relaxed);
  for (size_t i = kNameWord, at = 0; i < kWords; ++i, at += sizeof(uint64_t)) {  // in whole words: a detour would stall
    uint64_t word = 0;
    if (at < name.size()) std::memcpy(&word, name.data() + at, std::min(name.size() - at, sizeof word));
    slot.fixed[i].store(word, std::memory_order_relaxed);
  }
  slot.started.store(state == State::Running ? now : 0, std::memory_order_relaxed);
  slot.finished.store(0, std::memory_order_relaxed);
  slot.waiting_mask.store(0, std::memory_order_relaxed);
  slot.state.store(state, std::memory_order_relaxed);
  slot.number.store(number, std::memory_order_release);
  return number;
}

void started(uint64_t number) {
  Slot* slot = slot_of(number);
  if (slot == nullptr) return;
  slot->started.store(ticks(), std::memory_order_relaxed);
  slot->state.store(State::Running, std::memory_order_relaxed);
}

void finished(uint64_t number, State state) {
  Slot* slot = slot_of(number);
  if (slot == nullptr) return;
  slot->finished.store(ticks(), std::memory_order_relaxed);
  slot->state.store(state, std::memory_order_relaxed);
}

void waiting(uint64_t number, const std::vector<int>& ranks) {
  Slot* slot = slot_of(number);
  if (slot == nullptr) return;
  uint64_t mask = 0;
  for (const int r : ranks)
    if (r >= 0 && r < 64) mask |= uint64_t{1} << r;
  slot->waiting_mask.store(mask, std::memory_order_relaxed);
}

std::vector<Entry> entries() {
  std::vector<Entry> all;
  if (g_last.load(std::memory_order_relaxed) == 0) return all;
  const Seconds seconds;
  for (const Slot& slot : g_slots) {
    Entry entry;
    if (read(slot, seconds, entry)) all.push_back(std::move(entry));
  }
  std::sort(all.begin(), all.end(), [](const Entry& a, const Entry& b) { return a.number < b.number; });
  return all;
}

std::string doing() {
  const std::vector<Entry> all = entries();
  if (all.empty()) return "has not called any operation";
  // The oldest that is not over is what holds up the rest.
  const auto open = std::find_if(all.begin(), all.end(), [](const Entry& e) { return e.finished == 0; });
  const Entry& e = open != all.end() ? *open : all.back();
  std::string what = name_of(e.signature.kind);
  if (!e.name.empty()) what += " '" + e.name + "'";
  if (e.signature.kind != OpKind::PointToPoint)
    what += format(" (operation %llu)", static_cast<unsigned long long>(e.sequence));
  const double now = unix_seconds();
  if (e.finished > 0) return format("is in no operation; its last, %s, ended %.1f s ago", what.c_str(), now - e.finished);
  if (e.started == 0) return format("has queued %s %.1f s ago", what.c_str(), now - e.queued);
  std::string text = format("is in %s since %.1f s", what.c_str(), now - e.started);
  if (!e.waiting_for.empty()) text += ", waiting for rank " + join_ranks(e.waiting_for);
  return text;
}

void write(const std::string& prefix, int rank, int size, const std::string& why) {
  const std::string path = format("%s.rank%d.json", prefix.c_str(), rank), beside = format("%s.%d", path.c_str(), ::getpid());
  std::string text = format("{\"rank\": %d, \"size\": %d, \"pid\": %d, \"written\": %.6f, \"why\": %s}\n", rank, size,
                            ::getpid(), unix_seconds(), quoted(why).c_str());
  for (const Entry& entry : entries()) text += line_of(entry);
  const Fd file(::open(beside.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
  if (!file) throw system_error("flight record " + beside, errno);
  for (size_t done = 0; done < text.size();) {
    const ssize_t n = ::write(file.get(), text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) throw system_error("flight record " + beside, errno);
    done += static_cast<size_t>(n);
  }
  if (::rename(beside.c_str(), path.c_str()) != 0) throw system_error("flight record " + path, errno);
}

}  // namespace roundel::recorder
