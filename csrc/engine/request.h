// What a rank asks for under a name: everything on which the ranks must agree, and how it travels.
//
// Two ranks ask for the same just when their encoded requests are equal, byte for byte.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.h"

namespace roundel::engine {

enum class Kind : uint8_t { AllReduce, AllGather, Broadcast, AllToAll, ReduceScatter, Barrier, Join, AddSet, RemoveSet };
inline constexpr int kKinds = 9;
const char* name_of(Kind kind);  // as in the names of unnamed requests: "allreduce"

inline constexpr uint8_t kAdasum = kReduceOps;  // follows the ReduceOps
inline constexpr size_t kLongestName = 4096;
inline constexpr const char* kUnnamed = ".noname.";  // before the number in the name of an unnamed request

struct TensorSpec {
  DType dtype = DType::Float32;
  std::vector<int64_t> shape;  // where ranks may differ in dimension 0 (AllGather, AllToAll), it is -1
};

struct Request {
  Kind kind = Kind::Barrier;
  uint8_t op = 0;          // AllReduce, ReduceScatter: a ReduceOp, or kAdasum
  bool on_device = false;  // the caller's tensors are on a GPU
  int root = -1;           // Broadcast: a rank of the job; RemoveSet: the set
  uint32_t set = 0;
  double prescale = 1, postscale = 1;
  std::string name;
  std::vector<TensorSpec> tensors;
  std::vector<int> ranks;  // AddSet
};

std::string encode(const Request& request);
void encode(const Request& request, std::string& to);  // in its memory
Request decode(std::string_view encoded);

// A request in its final form.
struct Sealed {
  Sealed(Request from, std::string encoded);
  explicit Sealed(Request from) : Sealed(from, encode(from)) {}
  explicit Sealed(std::string_view from);  // throws CorruptFrame where that is no encoded request
  const Request request;
  const std::string encoded;
  const std::string_view key;   // set, kind and name: once at a time on one rank
  uint32_t number = kNoNumber;  // that stands for it between ranks; of whoever drives the engine

  static constexpr uint32_t kNoNumber = ~0u;
};
using SharedRequest = std::shared_ptr<Sealed>;

// "allreduce of float32 (3, 4), sum", and "allreduce 'fc.weight'".
std::string describe(const Request& request);
std::string title(const Request& request);

}  // namespace roundel::engine
