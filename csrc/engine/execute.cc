#include "engine/execute.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <tuple>

#include "base/error.h"
#include "base/shape.h"
#include "engine/timeline.h"

namespace roundel::engine {
namespace {

using comm::Operation;

constexpr size_t kAlone = 1u << 20;  // bytes of a tensor: above, packing costs more than an operation of its own

Operation operation_for(OpKind kind, const Request& request) {
  Operation o;
  o.kind = kind;
  o.name = request.name;
  o.prescale = request.prescale;
  o.postscale = request.postscale;
  if (request.op < kReduceOps) o.op = static_cast<ReduceOp>(request.op);
  return o;
}

bool goes_with(const Operation& o, const Request& request, DType dtype) {
  return o.op == static_cast<ReduceOp>(request.op) && o.prescale == request.prescale && o.postscale == request.postscale &&
         o.in.dtype == dtype;
}

template <class T>
void fill(const View& view, T value) {
  std::fill_n(static_cast<T*>(view.data), view.count, value);
}

template <class T>
T extreme(ReduceOp op) {
  using Limits = std::numeric_limits<T>;
  if constexpr (Limits::has_infinity) return op == ReduceOp::Max ? -Limits::infinity() : Limits::infinity();
  return op == ReduceOp::Max ? Limits::lowest() : Limits::max();
}

// What changes nothing when it is reduced with anything.
void fill_neutral(const View& view, ReduceOp op) {
  if (view.count == 0) return;
  std::memset(view.data, 0, view.bytes());
  if (op == ReduceOp::Sum || op == ReduceOp::Average) return;
  const bool product = op == ReduceOp::Product, max = op == ReduceOp::Max;
  switch (view.dtype) {
    case DType::Float32:
      return fill<float>(view, product ? 1 : extreme<float>(op));
    case DType::Float64:
      return fill<double>(view, product ? 1 : extreme<double>(op));
    case DType::Float16:
      return fill<uint16_t>(view, product ? 0x3C00 : max ? 0xFC00 : 0x7C00);
    case DType::BFloat16:
      return fill<uint16_t>(view, product ? 0x3F80 : max ? 0xFF80 : 0x7F80);
    case DType::Int8:
      return fill<int8_t>(view, product ? 1 : extreme<int8_t>(op));
    case DType::Int16:
      return fill<int16_t>(view, product ? 1 : extreme<int16_t>(op));
    case DType::Int32:
      return fill<int32_t>(view, product ? 1 : extreme<int32_t>(op));
    case DType::Int64:
      return fill<int64_t>(view, product ? 1 : extreme<int64_t>(op));
    case DType::UInt8:
      return fill<uint8_t>(view, product ? 1 : extreme<uint8_t>(op));
    case DType::Bool:
      return fill<uint8_t>(view, max ? 0 : 1);
  }
}

Output make_output(DType dtype, std::vector<int64_t> shape) {
  Output output;
  output.data.reset(new std::byte[std::max<size_t>(1, count_of(shape) * size_of(dtype))]);
  output.dtype = dtype;
  output.shape = std::move(shape);
  return output;
}

View view_of(const Output& output) { return {output.data.get(), count_of(output.shape), output.dtype}; }

std::vector<size_t> times(std::vector<size_t> rows, size_t row) {
  for (size_t& n : rows) n *= row;
  return rows;
}

}  // namespace

void Executor::run(std::vector<Work>& works) {
  for (Work& work : works) {
    if (work.request().kind == Kind::AllReduce && work.request().op != kAdasum) {
      add_allreduce(work);
      continue;
    }
    flush_all();
    const auto begin = Clock::now();
    carry_out(work);
    const auto end = Clock::now();
    size_t bytes = 0;
    for (const View& view : work.buffers != nullptr ? work.buffers->in : std::vector<View>{}) bytes += view.bytes();
    stats_.executed(static_cast<int>(work.request().kind), work.request().tensors.size(), bytes, begin - work.agreed,
                    end - begin);
    note(work, bytes, begin, end);
    Work* const done = &work;
    done_({&done, 1});
  }
  flush_all();
  scratch_.clear();
}

void Executor::carry_out(Work& work) {
  switch (work.request().kind) {
    case Kind::AllReduce:
      return run_adasum(work);
    case Kind::AllGather:
      return allgather(work);
    case Kind::Broadcast:
      return broadcast(work);
    case Kind::AllToAll:
      return alltoall(work);
    case Kind::ReduceScatter:
      return reduce_scatter(work);
    default:
      return;  // a barrier is over when it is announced
  }
}

// Into the timeline.
void Executor::note(const Work& work, size_t bytes, Clock::time_point begin, Clock::time_point end) const {
  Timeline& timeline = Timeline::instance();
  if (!timeline.on() || work.ticket == nullptr) return;
  Details details;
  details.bytes = bytes;
  if (!work.request().tensors.empty()) details.dtype = name_of(work.request().tensors.front().dtype);
  details.how = comm_->name();
  timeline.span(work.request().name, "queue", work.agreed, begin);
  timeline.span(work.request().name, name_of(work.request().kind), begin, end, details);
}

std::byte* Executor::scratch(size_t bytes) { return scratch_.emplace_back(new std::byte[std::max<size_t>(1, bytes)]).get(); }

// Of a rank that has joined.
View Executor::neutral(const Request& request, size_t tensor) {
  const TensorSpec& spec = request.tensors[tensor];
  const size_t count = count_of(spec.shape);
  const View view{scratch(count * size_of(spec.dtype)), count, spec.dtype};
  fill_neutral(view, request.op < kReduceOps ? static_cast<ReduceOp>(request.op) : ReduceOp::Sum);
  return view;
}

std::pair<View, View> Executor::views_of(const Work& work, size_t tensor) {
  if (work.buffers != nullptr) return {work.buffers->in[tensor], work.buffers->out[tensor]};
  const View view = neutral(work.request(), tensor);
  return {view, view};
}

void Executor::add_allreduce(Work& work) {
  const std::vector<TensorSpec>& tensors = work.request().tensors;
  work.parts_left = tensors.size();
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto [in, out] = views_of(work, i);
    const bool alone = in.bytes() >= kAlone || in.bytes() > fusion_bytes_;
    const auto fits = [&, dtype = in.dtype](const Fused& open) { return goes_with(open.operation, work.request(), dtype); };
    auto fused = alone ? open_.end() : std::find_if(open_.begin(), open_.end(), fits);
    if (fused != open_.end() && fused->operation.bytes() + in.bytes() > fusion_bytes_) {
      flush(*fused);
      open_.erase(fused);
      fused = open_.end();
    }
    if (fused == open_.end()) {
      Fused begun;
      begun.operation = operation_for(OpKind::AllReduce, work.request());
      begun.operation.in = in;
      begun.operation.out = out;
      begun.operation.shape = tensors[i].shape;
      begun.works.push_back(&work);
      if (alone)
        flush(begun);
      else
        open_.push_back(std::move(begun));
      continue;
    }
    if (fused->works.size() == 1) {  // no longer alone: the first becomes a member too
      const Operation first = std::move(fused->operation);
      fused->operation = operation_for(OpKind::AllReduce, fused->works.front()->request());
      fused->operation.in.dtype = fused->operation.out.dtype = first.in.dtype;
      fused->operation.fuse(first.in, first.out, first.shape, 0);
    }
    fused->operation.fuse(in, out, tensors[i].shape, fused->works.size());
    fused->works.push_back(&work);
  }
  Work* const done = &work;
  if (tensors.empty()) done_({&done, 1});
}

