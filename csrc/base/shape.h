// Shapes of arrays, outermost dimension first. Dimension 0 counts rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace roundel {

// Elements of one row.
inline size_t row_of(const std::vector<int64_t>& shape) {
  size_t count = 1;
  for (size_t d = 1; d < shape.size(); ++d) count *= static_cast<size_t>(shape[d]);
  return count;
}

// Elements in all; a scalar has one.
inline size_t count_of(const std::vector<int64_t>& shape) {
  return shape.empty() ? 1 : static_cast<size_t>(shape[0]) * row_of(shape);
}

inline std::vector<int64_t> with_rows(std::vector<int64_t> shape, size_t rows) {
  shape[0] = static_cast<int64_t>(rows);
  return shape;
}

}  // namespace roundel
