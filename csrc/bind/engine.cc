// roundel._core.Engine: named requests in any order. Every method starts one and returns an EngineHandle; none blocks.
#include "engine/engine.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "base/error.h"
#include "base/shape.h"
#include "bind/arrays.h"
#include "bind/bind.h"
#include "bind/calls.h"
#include "bind/fast.h"
#include "bind/fast_type.h"
#include "bind/handle.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace roundel::bind {
namespace {

using engine::Buffers;
using engine::Kind;
using engine::Output;
using engine::Request;
using engine::Ticket;

// An array of the library that `prototype` is from, over memory that the engine made; of numpy where that is not known.
py::object to_python(const Output& output, py::handle prototype) {
  const size_t bytes = count_of(output.shape) * size_of(output.dtype);
  auto* data = reinterpret_cast<uint8_t*>(output.data.get());
  using Memory = std::shared_ptr<std::byte[]>;
  const py::capsule owner(new Memory(output.data), [](void* p) { delete static_cast<Memory*>(p); });
  const py::array_t<uint8_t> memory({static_cast<py::ssize_t>(bytes)}, data, owner);
  const py::tuple shape(py::cast(output.shape));
  if (py::hasattr(prototype, "new_empty"))
    return py::module_::import("torch").attr("from_numpy")(memory).attr("view")(prototype.attr("dtype")).attr("reshape")(shape);
  const bool numpy = py::isinstance<py::array>(prototype);
  return memory.attr("view")(numpy ? prototype.attr("dtype") : py::object(py::dtype(name_of(output.dtype))))
      .attr("reshape")(shape);
}

// A request under way. `xs`: the caller's arrays, whose library the results are of.
class EngineHandle {
 public:
  using Finish = py::object (*)(Ticket& ticket, const py::object& xs);
  EngineHandle(std::shared_ptr<engine::Engine> engine, std::shared_ptr<Ticket> ticket, py::object xs,
               std::vector<py::object> keep, Finish finish)
      : engine_(std::move(engine)), ticket_(std::move(ticket)), xs_(std::move(xs)), keep_(std::move(keep)), finish_(finish) {}
  EngineHandle(EngineHandle&&) = default;
  ~EngineHandle() {
    if (ticket_ == nullptr || ticket_->done()) return;
    keep_.push_back(std::move(xs_));
    keep_until([ticket = std::move(ticket_)] { return ticket->done(); }, std::move(keep_));
  }
  py::object done() const { return py::bool_(ticket_->done()); }
  py::object wait() {
    if (!ticket_->done()) {
      const py::gil_scoped_release unlocked;
      engine_->wait(*ticket_);
    }
    ticket_->rethrow();
    if (!result_) {
      py::object made = finish_(*ticket_, py::object(xs_));  // other threads may run meanwhile, and come here too
      if (!result_) result_ = std::move(made);
      const std::vector<py::object> let_go = std::exchange(keep_, {});
      xs_ = py::none();
    }
    return result_;
  }

 private:
  std::shared_ptr<engine::Engine> engine_;
  std::shared_ptr<Ticket> ticket_;
  py::object xs_;
  std::vector<py::object> keep_;
  Finish finish_;
  py::object result_;
};

using HandleType = FastType<EngineHandle>;

py::object same(Ticket&, const py::object& xs) { return xs; }
py::object value(Ticket& ticket, const py::object&) { return py::int_(ticket.value); }
py::object nothing(Ticket&, const py::object&) { return py::none(); }
py::object made(Ticket& ticket, const py::object& xs) {
  const py::tuple prototypes = xs;
  py::list results;
  for (size_t i = 0; i < ticket.outputs.size(); ++i) results.append(to_python(ticket.outputs[i], prototypes[i]));
  return results;
}
py::object made_and_received(Ticket& ticket, const py::object& x) {
  return py::make_tuple(to_python(ticket.outputs.front(), x), ticket.received);
}

// Snapshot as dicts, by kind and by rank.
py::dict stats(const engine::Stats::Snapshot& snapshot) {
  py::dict kinds, waited, all;
  for (const auto& kind : snapshot.kinds)
    kinds[py::str(kind.name)] =
        py::dict("requests"_a = kind.requests, "tensors"_a = kind.tensors, "bytes"_a = kind.bytes, "batches"_a = kind.batches,
                 "fused"_a = kind.fused, "failed"_a = kind.failed, "negotiate_seconds"_a = kind.negotiate_seconds,
                 "queue_seconds"_a = kind.queue_seconds, "execute_seconds"_a = kind.execute_seconds);
  for (size_t r = 0; r < snapshot.waited.size(); ++r)
    waited[py::int_(r)] = py::dict("requests"_a = snapshot.waited[r].requests, "seconds"_a = snapshot.waited[r].seconds);
  all["kinds"] = kinds;
  all["waited_for"] = waited;
  all["seconds"] = snapshot.seconds;
  return all;
}

uint8_t op_of(int op) {
  if (op < 0 || op > engine::kAdasum)
    throw InvalidArgument(format("op: expected Sum, Average, Min, Max, Product or Adasum, got %d", op));
  return static_cast<uint8_t>(op);
}

// A request being put together.
struct Draft {
  Request request;
  Buffers buffers;
  std::vector<py::object> keep;

