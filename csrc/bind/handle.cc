#include "bind/handle.h"

#include <algorithm>
#include <list>
#include <utility>

namespace py = pybind11;

namespace roundel::bind {
namespace {

using Requests = std::vector<std::shared_ptr<comm::Request>>;

bool all_done(const Requests& requests) {
  return std::all_of(requests.begin(), requests.end(), [](const auto& request) { return request->done(); });
}

using Unfinished = std::list<std::pair<std::function<bool()>, std::vector<py::object>>>;
Unfinished& unfinished() {
  static auto& list = *new Unfinished();
  return list;
}

}  // namespace

Handle::Handle(comm::Communicator& communicator, Call call) : result_(std::move(call.result)), keep_(std::move(call.keep)) {
  std::vector<comm::Operation> operations;
  operations.reserve(1 + call.more.size());
  operations.push_back(std::move(call.operation));
  for (comm::Operation& operation : call.more) operations.push_back(std::move(operation));
  requests_ = communicator.start(std::move(operations));
}

Handle::~Handle() {
  if (all_done(requests_)) return;
  keep_.push_back(std::move(result_));
  keep_until([requests = std::move(requests_)] { return all_done(requests); }, std::move(keep_));
}

void keep_until(std::function<bool()> done, std::vector<py::object> objects) {
  unfinished().emplace_back(std::move(done), std::move(objects));
}

bool Handle::done() const { return all_done(requests_); }

py::object Handle::wait() {
  if (!done()) {
    const py::gil_scoped_release unlocked;
    for (const auto& request : requests_) request->wait();
  }
  for (const auto& request : requests_) request->wait();  // throws what the operation threw
  const std::vector<py::object> let_go = std::exchange(keep_, {});
  return result_;
}

// Python code may run when objects go, and come here again: so first out of the list, then away. (wait() does likewise.)
void sweep_unfinished() {
  Unfinished done;
  for (auto it = unfinished().begin(); it != unfinished().end();) {
    const auto next = std::next(it);
    if (it->first()) done.splice(done.end(), unfinished(), it);
    it = next;
  }
}

}  // namespace roundel::bind
