// The parts of DLPack 1.x's C ABI that we read, declared here so that no framework's headers are needed to build.
// https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once

#include <cstddef>
#include <cstdint>

namespace roundel::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; null: C-contiguous
  uint64_t byte_offset;
};

// How many elements a tensor has, and whether they lie in C order without gaps.
struct Extent {
  size_t count = 1;
  bool contiguous = true;
};

inline Extent extent(const Tensor& tensor) {
  Extent extent;
  for (int d = tensor.ndim - 1; d >= 0; --d) {
    if (tensor.strides != nullptr && tensor.shape[d] != 1 && tensor.strides[d] != static_cast<int64_t>(extent.count))
      extent.contiguous = false;
    extent.count *= static_cast<size_t>(tensor.shape[d]);
  }
  extent.contiguous |= extent.count <= 1;
  return extent;
}

// What a capsule named "dltensor" holds.
struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

struct Version {
  uint32_t major, minor;
};

inline constexpr uint64_t kReadOnly = 1;

// What a capsule named "dltensor_versioned" holds.
struct ManagedTensorVersioned {
  Version version;
  void* context;
  void (*deleter)(ManagedTensorVersioned*);
  uint64_t flags;
  Tensor tensor;
};

// A type's __dlpack_c_exchange_api__: borrowing a tensor without making a capsule, for about the price of a call.
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* allocate;
  void* export_owned;
  void* import_owned;
  int (*borrow)(void* object, Tensor* out);  // may be null
  void* current_stream;
};

}  // namespace roundel::dlpack
