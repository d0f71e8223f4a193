// Operations under way, as Python sees them.
#pragma once

#include <pybind11/pybind11.h>

#include <functional>
#include <memory>
#include <vector>

#include "comm/communicator.h"

namespace roundel::bind {

// Operations that make one call, with what it returns and the Python objects that their views look into.
struct Call {
  comm::Operation operation;
  pybind11::object result;
  std::vector<pybind11::object> keep;
  std::vector<comm::Operation> more = {};  // of grouped calls and of sendrecv
};

// A call that was started.
class Handle {
 public:
  // Starts all operations of the call, or none and throws. GIL.
  Handle(comm::Communicator& communicator, Call call);
  Handle(Handle&&) = default;
  ~Handle();
  bool done() const;
  pybind11::object wait();

 private:
  std::vector<std::shared_ptr<comm::Request>> requests_;
  pybind11::object result_;
  std::vector<pybind11::object> keep_;
};

// Objects of calls whose handle was dropped before they were done are kept until they are. sweep_unfinished() lets go of those
// that are. GIL.
void keep_until(std::function<bool()> done, std::vector<pybind11::object> objects);
void sweep_unfinished();

}  // namespace roundel::bind
