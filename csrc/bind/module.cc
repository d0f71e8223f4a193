#include "bind/bind.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "Roundel's native core; use the roundel package.";
  roundel::bind::bind_errors(m);
  roundel::bind::bind_mpi(m);
  roundel::bind::bind_comm(m);
  roundel::bind::bind_engine(m);
  roundel::bind::bind_info(m);
  roundel::bind::bind_optim(m);
  roundel::bind::bind_recorder(m);
}
