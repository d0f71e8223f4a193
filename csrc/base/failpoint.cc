#include "base/failpoint.h"

#include <unistd.h>

#include <csignal>
#include <cstdlib>

#include "base/env.h"
#include "base/error.h"
#include "base/log.h"

namespace roundel::failpoint {

std::atomic<bool> g_armed{false};

namespace {

enum class Action { Kill, Segv, Exit, Stop, Sleep, Flip, Error };

struct Setting {
  Point point = Point::StartConnect;
  Action action = Action::Kill;
  double seconds = 0;
  uint64_t at = 1;  // passing
};

constexpr int kExitCode = 3;
Setting g_setting;
std::atomic<uint64_t> g_passed{0};

[[noreturn]] void refuse(const std::string& text) {
  throw InvalidArgument("ROUNDEL_FAILPOINT: expected point=action@n such as shm-staged=kill@3, got '" + text + "'");
}

Setting parse(const std::string& text) {
  Setting setting;
  const size_t equals = text.find('=');
  if (equals == std::string::npos) refuse(text);
  const std::string point = text.substr(0, equals);
  std::string action = text.substr(equals + 1);
  const auto& all = names();
  size_t number = 0;
  while (number < all.size() && all[number] != point) ++number;
  if (number == all.size()) refuse(text);
  setting.point = static_cast<Point>(number);
  if (const size_t at = action.find('@'); at != std::string::npos) {
    char* end = nullptr;
    setting.at = std::strtoull(action.c_str() + at + 1, &end, 10);
    if (*end != '\0' || setting.at == 0) refuse(text);
    action.resize(at);
  }
  if (action.starts_with("sleep:")) {
    char* end = nullptr;
    setting.seconds = std::strtod(action.c_str() + 6, &end);
    if (*end != '\0' || !(setting.seconds >= 0 && setting.seconds < 1e6)) refuse(text);
    setting.action = Action::Sleep;
    return setting;
  }
  const char* actions[] = {"kill", "segv", "exit", "stop", "", "flip", "error"};
  for (int i = 0; i < 7; ++i)
    if (action == actions[i] && !action.empty()) {
      setting.action = static_cast<Action>(i);
      return setting;
    }
  refuse(text);
}

}  // namespace

const std::vector<std::string>& names() {
  static const std::vector<std::string> all = {"start-connect",
                                               "start-hello",
                                               "start-card",
                                               "start-verdict",
                                               "start-before-memory",
                                               "start-after-memory",
                                               "shm-entered",
                                               "shm-published",
                                               "shm-staged",
                                               "shm-consumed",
                                               "shm-gathered",
                                               "shm-arena-tile",
                                               "shm-finished",
                                               "stream-queued",
                                               "stream-header-sent",
                                               "stream-half-sent",
                                               "stream-header-received",
                                               "stream-received",
                                               "stream-matched",
                                               "stream-retire",
                                               "executor-round",
                                               "leave-before",
                                               "leave-after"};
  ROUNDEL_CHECK(all.size() == kPoints);
  return all;
}

void configure() {
  static std::string known;
  const std::string text = env::text("ROUNDEL_FAILPOINT");
  if (text == known) return;  // a further communicator of this process: go on counting
  g_armed = false;
  if (!text.empty()) g_setting = parse(text);
  known = text;
  if (text.empty()) return;
  g_passed = 0;
  g_armed = true;
}

bool is_set(Point point) { return g_setting.point == point; }

void hit(Point point, std::span<std::byte> bytes) {
  if (g_setting.point != point || g_passed.fetch_add(1) + 1 != g_setting.at) return;
  const std::string where = names()[static_cast<size_t>(point)];
  log::debug("failpoint " + where);
  switch (g_setting.action) {
    case Action::Kill:
      ::kill(::getpid(), SIGKILL);
      break;
    case Action::Segv:
      std::signal(SIGSEGV, SIG_DFL);
      ::kill(::getpid(), SIGSEGV);
      break;
    case Action::Exit:
      ::_exit(kExitCode);
    case Action::Stop:
      ::kill(::getpid(), SIGSTOP);
      break;
    case Action::Sleep:
      ::usleep(static_cast<useconds_t>(g_setting.seconds * 1e6));
      break;
    case Action::Flip:
      if (!bytes.empty()) bytes[bytes.size() / 2] ^= std::byte{0x10};
      break;
    case Action::Error:
      throw roundel::Error("failpoint " + where);
  }
}

}  // namespace roundel::failpoint
