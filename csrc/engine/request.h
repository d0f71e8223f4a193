// What a rank asks for under a name: everything on which the ranks must agree, and how it travels.
//
// Two ranks ask for the same just when their encoded requests are equal, byte for byte.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/view.h"

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
  std::vector<TensorSpec> tensors;
  std::string name;
  std::vector<int> ranks;  // AddSet
};

// The caller's arrays of one request, one for each tensor.
struct Buffers {
  std::vector<View> in, out;   // out: AllReduce and Broadcast, where it may be in
  std::vector<size_t> rows;    // AllGather, AllToAll: of dimension 0 of each tensor
  std::vector<size_t> splits;  // AllToAll: rows that go to each rank of the set
};

// The key of a request: set, kind and name, which it begins with when encoded. Once at a time on one rank.
void encode_key(Kind kind, uint32_t set, std::string_view name, std::string& to);  // in its memory
std::string_view key_of(std::string_view encoded);
void encode(const Request& request, std::string& to);  // in its memory
Request decode(std::string_view encoded);              // throws CorruptFrame where that is no encoded request

struct Slot;

// A request in its final form, made by Names.
struct Sealed {
  Sealed(Request request, std::string encoded, std::shared_ptr<Slot> slot)
      : slot(std::move(slot)), request(std::move(request)), encoded(std::move(encoded)) {}
  static constexpr uint32_t kNoNumber = ~0u;
  uint32_t number = kNoNumber;       // that stands for it between ranks; of whoever drives the engine
  const std::shared_ptr<Slot> slot;  // of its key
  const Request request;
  const std::string encoded;
};
using SharedRequest = std::shared_ptr<Sealed>;

// "allreduce of float32 (3, 4), sum", and "allreduce 'fc.weight'".
std::string describe(const Request& request);
std::string title(const Request& request);

}  // namespace roundel::engine
