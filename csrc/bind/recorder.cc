// roundel.flight_record(): the flight recorder's entries as dictionaries; and the names of the failpoints.
#include "base/recorder.h"

#include "base/failpoint.h"
#include "bind/bind.h"

namespace py = pybind11;

namespace roundel::bind {
namespace {

py::list flight_record() {
  py::list rows;
  for (const recorder::Entry& e : recorder::entries()) {
    py::dict row;
    row["number"] = e.number;
    row["sequence"] = e.sequence;
    row["epoch"] = e.epoch;
    row["group"] = e.group;
    row["kind"] = name_of(e.signature.kind);
    row["what"] = to_str(e.signature.describe());
    row["name"] = to_str(e.name);
    row["dtype"] = name_of(e.signature.dtype);
    row["bytes"] = e.bytes;
    row["queued"] = e.queued;
    row["started"] = e.started;
    row["finished"] = e.finished;
    row["state"] = recorder::name_of(e.state);
    py::list ranks;
    for (const int r : e.waiting_for) ranks.append(r);
    row["waiting_for"] = ranks;
    rows.append(row);
  }
  return rows;
}

}  // namespace

void bind_recorder(py::module_& m) {
  m.def("flight_record", &flight_record,
        "The last 256 operations of this process, oldest first, as dictionaries: number, sequence, epoch, group, kind, what, "
        "name, "
        "dtype, bytes,\nqueued, started, finished (seconds since 1970, 0 for not yet), state (queued, running, done, failed), "
        "waiting_for (ranks).");
  m.def(
      "write_flight_record",
      [](const std::string& prefix, int rank, int size, const std::string& why) { recorder::write(prefix, rank, size, why); },
      py::arg("prefix"), py::arg("rank"), py::arg("size"), py::arg("why") = "asked for",
      "Write the record to PREFIX.rank<rank>.json, for `roundel flight`.");
  m.def(
      "failpoints",
      [] {
        py::list all;
        for (const std::string& name : failpoint::names()) all.append(name);
        return all;
      },
      "Names of the points that ROUNDEL_FAILPOINT may name.");
}

}  // namespace roundel::bind
