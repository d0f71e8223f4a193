#include "bind/calls.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <map>

#include "base/error.h"
#include "base/shape.h"
#include "bind/arrays.h"

namespace py = pybind11;

namespace roundel::bind {
namespace {

using comm::Operation;

// Grouped arrays below kAlone travel together, kTogether at most: above, packing costs more than an operation of its own.
constexpr size_t kAlone = 1u << 20, kTogether = 8u << 20;

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

Operation reducing(OpKind kind, int op, double prescale, double postscale, const std::string& name, double timeout) {
  Operation operation = named(kind, name, timeout);
  operation.op = to_op(op);
  operation.prescale = prescale;
  operation.postscale = postscale;
  return operation;
}

size_t total_of(const std::vector<size_t>& rows) {
  size_t total = 0;
  for (const size_t n : rows) total += n;
  return total;
}

size_t first_dimension(const Array& array, const char* what) {
  if (array.shape.empty()) throw InvalidArgument(std::string(what) + ": expected at least one dimension, got a scalar");
  return static_cast<size_t>(array.shape[0]);
}

// `out`, or a new array of `shape` like x.
py::object result_for(const py::object& out, const py::object& x, const Array& in, const std::vector<int64_t>& shape) {
  return out.is_none() ? empty_like(x, in, shape) : out;
}

Call finish_call(Operation&& operation, py::object result, Array&& in, Array&& out) {
  operation.in = in.view;
  operation.out = out.view;
  Call call{std::move(operation), std::move(result), {}};
  call.keep.reserve(2);
  call.keep.push_back(std::move(in.keep));
  call.keep.push_back(std::move(out.keep));
  return call;
}

// Calls under one handle, whose result is the list of theirs.
Call together(std::vector<Call> calls) {
  py::list results;
  Call whole;
  for (size_t i = 0; i < calls.size(); ++i) {
    results.append(calls[i].result);
    for (py::object& object : calls[i].keep) whole.keep.push_back(std::move(object));
    if (i == 0)
      whole.operation = std::move(calls[i].operation);
    else
      whole.more.push_back(std::move(calls[i].operation));
  }
  whole.result = std::move(results);
  return whole;
}

std::string member(const std::string& name, size_t i) { return name.empty() ? name : name + "[" + std::to_string(i) + "]"; }

// An empty array may have no address, but sending needs to be told from receiving.
View sendable(View view) {
  static char unused = 0;
  if (view.data == nullptr) view.data = &unused;
  return view;
}

}  // namespace

plan::Parts Calls::parts_of(const char* what, const Rows& rows, size_t even_rows, size_t row_elements) const {
  if (!rows && even_rows % static_cast<size_t>(size()) == 0)
    return plan::Parts::equal(even_rows / static_cast<size_t>(size()) * row_elements, size());
  if (rows && static_cast<int>(rows->size()) != size())
    throw InvalidArgument(
        format("rank %d: %s: expected one number for each of %d ranks, got %zu", rank(), what, size(), rows->size()));
  std::vector<size_t> counts;
  const plan::Parts even = plan::Parts::even(even_rows, size());
  for (int r = 0; r < size(); ++r) counts.push_back((rows ? (*rows)[static_cast<size_t>(r)] : even.count(r)) * row_elements);
  return plan::Parts::of(counts);
}

Call Calls::allreduce(const py::object& x, int op, const py::object& out, double prescale, double postscale,
                      const std::string& name, double timeout) const {
  Operation o = reducing(OpKind::AllReduce, op, prescale, postscale, name, timeout);
  Array in = to_array(x, out.is(x), "allreduce's input");
  py::object result = result_for(out, x, in, in.shape);
  Array to = result.is(x) ? Array{in.view, {}, {}} : to_array(result, true, "allreduce's out");
  o.shape = std::move(in.shape);
  return finish_call(std::move(o), std::move(result), std::move(in), std::move(to));
}

Call Calls::grouped_allreduce(const py::list& xs, int op, const py::object& outs, double prescale, double postscale,
                              const std::string& name, double timeout) const {
  if (xs.empty()) throw InvalidArgument(format("rank %d: grouped_allreduce: expected at least one array, got none", rank()));
  if (!outs.is_none() && py::len(outs) != xs.size())
    throw InvalidArgument(
        format("rank %d: grouped_allreduce's outs: expected %zu arrays, got %zu", rank(), xs.size(), py::len(outs)));
  std::vector<Call> alone;
  std::map<DType, Call> open;  // fused operations that still have room
  std::vector<Call> full;
  py::list results;
  for (size_t i = 0; i < xs.size(); ++i) {
    Call call = allreduce(xs[i], op, outs.is_none() ? py::none() : py::object(outs[py::int_(i)]), prescale, postscale,
                          member(name, i), timeout);
    results.append(call.result);
    if (call.operation.bytes() >= kAlone) {
      alone.push_back(std::move(call));
      continue;
    }
    const DType dtype = call.operation.in.dtype;
    auto fused = open.find(dtype);
    if (fused != open.end() && fused->second.operation.bytes() + call.operation.bytes() > kTogether) {
      full.push_back(std::move(fused->second));
      open.erase(fused);
      fused = open.end();
    }
    if (fused == open.end()) {
      fused = open.emplace(dtype, Call{reducing(OpKind::AllReduce, op, prescale, postscale, name, timeout), {}, {}}).first;
      fused->second.operation.in.dtype = fused->second.operation.out.dtype = dtype;
    }
    fused->second.operation.fuse(call.operation.in, call.operation.out, call.operation.shape, i);
    for (py::object& object : call.keep) fused->second.keep.push_back(std::move(object));
  }
  for (auto& [dtype, call] : open) full.push_back(std::move(call));
  for (Call& call : alone) full.push_back(std::move(call));
  for (Call& call : full)
    if (!call.result) call.result = py::none();
  Call whole = together(std::move(full));
  whole.result = std::move(results);
  return whole;
}

Call Calls::reduce(const py::object& x, int root, int op, const py::object& out, double prescale, double postscale,
                   const std::string& name, double timeout) const {
  Operation o = reducing(OpKind::Reduce, op, prescale, postscale, name, timeout);
  o.root = root;
  Array in = to_array(x, out.is(x) && rank() == root, "reduce's input");
  o.shape = in.shape;
  if (rank() != root) return finish_call(std::move(o), py::none(), std::move(in), {});
  py::object result = result_for(out, x, in, in.shape);
  Array to = result.is(x) ? in : to_array(result, true, "reduce's out");
  return finish_call(std::move(o), std::move(result), std::move(in), std::move(to));
}

Call Calls::reduce_scatter(const py::object& x, int op, const py::object& out, const Rows& rows, double prescale,
                           double postscale, const std::string& name, double timeout) const {
  Operation o = reducing(OpKind::ReduceScatter, op, prescale, postscale, name, timeout);
  Array in = to_array(x, false, "reduce_scatter's input");
  const size_t n = first_dimension(in, "reduce_scatter's input"), row = row_of(in.shape);
  if (rows && total_of(*rows) != n)
    throw InvalidArgument(format("rank %d: reduce_scatter's rows: expected a sum of %zu, got %zu", rank(), n, total_of(*rows)));
  o.parts = parts_of("reduce_scatter's rows", rows, n, row);
  const size_t mine = rows ? (*rows)[static_cast<size_t>(rank())] : plan::Parts::even(n, size()).count(rank());
  py::object result = result_for(out, x, in, with_rows(in.shape, mine));
  Array to = to_array(result, true, "reduce_scatter's out");
  return finish_call(std::move(o), std::move(result), std::move(in), std::move(to));
}

Call Calls::grouped_reduce_scatter(const py::list& xs, int op, double prescale, double postscale, const std::string& name,
                                   double timeout) const {
  if (xs.empty())
    throw InvalidArgument(format("rank %d: grouped_reduce_scatter: expected at least one array, got none", rank()));
  std::vector<Call> calls;
  for (size_t i = 0; i < xs.size(); ++i)
    calls.push_back(reduce_scatter(xs[i], op, py::none(), {}, prescale, postscale, member(name, i), timeout));
  return together(std::move(calls));
}

Call Calls::allgather(const py::object& x, const Rows& rows, const py::object& out, const std::string& name,
                      double timeout) const {
  Operation o = named(OpKind::AllGather, name, timeout);
  Array in = to_array(x, false, "allgather's input");
  std::vector<int64_t> shape = in.shape.empty() ? std::vector<int64_t>{1} : in.shape;  // scalars are gathered to a vector
  const size_t all_rows = rows ? total_of(*rows) : static_cast<size_t>(shape[0]) * static_cast<size_t>(size());
  o.parts = parts_of("allgather's rows", rows, all_rows, row_of(shape));
  py::object result = result_for(out, x, in, with_rows(shape, all_rows));
  Array to = to_array(result, true, "allgather's out");
  return finish_call(std::move(o), std::move(result), std::move(in), std::move(to));
}

Call Calls::grouped_allgather(const py::list& xs, const std::optional<std::vector<Rows>>& rows, const std::string& name,
                              double timeout) const {
  if (xs.empty()) throw InvalidArgument(format("rank %d: grouped_allgather: expected at least one array, got none", rank()));
  if (rows && rows->size() != xs.size())
    throw InvalidArgument(
        format("rank %d: grouped_allgather's rows: expected %zu lists, got %zu", rank(), xs.size(), rows->size()));
  std::vector<Call> calls;
  for (size_t i = 0; i < xs.size(); ++i)
    calls.push_back(allgather(xs[i], rows ? (*rows)[i] : Rows{}, py::none(), member(name, i), timeout));
  return together(std::move(calls));
}

Call Calls::gather(const py::object& x, int root, const Rows& rows, const py::object& out, const std::string& name,
                   double timeout) const {
  Operation o = named(OpKind::Gather, name, timeout);
  o.root = root;
  Array in = to_array(x, false, "gather's input");
  std::vector<int64_t> shape = in.shape.empty() ? std::vector<int64_t>{1} : in.shape;
  const size_t all_rows = rows ? total_of(*rows) : static_cast<size_t>(shape[0]) * static_cast<size_t>(size());
  o.parts = parts_of("gather's rows", rows, all_rows, row_of(shape));
  if (rank() != root) return finish_call(std::move(o), py::none(), std::move(in), {});
  py::object result = result_for(out, x, in, with_rows(shape, all_rows));
  Array to = to_array(result, true, "gather's out");
  return finish_call(std::move(o), std::move(result), std::move(in), std::move(to));
}

Call Calls::scatter(const py::object& x, int root, const Rows& rows, const py::object& out, const std::string& name,
                    double timeout) const {
  Operation o = named(OpKind::Scatter, name, timeout);
  o.root = root;
  if (rank() != root) {
    if (out.is_none())
      throw InvalidArgument(format("rank %d: scatter: expected `out` on ranks other than root %d, got none", rank(), root));
    Array to = to_array(out, true, "scatter's out");
    const size_t n = first_dimension(to, "scatter's out");
    o.parts = parts_of("scatter's rows", rows, n * static_cast<size_t>(size()), row_of(to.shape));
    return finish_call(std::move(o), out, {}, std::move(to));
  }
  Array in = to_array(x, false, "scatter's input");
  const size_t n = first_dimension(in, "scatter's input");
  if (rows ? total_of(*rows) != n : n % static_cast<size_t>(size()) != 0)
    throw InvalidArgument(format("rank %d: scatter's input: expected %s rows, got %zu", rank(),
                                 rows ? std::to_string(total_of(*rows)).c_str() : "a number divisible by the ranks of", n));
  o.parts = parts_of("scatter's rows", rows, n, row_of(in.shape));
  const size_t mine = rows ? (*rows)[static_cast<size_t>(rank())] : n / static_cast<size_t>(size());
  py::object result = result_for(out, x, in, with_rows(in.shape, mine));
  Array to = to_array(result, true, "scatter's out");
  return finish_call(std::move(o), std::move(result), std::move(in), std::move(to));
}

Call Calls::broadcast(const py::object& x, int root, const std::string& name, double timeout) const {
  Operation o = named(OpKind::Broadcast, name, timeout);
  o.root = root;
  Array array = to_array(x, rank() != root, "broadcast's array");
  o.shape = std::move(array.shape);
  Array same{array.view, {}, {}};
  return finish_call(std::move(o), x, std::move(array), std::move(same));
}

void Calls::check_array(const py::object& x) const {
  const Array array = to_array(x, false, "the array");
  std::vector<int64_t> shape = array.shape;
  if (!shape.empty()) shape[0] = 0;
  empty_like(x, array, shape);  // not every array has a library that can make another one
}

void Calls::check_alltoall(const py::object& x, const py::object& out, const Rows::value_type& sends) const {
  const Array in = to_array(x, false, "alltoall's input");
  const size_t n = first_dimension(in, "alltoall's input");
  parts_of("alltoall's splits", sends, 0, 1);
  if (total_of(sends) != n)
    throw InvalidArgument(format("rank %d: alltoall's splits: expected a sum of %zu, got %zu", rank(), n, total_of(sends)));
  const Array to = to_array(result_for(out, x, in, with_rows(in.shape, 0)), true, "alltoall's out");
  if (in.view.dtype != to.view.dtype)
    throw InvalidArgument(format("rank %d: alltoall: expected input and output of one dtype, got %s and %s", rank(),
                                 name_of(in.view.dtype), name_of(to.view.dtype)));
  if (in.view.at(0) < to.view.at(to.view.count) && to.view.at(0) < in.view.at(in.view.count))
    throw InvalidArgument(format("rank %d: alltoall: input and output overlap; expected them apart", rank()));
}

Call Calls::alltoall(const py::object& x, const py::object& out, const Rows& sends, const Rows& receives,
                     const std::string& name, double timeout) const {
  if (!sends || receives) return alltoall_async(x, out, sends, receives, name, timeout);
  // All that can be refused here is refused before the others are asked: they would wait for this rank's part.
  check_alltoall(x, out, *sends);
  std::vector<int64_t> theirs(static_cast<size_t>(size())), ours(sends->begin(), sends->end());
  Operation o = named(OpKind::AllToAll, name.empty() ? "alltoall: splits" : "alltoall: splits (" + name + ")", timeout);
  o.parts = plan::Parts::even(ours.size(), size());
  o.in = {ours.data(), ours.size(), DType::Int64};
  o.out = {theirs.data(), theirs.size(), DType::Int64};
  {
    const py::gil_scoped_release unlocked;
    native->run(std::move(o));
  }
  const Rows come = std::vector<size_t>(theirs.begin(), theirs.end());
  if (out.is_none()) return alltoall_async(x, out, sends, come, name, timeout);
  const size_t expected = total_of(*come) * row_of(to_array(x, false, "alltoall's input").shape);
  const size_t room = to_array(out, true, "alltoall's out").view.count;
  if (room == expected) return alltoall_async(x, out, sends, come, name, timeout);
  // Known only now, when the others are on their way: they get their parts, and what came from them is dropped.
  Call dropped = alltoall_async(x, py::none(), sends, come, name, timeout);
  {
    const py::gil_scoped_release unlocked;
    native->run(std::move(dropped.operation));
  }
  throw InvalidArgument(format("rank %d: alltoall's out: expected %zu elements, got %zu", rank(), expected, room));
}

Call Calls::alltoall_async(const py::object& x, const py::object& out, const Rows& sends, const Rows& receives,
                           const std::string& name, double timeout) const {
  Operation o = named(sends ? OpKind::AllToAllV : OpKind::AllToAll, name, timeout);
  Array in = to_array(x, false, "alltoall's input");
  const size_t n = first_dimension(in, "alltoall's input"), row = row_of(in.shape);
  size_t rows = n;
  if (sends) {
    if (!receives)
      throw InvalidArgument(format("rank %d: alltoall_async with splits: expected received_splits too, got none", rank()));
    if (total_of(*sends) != n)
      throw InvalidArgument(format("rank %d: alltoall's splits: expected a sum of %zu, got %zu", rank(), n, total_of(*sends)));
    rows = total_of(*receives);
    o.sends = parts_of("alltoall's splits", sends, 0, row);
    o.parts = parts_of("alltoall's received_splits", receives, 0, row);
  } else {
    if (n % static_cast<size_t>(size()) != 0)
      throw InvalidArgument(
          format("rank %d: alltoall's input: expected a first dimension divisible by %d ranks, got %zu", rank(), size(), n));
    o.parts = plan::Parts::even(in.view.count, size());
  }
  py::object result = result_for(out, x, in, with_rows(in.shape, rows));
  Array to = to_array(result, true, "alltoall's out");
  return finish_call(std::move(o), std::move(result), std::move(in), std::move(to));
}

Call Calls::barrier(double timeout) const { return {named(OpKind::Barrier, "", timeout), py::none(), {}}; }

Call Calls::send(const py::object& x, int dest, double timeout) const {
  Operation o = named(OpKind::PointToPoint, "", timeout);
  o.root = dest;
  Array in = to_array(x, false, "send's array");
  o.in = sendable(in.view);
  return {std::move(o), py::none(), {std::move(in.keep)}};
}

Call Calls::recv(const py::object& x, int source, double timeout) const {
  Operation o = named(OpKind::PointToPoint, "", timeout);
  o.root = source;
  Array out = to_array(x, true, "recv's array");
  o.out = out.view;
  return {std::move(o), x, {std::move(out.keep)}};
}

Call Calls::sendrecv(const py::object& x, int dest, const py::object& out, int source, double timeout) const {
  Call whole = recv(out, source, timeout);
  Call sending = send(x, dest, timeout);
  whole.more.push_back(std::move(sending.operation));
  whole.keep.push_back(std::move(sending.keep[0]));
  return whole;
}

}  // namespace roundel::bind
