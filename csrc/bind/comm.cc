// roundel.Communicator: each method makes one comm::Operation out of its arguments and either runs it (GIL released) or starts
// it.
#include "comm/communicator.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <list>

#include "base/env.h"
#include "base/error.h"
#include "base/interrupt.h"
#include "bind/arrays.h"
#include "bind/bind.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace roundel::bind {
namespace {

using comm::Communicator;
using comm::Operation;
using comm::Request;

// An operation with the Python objects that its views look into.
struct Call {
  Operation operation;
  py::object result;
  std::vector<py::object> keep;
};

// Objects of operations whose handle was dropped before they were done: kept until they are. GIL.
using Unfinished = std::list<std::pair<std::shared_ptr<Request>, std::vector<py::object>>>;
Unfinished& unfinished() {
  static auto& list = *new Unfinished();
  return list;
}

class Handle {
 public:
  Handle(std::shared_ptr<Request> request, Call call)
      : request_(std::move(request)), result_(std::move(call.result)), keep_(std::move(call.keep)) {}
  Handle(Handle&&) = default;
  ~Handle() {
    if (request_ != nullptr && !request_->done()) {
      keep_.push_back(std::move(result_));
      unfinished().emplace_back(request_, std::move(keep_));
    }
  }
  bool done() const { return request_->done(); }
  py::object wait() {
    if (!request_->done()) {
      const py::gil_scoped_release unlocked;
      request_->wait();
    }
    request_->wait();  // throws what the operation threw
    keep_.clear();
    return result_;
  }

 private:
  std::shared_ptr<Request> request_;
  py::object result_;
  std::vector<py::object> keep_;
};

// Lets go of what is done. Python code may run when objects go, and come here again: so first out of the list, then away.
void sweep_unfinished() {
  Unfinished done;
  for (auto it = unfinished().begin(); it != unfinished().end();) {
    const auto next = std::next(it);
    if (it->first->done()) done.splice(done.end(), unfinished(), it);
    it = next;
  }
}

thread_local bool t_is_main_thread = false;

ReduceOp to_op(int op) {
  if (op < 0 || op >= kReduceOps) throw InvalidArgument(format("op: expected Sum, Average, Min, Max or Product, got %d", op));
  return static_cast<ReduceOp>(op);
}

Operation named(OpKind kind, const std::string& name, double timeout) {
  Operation operation;
  operation.kind = kind;
  operation.name = name;
  operation.timeout = timeout;
  return operation;
}

// How rows (of dimension 0) are divided among ranks, in elements.
plan::Parts parts_of_rows(const std::vector<size_t>& rows, size_t row_elements) {
  std::vector<size_t> counts;
  for (const size_t n : rows) counts.push_back(n * row_elements);
  return plan::Parts::of(counts);
}

size_t row_elements(const std::vector<int64_t>& shape) {
  size_t count = 1;
  for (size_t d = 1; d < shape.size(); ++d) count *= static_cast<size_t>(shape[d]);
  return count;
}

void need_rows(const Array& array, const char* what) {
  if (array.shape.empty()) throw InvalidArgument(std::string(what) + ": expected at least one dimension, got a scalar");
}

struct PyCommunicator {
  std::shared_ptr<Communicator> native;

  int rank() const { return native->world().rank; }
  int size() const { return native->world().size; }

  // Result array: `out`, or a new one of `shape` like x.
  static py::object result_for(const py::object& out, const py::object& x, const Array& in, const std::vector<int64_t>& shape) {
    return out.is_none() ? empty_like(x, in, shape) : out;
  }

  static Call finish_call(Operation operation, py::object result, Array in, Array out) {
    operation.in = in.view;
    operation.out = out.view;
    return {std::move(operation), std::move(result), {std::move(in.keep), std::move(out.keep)}};
  }

