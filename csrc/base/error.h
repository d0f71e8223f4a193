// The one tree of errors that the world can cause. Each is translated to the Python exception of the same name in
// bind/errors.cc. Broken invariants of our own are not errors but CHECK failures: they say where, and end the process.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace roundel {

enum class ErrorKind : uint8_t {
  Generic,
  InvalidArgument,
  PeerLost,
  Mismatch,
  CorruptFrame,
  Timeout,
  Handshake,
  Fenced,
  DuplicateName
};

class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& what, ErrorKind kind = ErrorKind::Generic) : std::runtime_error(what), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

struct InvalidArgument : Error {
  explicit InvalidArgument(const std::string& what) : Error(what, ErrorKind::InvalidArgument) {}
};

// A rank died, left or could not be reached. `ranks` are global ranks, ascending.
struct PeerLost : Error {
  PeerLost(const std::string& what, std::vector<int> ranks, uint32_t epoch, std::string op = {})
      : Error(what, ErrorKind::PeerLost), ranks(std::move(ranks)), epoch(epoch), op(std::move(op)) {}
  std::vector<int> ranks;
  uint32_t epoch;
  std::string op;
};

// Ranks called different things: both signatures are in the text.
struct Mismatch : Error {
  explicit Mismatch(const std::string& what) : Error(what, ErrorKind::Mismatch) {}
};

// The same, told by what came later: those who were there know more.
struct Diverged : Mismatch {
  using Mismatch::Mismatch;
};

struct CorruptFrame : Error {
  explicit CorruptFrame(const std::string& what) : Error(what, ErrorKind::CorruptFrame) {}
};

// A deadline passed; the text names the operation and the ranks waited for.
struct Timeout : Error {
  explicit Timeout(const std::string& what) : Error(what, ErrorKind::Timeout) {}
};

// The other end does not know the job token, or speaks another version.
struct HandshakeError : Error {
  explicit HandshakeError(const std::string& what) : Error(what, ErrorKind::Handshake) {}
};

// This rank was excluded from its job, or has lost touch with it, and must end: the others go on without it.
struct Fenced : Error {
  explicit Fenced(const std::string& what) : Error(what, ErrorKind::Fenced) {}
};

// A request under a name of which one is under way already.
struct DuplicateName : Error {
  explicit DuplicateName(const std::string& what) : Error(what, ErrorKind::DuplicateName) {}
};

// printf-style text; the only formatting helper in the core.
[[gnu::format(printf, 1, 2)]] std::string format(const char* pattern, ...);

// "1, 4 and 7"
std::string join_ranks(const std::vector<int>& ranks);

// An Error that carries errno's text: "bind 10.0.0.1:4000: Address already in use".
Error system_error(const std::string& what, int error_number);

[[noreturn]] void check_failed(const char* condition, const char* file, int line);

}  // namespace roundel

#define ROUNDEL_CHECK(condition)                                               \
  do {                                                                         \
    if (!(condition)) ::roundel::check_failed(#condition, __FILE__, __LINE__); \
  } while (0)
