// Text that has to fit into a field.
#pragma once

#include <string_view>

namespace roundel {

// `text`, or its first bytes, at most `most`, without a part of a UTF-8 character at their end.
inline std::string_view cut_text(std::string_view text, size_t most) {
  if (text.size() <= most) return text;
  size_t end = most;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) --end;
  return text.substr(0, end);
}

}  // namespace roundel