void Executor::flush(Fused& fused) {
  comm::Operation& operation = fused.operation;
  comm::Phases phases;
  if (fused.works.size() > 1) operation.name += format(" and %zu more", fused.works.size() - 1);
  operation.phases = &phases;
  Details details;
  details.bytes = operation.bytes();
  details.dtype = name_of(operation.in.dtype);
  details.how = comm_->name();
  details.fused = fused.works.size();
  const auto begin = Clock::now();
  comm_->run(std::move(operation));
  const auto end = Clock::now();
  if (details.fused == 1) phases = {begin, begin, end, end};

  Clock::duration queued{};
  for (const Work* work : fused.works) queued += begin - work->agreed;
  stats_.executed(static_cast<int>(Kind::AllReduce), details.fused, details.bytes, queued, end - begin);
  Timeline& timeline = Timeline::instance();
  for (Work* work : fused.works) {
    if (timeline.on() && work->ticket != nullptr) {
      timeline.span(work->request().name, "queue", work->agreed, begin);
      if (details.fused > 1) timeline.span(work->request().name, "memcpy_in", phases.pack, phases.exchange);
      timeline.span(work->request().name, name_of(Kind::AllReduce), phases.exchange, phases.unpack, details);
      if (details.fused > 1) timeline.span(work->request().name, "memcpy_out", phases.unpack, phases.end);
    }
  }
  std::erase_if(fused.works, [](Work* work) { return --work->parts_left > 0; });
  done_(fused.works);
}

void Executor::flush_all() {
  for (Fused& fused : open_) flush(fused);
  open_.clear();
}

// Tensors of one dtype at once.
void Executor::run_adasum(Work& work) {
  std::map<DType, std::vector<std::pair<View, View>>> by_dtype;
  for (size_t i = 0; i < work.request().tensors.size(); ++i)
    by_dtype[work.request().tensors[i].dtype].push_back(views_of(work, i));
  for (const auto& [dtype, tensors] : by_dtype)
    adasum_.run(tensors, work.request().prescale, work.request().postscale, work.request().name);
}

