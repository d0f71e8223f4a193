#include "base/error.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace roundel {

std::string format(const char* pattern, ...) {
  va_list args;
  va_start(args, pattern);
  va_list measure;
  va_copy(measure, args);
  const int length = std::vsnprintf(nullptr, 0, pattern, measure);
  va_end(measure);
  std::string text(static_cast<size_t>(length), '\0');
  std::vsnprintf(text.data(), text.size() + 1, pattern, args);
  va_end(args);
  return text;
}

std::string join_ranks(const std::vector<int>& ranks) {
  std::string text;
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (i > 0) text += i + 1 == ranks.size() ? " and " : ", ";
    text += std::to_string(ranks[i]);
  }
  return text;
}

Error system_error(const std::string& what, int error_number) { return Error(what + ": " + std::strerror(error_number)); }

void check_failed(const char* condition, const char* file, int line) {
  std::fprintf(stderr, "roundel: broken invariant %s at %s:%d; please report this\n", condition, file, line);
  std::abort();
}

}  // namespace roundel
