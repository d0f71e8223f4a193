// C++ errors to the Python classes of roundel.errors, in this one place.
#include "base/error.h"

#include "bind/bind.h"

namespace py = pybind11;

namespace roundel::bind {
namespace {

const char* class_of(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::InvalidArgument:
      return "InvalidArgumentError";
    case ErrorKind::PeerLost:
      return "PeerLostError";
    case ErrorKind::Mismatch:
      return "MismatchError";
    case ErrorKind::CorruptFrame:
      return "CorruptFrameError";
    case ErrorKind::Timeout:
      return "TimeoutError";
    case ErrorKind::Handshake:
      return "HandshakeError";
    case ErrorKind::Fenced:
      return "FencedError";
    case ErrorKind::DuplicateName:
      return "DuplicateNameError";
    case ErrorKind::Generic:
      break;
  }
  return "RoundelError";
}

void raise(const Error& error) {
  const py::object type = py::module_::import("roundel.errors").attr(class_of(error.kind()));
  py::object instance;
  if (const auto* lost = dynamic_cast<const PeerLost*>(&error)) {
    py::tuple ranks(lost->ranks.size());
    for (size_t i = 0; i < lost->ranks.size(); ++i) ranks[i] = lost->ranks[i];
    instance = type(to_str(error.what()), ranks, lost->epoch, to_str(lost->op));
  } else {
    instance = type(to_str(error.what()));
  }
  PyErr_SetObject(type.ptr(), instance.ptr());
}

}  // namespace

void bind_errors(py::module_&) {
  py::register_exception_translator([](std::exception_ptr pending) {
    try {
      if (pending) std::rethrow_exception(pending);
    } catch (const Error& error) {
      raise(error);
    }
  });
}

}  // namespace roundel::bind
