// What `roundel info` shows: what this build and this machine have, or the reason why not.
#include "base/dynlib.h"
#include "base/env.h"
#include "base/fd.h"
#include "bind/bind.h"
#include "kernels/cuda.h"
#include "kernels/kernels.h"
#include "transport/mpi_library.h"

#include <pybind11/stl.h>

namespace py = pybind11;

namespace roundel::bind {
namespace {

// What a job started through MPI would use, unless its mpirun is of another family.
std::string mpi_status(const std::vector<std::string>& folders) {
  const DynLib library(transport::Mpi::candidates("", "", folders));
  if (!library.found()) return "not found: " + library.reason();
  const auto version = library.symbol<int(char*, int*)>("MPI_Get_library_version");
  if (version == nullptr) return library.name() + " has no MPI_Get_library_version";
  char text[8192] = {};
  int length = 0;
  version(text, &length);
  const std::string all(text);
  return library.name() + ": " + all.substr(0, all.find_first_of(",\n"));
}

std::string nccl_status() {
  const DynLib library({"libnccl.so.2"});
  if (!library.found()) return "not found: " + library.reason();
  int version = 0;
  const auto get = library.symbol<int(int*)>("ncclGetVersion");
  if (get == nullptr || get(&version) != 0) return library.name() + " does not tell its version";
  return library.name() + " " + std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

py::dict info(const std::vector<std::string>& folders) {
  py::dict rows;
  rows["transports"] = "shm, tcp, mpi";
  rows["isa"] = kernels::isa();
  rows["cuda"] = kernels::cuda_status();
  rows["mpi"] = mpi_status(folders);
  rows["nccl"] = nccl_status();
  return rows;
}

}  // namespace

void bind_info(py::module_& m) {
  m.def("info", &info, py::arg("folders") = std::vector<std::string>(),
        "What was built and found, as text by topic. folders: where MPI libraries may be, beside the loader's path.");
  m.def(
      "settings",
      [] {
        py::list rows;
        for (const env::Setting& setting : env::settings()) {
          py::list aliases;
          for (const env::Alias& alias : setting.aliases) aliases.append(alias.name);
          rows.append(py::make_tuple(setting.name, setting.fallback, setting.doc, aliases));
        }
        return rows;
      },
      "All settings: (name, default, doc, other libraries' names for it).");
  m.def("setting_bytes", &env::bytes, "The value of a setting that counts bytes.");
  m.def("in_forked_child", &in_forked_child, "True in a process that was forked from a rank.");
}

}  // namespace roundel::bind
