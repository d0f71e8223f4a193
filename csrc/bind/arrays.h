// Arrays of any library as Views, without a copy: numpy by its own API, torch by DLPack's C exchange table (borrowed, no
// capsule), all others by __dlpack__().
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <vector>

#include "base/view.h"
#include "bind/dlpack.h"

namespace roundel::bind {

struct Array {
  View view;
  std::vector<int64_t> shape;
  pybind11::object keep;  // what must live as long as the view; often the array itself
};

// Throws InvalidArgument unless the array is on the CPU, C-contiguous, of a supported dtype and, where asked, writable. `what`
// names the argument in the text. Needs the GIL.
Array to_array(pybind11::handle object, bool writable, const char* what);

// For those who read thousands of tensors per call: the exchange table of the object's type, or null; and what its type codes
// mean.
dlpack::ExchangeApi* exchange_api(pybind11::handle object);
std::optional<DType> dtype_of(uint8_t code, int bits);

// A new array of the same library, dtype and device. Where the library is not known: numpy's.
pybind11::object empty_like(pybind11::handle prototype, const Array& prototype_array, const std::vector<int64_t>& shape);

}  // namespace roundel::bind