  Draft(Kind kind, const std::string& name, uint32_t set, int device) {
    request.kind = kind;
    request.name = name;
    request.set = set;
    request.on_device = device >= 0;
  }
  void reduces(int op, double prescale, double postscale) {
    request.op = op_of(op);
    request.prescale = prescale;
    request.postscale = postscale;
  }
  // `rows_differ`: ranks may differ in dimension 0; a scalar counts as one row.
  void add(Array in, bool rows_differ) {
    if (rows_differ && in.shape.empty()) in.shape = {1};
    if (rows_differ) buffers.rows.push_back(static_cast<size_t>(std::exchange(in.shape[0], -1)));
    request.tensors.push_back({in.view.dtype, std::move(in.shape)});
    buffers.in.push_back(in.view);
    if (in.keep) keep.push_back(std::move(in.keep));
  }
  void add_out(Array out) {
    buffers.out.push_back(out.view);
    if (out.keep) keep.push_back(std::move(out.keep));
  }
};

struct PyEngine {
  std::shared_ptr<engine::Engine> native;

  EngineHandle start(Draft draft, py::object xs, EngineHandle::Finish finish) const {
    sweep_unfinished();
    auto ticket = native->submit(std::move(draft.request), std::move(draft.buffers));
    return {native, std::move(ticket), std::move(xs), std::move(draft.keep), finish};
  }

  EngineHandle allreduce(const py::list& xs, const std::optional<py::list>& outs, int op, double prescale, double postscale,
                         const std::string& name, uint32_t set, int device) const {
    if (outs && outs->size() != xs.size())
      throw InvalidArgument(format("allreduce's outs: expected %zu arrays, got %zu", xs.size(), outs->size()));
    Draft draft(Kind::AllReduce, name, set, device);
    draft.reduces(op, prescale, postscale);
    py::list results;
    for (size_t i = 0; i < xs.size(); ++i) {
      const py::object x = xs[i];
      const bool in_place = outs && py::object((*outs)[i]).is(x);
      Array in = to_array(x, in_place, "allreduce's input");
      const py::object result = outs ? py::object((*outs)[i]) : empty_like(x, in, in.shape);
      draft.add_out(in_place ? Array{in.view, {}, {}} : to_array(result, true, "allreduce's out"));
      draft.add(std::move(in), false);
      results.append(result);
    }
    return start(std::move(draft), std::move(results), &same);
  }

  // The commonest request, without lists.
  EngineHandle allreduce_in_place(const py::object& x, int op, double prescale, double postscale, std::string_view name,
                                  int set) const {
    Array array = to_array(x, true, "allreduce's array");
    if (array.keep.is(x)) {  // the handle has it
      array.keep = {};
      sweep_unfinished();
      auto ticket =
          native->submit_again({array.view, array.shape, op_of(op), prescale, postscale, name, static_cast<uint32_t>(set)});
      if (ticket != nullptr) return {native, std::move(ticket), x, {}, &same};
    }
    Draft draft(Kind::AllReduce, std::string(name), static_cast<uint32_t>(set), -1);
    draft.reduces(op, prescale, postscale);
    draft.add_out({array.view, {}, {}});
    draft.add(std::move(array), false);
    return start(std::move(draft), x, &same);
  }

