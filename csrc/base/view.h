// Views: memory that somebody else owns, with its type erased at the door (bind/) and dispatched once (kernels/).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/dtype.h"

namespace roundel {

using Bytes = std::span<std::byte>;
using ConstBytes = std::span<const std::byte>;

struct View {
  void* data = nullptr;
  size_t count = 0;  // elements
  DType dtype = DType::Float32;

  size_t bytes() const { return count * size_of(dtype); }
  std::byte* at(size_t element) const { return static_cast<std::byte*>(data) + element * size_of(dtype); }
};

}  // namespace roundel
