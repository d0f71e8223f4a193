// What python/roundel/launch needs of MPI before there is a communicator: the library, its ranks, their texts; and this host's
// addresses, one of which they are told.
#include "base/dynlib.h"
#include "bind/bind.h"
#include "transport/interface.h"
#include "transport/mpi_job.h"

#include <pybind11/stl.h>

namespace py = pybind11;
using namespace pybind11::literals;

namespace roundel::bind {
namespace {

std::shared_ptr<transport::MpiJob> join(const std::string& family, const std::string& opener,
                                        const std::vector<std::string>& folders, uintptr_t comm_address, double seconds) {
  auto library = transport::Mpi::open(family, opener, folders);
  return std::make_shared<transport::MpiJob>(std::move(library), comm_address, seconds);
}

// Whether MPI can be used by this process as it is; the threads that it was initialized for.
py::object state() {
  if (transport::Mpi::opened() == nullptr && DynLib::loaded({"libmpi.so", "libmpi_abi.so"}).empty()) return py::none();
  const auto mpi = transport::Mpi::open("", "", {});
  if (!mpi->initialized() || mpi->finalized()) return py::none();
  return py::str(name_of(mpi->threads()));
}

}  // namespace

void bind_mpi(py::module_& m) {
  py::class_<transport::MpiJob, std::shared_ptr<transport::MpiJob>>(m, "MpiJob", "A job's ranks as MPI knows them.")
      .def(py::init(&join), "family"_a = "", "opener"_a = "", "folders"_a = std::vector<std::string>(), "comm_address"_a = 0,
           "seconds"_a = 60.0, py::call_guard<py::gil_scoped_release>(),
           "Open the MPI library, initialize MPI unless somebody has, and duplicate the communicator whose handle is at this "
           "address, or MPI_COMM_WORLD. All its ranks call this.")
      .def_property_readonly("rank", &transport::MpiJob::rank)
      .def_property_readonly("size", &transport::MpiJob::size)
      .def_property_readonly("carries_data", &transport::MpiJob::carries_data,
                             "Whether MPI was initialized for calls from several threads, at least one at a time.")
      .def_property_readonly("threads", [](const transport::MpiJob& job) { return std::string(name_of(job.mpi().threads())); })
      .def("describe", &transport::MpiJob::describe, "Version, file, ABI and threads.")
      .def("gather", &transport::MpiJob::gather, "text"_a, "seconds"_a = 60.0, py::call_guard<py::gil_scoped_release>(),
           "Every rank's text, on every rank.");
  m.def("mpi_threads", &state, "The thread level of the MPI library in use, such as 'MPI_THREAD_MULTIPLE', or None.");
  m.def("finish_mpi", &transport::finish_mpi, "seconds"_a = 5.0, py::call_guard<py::gil_scoped_release>(),
        "Finalize MPI at the end of the process, if it was initialized here and all ranks come to their end.");
  m.def(
      "addresses",
      [] {
        py::list rows;
        for (const transport::Interface& each : transport::interfaces())
          rows.append(py::make_tuple(each.name, each.text, each.prefix));
        return rows;
      },
      "This host's interfaces that are up: (name, address, bits of its network).");
}

}  // namespace roundel::bind
