// The ring: cells of 64 bytes, an event in as many in a row as it needs. Whoever wants to write takes them by moving `tail_`,
// fills them, and stamps the first one with its position; the writer waits for the stamp at `head_`, and gives the cells back
// by moving `head_`. Positions count up for ever, so a stamp is never mistaken for one of an earlier lap.
#include "engine/timeline.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "base/error.h"
#include "base/fd.h"
#include "base/log.h"
#include "base/text.h"

namespace roundel::engine {
namespace {

constexpr size_t kCells = 1u << 16;  // 4 MiB: some 30,000 events, a third of a second of a thread that does nothing else
constexpr size_t kCellBytes = 64;
constexpr size_t kWakeEvery = kCells / 4;  // cells; between times the writer looks by itself
constexpr int kLookMilliseconds = 50;
constexpr size_t kMostText = 1024;  // of a name
constexpr size_t kMostRanks = 8;    // of those waited for
constexpr size_t kWriteBytes = 64u << 10;
constexpr double kPatience = 1;  // seconds that stop() waits for an event that is being copied
constexpr int kOwnRow = 1;       // of instants; tensors come after it

int64_t nanoseconds(Clock::time_point t) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(t.time_since_epoch()).count();
}

// Unix time minus Clock, from the tightest of a few pairs of readings. Later steps of the system's clock are not followed.
int64_t unix_offset() {
  int64_t best = 0, tightest = INT64_MAX;
  for (int i = 0; i < 16; ++i) {
    const int64_t before = nanoseconds(Clock::now());
    const int64_t now = std::chrono::duration_cast<std::chrono::nanoseconds>(  //
                            std::chrono::system_clock::now().time_since_epoch())
                            .count();
    const int64_t after = nanoseconds(Clock::now());
    if (after - before >= tightest) continue;
    tightest = after - before;
    best = now - (before + tightest / 2);
  }
  return best;
}

// Of torch.profiler's traces (baseTimeNanoseconds): the beginning of one of these intervals, three months ago at most.
int64_t base_of(int64_t unix_now) {
  constexpr int64_t kInterval = 7'889'238LL * 1'000'000'000;
  return unix_now / kInterval * kInterval;
}

std::string path_of(const std::string& path, int rank) {
  const std::string number = std::to_string(rank), place = "{rank}";
  std::string text = path;
  size_t at = text.find(place);
  if (at == std::string::npos) {
    const size_t slash = text.find_last_of('/'), first = slash == std::string::npos ? 0 : slash + 1;
    const size_t dot = text.find_last_of('.');
    return text.insert(dot == std::string::npos || dot <= first ? text.size() : dot, ".rank" + number);
  }
  for (; at != std::string::npos; at = text.find(place, at + number.size())) text.replace(at, place.size(), number);
  return text;
}

void append(std::string& to, int64_t number) {
  char digits[24];
  to.append(digits, std::to_chars(digits, digits + sizeof digits, number).ptr);
}

// In microseconds, with three decimals.
void append_microseconds(std::string& to, int64_t ns) {
  append(to, ns / 1000);
  const int64_t rest = ns % 1000;
  to += '.';
  for (const int64_t unit : {100, 10, 1}) to += static_cast<char>('0' + rest / unit % 10);
}

void append_quoted(std::string& to, std::string_view text) {
  to += '"';
  for (const char c : text) {
    if (c == '"' || c == '\\')
      (to += '\\') += c;
    else if (static_cast<unsigned char>(c) < 0x20)
      to += format("\\u%04x", static_cast<unsigned>(c));
    else
      to += c;
  }
  to += '"';
}

}  // namespace

// As it lies in the ring; behind it `ranks` ranks and `text` bytes.
struct Timeline::Event {
  int64_t begin = 0, end = -1;  // Clock; end < 0: an instant
  const char* phase = nullptr;
  const char* dtype = nullptr;
  const char* how = nullptr;
  uint64_t bytes = 0;
  uint32_t fused = 0;
  uint32_t session = 0;
  uint32_t waited_for = 0;  // ranks, of which `ranks` are named
  uint16_t text = 0;
  uint16_t ranks = 0;
};

