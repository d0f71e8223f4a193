// An MPI library opened at run time, whichever ABI it has: MPICH's (and Intel MPI's), Open MPI's or the standard one. Nothing
// of it is known when Roundel is built.
//
// Handles are ints in one ABI and pointers in the others; here they are numbers. Every call throws Error with MPI's own words
// when MPI refuses it. Threads: any, one at a time where the library was not initialized for several (calls are serialized).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/signature.h"

namespace roundel::transport {

enum class MpiThreads { Single, Funneled, Serialized, Multiple };
const char* name_of(MpiThreads threads);

class Mpi {
 public:
  using Comm = uintptr_t;
  using Request = uintptr_t;
  virtual ~Mpi() = default;

  // Where the library is looked for: what ROUNDEL_MPI_LIBRARY names, else `opener` (a module that is linked with it), else what
  // the process has loaded already, else the names that `family` ("openmpi", "mpich" or "") suggests, in `folders` and on the
  // loader's path.
  static std::vector<std::string> candidates(const std::string& family, const std::string& opener,
                                             const std::vector<std::string>& folders);
  // The process's one MPI library, the first of these that can be opened. Throws Error saying what was tried.
  static std::shared_ptr<Mpi> open(const std::string& family, const std::string& opener,
                                   const std::vector<std::string>& folders);
  // What open() has found before, or nullptr.
  static std::shared_ptr<Mpi> opened();

  virtual const std::string& path() const = 0;
  virtual std::string version() const = 0;  // its own words, first line
  virtual const char* abi() const = 0;      // "MPICH", "Open MPI" or "standard"

  virtual bool initialized() const = 0;
  virtual bool finalized() const = 0;
  // Unless somebody has: asks for Multiple. True when this call did it.
  virtual bool initialize() = 0;
  virtual MpiThreads threads() const = 0;
  virtual void finalize() = 0;

  virtual Comm world() const = 0;
  virtual Comm comm_at(uintptr_t address) const = 0;  // of a handle in memory, such as mpi4py's
  virtual int rank(Comm comm) const = 0;
  virtual int size(Comm comm) const = 0;
  virtual int highest_tag(Comm comm) const = 0;

  // Messages of bytes. Requests are tested one by one: arrays of them differ between ABIs.
  virtual Request send(Comm comm, int peer, int tag, const void* data, size_t bytes) = 0;
  // Done when its receive has begun.
  virtual Request send_when_received(Comm comm, int peer, int tag, const void* data, size_t bytes) = 0;
  virtual Request receive(Comm comm, int peer, int tag, void* data, size_t bytes) = 0;
  virtual Request duplicate(Comm comm, Comm* made) = 0;  // `made` must stay where it is until the request is done
  virtual Request barrier(Comm comm) = 0;
  // MPI's own all-reduce, in place; only of what has_type() and has_op().
  virtual Request allreduce(Comm comm, void* data, size_t count, DType dtype, ReduceOp op) = 0;
  virtual bool can_reduce(DType dtype, ReduceOp op) const = 0;
  virtual bool test(Request& request) = 0;
  virtual void cancel(Request& request) = 0;
};

}  // namespace roundel::transport