  Call allreduce(const py::object& x, int op, const py::object& out, double prescale, double postscale, const std::string& name,
                 double timeout) const {
    Operation o = named(OpKind::AllReduce, name, timeout);
    o.op = to_op(op);
    o.prescale = prescale;
    o.postscale = postscale;
    Array in = to_array(x, out.is(x), "allreduce's input");
    py::object result = result_for(out, x, in, in.shape);
    o.shape = in.shape;
    Array to = result.is(x) ? in : to_array(result, true, "allreduce's out");
    return finish_call(std::move(o), std::move(result), std::move(in), std::move(to));
  }

  Call reduce_scatter(const py::object& x, int op, const py::object& out, double prescale, double postscale,
                      const std::string& name, double timeout) const {
    Operation o = named(OpKind::ReduceScatter, name, timeout);
    o.op = to_op(op);
    o.prescale = prescale;
    o.postscale = postscale;
    Array in = to_array(x, false, "reduce_scatter's input");
    need_rows(in, "reduce_scatter's input");
    std::vector<size_t> rows;
    const plan::Parts even = plan::Parts::even(static_cast<size_t>(in.shape[0]), size());
    for (int r = 0; r < size(); ++r) rows.push_back(even.count(r));
    o.parts = parts_of_rows(rows, row_elements(in.shape));
    std::vector<int64_t> shape = in.shape;
    shape[0] = static_cast<int64_t>(rows[static_cast<size_t>(rank())]);
    py::object result = result_for(out, x, in, shape);
    Array to = to_array(result, true, "reduce_scatter's out");
    return finish_call(std::move(o), std::move(result), std::move(in), std::move(to));
  }

  Call allgather(const py::object& x, const std::optional<std::vector<size_t>>& rows, const py::object& out,
                 const std::string& name, double timeout) const {
    Operation o = named(OpKind::AllGather, name, timeout);
    Array in = to_array(x, false, "allgather's input");
    std::vector<int64_t> shape = in.shape.empty() ? std::vector<int64_t>{1} : in.shape;  // scalars are gathered to a vector
    const std::vector<size_t> all_rows =
        rows ? *rows : std::vector<size_t>(static_cast<size_t>(size()), static_cast<size_t>(shape[0]));
    if (static_cast<int>(all_rows.size()) != size())
      throw InvalidArgument(
          format("allgather's rows: expected one number for each of %d ranks, got %zu", size(), all_rows.size()));
    o.parts = parts_of_rows(all_rows, row_elements(shape));
    shape[0] = 0;
    for (const size_t n : all_rows) shape[0] += static_cast<int64_t>(n);
    py::object result = result_for(out, x, in, shape);
    Array to = to_array(result, true, "allgather's out");
    return finish_call(std::move(o), std::move(result), std::move(in), std::move(to));
  }

  Call broadcast(const py::object& x, int root, const std::string& name, double timeout) const {
    Operation o = named(OpKind::Broadcast, name, timeout);
    o.root = root;
    Array array = to_array(x, rank() != root, "broadcast's array");
    o.shape = array.shape;
    return finish_call(std::move(o), x, array, array);
  }

  Call alltoall(const py::object& x, const py::object& out, const std::string& name, double timeout) const {
    Operation o = named(OpKind::AllToAll, name, timeout);
    Array in = to_array(x, false, "alltoall's input");
    need_rows(in, "alltoall's input");
    if (in.shape[0] % size() != 0)
      throw InvalidArgument(format("alltoall's input: expected a first dimension divisible by %d ranks, got %lld", size(),
                                   static_cast<long long>(in.shape[0])));
    o.parts = plan::Parts::even(in.view.count, size());
    py::object result = result_for(out, x, in, in.shape);
    Array to = to_array(result, true, "alltoall's out");
    return finish_call(std::move(o), std::move(result), std::move(in), std::move(to));
  }

  Call barrier(double timeout) const {
    Operation o;
    o.timeout = timeout;
    return {std::move(o), py::none(), {}};
  }

  Call send(const py::object& x, int dest, double timeout) const {
    Operation o;
    o.kind = OpKind::PointToPoint;
    o.root = dest;
    o.timeout = timeout;
    Array in = to_array(x, false, "send's array");
    if (in.view.data == nullptr)
      in.view.data = &unused_;  // an empty array may have no address, but sending needs to be told from receiving
    o.in = in.view;
    return {std::move(o), py::none(), {std::move(in.keep)}};
  }