class Timeline::Ring {
 public:
  // False when there is no room. Any thread.
  bool put(const Event& event, std::string_view text, std::span<const int> ranks) noexcept {
    const size_t bytes = sizeof event + ranks.size_bytes() + text.size(), cells = (bytes + kCellBytes - 1) / kCellBytes;
    uint64_t at = tail_.load(std::memory_order_relaxed);
    do {
      // Negative when `at` is old; the exchange fails then.
      const auto used = static_cast<int64_t>(at + cells - head_.load(std::memory_order_acquire));
      if (used > static_cast<int64_t>(kCells)) return false;
    } while (!tail_.compare_exchange_weak(at, at + cells, std::memory_order_relaxed));
    std::byte* to = data_ + at % kCells * kCellBytes;
    std::memcpy(to, &event, sizeof event);
    if (!ranks.empty()) std::memcpy(to + sizeof event, ranks.data(), ranks.size_bytes());
    if (!text.empty()) std::memcpy(to + sizeof event + ranks.size_bytes(), text.data(), text.size());
    stamps_[at % kCells].store(at + 1, std::memory_order_release);
    if (at / kWakeEvery != (at + cells) / kWakeEvery) wake();
    return true;
  }

  // Hands all complete events to `use`(event, text, ranks), in order. The writer's thread only.
  template <class Use>
  void drain(const Use& use) {
    uint64_t at = head_.load(std::memory_order_relaxed);
    while (stamps_[at % kCells].load(std::memory_order_acquire) == at + 1) {
      const std::byte* from = data_ + at % kCells * kCellBytes;
      Event event;
      std::memcpy(&event, from, sizeof event);
      int ranks[kMostRanks];
      const size_t rank_bytes = event.ranks * sizeof(int);
      std::memcpy(ranks, from + sizeof event, rank_bytes);
      use(event, std::string_view(reinterpret_cast<const char*>(from) + sizeof event + rank_bytes, event.text),
          std::span<const int>(ranks, event.ranks));
      at += (sizeof event + rank_bytes + event.text + kCellBytes - 1) / kCellBytes;
      head_.store(at, std::memory_order_release);
    }
  }

  bool empty() const { return head_.load(std::memory_order_relaxed) == tail_.load(std::memory_order_relaxed); }
  void wake() const noexcept {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = ::write(event_.get(), &one, sizeof one);
  }
  void sleep(int milliseconds) const {
    pollfd readable{event_.get(), POLLIN, 0};
    if (::poll(&readable, 1, milliseconds) <= 0) return;
    uint64_t count;
    [[maybe_unused]] const ssize_t n = ::read(event_.get(), &count, sizeof count);
  }

 private:
  static constexpr size_t kMostBytes = sizeof(Event) + kMostRanks * sizeof(int) + kMostText;
  const Fd event_{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  alignas(kCellBytes) std::atomic<uint64_t> tail_{0};
  alignas(kCellBytes) std::atomic<uint64_t> head_{0};
  alignas(kCellBytes) std::atomic<uint64_t> stamps_[kCells] = {};
  alignas(kCellBytes) std::byte data_[kCells * kCellBytes + kMostBytes];  // an event that begins in the last cells runs over
};

// Of one file, from start() to stop(): its thread turns events into lines.
class Timeline::Writer {
 public:
  Writer(Timeline& timeline, Ring& ring, std::string path, int rank, int size, uint32_t session)
      : timeline_(timeline),
        ring_(ring),
        path_(std::move(path)),
        rank_(rank),
        session_(session),
        file_(::open(path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644)) {
    if (!file_) refuse();
    char host[64] = "";
    ::gethostname(host, sizeof host - 1);
    text_ = "[\n";
    name_row("process_name", 0, "name", format("rank %d", rank));
    name_row("process_labels", 0, "labels", format("of %d, process %d on %s", size, ::getpid(), host));
    text_ += format(R"({"name":"process_sort_index","ph":"M","pid":%d,"tid":0,"args":{"sort_index":%d,)", rank, rank);
    text_ += format("\"baseTimeNanoseconds\":%lld}},\n", static_cast<long long>(base_));
    name_row("thread_name", kOwnRow, "name", "events");
    if (!write_out()) refuse();
    thread_ = std::thread([this] { loop(); });
  }

