"""
Roundel's native core; use the roundel package.
"""
from __future__ import annotations
import collections.abc
import numpy
import typing
__all__: list[str] = ['Communicator', 'Handle', 'failpoints', 'flight_record', 'in_forked_child', 'info', 'setting_bytes', 'settings', 'write_flight_record']
class Handle:
    """
    An operation under way.
    """
    def done(self) -> bool:
        """
        True when wait() would not block.
        """
    def wait(self) -> typing.Any:
        """
        Block until the operation is done; return its result or raise its error.
        """
class Communicator:
    """
    Ordered collectives among the ranks of a job: all ranks call the same operations in the same order.
    
    Arrays: C-contiguous, on the CPU, of numpy, torch or any library with __dlpack__, dtype float32, float64,
    float16, bfloat16, int8, int16, int32, int64, uint8 or bool. Results are arrays of the input's library.
    16-bit sums accumulate in float32 and round once. Every rank gets the same bits.
    Raises InvalidArgumentError before anything is changed; PeerLostError, MismatchError, TimeoutError,
    CorruptFrameError end the communicator. timeout: seconds, 0 for ROUNDEL_TIMEOUT.
    """
    @staticmethod
    def open(rank: typing.SupportsInt | typing.SupportsIndex, size: typing.SupportsInt | typing.SupportsIndex, rendezvous: str = '', rendezvous_fd: typing.SupportsInt | typing.SupportsIndex = -1, token: collections.abc.Buffer = b'\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00', epoch: typing.SupportsInt | typing.SupportsIndex = 1, start_timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> Communicator:
        """
        Meet the other ranks; blocks until all have come.
        """
    def allgather(self, x: typing.Any, rows: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] | None = None, out: typing.Any = None, *, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> typing.Any:
        """
        Concatenate every rank's array along dimension 0. rows: how many each rank has, when they differ.
        """
    def allgather_async(self, x: typing.Any, rows: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] | None = None, out: typing.Any = None, *, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> Handle:
        """
        Start allgather; returns a Handle. The arrays belong to the operation until it is done.
        """
    def allocate(self, nbytes: typing.SupportsInt | typing.SupportsIndex) -> numpy.ndarray:
        """
        uint8 numpy array in memory that this host's ranks share, where there is any: all-reduce in place on it needs no staging.
        """
    def allreduce(self, x: typing.Any, op: typing.SupportsInt | typing.SupportsIndex = 0, out: typing.Any = None, *, prescale: typing.SupportsFloat | typing.SupportsIndex = 1.0, postscale: typing.SupportsFloat | typing.SupportsIndex = 1.0, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> typing.Any:
        """
        Reduce over ranks; every rank gets the result. `out` may be `x`.
        """
    def allreduce_async(self, x: typing.Any, op: typing.SupportsInt | typing.SupportsIndex = 0, out: typing.Any = None, *, prescale: typing.SupportsFloat | typing.SupportsIndex = 1.0, postscale: typing.SupportsFloat | typing.SupportsIndex = 1.0, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> Handle:
        """
        Start allreduce; returns a Handle. The arrays belong to the operation until it is done.
        """
    def alltoall(self, x: typing.Any, out: typing.Any = None, *, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> typing.Any:
        """
        Part i of dimension 0 goes to rank i; part i of the result comes from rank i.
        """
    def alltoall_async(self, x: typing.Any, out: typing.Any = None, *, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> Handle:
        """
        Start alltoall; returns a Handle. The arrays belong to the operation until it is done.
        """
    def barrier(self, *, timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> typing.Any:
        """
        Wait for every rank.
        """
    def barrier_async(self, *, timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> Handle:
        """
        Start barrier; returns a Handle. The arrays belong to the operation until it is done.
        """
    def broadcast(self, x: typing.Any, root: typing.SupportsInt | typing.SupportsIndex = 0, *, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> typing.Any:
        """
        Overwrite `x` with root's, in place.
        """
    def broadcast_async(self, x: typing.Any, root: typing.SupportsInt | typing.SupportsIndex = 0, *, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> Handle:
        """
        Start broadcast; returns a Handle. The arrays belong to the operation until it is done.
        """
    def recv(self, x: typing.Any, source: typing.SupportsInt | typing.SupportsIndex, *, timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> typing.Any:
        """
        Receive into `x`, in place.
        """
    def recv_async(self, x: typing.Any, source: typing.SupportsInt | typing.SupportsIndex, *, timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> Handle:
        """
        Start recv; returns a Handle. The arrays belong to the operation until it is done.
        """
    def reduce_scatter(self, x: typing.Any, op: typing.SupportsInt | typing.SupportsIndex = 0, out: typing.Any = None, *, prescale: typing.SupportsFloat | typing.SupportsIndex = 1.0, postscale: typing.SupportsFloat | typing.SupportsIndex = 1.0, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> typing.Any:
        """
        Reduce over ranks and keep this rank's rows of dimension 0; the first n % size ranks get one row more.
        """
    def reduce_scatter_async(self, x: typing.Any, op: typing.SupportsInt | typing.SupportsIndex = 0, out: typing.Any = None, *, prescale: typing.SupportsFloat | typing.SupportsIndex = 1.0, postscale: typing.SupportsFloat | typing.SupportsIndex = 1.0, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> Handle:
        """
        Start reduce_scatter; returns a Handle. The arrays belong to the operation until it is done.
        """
    def send(self, x: typing.Any, dest: typing.SupportsInt | typing.SupportsIndex, *, timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> typing.Any:
        """
        Send `x` to a rank; sends and receives between two ranks meet in order.
        """
    def send_async(self, x: typing.Any, dest: typing.SupportsInt | typing.SupportsIndex, *, timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> Handle:
        """
        Start send; returns a Handle. The arrays belong to the operation until it is done.
        """
    def shutdown(self, seconds: typing.SupportsFloat | typing.SupportsIndex = 5.0) -> None:
        """
        Leave the job. Rank 0 waits up to `seconds` for the others to leave.
        """
    @property
    def epoch(self) -> int:
        ...
    @property
    def hosts(self) -> list[int]:
        """
        Host number of every rank, counted in order of first appearance.
        """
    @property
    def rank(self) -> int:
        ...
    @property
    def size(self) -> int:
        ...
    @property
    def transport(self) -> str:
        ...
def failpoints() -> list:
    """
    Names of the points that ROUNDEL_FAILPOINT may name.
    """
def flight_record() -> list:
    """
    The last 256 operations of this process, oldest first, as dictionaries: number, sequence, epoch, group, kind, what, name, dtype, bytes,
    queued, started, finished (seconds since 1970, 0 for not yet), state (queued, running, done, failed), waiting_for (ranks).
    """
def in_forked_child() -> bool:
    """
    True in a process that was forked from a rank.
    """
def info() -> dict:
    """
    What was built and found, as text by topic.
    """
def setting_bytes(arg0: str) -> int:
    """
    The value of a setting that counts bytes.
    """
def settings() -> list:
    """
    All settings: (name, default, doc).
    """
def write_flight_record(prefix: str, rank: int, size: int, why: str = 'asked for') -> None:
    """
    Write the record to PREFIX.rank<rank>.json, for `roundel flight`.
    """
