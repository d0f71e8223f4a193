// The bindings' topics. module.cc is their table of contents.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace roundel::bind {

void bind_errors(pybind11::module_& m);
void bind_comm(pybind11::module_& m);
void bind_engine(pybind11::module_& m);
void bind_info(pybind11::module_& m);
void bind_mpi(pybind11::module_& m);
void bind_optim(pybind11::module_& m);
void bind_recorder(pybind11::module_& m);

// Texts may hold bytes of other ranks, or names that are no UTF-8: an error about one must not become an error about its text.
inline pybind11::str to_str(const std::string& text) {
  return pybind11::reinterpret_steal<pybind11::str>(
      PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "replace"));
}

}  // namespace roundel::bind
