// engine/timeline: what a file says after stop(), when it is cut off, when threads write more than fits, and in a forked child.
#include "engine/timeline.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <thread>

#include "base/error.h"
#include "check.h"

using namespace roundel;
using engine::Timeline;
using namespace std::chrono_literals;

namespace {

// A directory of its own that goes with everything in it.
class Directory {
 public:
  Directory() { CHECK(::mkdtemp(path_) != nullptr); }
  ~Directory() { std::filesystem::remove_all(path_); }
  std::string file(const std::string& name) const { return std::filesystem::path(path_) / name; }

 private:
  char path_[32] = "/tmp/roundel-test-XXXXXX";
};

std::vector<std::string> lines_of(const std::string& path) {
  std::ifstream file(path);
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);) lines.push_back(line);
  return lines;
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

size_t count_with(const std::vector<std::string>& lines, const std::string& part) {
  size_t n = 0;
  for (const std::string& line : lines) n += has(line, part);
  return n;
}

// The number after `key` in a line.
double number_in(const std::string& line, const std::string& key) {
  const size_t at = line.find(key);
  return at == std::string::npos ? -1 : std::atof(line.c_str() + at + key.size());
}

Timeline& timeline() { return Timeline::instance(); }

}  // namespace

TEST(timeline_writes_spans_and_instants) {
  const Directory directory;
  timeline().start(directory.file("t.json"), 3, 8, true);
  CHECK(timeline().on() && timeline().marks_cycles());
  CHECK_EQ(timeline().path(), directory.file("t.rank3.json"));
  const auto begin = Clock::now();
  const double unix_before =
      std::chrono::duration<double, std::micro>(std::chrono::system_clock::now().time_since_epoch()).count();
  const int ranks[] = {4, 11};
  timeline().span("layer \"1\"\\\n.w", "negotiate", begin, begin + 1500us, {.waited_for = ranks});
  timeline().span("b", "allreduce", begin, begin + 2us, {.bytes = 4096, .dtype = "float16", .how = "shm", .fused = 7});
  timeline().span("b", "memcpy_out", begin + 5us, begin, {});
  timeline().instant("batch");
  timeline().stop();
  CHECK(!timeline().on() && !timeline().marks_cycles());
  CHECK_EQ(timeline().path(), "");
  const std::vector<std::string> lines = lines_of(directory.file("t.rank3.json"));
  CHECK_EQ(lines.front(), "[");
  CHECK_EQ(lines.back(), "]");
  for (size_t i = 1; i + 2 < lines.size(); ++i) CHECK(has(lines[i], "{\"name\":") && lines[i].ends_with("},"));
  CHECK(lines[lines.size() - 2].ends_with("}"));
  CHECK_EQ(count_with(lines, "\"pid\":3,"), lines.size() - 2);
  CHECK_EQ(count_with(lines, R"("process_name","ph":"M","pid":3,"tid":0,"args":{"name":"rank 3"}})"), 1u);
  CHECK_EQ(count_with(lines, R"({"name":"layer \"1\"\\\u000a.w"}})"), 1u);
  CHECK_EQ(count_with(lines, R"("dur":1500.000,"args":{"tensor":"layer \"1\"\\\u000a.w","waited_for":[4,11]}},)"), 1u);
  CHECK_EQ(count_with(lines, R"("dur":2.000,"args":{"tensor":"b","bytes":4096,"dtype":"float16","how":"shm","fused":7}},)"),
           1u);
  CHECK_EQ(count_with(lines, R"("name":"memcpy_out")"), 1u);
  CHECK_EQ(count_with(lines, R"("dur":0.000)"), 1u);  // never negative
  CHECK_EQ(count_with(lines, R"({"name":"batch","ph":"i")"), 1u);
  CHECK_EQ(count_with(lines, R"("args":{"events":4,"dropped":0}})"), 1u);
  double base = -1;
  for (const std::string& line : lines) {
    if (has(line, "baseTimeNanoseconds")) base = number_in(line, "\"baseTimeNanoseconds\":") / 1e3;
    if (has(line, "\"negotiate\"")) CHECK(std::fabs(base + number_in(line, "\"ts\":") - unix_before) < 1000);
  }
  CHECK(base > 0 && std::fmod(base, 7'889'238e6) == 0);  // as torch.profiler's
}

