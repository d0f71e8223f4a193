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
    allgather_async,
    allreduce,
    allreduce_,
    allreduce_async,
    allreduce_async_,
    alltoall,
    alltoall_async,
    barrier,
    broadcast,
    broadcast_,
    broadcast_async,
    broadcast_async_,
    grouped_allgather,
    grouped_allgather_async,
    grouped_allreduce,
    grouped_allreduce_,
    grouped_allreduce_async,
    grouped_allreduce_async_,
    grouped_reducescatter,
    grouped_reducescatter_async,
    join,
    reduce_scatter,
    reducescatter,
    reducescatter_async,
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
from roundel.handles import poll, synchronize
from roundel.objects import allgather_object, broadcast_object, broadcast_object_fn
from roundel.observe import reset_stats, start_timeline, stats, stop_timeline
from roundel.ops import Adasum, Average, Max, Min, Product, ReduceOp, Sum
from roundel.process_sets import (
    ProcessSet,
    add_process_set,
    global_process_set,
    process_set_by_id,
    remove_process_set,
)
from roundel.rooted import gather, reduce, scatter
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
    "allgather_async",
    "allgather_object",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "alltoall",
    "alltoall_async",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "broadcast_object",
    "broadcast_object_fn",
    "communicator",
    "cross_rank",
    "cross_size",
    "flight_record",
    "gather",
    "global_process_set",
    "grouped_allgather",
    "grouped_allgather_async",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "grouped_reducescatter",
    "grouped_reducescatter_async",
    "init",
    "is_initialized",
    "join",
    "local_rank",
    "local_size",
    "poll",
    "process_set_by_id",
    "rank",
    "reduce",
    "reduce_scatter",
    "reducescatter",
    "reducescatter_async",
    "remove_process_set",
    "reset_stats",
    "scatter",
    "shutdown",
    "size",
    "start_timeline",
    "stats",
    "stop_timeline",
    "synchronize",
]
