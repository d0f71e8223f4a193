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
    FencedError,
    HandshakeError,
    InvalidArgumentError,
    MismatchError,
    PeerLostError,
    RoundelError,
    TimeoutError,
)
from roundel.ops import Average, Max, Min, Product, ReduceOp, Sum
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
    "Average",
    "Communicator",
    "CorruptFrameError",
    "FencedError",
    "Handle",
    "HandshakeError",
    "InvalidArgumentError",
    "Max",
    "Min",
    "MismatchError",
    "PeerLostError",
    "Product",
    "ReduceOp",
    "RoundelError",
    "Sum",
    "TimeoutError",
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
    "grouped_allreduce",
    "init",
    "is_initialized",
    "local_rank",
    "local_size",
    "rank",
    "reduce",
    "reduce_scatter",
    "scatter",
    "shutdown",
    "size",
]
