// From Python arguments to operations: one method for each call of roundel.Communicator. Nothing is started here; a wrong
// argument throws InvalidArgument before anything is changed. GIL.
#pragma once

#include <optional>
#include <string>

#include "bind/handle.h"

namespace roundel::bind {

using Rows = std::optional<std::vector<size_t>>;  // of dimension 0, by rank

struct Calls {
  std::shared_ptr<comm::Communicator> native;

  int rank() const { return native->world().rank; }
  int size() const { return native->world().size; }

  Call allreduce(const pybind11::object& x, int op, const pybind11::object& out, double prescale, double postscale,
                 const std::string& name, double timeout) const;
  Call grouped_allreduce(const pybind11::list& xs, int op, const pybind11::object& outs, double prescale, double postscale,
                         const std::string& name, double timeout) const;
  Call reduce(const pybind11::object& x, int root, int op, const pybind11::object& out, double prescale, double postscale,
              const std::string& name, double timeout) const;
  Call reduce_scatter(const pybind11::object& x, int op, const pybind11::object& out, const Rows& rows, double prescale,
                      double postscale, const std::string& name, double timeout) const;
  Call grouped_reduce_scatter(const pybind11::list& xs, int op, double prescale, double postscale, const std::string& name,
                              double timeout) const;
  Call allgather(const pybind11::object& x, const Rows& rows, const pybind11::object& out, const std::string& name,
                 double timeout) const;
  Call grouped_allgather(const pybind11::list& xs, const std::optional<std::vector<Rows>>& rows, const std::string& name,
                         double timeout) const;
  Call gather(const pybind11::object& x, int root, const Rows& rows, const pybind11::object& out, const std::string& name,
              double timeout) const;
  Call scatter(const pybind11::object& x, int root, const Rows& rows, const pybind11::object& out, const std::string& name,
               double timeout) const;
  Call broadcast(const pybind11::object& x, int root, const std::string& name, double timeout) const;
  // With `sends` alone, asks the other ranks how much they send, which blocks: not for asynchronous calls.
  Call alltoall(const pybind11::object& x, const pybind11::object& out, const Rows& sends, const Rows& receives,
                const std::string& name, double timeout) const;
  Call alltoall_async(const pybind11::object& x, const pybind11::object& out, const Rows& sends, const Rows& receives,
                      const std::string& name, double timeout) const;
  Call barrier(double timeout) const;
  // Throws what the collectives would throw at the sight of this array.
  void check_array(const pybind11::object& x) const;
  Call send(const pybind11::object& x, int dest, double timeout) const;
  Call recv(const pybind11::object& x, int source, double timeout) const;
  Call sendrecv(const pybind11::object& x, int dest, const pybind11::object& out, int source, double timeout) const;

 private:
  void check_alltoall(const pybind11::object& x, const pybind11::object& out, const Rows::value_type& sends) const;
  plan::Parts parts_of(const char* what, const Rows& rows, size_t even_rows, size_t row_elements) const;
};

}  // namespace roundel::bind
