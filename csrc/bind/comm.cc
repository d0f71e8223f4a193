// roundel.Communicator: every call exists as a blocking method (GIL released) and, with _async, as one that returns a Handle.
#include "comm/communicator.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "base/env.h"
#include "base/error.h"
#include "base/interrupt.h"
#include "bind/bind.h"
#include "bind/calls.h"
#include "bind/fast.h"
#include "comm/split.h"
#include "transport/mpi_job.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace roundel::bind {
namespace {

thread_local bool t_is_main_thread = false;

// Several operations are started before the first is waited for: a sendrecv must not wait for its receive to send.
py::object run(const std::shared_ptr<comm::Communicator>& native, Call&& call) {
  if (!call.more.empty()) return Handle(*native, std::move(call)).wait();
  {
    const py::gil_scoped_release unlocked;
    native->run(std::move(call.operation));
  }
  return std::move(call.result);
}

// Defines `name` (blocking, returns the result) and `name`_async (returns a Handle) from the methods that make the Call.
template <class... Args, class... Extra>
void def_both(py::class_<Calls>& cls, const std::string& name, Call (Calls::*make)(Args...) const,
              Call (Calls::*make_async)(Args...) const, const char* doc, const Extra&... extra) {
  const auto blocking = [make](const Calls& self, Args... args) {
    sweep_unfinished();
    return run(self.native, (self.*make)(args...));
  };
  cls.def(name.c_str(), blocking, doc, extra...);
  FastMethod<Calls, decltype(blocking), Args...>::put_before(cls, name.c_str(), blocking, extra...);
  const std::string async_doc = "Start " + name + "; returns a Handle. The arrays belong to the operation until it is done.";
  cls.def((name + "_async").c_str(),
          [make_async](const Calls& self, Args... args) {
            sweep_unfinished();
            return Handle(*self.native, (self.*make_async)(args...));
          },
          async_doc.c_str(), extra...);
}

template <class... Args, class... Extra>
void def_both(py::class_<Calls>& cls, const std::string& name, Call (Calls::*make)(Args...) const, const char* doc,
              const Extra&... extra) {
  def_both(cls, name, make, make, doc, extra...);
}

// Memory of the arena as a numpy array that gives it back in the end.
py::array allocate(const Calls& self, size_t bytes) {
  std::byte* data = self.native->allocate(bytes);
  struct Owner {
    std::shared_ptr<comm::Communicator> native;
    std::byte* data;
  };
  const py::capsule owner(new Owner{self.native, data}, [](void* p) {
    const std::unique_ptr<Owner> owned(static_cast<Owner*>(p));
    owned->native->release(owned->data);
  });
  return py::array_t<uint8_t>({static_cast<py::ssize_t>(bytes)}, reinterpret_cast<uint8_t*>(data), owner);
}

py::object empty(const Calls& self, const py::object& shape, const py::object& dtype) {
  const py::object torch_module = py::module_::import("sys").attr("modules").attr("get")("torch");
  const bool of_torch = !torch_module.is_none() && py::isinstance(dtype, torch_module.attr("dtype"));
  const py::object type = of_torch ? dtype : py::object(py::dtype::from_args(dtype));
  const auto sizes =
      py::isinstance<py::int_>(shape) ? std::vector<size_t>{shape.cast<size_t>()} : shape.cast<std::vector<size_t>>();
  size_t bytes = type.attr("itemsize").cast<size_t>();
  for (const size_t n : sizes) bytes *= n;
  const py::array memory = allocate(self, bytes);
  const py::object typed = of_torch ? torch_module.attr("from_numpy")(memory).attr("view")(type) : memory.attr("view")(type);
  return typed.attr("reshape")(py::tuple(py::cast(sizes)));
}

Calls open(int rank, int size, const std::string& rendezvous, int rendezvous_fd, const py::buffer& token, uint32_t epoch,
           double start_timeout, std::shared_ptr<transport::MpiJob> mpi) {
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
  job.mpi = std::move(mpi);
  job.start_timeout = start_timeout > 0 ? start_timeout : env::number("ROUNDEL_START_TIMEOUT", 0.001, 1e9);
  const py::gil_scoped_release unlocked;
  return {comm::Communicator::open(transport::open_world(job))};
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

  py::class_<Calls> cls(
      m, "Communicator",
      "Ordered collectives among the ranks of a job: all ranks call the same operations in the same order.\n\n"
      "Arrays: C-contiguous, on the CPU, of numpy, torch or any library with __dlpack__, dtype float32, float64,\n"
      "float16, bfloat16, int8, int16, int32, int64, uint8 or bool. Results are arrays of the input's library.\n"
      "16-bit sums accumulate in float32 and round once. Every rank gets the same bits.\n"
      "Raises InvalidArgumentError before anything is changed; PeerLostError, MismatchError, TimeoutError,\n"
      "CorruptFrameError end the communicator. timeout: seconds, 0 for ROUNDEL_TIMEOUT. `rows` and splits: of\n"
      "dimension 0, one number for each rank.");
  cls.def_static("open", &open, "rank"_a, "size"_a, "rendezvous"_a = "", "rendezvous_fd"_a = -1,
                 "token"_a = py::bytes(std::string(32, '\0')), "epoch"_a = 1, "start_timeout"_a = 0.0,
                 "mpi"_a = std::shared_ptr<transport::MpiJob>(), "Meet the other ranks; blocks until all have come.")
      .def_property_readonly("rank", &Calls::rank)
      .def_property_readonly("size", &Calls::size)
      .def_property_readonly("epoch", [](const Calls& c) { return c.native->world().epoch; })
      .def_property_readonly(
          "hosts", [](const Calls& c) { return c.native->world().host; },
          "Host number of every rank, counted in order of first appearance.")
      .def_property_readonly(
          "members", [](const Calls& c) { return c.native->world().members; },
          "The rank in the whole job of every rank here; the same numbers unless this came from split().")
      .def_property_readonly("transport", [](const Calls& c) { return std::string(c.native->name()); })
      .def("allocate", &allocate, "nbytes"_a,
           "uint8 numpy array in memory that this host's ranks share, where there is any: all-reduce in place on it needs no "
           "staging.")
      .def("empty", &empty, "shape"_a, "dtype"_a = "float32",
           "As allocate(), of a shape and a dtype: a numpy array, or a torch tensor when the dtype is torch's.")
      .def(
          "split",
          [](const Calls& self, std::optional<int> color, int key) -> std::optional<Calls> {
            const py::gil_scoped_release unlocked;
            auto made = comm::split(*self.native, color.value_or(-1), key);
            if (made == nullptr) return std::nullopt;
            return Calls{std::move(made)};
          },
          "color"_a, "key"_a = 0,
          "A communicator of the ranks that give the same color (from 0 on), in the order of key, then rank; None for a rank "
          "that gives None. All ranks call it. It has memory, connections and a failure detector of its own; PeerLostError "
          "names ranks of the whole job.")
      .def("check_array", &Calls::check_array, "x"_a,
           "Raise InvalidArgumentError where collectives would refuse this array; before a step that other ranks wait for.")
      .def(
          "shutdown", [](const Calls& c, double seconds) { c.native->leave(seconds); }, "seconds"_a = 5.0,
          py::call_guard<py::gil_scoped_release>(),
          "Leave the job and the groups made of it. Rank 0 waits up to `seconds`, in all, for the others to leave.");

  const int sum = static_cast<int>(ReduceOp::Sum);
  def_both(cls, "allreduce", &Calls::allreduce, "Reduce over ranks; every rank gets the result. `out` may be `x`.", "x"_a,
           "op"_a = sum, "out"_a = py::none(), py::kw_only(), "prescale"_a = 1.0, "postscale"_a = 1.0, "name"_a = "",
           "timeout"_a = 0.0);
  def_both(cls, "grouped_allreduce", &Calls::grouped_allreduce,
           "allreduce of a list of arrays, all or none; small ones of a dtype travel together. Returns a list.", "xs"_a,
           "op"_a = sum, "outs"_a = py::none(), py::kw_only(), "prescale"_a = 1.0, "postscale"_a = 1.0, "name"_a = "",
           "timeout"_a = 0.0);
  def_both(cls, "reduce", &Calls::reduce, "Reduce over ranks; root gets the result, which may be `x`, the others None.", "x"_a,
           "root"_a = 0, "op"_a = sum, "out"_a = py::none(), py::kw_only(), "prescale"_a = 1.0, "postscale"_a = 1.0,
           "name"_a = "", "timeout"_a = 0.0);
  def_both(cls, "reduce_scatter", &Calls::reduce_scatter,
           "Reduce over ranks and keep this rank's rows of dimension 0: as `rows` says, or the first n % size ranks one more.",
           "x"_a, "op"_a = sum, "out"_a = py::none(), py::kw_only(), "rows"_a = py::none(), "prescale"_a = 1.0,
           "postscale"_a = 1.0, "name"_a = "", "timeout"_a = 0.0);
  def_both(cls, "grouped_reduce_scatter", &Calls::grouped_reduce_scatter, "reduce_scatter of each array of a list.", "xs"_a,
           "op"_a = sum, py::kw_only(), "prescale"_a = 1.0, "postscale"_a = 1.0, "name"_a = "", "timeout"_a = 0.0);
  def_both(cls, "allgather", &Calls::allgather,
           "Concatenate every rank's array along dimension 0. rows: how many each rank has, when they differ.", "x"_a,
           "rows"_a = py::none(), "out"_a = py::none(), py::kw_only(), "name"_a = "", "timeout"_a = 0.0);
  def_both(cls, "grouped_allgather", &Calls::grouped_allgather, "allgather of each array of a list; rows: a list of rows.",
           "xs"_a, "rows"_a = py::none(), py::kw_only(), "name"_a = "", "timeout"_a = 0.0);
  def_both(cls, "gather", &Calls::gather, "As allgather, at root; the others get None.", "x"_a, "root"_a = 0,
           "rows"_a = py::none(), "out"_a = py::none(), py::kw_only(), "name"_a = "", "timeout"_a = 0.0);
  def_both(
      cls, "scatter", &Calls::scatter,
      "Root's rows of dimension 0, divided among the ranks: evenly, or as `rows` says on every rank. Ranks other than root "
      "give `out`, and no x.",
      "x"_a = py::none(), "root"_a = 0, "rows"_a = py::none(), "out"_a = py::none(), py::kw_only(), "name"_a = "",
      "timeout"_a = 0.0);
  def_both(cls, "broadcast", &Calls::broadcast, "Overwrite `x` with root's, in place.", "x"_a, "root"_a = 0, py::kw_only(),
           "name"_a = "", "timeout"_a = 0.0);
  def_both(cls, "alltoall", &Calls::alltoall, &Calls::alltoall_async,
           "Part i of dimension 0 goes to rank i; part i of the result comes from rank i. splits: rows that go to each rank; "
           "received_splits: that come from each, asked for where they are not given (alltoall_async needs them).",
           "x"_a, "out"_a = py::none(), py::kw_only(), "splits"_a = py::none(), "received_splits"_a = py::none(), "name"_a = "",
           "timeout"_a = 0.0);
  def_both(cls, "barrier", &Calls::barrier, "Wait for every rank. TimeoutError names those that have not come.", py::kw_only(),
           "timeout"_a = 0.0);
  def_both(cls, "send", &Calls::send, "Send `x` to a rank; sends and receives between two ranks meet in order.", "x"_a,
           "dest"_a, py::kw_only(), "timeout"_a = 0.0);
  def_both(cls, "recv", &Calls::recv, "Receive into `x`, in place.", "x"_a, "source"_a, py::kw_only(), "timeout"_a = 0.0);
  def_both(cls, "sendrecv", &Calls::sendrecv, "Send `x` to a rank while receiving into `out` from another, or the same.", "x"_a,
           "dest"_a, "out"_a, "source"_a, py::kw_only(), "timeout"_a = 0.0);
}

}  // namespace roundel::bind