  ~Writer() {
    ending_.store(true, std::memory_order_release);
    ring_.wake();
    thread_.join();
  }

  const std::string& path() const { return path_; }

 private:
  void loop() {
    while (!ending_.load(std::memory_order_acquire)) {
      ring_.sleep(kLookMilliseconds);
      take_all();
    }
    for (const Deadline deadline = Deadline::after(kPatience); !ring_.empty() && !deadline.passed(); take_all())
      if (!ring_.empty()) ::usleep(100);  // somebody is copying an event
    open_line("timeline ends", "i", nanoseconds(Clock::now()), kOwnRow);
    text_ += format(R"(,"s":"p","args":{"events":%llu,"dropped":%llu}})", static_cast<unsigned long long>(events_),
                    static_cast<unsigned long long>(timeline_.dropped())) +
             "\n]\n";
    flush();
  }

  void take_all() {
    ring_.drain([this](const Event& event, std::string_view text, std::span<const int> ranks) {
      if (event.session != session_) return;
      ++events_;
      event.end < 0 ? write_instant(event, text) : write_span(event, text, ranks);
      if (text_.size() >= kWriteBytes) flush();
    });
    const uint64_t dropped = timeline_.dropped();
    if (dropped != told_dropped_) {
      open_line("events dropped", "i", nanoseconds(Clock::now()), kOwnRow);
      text_ += format(R"(,"s":"p","args":{"so_far":%llu}},)", static_cast<unsigned long long>(dropped)) + "\n";
      told_dropped_ = dropped;
    }
    flush();
  }

  void open_line(std::string_view name, const char* phase, int64_t at, int row) {
    text_ += "{\"name\":";
    append_quoted(text_, name);
    ((text_ += ",\"ph\":\"") += phase) += "\",\"ts\":";
    append_microseconds(text_, at + offset_ - base_);
    text_ += ",\"pid\":";
    append(text_, rank_);
    text_ += ",\"tid\":";
    append(text_, row);
  }

  void write_instant(const Event& event, std::string_view what) {
    open_line(what, "i", event.begin, kOwnRow);
    text_ += ",\"s\":\"p\"},\n";
  }

  void write_span(const Event& event, std::string_view tensor, std::span<const int> ranks) {
    const int row = row_of(tensor);
    open_line(event.phase, "X", event.begin, row);
    text_ += ",\"dur\":";
    append_microseconds(text_, std::max<int64_t>(event.end - event.begin, 0));
    text_ += ",\"args\":{\"tensor\":";
    append_quoted(text_, tensor);
    const auto number = [this](const char* name, uint64_t value) {
      if (value == 0) return;
      ((text_ += ",\"") += name) += "\":";
      append(text_, static_cast<int64_t>(value));
    };
    const auto text = [this](const char* name, const char* value) {
      if (value == nullptr) return;
      ((text_ += ",\"") += name) += "\":";
      append_quoted(text_, value);
    };
    number("bytes", event.bytes);
    text("dtype", event.dtype);
    text("how", event.how);
    number("fused", event.fused);
    if (!ranks.empty()) {
      text_ += ",\"waited_for\":[";
      for (const int rank : ranks) {
        append(text_, rank);
        text_ += ',';
      }
      text_.back() = ']';
      if (event.waited_for > ranks.size()) number("waited_for_ranks", event.waited_for);
    }
    text_ += "}},\n";
  }

  int row_of(std::string_view tensor) {
    key_ = tensor;
    const auto [at, is_new] = rows_.try_emplace(key_, kOwnRow + 1 + static_cast<int>(rows_.size()));
    if (is_new) name_row("thread_name", at->second, "name", tensor);
    return at->second;
  }

  void name_row(const char* what, int row, const char* argument, std::string_view name) {
    text_ += format(R"({"name":"%s","ph":"M","pid":%d,"tid":%d,"args":{"%s":)", what, rank_, row, argument);
    append_quoted(text_, name);
    text_ += "}},\n";
  }