TEST(timeline_takes_any_path_or_says_why_not) {
  const Directory directory;
  const auto written = [&](const std::string& path, int rank) {
    timeline().start(directory.file(path), rank, 16);
    const std::string at = timeline().path();
    timeline().stop();
    CHECK(std::filesystem::exists(at));
    return at.substr(directory.file("").size());
  };
  CHECK_EQ(written("plain", 2), "plain.rank2");
  CHECK_EQ(written(".hidden", 2), ".hidden.rank2");
  CHECK_EQ(written("a.b.json", 12), "a.b.rank12.json");
  CHECK_EQ(written("{rank}-of-{rank}.json", 1), "1-of-1.json");
  try {
    timeline().start(directory.file("no/such/t.json"), 1, 2);
    CHECK(!"started");
  } catch (const InvalidArgument& error) {
    CHECK(has(error.what(), "rank 1: timeline: ") && has(error.what(), "no/such/t.rank1.json: No such file"));
  }
  CHECK(!timeline().on());
  timeline().start(directory.file("one"), 0, 1);
  CHECK_THROWS(timeline().start(directory.file("two"), 0, 1), InvalidArgument);
  CHECK(timeline().on());
  timeline().stop();
  timeline().stop();
}

TEST(timeline_without_start_costs_nothing_and_does_nothing) {
  timeline().span("x", "y", Clock::now(), Clock::now());
  timeline().instant("z");
  CHECK(!timeline().on());
}

TEST(timeline_counts_what_it_drops_and_writes_the_rest_in_order) {
  const Directory directory;
  timeline().start(directory.file("t"), 0, 1);
  constexpr int kThreads = 3, kEvents = 40'000;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([t] {
      const std::string name = "tensor " + std::to_string(t) + std::string(static_cast<size_t>(50 * t), 'x');
      for (int i = 0; i < kEvents; ++i)
        timeline().span(name, "p", Clock::now(), Clock::now(), {.bytes = static_cast<size_t>(i + 1)});
    });
  for (std::thread& thread : threads) thread.join();
  const uint64_t dropped = timeline().dropped();
  timeline().stop();
  std::map<double, double> last;  // bytes by row
  uint64_t written = 0;
  const std::vector<std::string> lines = lines_of(directory.file("t.rank0"));
  for (const std::string& line : lines) {
    if (!has(line, "\"name\":\"p\"")) continue;
    ++written;
    double& before = last[number_in(line, "\"tid\":")];
    CHECK(number_in(line, "\"bytes\":") > before);
    before = number_in(line, "\"bytes\":");
    CHECK(line.ends_with("}},"));
  }
  CHECK(written > 15'000 && last.size() <= static_cast<size_t>(kThreads));
  CHECK_EQ(written + dropped, static_cast<uint64_t>(kThreads * kEvents));
  CHECK_EQ(number_in(lines[lines.size() - 2], "\"dropped\":"), static_cast<double>(dropped));
}

TEST(timeline_cuts_long_names_and_many_ranks) {
  const Directory directory;
  timeline().start(directory.file("t"), 0, 1);
  std::vector<int> ranks(100);
  const std::string name = std::string(1023, 'n') + "\u00e9";  // two bytes, of which one would fit
  for (int i = 0; i < 5000; ++i) timeline().span(name, "p", Clock::now(), Clock::now(), {.waited_for = ranks});
  timeline().stop();
  const std::vector<std::string> lines = lines_of(directory.file("t.rank0"));
  const size_t whole =
      count_with(lines, "\"" + std::string(1023, 'n') + "\",\"waited_for\":[0,0,0,0,0,0,0,0],\"waited_for_ranks\":100}},");
  CHECK(whole > 2000);
  CHECK_EQ(whole, count_with(lines, "\"name\":\"p\""));
}

