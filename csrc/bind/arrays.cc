#include "bind/arrays.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <unordered_map>

#include "base/error.h"

namespace py = pybind11;

namespace roundel::bind {
namespace {

[[noreturn]] void refuse(const char* what, const std::string& expected, const std::string& came) {
  throw InvalidArgument(std::string(what) + ": expected " + expected + ", got " + came);
}

std::string type_name(py::handle object) { return py::str(py::type::handle_of(object).attr("__name__")); }

constexpr const char* kDTypeList = "float32, float64, float16, bfloat16, int8, int16, int32, int64, uint8 or bool";

}  // namespace

std::optional<DType> dtype_of(uint8_t code, int bits) {
  switch (code) {
    case dlpack::kFloat:
      return bits == 32   ? DType::Float32
             : bits == 64 ? DType::Float64
             : bits == 16 ? std::optional(DType::Float16)
                          : std::nullopt;
    case dlpack::kBfloat:
      return bits == 16 ? std::optional(DType::BFloat16) : std::nullopt;
    case dlpack::kInt:
      return bits == 8    ? DType::Int8
             : bits == 16 ? DType::Int16
             : bits == 32 ? DType::Int32
             : bits == 64 ? std::optional(DType::Int64)
                          : std::nullopt;
    case dlpack::kUInt:
      return bits == 8 ? std::optional(DType::UInt8) : std::nullopt;
    case dlpack::kBool:
      return bits == 8 ? std::optional(DType::Bool) : std::nullopt;
    default:
      return std::nullopt;
  }
}

namespace {

Array from_tensor(const dlpack::Tensor& tensor, py::object keep, const char* what) {
  if (tensor.device_type != dlpack::kCpu && tensor.device_type != dlpack::kCudaHost)
    refuse(what, "an array in CPU memory", "one on device type " + std::to_string(tensor.device_type));
  const auto dtype = tensor.lanes == 1 ? dtype_of(tensor.code, tensor.bits) : std::nullopt;
  if (!dtype)
    refuse(what, kDTypeList,
           "DLPack type code " + std::to_string(tensor.code) + " of " + std::to_string(tensor.bits) + " bits");
  Array array;
  array.shape.assign(tensor.shape, tensor.shape + tensor.ndim);
  const auto [count, contiguous] = dlpack::extent(tensor);
  if (!contiguous) refuse(what, "a C-contiguous array", "one with other strides; pass a contiguous copy");
  array.view = {static_cast<std::byte*>(tensor.data) + tensor.byte_offset, count, *dtype};
  array.keep = std::move(keep);
  return array;
}

std::optional<DType> numpy_dtype(const py::dtype& dtype) {
  const char kind = dtype.kind();
  const int bits = static_cast<int>(dtype.itemsize()) * 8;
  if (dtype.byteorder() == '>') return std::nullopt;
  switch (kind) {
    case 'f':
      return dtype_of(dlpack::kFloat, bits);
    case 'i':
      return dtype_of(dlpack::kInt, bits);
    case 'u':
      return dtype_of(dlpack::kUInt, bits);
    case 'b':
      return dtype_of(dlpack::kBool, bits);
    case 'V':
      return py::str(dtype.attr("name")).cast<std::string>() == "bfloat16" ? std::optional(DType::BFloat16) : std::nullopt;
    default:
      return std::nullopt;  // numpy knows bfloat16 from ml_dtypes only
  }
}

Array from_numpy(const py::array& numpy, bool writable, const char* what) {
  const auto dtype = numpy_dtype(numpy.dtype());
  if (!dtype) refuse(what, kDTypeList, py::str(numpy.dtype()));
  if ((numpy.flags() & py::array::c_style) == 0)
    refuse(what, "a C-contiguous array", "one with other strides; pass a contiguous copy");
  if (writable && !numpy.writeable()) refuse(what, "a writable array", "a read-only one");
  Array array;
  array.view = {const_cast<void*>(numpy.data()), static_cast<size_t>(numpy.size()), *dtype};
  array.shape.assign(numpy.shape(), numpy.shape() + numpy.ndim());
  array.keep = numpy;
  return array;
}

}  // namespace

// The table of an array type, or null. Types are kept alive by the cache, so that an address is never somebody else's later.
dlpack::ExchangeApi* exchange_api(py::handle object) {
  static auto& cache = *new std::unordered_map<PyTypeObject*, dlpack::ExchangeApi*>();
  PyTypeObject* type = Py_TYPE(object.ptr());
  if (const auto found = cache.find(type); found != cache.end()) return found->second;
  dlpack::ExchangeApi* api = nullptr;
  const py::handle type_object(reinterpret_cast<PyObject*>(type));
  if (py::hasattr(type_object, "__dlpack_c_exchange_api__")) {
    const py::object capsule = type_object.attr("__dlpack_c_exchange_api__");
    api = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api == nullptr) PyErr_Clear();
    while (api != nullptr && api->version.major != 1) api = api->previous;
    if (api != nullptr && api->borrow == nullptr) api = nullptr;
  }
  Py_INCREF(type);
  cache.emplace(type, api);
  return api;
}

namespace {

Array from_capsule(py::handle object, bool writable, const char* what) {
  // A capsule that nobody consumes frees its tensor itself; holding it is all that is needed.
  const py::object capsule = object.attr("__dlpack__")();
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    const auto* managed =
        static_cast<dlpack::ManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    if (managed->version.major != 1) refuse(what, "DLPack version 1", "version " + std::to_string(managed->version.major));
    if (writable && (managed->flags & dlpack::kReadOnly) != 0) refuse(what, "a writable array", "a read-only one");
    return from_tensor(managed->tensor, capsule, what);
  }
  if (!PyCapsule_IsValid(capsule.ptr(), "dltensor")) refuse(what, "a DLPack capsule", type_name(capsule));
  return from_tensor(static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"))->tensor, capsule,
                     what);
}

}  // namespace

Array to_array(py::handle object, bool writable, const char* what) {
  if (py::isinstance<py::array>(object)) return from_numpy(py::reinterpret_borrow<py::array>(object), writable, what);
  if (const dlpack::ExchangeApi* api = exchange_api(object)) {
    dlpack::Tensor tensor{};
    if (api->borrow(object.ptr(), &tensor) != 0) throw py::error_already_set();
    return from_tensor(tensor, py::reinterpret_borrow<py::object>(object), what);
  }
  if (py::hasattr(object, "__dlpack__")) return from_capsule(object, writable, what);
  refuse(what, "an array (numpy, torch, or anything with __dlpack__)", type_name(object));
}

py::object empty_like(py::handle prototype, const Array& array, const std::vector<int64_t>& shape) {
  if (py::isinstance<py::array>(prototype))
    return py::array(py::reinterpret_borrow<py::array>(prototype).dtype(),
                     std::vector<py::ssize_t>(shape.begin(), shape.end()));
  if (py::hasattr(prototype, "new_empty")) return prototype.attr("new_empty")(py::tuple(py::cast(shape)));
  if (array.view.dtype == DType::BFloat16)
    throw InvalidArgument("numpy has no bfloat16 to answer with: give `out`, or torch tensors");
  return py::array(py::dtype(name_of(array.view.dtype)), std::vector<py::ssize_t>(shape.begin(), shape.end()));
}

}  // namespace roundel::bind
