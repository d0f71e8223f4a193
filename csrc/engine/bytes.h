// Writing and reading the engine's control messages: numbers as they lie in memory, texts with their length before them.
// Reading past the end throws CorruptFrame.
#pragma once

#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "base/error.h"

namespace roundel::engine {

class Writer {
 public:
  Writer() = default;
  explicit Writer(std::string memory) : text_(std::move(memory)) { text_.clear(); }
  template <class T>
  void number(T value) {
    static_assert(std::is_arithmetic_v<T> || std::is_enum_v<T>);
    text_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void text(std::string_view value) {
    number(static_cast<uint32_t>(value.size()));
    text_.append(value);
  }
  template <class T>
  void list(const std::vector<T>& values) {
    number(static_cast<uint32_t>(values.size()));
    text_.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
  }
  bool empty() const { return text_.empty(); }
  std::string take() { return std::exchange(text_, {}); }

 private:
  std::string text_;
};

class Reader {
 public:
  explicit Reader(std::string_view text) : text_(text) {}
  template <class T>
  T number() {
    T value;
    const std::string_view bytes = take(sizeof value);
    std::memcpy(&value, bytes.data(), sizeof value);
    return value;
  }
  std::string_view text() { return take(number<uint32_t>()); }
  template <class T>
  std::vector<T> list() {
    const auto count = number<uint32_t>();
    const std::string_view bytes = take(size_t{count} * sizeof(T));
    std::vector<T> values(count);
    if (count > 0) std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }
  bool done() const { return text_.empty(); }
  std::string_view rest() const { return text_; }

 private:
  std::string_view take(size_t bytes) {
    if (bytes > text_.size()) throw CorruptFrame("a message of the engine ends too early");
    const std::string_view taken = text_.substr(0, bytes);
    text_.remove_prefix(bytes);
    return taken;
  }
  std::string_view text_;
};

}  // namespace roundel::engine