// First every rank tells how many rows it has.
void Executor::allgather(Work& work) {
  const auto size = static_cast<size_t>(comm_->world().size), rank = static_cast<size_t>(comm_->world().rank);
  const std::vector<TensorSpec>& tensors = work.request().tensors;
  std::vector<int64_t> rows(size * tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i)
    rows[rank * tensors.size() + i] = work.buffers != nullptr ? static_cast<int64_t>(work.buffers->rows[i]) : 0;
  Operation tell = operation_for(OpKind::AllGather, work.request());
  tell.parts = plan::Parts::equal(tensors.size(), comm_->world().size);
  tell.in = {&rows[rank * tensors.size()], tensors.size(), DType::Int64};
  tell.out = {rows.data(), rows.size(), DType::Int64};
  comm_->run(std::move(tell));
  for (size_t i = 0; i < tensors.size(); ++i) {
    std::vector<size_t> of_rank(size);
    for (size_t r = 0; r < size; ++r) of_rank[r] = static_cast<size_t>(rows[r * tensors.size() + i]);
    Operation o = operation_for(OpKind::AllGather, work.request());
    o.parts = plan::Parts::of(times(of_rank, row_of(tensors[i].shape)));
    size_t total = 0;
    for (const size_t n : of_rank) total += n;
    Output output = make_output(tensors[i].dtype, with_rows(tensors[i].shape, total));
    o.in = work.buffers != nullptr ? work.buffers->in[i] : View{scratch(0), 0, tensors[i].dtype};
    o.out = view_of(output);
    comm_->run(std::move(o));
    if (work.ticket != nullptr) work.ticket->outputs.push_back(std::move(output));
  }
}

void Executor::broadcast(Work& work) {
  const std::vector<int>& members = comm_->world().members;
  for (size_t i = 0; i < work.request().tensors.size(); ++i) {
    Operation o = operation_for(OpKind::Broadcast, work.request());
    o.root = static_cast<int>(std::find(members.begin(), members.end(), work.request().root) - members.begin());
    std::tie(o.in, o.out) = views_of(work, i);
    o.shape = work.request().tensors[i].shape;
    comm_->run(std::move(o));
  }
}

// First every rank tells every other how many rows come.
void Executor::alltoall(Work& work) {
  const auto size = static_cast<size_t>(comm_->world().size);
  const TensorSpec& tensor = work.request().tensors.front();
  const size_t row = row_of(tensor.shape);
  std::vector<size_t> sends = work.buffers != nullptr ? work.buffers->splits : std::vector<size_t>(size);
  std::vector<int64_t> ours(sends.begin(), sends.end()), theirs(size);
  Operation tell = operation_for(OpKind::AllToAll, work.request());
  tell.parts = plan::Parts::equal(1, comm_->world().size);
  tell.in = {ours.data(), size, DType::Int64};
  tell.out = {theirs.data(), size, DType::Int64};
  comm_->run(std::move(tell));

  const std::vector<size_t> receives(theirs.begin(), theirs.end());
  size_t total = 0;
  for (const size_t n : receives) total += n;
  Output output = make_output(tensor.dtype, with_rows(tensor.shape, total));
  Operation o = operation_for(OpKind::AllToAllV, work.request());
  o.sends = plan::Parts::of(times(sends, row));
  o.parts = plan::Parts::of(times(receives, row));
  o.in = work.buffers != nullptr ? work.buffers->in[0] : View{scratch(0), 0, tensor.dtype};
  o.out = view_of(output);
  comm_->run(std::move(o));
  if (work.ticket == nullptr) return;
  work.ticket->outputs.push_back(std::move(output));
  work.ticket->received = receives;
}

void Executor::reduce_scatter(Work& work) {
  const int size = comm_->world().size, rank = comm_->world().rank;
  for (size_t i = 0; i < work.request().tensors.size(); ++i) {
    const TensorSpec& tensor = work.request().tensors[i];
    const plan::Parts rows = plan::Parts::even(static_cast<size_t>(tensor.shape[0]), size);
    std::vector<size_t> counts;
    for (int r = 0; r < size; ++r) counts.push_back(rows.count(r) * row_of(tensor.shape));
    Operation o = operation_for(OpKind::ReduceScatter, work.request());
    o.parts = plan::Parts::of(counts);
    Output output = make_output(tensor.dtype, with_rows(tensor.shape, rows.count(rank)));
    o.in = work.buffers != nullptr ? work.buffers->in[i] : neutral(work.request(), i);
    o.out = view_of(output);
    comm_->run(std::move(o));
    if (work.ticket != nullptr) work.ticket->outputs.push_back(std::move(output));
  }
}

}  // namespace roundel::engine