TEST(timeline_stops_and_starts_beside_threads_that_write) {
  const Directory directory;
  std::atomic<bool> over{false};
  std::vector<std::thread> threads;
  for (int t = 0; t < 2; ++t)
    threads.emplace_back([&] {
      while (!over) timeline().span("x", "p", Clock::now(), Clock::now());
    });
  for (int i = 0; i < 10; ++i) {
    const std::string name = std::to_string(i);
    timeline().start(directory.file(name), 0, 1);
    std::this_thread::sleep_for(2ms);
    timeline().stop();
    const std::vector<std::string> lines = lines_of(directory.file(name + ".rank0"));
    CHECK(lines.size() > 2);
    CHECK_EQ(lines.back(), "]");
    CHECK_EQ(static_cast<double>(count_with(lines, "\"name\":\"p\"")), number_in(lines[lines.size() - 2], "\"events\":"));
  }
  over = true;
  for (std::thread& thread : threads) thread.join();
}

TEST(timeline_of_a_killed_process_ends_with_a_whole_line) {
  const Directory directory;
  timeline().start(directory.file("t"), 0, 1);
  timeline().span("x", "p", Clock::now(), Clock::now());
  std::vector<std::string> lines;  // what a process that is killed now leaves behind
  for (const Deadline deadline = Deadline::after(10); count_with(lines, "\"name\":\"p\"") == 0 && !deadline.passed();)
    lines = lines_of(directory.file("t.rank0"));
  CHECK(lines.back().ends_with("}},"));
  timeline().stop();
}

TEST(timeline_ends_when_the_disk_is_full_and_the_program_goes_on) {
  const Directory directory;
  std::filesystem::create_symlink("/dev/full", directory.file("full.rank0"));
  CHECK_THROWS(timeline().start(directory.file("full"), 0, 1), InvalidArgument);
  const auto before = ::signal(SIGXFSZ, SIG_IGN);
  rlimit limit{}, small{};
  CHECK_EQ(::getrlimit(RLIMIT_FSIZE, &limit), 0);
  small = limit;
  small.rlim_cur = 20'000;
  CHECK_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  timeline().start(directory.file("t"), 0, 1);
  for (const Deadline deadline = Deadline::after(10); timeline().on() && !deadline.passed(); std::this_thread::sleep_for(1ms))
    timeline().span("x", "p", Clock::now(), Clock::now());
  CHECK(!timeline().on());
  timeline().stop();
  CHECK_EQ(::setrlimit(RLIMIT_FSIZE, &limit), 0);
  ::signal(SIGXFSZ, before);
  timeline().start(directory.file("u"), 0, 1);
  timeline().stop();
  CHECK_EQ(lines_of(directory.file("u.rank0")).back(), "]");
}

TEST(timeline_is_silent_in_a_forked_child) {
  const Directory directory;
  timeline().start(directory.file("t"), 0, 1);
  timeline().span("parent", "p", Clock::now(), Clock::now());
  const pid_t child = ::fork();
  if (child == 0) {
    timeline().span("child", "p", Clock::now(), Clock::now());
    timeline().stop();
    bool refused = false;
    try {
      timeline().start("/dev/null", 0, 1);
    } catch (const Error&) {
      refused = true;
    }
    ::_exit(refused && !timeline().on() && timeline().path().empty() ? 0 : 1);
  }
  int status = 1;
  CHECK_EQ(::waitpid(child, &status, 0), child);
  CHECK_EQ(status, 0);
  CHECK(timeline().on());
  timeline().stop();
  const std::vector<std::string> lines = lines_of(directory.file("t.rank0"));
  CHECK_EQ(count_with(lines, "\"tensor\":\"parent\""), 1u);
  CHECK_EQ(count_with(lines, "\"tensor\":\"child\""), 0u);
}
