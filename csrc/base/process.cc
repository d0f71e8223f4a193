#include "base/process.h"

#include <poll.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>

#include "base/error.h"

namespace roundel {
namespace {

// struct pidfd_info of linux/pidfd.h in its first size; older headers do not have it.
struct PidfdInfo {
  static constexpr uint64_t kExit = 1u << 3;
  uint64_t mask = kExit;
  uint64_t cgroup = 0;
  uint32_t ids[11] = {};
  int32_t exit_code = 0;
};
static_assert(sizeof(PidfdInfo) == 64);

// The last field of /proc/PID/stat is the wait status of a process that has ended and was not reaped. That the pidfd still
// knows the process afterwards means that the number was its own all the time.
std::optional<int> status_of_unreaped(const Fd& pidfd, int pid) {
  std::FILE* file = std::fopen(format("/proc/%d/stat", pid).c_str(), "re");
  if (file == nullptr) return std::nullopt;
  char text[2048] = {};
  const size_t length = std::fread(text, 1, sizeof text - 1, file);
  std::fclose(file);
  const char* after_name = std::strrchr(text, ')');
  if (length == 0 || after_name == nullptr || after_name[1] != ' ' || after_name[2] != 'Z') return std::nullopt;
  const char* last = std::strrchr(after_name, ' ');
  if (::syscall(SYS_pidfd_send_signal, pidfd.get(), 0, nullptr, 0) != 0) return std::nullopt;
  return std::atoi(last + 1);
}

std::optional<int> status_of_reaped(const Fd& pidfd) {
  PidfdInfo info;
  if (::ioctl(pidfd.get(), _IOWR(0xFF, 11, PidfdInfo), &info) != 0 || (info.mask & PidfdInfo::kExit) == 0) return std::nullopt;
  return info.exit_code;
}

}  // namespace

Fd open_process(int pid) { return pid > 0 ? Fd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0))) : Fd(); }

int pid_of(const Fd& pidfd) {
  if (!pidfd) return 0;
  std::FILE* file = std::fopen(format("/proc/self/fdinfo/%d", pidfd.get()).c_str(), "re");
  if (file == nullptr) return 0;
  int pid = 0;
  char line[128];
  while (std::fgets(line, sizeof line, file) != nullptr)
    if (std::sscanf(line, "Pid: %d", &pid) == 1) break;
  std::fclose(file);
  return pid > 0 ? pid : 0;
}

std::string how_it_ended(const Fd& pidfd, int pid) {
  if (!pidfd || pid <= 0) return "";
  std::optional<int> status = status_of_unreaped(pidfd, pid);
  if (!status) status = status_of_reaped(pidfd);  // its parent was faster
  if (!status) return "";
  if (WIFSIGNALED(*status)) return format("killed by signal %d (%s)", WTERMSIG(*status), ::strsignal(WTERMSIG(*status)));
  return format("exit code %d", WEXITSTATUS(*status));
}

std::string how_it_ends(const Fd& pidfd, double seconds) {
  const int pid = pid_of(pidfd);  // while it is known
  pollfd ended{pidfd.get(), POLLIN, 0};
  if (!pidfd || ::poll(&ended, 1, static_cast<int>(seconds * 1000)) <= 0) return "";
  return how_it_ended(pidfd, pid);
}

}  // namespace roundel
