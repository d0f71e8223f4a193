#include "engine/request.h"

#include "engine/bytes.h"

namespace roundel::engine {

const char* name_of(Kind kind) {
  constexpr const char* names[kKinds] = {"allreduce", "allgather", "broadcast",       "alltoall",          "reducescatter",
                                         "barrier",   "join",      "add_process_set", "remove_process_set"};
  return names[static_cast<int>(kind)];
}

namespace {

void write_key(Kind kind, uint32_t set, std::string_view name, Writer& out) {
  out.number(set);
  out.number(kind);
  out.text(name);
}

}  // namespace

void encode_key(Kind kind, uint32_t set, std::string_view name, std::string& to) {
  Writer out(std::move(to));
  write_key(kind, set, name, out);
  to = out.take();
}

std::string_view key_of(std::string_view encoded) {
  Reader in(encoded);
  in.number<uint32_t>();
  in.number<Kind>();
  in.text();
  return encoded.substr(0, encoded.size() - in.rest().size());
}

void encode(const Request& request, std::string& to) {
  Writer out(std::move(to));
  write_key(request.kind, request.set, request.name, out);
  out.number(request.op);
  out.number(request.on_device);
  out.number(request.root);
  out.number(request.prescale);
  out.number(request.postscale);
  out.number(static_cast<uint32_t>(request.tensors.size()));
  for (const TensorSpec& tensor : request.tensors) {
    out.number(tensor.dtype);
    out.list(tensor.shape);
  }
  out.list(request.ranks);
  to = out.take();
}

Request decode(std::string_view encoded) {
  Reader in(encoded);
  Request request;
  request.set = in.number<uint32_t>();
  request.kind = in.number<Kind>();
  request.name = in.text();
  request.op = in.number<uint8_t>();
  request.on_device = in.number<bool>();
  request.root = in.number<int>();
  request.prescale = in.number<double>();
  request.postscale = in.number<double>();
  const auto tensors = in.number<uint32_t>();
  for (uint32_t i = 0; i < tensors; ++i) {
    TensorSpec& tensor = request.tensors.emplace_back();
    tensor.dtype = in.number<DType>();
    tensor.shape = in.list<int64_t>();
    if (static_cast<int>(tensor.dtype) >= kDTypes) throw CorruptFrame("a request of the engine has an unknown dtype");
  }
  request.ranks = in.list<int>();
  if (!in.done() || static_cast<int>(request.kind) >= kKinds) throw CorruptFrame("a request of the engine makes no sense");
  return request;
}

namespace {

std::string describe(const TensorSpec& tensor) {
  std::string text = std::string(name_of(tensor.dtype)) + " (";
  for (size_t d = 0; d < tensor.shape.size(); ++d)
    text += (d > 0 ? ", " : "") + (tensor.shape[d] < 0 ? std::string("any") : std::to_string(tensor.shape[d]));
  return text + (tensor.shape.size() == 1 ? ",)" : ")");
}

constexpr size_t kDescribed = 4;  // tensors of a group

}  // namespace

std::string describe(const Request& request) {
  std::string text = name_of(request.kind);
  for (size_t i = 0; i < request.tensors.size() && i < kDescribed; ++i)
    text += (i == 0 ? " of " : ", ") + describe(request.tensors[i]);
  if (request.tensors.size() > kDescribed) text += format(" and %zu more", request.tensors.size() - kDescribed);
  if (request.kind == Kind::AllReduce || request.kind == Kind::ReduceScatter)
    text += std::string(", ") + (request.op == kAdasum ? "adasum" : name_of(static_cast<ReduceOp>(request.op)));
  if (request.kind == Kind::Broadcast) text += format(", root %d", request.root);
  if (request.prescale != 1) text += format(", prescale %g", request.prescale);
  if (request.postscale != 1) text += format(", postscale %g", request.postscale);
  if (request.kind == Kind::AddSet) text += " of rank " + join_ranks(request.ranks);
  if (request.kind == Kind::RemoveSet) text += format(" %d", request.root);
  if (request.on_device) text += ", on a GPU";
  return text;
}

std::string title(const Request& request) { return std::string(name_of(request.kind)) + " '" + request.name + "'"; }

}  // namespace roundel::engine
