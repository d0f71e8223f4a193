#include "base/signature.h"

#include "base/error.h"

namespace roundel {

const char* name_of(OpKind kind) {
  constexpr const char* names[kOpKinds] = {"all-reduce", "reduce-scatter", "all-gather", "broadcast", "all-to-all",  "barrier",
                                           "send/recv",  "reduce",         "gather",     "scatter",   "all-to-all-v"};
  return static_cast<int>(kind) < kOpKinds ? names[static_cast<int>(kind)] : "unknown operation";
}

std::string Signature::describe() const {
  if (kind == OpKind::Barrier) return name_of(kind);
  const char* type = static_cast<int>(dtype) < kDTypes ? name_of(dtype) : "unknown dtype";
  std::string text = format("%s of %llu %s", name_of(kind), static_cast<unsigned long long>(count), type);
  if (reduces(kind)) text += std::string(", ") + (static_cast<int>(op) < kReduceOps ? name_of(op) : "unknown op");
  if (has_root(kind)) text += format(", root %d", root);
  return text + format(" [name, shape, scale and parts hash %04x, plan %d]", salt, algorithm);
}

}  // namespace roundel