  [[noreturn]] void refuse() const {
    throw InvalidArgument(format("rank %d: timeline: %s: %s", rank_, path_.c_str(), std::strerror(errno)));
  }

  // Whole lines, so that whatever ends the process leaves a file that ends with one.
  bool write_out() {
    for (size_t done = 0; done < text_.size();) {
      const ssize_t n = ::write(file_.get(), text_.data() + done, text_.size() - done);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return false;
      done += static_cast<size_t>(n);
    }
    text_.clear();
    return true;
  }

  void flush() {
    if (file_ && !write_out()) {
      log::warning(format("timeline: %s: %s; it ends here", path_.c_str(), std::strerror(errno)));
      timeline_.on_.store(false, std::memory_order_relaxed);
      file_.reset();
    }
    text_.clear();
  }

  Timeline& timeline_;
  Ring& ring_;
  const std::string path_;
  const int rank_;
  const uint32_t session_;
  const int64_t offset_ = unix_offset(), base_ = base_of(nanoseconds(Clock::now()) + offset_);
  Fd file_;
  std::string text_, key_;
  std::unordered_map<std::string, int> rows_;
  uint64_t events_ = 0, told_dropped_ = 0;
  std::atomic<bool> ending_{false};
  std::thread thread_;
};

Timeline& Timeline::instance() {
  static Timeline* const timeline = [] {
    ::pthread_atfork(nullptr, nullptr, [] {
      instance().forked_ = true;
      instance().on_ = false;
    });
    std::atexit([] { instance().stop(); });  // who does not stop it has a complete file, too
    return new Timeline;
  }();
  return *timeline;
}

void Timeline::start(const std::string& path, int rank, int size, bool mark_cycles) {
  if (forked_) throw Error(format("timeline: this process was forked from rank %d and is no rank itself", rank));
  const std::lock_guard lock(mutex_);
  if (writer_ != nullptr)
    throw InvalidArgument(format("rank %d: timeline: already written to %s; stop it first", rank, writer_->path().c_str()));
  if (ring_ == nullptr) ring_ = new Ring;
  dropped_ = 0;
  const uint32_t session = ++session_;
  writer_ = std::make_unique<Writer>(*this, *ring_, path_of(path, rank), rank, size, session);
  marks_cycles_ = mark_cycles;
  on_ = true;
}

void Timeline::stop() {
  if (forked_) return;  // there is no thread to join, and no file
  const std::lock_guard lock(mutex_);
  on_ = false;
  writer_.reset();
}

std::string Timeline::path() const {
  if (forked_) return {};
  const std::lock_guard lock(mutex_);
  return writer_ != nullptr ? writer_->path() : std::string();
}

void Timeline::put(Event& event, std::string_view text, std::span<const int> ranks) noexcept {
  text = cut_text(text, kMostText);
  event.text = static_cast<uint16_t>(text.size());
  event.session = session_.load(std::memory_order_relaxed);
  event.waited_for = static_cast<uint32_t>(ranks.size());
  ranks = ranks.first(std::min(ranks.size(), kMostRanks));
  event.ranks = static_cast<uint16_t>(ranks.size());
  if (!ring_.load(std::memory_order_acquire)->put(event, text, ranks)) dropped_.fetch_add(1, std::memory_order_relaxed);
}

void Timeline::span(std::string_view tensor, const char* phase, Clock::time_point begin, Clock::time_point end,
                    const Details& details) noexcept {
  if (!on()) return;
  Event event;
  event.begin = nanoseconds(begin);
  event.end = nanoseconds(end);
  event.phase = phase;
  event.dtype = details.dtype;
  event.how = details.how;
  event.bytes = details.bytes;
  event.fused = static_cast<uint32_t>(details.fused);
  const bool unknown = !details.waited_for.empty() && details.waited_for.front() < 0;
  put(event, tensor, unknown ? std::span<const int>() : details.waited_for);
}

void Timeline::instant(std::string_view what) noexcept {
  if (!on()) return;
  Event event;
  event.begin = nanoseconds(Clock::now());
  put(event, what, {});
}

}  // namespace roundel::engine