  Call recv(const py::object& x, int source, double timeout) const {
    Operation o;
    o.kind = OpKind::PointToPoint;
    o.root = source;
    o.timeout = timeout;
    Array out = to_array(x, true, "recv's array");
    o.out = out.view;
    return {std::move(o), x, {std::move(out.keep)}};
  }

  py::array allocate(size_t bytes) const {
    std::byte* data = native->allocate(bytes);
    struct Owner {
      std::shared_ptr<Communicator> native;
      std::byte* data;
    };
    const py::capsule owner(new Owner{native, data}, [](void* p) {
      const std::unique_ptr<Owner> owned(static_cast<Owner*>(p));
      owned->native->release(owned->data);
    });
    return py::array_t<uint8_t>({static_cast<py::ssize_t>(bytes)}, reinterpret_cast<uint8_t*>(data), owner);
  }

 private:
  static inline char unused_ = 0;
};

// Defines `name` (blocking, returns the result) and `name`_async (returns a Handle) from one method that makes the Call.
template <class... Args, class... Extra>
void def_both(py::class_<PyCommunicator>& cls, const std::string& name, Call (PyCommunicator::*make)(Args...) const,
              const char* doc, const Extra&... extra) {
  cls.def(
      name.c_str(),
      [make](const PyCommunicator& self, Args... args) {
        if (!unfinished().empty()) sweep_unfinished();
        Call call = (self.*make)(args...);
        {
          const py::gil_scoped_release unlocked;
          self.native->run(std::move(call.operation));
        }
        return std::move(call.result);
      },
      doc, extra...);
  const std::string async_doc = "Start " + name + "; returns a Handle. The arrays belong to the operation until it is done.";
  cls.def((name + "_async").c_str(),
          [make](const PyCommunicator& self, Args... args) {
            sweep_unfinished();
            Call call = (self.*make)(args...);
            auto request = self.native->start(std::move(call.operation));
            return Handle(std::move(request), std::move(call));
          },
          async_doc.c_str(), extra...);
}

PyCommunicator open(int rank, int size, const std::string& rendezvous, int rendezvous_fd, const py::buffer& token,
                    uint32_t epoch, double start_timeout) {
  transport::Job job;
  const py::buffer_info secret = token.request();
  const auto length = static_cast<size_t>(secret.size * secret.itemsize);
  if (length != job.token.size())
    throw InvalidArgument(format("rank %d: the job token: expected %zu bytes, got %zu", rank, job.token.size(), length));
  std::copy_n(static_cast<const uint8_t*>(secret.ptr), length, job.token.data());
  job.rank = rank;
  job.size = size;
  job.rendezvous = rendezvous;
  job.rendezvous_fd = rendezvous_fd;
  job.epoch = epoch;
  job.start_timeout = start_timeout > 0 ? start_timeout : env::number("ROUNDEL_START_TIMEOUT", 0.001, 1e9);
  const py::gil_scoped_release unlocked;
  return {Communicator::open(transport::open_world(job))};
}

// Ctrl-C ends a wait: the pending KeyboardInterrupt is thrown through the core. Python runs signal handlers on its main thread
// only; other threads return at once, without asking for the GIL.
void check_signals() {
  if (!t_is_main_thread) return;
  const py::gil_scoped_acquire locked;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

}  // namespace

void bind_comm(py::module_& m) {
  t_is_main_thread = true;  // modules are imported there; where not, Ctrl-C waits for the operation's end
  set_interrupt_check(&check_signals);
  py::class_<Handle>(m, "Handle", "An operation under way.")
      .def("done", &Handle::done, "True when wait() would not block.")
      .def("wait", &Handle::wait, "Block until the operation is done; return its result or raise its error.");

  py::class_<PyCommunicator> cls(
      m, "Communicator",
      "Ordered collectives among the ranks of a job: all ranks call the same operations in the same order.\n\n"
      "Arrays: C-contiguous, on the CPU, of numpy, torch or any library with __dlpack__, dtype float32, float64,\n"
      "float16, bfloat16, int8, int16, int32, int64, uint8 or bool. Results are arrays of the input's library.\n"
      "16-bit sums accumulate in float32 and round once. Every rank gets the same bits.\n"
      "Raises InvalidArgumentError before anything is changed; PeerLostError, MismatchError, TimeoutError,\n"
      "CorruptFrameError end the communicator. timeout: seconds, 0 for ROUNDEL_TIMEOUT.");
  cls.def_static("open", &open, "rank"_a, "size"_a, "rendezvous"_a = "", "rendezvous_fd"_a = -1,
                 "token"_a = py::bytes(std::string(32, '\0')), "epoch"_a = 1, "start_timeout"_a = 0.0,
                 "Meet the other ranks; blocks until all have come.")
      .def_property_readonly("rank", &PyCommunicator::rank)
      .def_property_readonly("size", &PyCommunicator::size)
      .def_property_readonly("epoch", [](const PyCommunicator& c) { return c.native->world().epoch; })
      .def_property_readonly(
          "hosts", [](const PyCommunicator& c) { return c.native->world().host; },
          "Host number of every rank, counted in order of first appearance.")
      .def_property_readonly("transport", [](const PyCommunicator& c) { return std::string(c.native->name()); })
      .def("allocate", &PyCommunicator::allocate, "nbytes"_a,
           "uint8 numpy array in memory that this host's ranks share, where there is any: all-reduce in place on it needs no "
           "staging.")
      .def(
          "shutdown", [](const PyCommunicator& c, double seconds) { c.native->leave(seconds); }, "seconds"_a = 5.0,
          py::call_guard<py::gil_scoped_release>(), "Leave the job. Rank 0 waits up to `seconds` for the others to leave.");

  const int sum = static_cast<int>(ReduceOp::Sum);
  def_both(cls, "allreduce", &PyCommunicator::allreduce, "Reduce over ranks; every rank gets the result. `out` may be `x`.",
           "x"_a, "op"_a = sum, "out"_a = py::none(), py::kw_only(), "prescale"_a = 1.0, "postscale"_a = 1.0, "name"_a = "",
           "timeout"_a = 0.0);
  def_both(cls, "reduce_scatter", &PyCommunicator::reduce_scatter,
           "Reduce over ranks and keep this rank's rows of dimension 0; the first n % size ranks get one row more.", "x"_a,
           "op"_a = sum, "out"_a = py::none(), py::kw_only(), "prescale"_a = 1.0, "postscale"_a = 1.0, "name"_a = "",
           "timeout"_a = 0.0);
  def_both(cls, "allgather", &PyCommunicator::allgather,
           "Concatenate every rank's array along dimension 0. rows: how many each rank has, when they differ.", "x"_a,
           "rows"_a = py::none(), "out"_a = py::none(), py::kw_only(), "name"_a = "", "timeout"_a = 0.0);
  def_both(cls, "broadcast", &PyCommunicator::broadcast, "Overwrite `x` with root's, in place.", "x"_a, "root"_a = 0,
           py::kw_only(), "name"_a = "", "timeout"_a = 0.0);
  def_both(cls, "alltoall", &PyCommunicator::alltoall,
           "Part i of dimension 0 goes to rank i; part i of the result comes from rank i.", "x"_a, "out"_a = py::none(),
           py::kw_only(), "name"_a = "", "timeout"_a = 0.0);
  def_both(cls, "barrier", &PyCommunicator::barrier, "Wait for every rank.", py::kw_only(), "timeout"_a = 0.0);
  def_both(cls, "send", &PyCommunicator::send, "Send `x` to a rank; sends and receives between two ranks meet in order.", "x"_a,
           "dest"_a, py::kw_only(), "timeout"_a = 0.0);
  def_both(cls, "recv", &PyCommunicator::recv, "Receive into `x`, in place.", "x"_a, "source"_a, py::kw_only(),
           "timeout"_a = 0.0);
}

}  // namespace roundel::bind