  EngineHandle allgather(const py::list& xs, const std::string& name, uint32_t set, int device) const {
    Draft draft(Kind::AllGather, name, set, device);
    for (const py::handle x : xs) draft.add(to_array(x, false, "allgather's input"), true);
    return start(std::move(draft), py::tuple(xs), &made);
  }

  EngineHandle broadcast(const py::object& x, int root, const std::string& name, uint32_t set, int device) const {
    Draft draft(Kind::Broadcast, name, set, device);
    draft.request.root = root;
    Array array = to_array(x, native->rank() != root, "broadcast's array");
    draft.add_out({array.view, {}, {}});
    draft.add(std::move(array), false);
    return start(std::move(draft), x, &same);
  }

  EngineHandle alltoall(const py::object& x, const std::optional<std::vector<size_t>>& splits, const std::string& name,
                        uint32_t set, int device) const {
    Draft draft(Kind::AllToAll, name, set, device);
    if (splits && splits->empty()) throw InvalidArgument("alltoall's splits: expected one for each rank, got none");
    draft.add(to_array(x, false, "alltoall's input"), true);
    if (splits) draft.buffers.splits = *splits;
    return start(std::move(draft), x, &made_and_received);
  }

  EngineHandle reduce_scatter(const py::list& xs, int op, double prescale, double postscale, const std::string& name,
                              uint32_t set, int device) const {
    Draft draft(Kind::ReduceScatter, name, set, device);
    draft.reduces(op, prescale, postscale);
    for (const py::handle x : xs) draft.add(to_array(x, false, "reduce_scatter's input"), false);
    return start(std::move(draft), py::tuple(xs), &made);
  }

  EngineHandle barrier(uint32_t set) const { return start({Kind::Barrier, "", set, -1}, py::none(), &nothing); }
  EngineHandle join(int device) const { return start({Kind::Join, "", 0, device}, py::none(), &value); }
  EngineHandle add_process_set(const std::vector<int>& ranks) const {
    Draft draft(Kind::AddSet, "", 0, -1);
    draft.request.ranks = ranks;
    return start(std::move(draft), py::none(), &value);
  }
  EngineHandle remove_process_set(int set) const {
    Draft draft(Kind::RemoveSet, "", 0, -1);
    draft.request.root = set;
    return start(std::move(draft), py::none(), &nothing);
  }
};

}  // namespace
}  // namespace roundel::bind

template <>
struct pybind11::detail::type_caster<roundel::bind::EngineHandle> {
  static constexpr auto name = const_name("roundel._core.EngineHandle");
  static handle cast(roundel::bind::EngineHandle&& made, return_value_policy, handle) {
    return roundel::bind::HandleType::make(std::move(made)).release();
  }
};

