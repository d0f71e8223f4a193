// The bindings' topics. module.cc is their table of contents.
#pragma once

#include <pybind11/pybind11.h>

namespace roundel::bind {

void bind_errors(pybind11::module_& m);
void bind_comm(pybind11::module_& m);
void bind_info(pybind11::module_& m);
void bind_recorder(pybind11::module_& m);

}  // namespace roundel::bind
