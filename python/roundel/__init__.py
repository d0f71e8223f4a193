"""Roundel: collective communication for training. A roundel is a dance in a ring.

    import numpy as np, roundel
    roundel.init()
    roundel.allreduce(np.ones(4), op=roundel.Sum)

Start it with `roundelrun -np 2 python script.py`. Horovod's API for torch is `import roundel.torch as hvd`.
"""

from importlib.metadata import version as _version

from roundel._core import Communicator, Handle, flight_record
from roundel.collectives import (
    allgather,
    allreduce,
    alltoall,
    barrier,
    broadcast,
    gather,
    grouped_allreduce,
    reduce,
    reduce_scatter,
    scatter,
)
from roundel.errors import (
    CorruptFrameError,
    DuplicateNameError,
    FencedError,
    HandshakeError,
    HorovodInternalError,
    HostsUpdatedInterrupt,
    InvalidArgumentError,
    MismatchError,
    PeerLostError,
    RoundelError,
    TimeoutError,
)
from roundel.ops import Adasum, Average, Max, Min, Product, ReduceOp, Sum
from roundel.process_sets import ProcessSet, add_process_set, global_process_set, remove_process_set
from roundel.start import init
from roundel.world import (
    communicator,
    cross_rank,
    cross_size,
    is_initialized,
    local_rank,
    local_size,
    rank,
    shutdown,
    size,
)

__version__ = _version("roundel")

__all__ = [
    "Adasum",
    "Average",
    "Communicator",
    "CorruptFrameError",
    "DuplicateNameError",
    "FencedError",
    "Handle",
    "HandshakeError",
    "HorovodInternalError",
    "HostsUpdatedInterrupt",
    "InvalidArgumentError",
    "Max",
    "Min",
    "MismatchError",
    "PeerLostError",
    "ProcessSet",
    "Product",
    "ReduceOp",
    "RoundelError",
    "Sum",
    "TimeoutError",
    "add_process_set",
    "allgather",
    "allreduce",
    "alltoall",
    "barrier",
    "broadcast",
    "communicator",
    "cross_rank",
    "cross_size",
    "flight_record",
    "gather",
    "global_process_set",
    "grouped_allreduce",
    "init",
    "is_initialized",
    "local_rank",
    "local_size",
    "rank",
    "reduce",
    "reduce_scatter",
    "remove_process_set",
    "scatter",
    "shutdown",
    "size",
]