namespace roundel::bind {

void bind_engine(py::module_& m) {
  HandleType::define(
      m, "EngineHandle", "A named request under way.",
      {HandleType::method<&EngineHandle::done>("done",
                                               "done(self: roundel._core.EngineHandle) -> bool\n\n"
                                               "True when wait() would not block."),
       HandleType::method<&EngineHandle::wait>("wait",
                                               "wait(self: roundel._core.EngineHandle) -> object\n\n"
                                               "Block until the request is done; return its result or raise its error.")});

  const int sum = static_cast<int>(ReduceOp::Sum);
  py::class_<PyEngine> cls(
      m, "Engine",
      "Named requests, from any thread and in any order, agreed between the ranks of a job.\n\n"
      "Every method starts a request and returns a handle. Arrays as for Communicator; they belong to the\n"
      "request until it is done. An empty name is made up: counted per kind and process set. device: -1, or\n"
      "the index of the GPU that the caller's tensors are on.\n"
      "Raises InvalidArgumentError and DuplicateNameError at once; MismatchError, on all ranks and the job\n"
      "goes on, from wait(); PeerLostError, TimeoutError etc. end the engine.");
  cls.def(py::init([](const Calls& comm) {
            const py::gil_scoped_release unlocked;
            return PyEngine{engine::Engine::open(*comm.native)};
          }),
          "communicator"_a, "All ranks of the communicator together.")
      .def("allreduce", &PyEngine::allreduce, "xs"_a, "outs"_a = py::none(), "op"_a = sum, py::kw_only(), "prescale"_a = 1.0,
           "postscale"_a = 1.0, "name"_a = "", "process_set"_a = 0, "device"_a = -1,
           "Reduce a list of arrays over ranks, all or none. wait() returns a list. op 5 is Adasum.")
      .def("allgather", &PyEngine::allgather, "xs"_a, py::kw_only(), "name"_a = "", "process_set"_a = 0, "device"_a = -1,
           "Concatenate every rank's arrays along dimension 0, in which ranks may differ. wait() returns a list.")
      .def("broadcast", &PyEngine::broadcast, "x"_a, "root"_a, py::kw_only(), "name"_a = "", "process_set"_a = 0,
           "device"_a = -1, "Overwrite `x` with that of `root`, a rank of the job. wait() returns x.")
      .def("alltoall", &PyEngine::alltoall, "x"_a, "splits"_a = py::none(), py::kw_only(), "name"_a = "", "process_set"_a = 0,
           "device"_a = -1,
           "splits[i] rows go to the set's rank i; evenly without. wait() returns the new array and the rows from each rank.")
      .def("reduce_scatter", &PyEngine::reduce_scatter, "xs"_a, "op"_a = sum, py::kw_only(), "prescale"_a = 1.0,
           "postscale"_a = 1.0, "name"_a = "", "process_set"_a = 0, "device"_a = -1,
           "Reduce and keep this rank's rows of dimension 0; the first n % size ranks one more. wait() returns a list.")
      .def("barrier", &PyEngine::barrier, py::kw_only(), "process_set"_a = 0, "Done when all ranks of the set have come.")
      .def("join", &PyEngine::join, py::kw_only(), "device"_a = -1,
           "From here on this rank takes part in what others call, with neutral elements and no rows, until all have joined. "
           "wait() returns the rank that joined last.")
      .def("add_process_set", &PyEngine::add_process_set, "ranks"_a,
           "All ranks of the job call it. wait() returns the set's number, that of an equal set where there is one.")
      .def("remove_process_set", &PyEngine::remove_process_set, "process_set"_a, "All ranks of the job call it.")
      .def(
          "stats", [](const PyEngine& e) { return stats(e.native->stats().snapshot()); },
          "What the engine has done, since it began or reset_stats(). \"kinds\": by kind of request, counts, bytes on "
          "this rank and seconds summed over requests. \"waited_for\": by rank, how often it was the last to become ready, "
          "and how long this rank's requests had waited by then.")
      .def(
          "reset_stats", [](const PyEngine& e) { e.native->stats().reset(); }, "Count from here.")
      .def(
          "start_timeline",
          [](const PyEngine& e, const std::string& path, bool mark_cycles) { e.native->start_timeline(path, mark_cycles); },
          "path"_a, "mark_cycles"_a = false, py::call_guard<py::gil_scoped_release>(),
          "Write what happens to every tensor to a Chrome trace, a file for each rank: {rank} in the path, or .rank3 "
          "before its extension. Raises InvalidArgumentError when it cannot be written or is on already.")
      .def(
          "stop_timeline", [](const PyEngine& e) { e.native->stop_timeline(); }, py::call_guard<py::gil_scoped_release>(),
          "Complete the file.")
      .def_property_readonly(
          "process_sets", [](const PyEngine& e) { return e.native->sets(); }, "Ranks of each process set, by number.")
      .def(
          "close", [](const PyEngine& e) { e.native->close(); }, py::call_guard<py::gil_scoped_release>(),
          "End what is pending and leave.");

  const auto in_place = [](const PyEngine& e, const py::object& x, int op, double prescale, double postscale,
                           std::string_view name, int set) -> py::object {
    return py::cast(e.allreduce_in_place(x, op, prescale, postscale, name, set));
  };
  const auto with_fast = [&cls, &in_place](const auto&... arguments) {
    cls.def("allreduce_in_place", in_place, arguments..., "Reduce one array over ranks. wait() returns it.");
    FastMethod<PyEngine, decltype(in_place), py::object, int, double, double, std::string_view, int>::put_before(
        cls, "allreduce_in_place", in_place, arguments...);
  };
  with_fast("x"_a, "op"_a = sum, "prescale"_a = 1.0, "postscale"_a = 1.0, "name"_a = "", "process_set"_a = 0);
}

}  // namespace roundel::bind
