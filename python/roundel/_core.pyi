"""
Roundel's native core; use the roundel package.
"""
from __future__ import annotations
import collections.abc
import numpy
import typing
import typing_extensions
__all__: list[str] = ['Communicator', 'Engine', 'EngineHandle', 'Handle', 'MpiJob', 'OptimizerPlan', 'addresses', 'failpoints', 'finish_mpi', 'flight_record', 'grad_norm', 'in_forked_child', 'info', 'mpi_threads', 'optimizer_hyper', 'optimizer_needs_steps', 'optimizer_states', 'scale_tensors', 'setting_bytes', 'settings', 'write_flight_record']
class MpiJob:
    """
    A job's ranks as MPI knows them.
    """
    def __init__(self, family: str = '', opener: str = '', folders: collections.abc.Sequence[str] = [], comm_address: typing.SupportsInt | typing.SupportsIndex = 0, seconds: typing.SupportsFloat | typing.SupportsIndex = 60.0) -> None:
        """
        Open the MPI library, initialize MPI unless somebody has, and duplicate the communicator whose handle is at this address, or MPI_COMM_WORLD. All its ranks call this.
        """
    def describe(self) -> str:
        """
        Version, file, ABI and threads.
        """
    def gather(self, text: str, seconds: typing.SupportsFloat | typing.SupportsIndex = 60.0) -> list[str]:
        """
        Every rank's text, on every rank.
        """
    @property
    def carries_data(self) -> bool:
        """
        Whether MPI was initialized for calls from several threads, at least one at a time.
        """
    @property
    def rank(self) -> int:
        ...
    @property
    def size(self) -> int:
        ...
    @property
    def threads(self) -> str:
        ...
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
    CorruptFrameError end the communicator. timeout: seconds, 0 for ROUNDEL_TIMEOUT. `rows` and splits: of
    dimension 0, one number for each rank.
    """
    @staticmethod
    def open(rank: typing.SupportsInt | typing.SupportsIndex, size: typing.SupportsInt | typing.SupportsIndex, rendezvous: str = '', rendezvous_fd: typing.SupportsInt | typing.SupportsIndex = -1, token: typing_extensions.Buffer = b'\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00', epoch: typing.SupportsInt | typing.SupportsIndex = 1, start_timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0, mpi: MpiJob = None) -> Communicator:
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
    def alltoall(self, x: typing.Any, out: typing.Any = None, *, splits: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] | None = None, received_splits: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] | None = None, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> typing.Any:
        """
        Part i of dimension 0 goes to rank i; part i of the result comes from rank i. splits: rows that go to each rank; received_splits: that come from each, asked for where they are not given (alltoall_async needs them).
        """
    def alltoall_async(self, x: typing.Any, out: typing.Any = None, *, splits: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] | None = None, received_splits: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] | None = None, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> Handle:
        """
        Start alltoall; returns a Handle. The arrays belong to the operation until it is done.
        """
    def barrier(self, *, timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> typing.Any:
        """
        Wait for every rank. TimeoutError names those that have not come.
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
    def check_array(self, x: typing.Any) -> None:
        """
        Raise InvalidArgumentError where collectives would refuse this array; before a step that other ranks wait for.
        """
    def empty(self, shape: typing.Any, dtype: typing.Any = 'float32') -> typing.Any:
        """
        As allocate(), of a shape and a dtype: a numpy array, or a torch tensor when the dtype is torch's.
        """
    def gather(self, x: typing.Any, root: typing.SupportsInt | typing.SupportsIndex = 0, rows: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] | None = None, out: typing.Any = None, *, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> typing.Any:
        """
        As allgather, at root; the others get None.
        """
    def gather_async(self, x: typing.Any, root: typing.SupportsInt | typing.SupportsIndex = 0, rows: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] | None = None, out: typing.Any = None, *, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> Handle:
        """
        Start gather; returns a Handle. The arrays belong to the operation until it is done.
        """
    def grouped_allgather(self, xs: list, rows: collections.abc.Sequence[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] | None] | None = None, *, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> typing.Any:
        """
        allgather of each array of a list; rows: a list of rows.
        """
    def grouped_allgather_async(self, xs: list, rows: collections.abc.Sequence[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] | None] | None = None, *, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> Handle:
        """
        Start grouped_allgather; returns a Handle. The arrays belong to the operation until it is done.
        """
    def grouped_allreduce(self, xs: list, op: typing.SupportsInt | typing.SupportsIndex = 0, outs: typing.Any = None, *, prescale: typing.SupportsFloat | typing.SupportsIndex = 1.0, postscale: typing.SupportsFloat | typing.SupportsIndex = 1.0, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> typing.Any:
        """
        allreduce of a list of arrays, all or none; small ones of a dtype travel together. Returns a list.
        """
    def grouped_allreduce_async(self, xs: list, op: typing.SupportsInt | typing.SupportsIndex = 0, outs: typing.Any = None, *, prescale: typing.SupportsFloat | typing.SupportsIndex = 1.0, postscale: typing.SupportsFloat | typing.SupportsIndex = 1.0, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> Handle:
        """
        Start grouped_allreduce; returns a Handle. The arrays belong to the operation until it is done.
        """
    def grouped_reduce_scatter(self, xs: list, op: typing.SupportsInt | typing.SupportsIndex = 0, *, prescale: typing.SupportsFloat | typing.SupportsIndex = 1.0, postscale: typing.SupportsFloat | typing.SupportsIndex = 1.0, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> typing.Any:
        """
        reduce_scatter of each array of a list.
        """
    def grouped_reduce_scatter_async(self, xs: list, op: typing.SupportsInt | typing.SupportsIndex = 0, *, prescale: typing.SupportsFloat | typing.SupportsIndex = 1.0, postscale: typing.SupportsFloat | typing.SupportsIndex = 1.0, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> Handle:
        """
        Start grouped_reduce_scatter; returns a Handle. The arrays belong to the operation until it is done.
        """
    def recv(self, x: typing.Any, source: typing.SupportsInt | typing.SupportsIndex, *, timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> typing.Any:
        """
        Receive into `x`, in place.
        """
    def recv_async(self, x: typing.Any, source: typing.SupportsInt | typing.SupportsIndex, *, timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> Handle:
        """
        Start recv; returns a Handle. The arrays belong to the operation until it is done.
        """
    def reduce(self, x: typing.Any, root: typing.SupportsInt | typing.SupportsIndex = 0, op: typing.SupportsInt | typing.SupportsIndex = 0, out: typing.Any = None, *, prescale: typing.SupportsFloat | typing.SupportsIndex = 1.0, postscale: typing.SupportsFloat | typing.SupportsIndex = 1.0, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> typing.Any:
        """
        Reduce over ranks; root gets the result, which may be `x`, the others None.
        """
    def reduce_async(self, x: typing.Any, root: typing.SupportsInt | typing.SupportsIndex = 0, op: typing.SupportsInt | typing.SupportsIndex = 0, out: typing.Any = None, *, prescale: typing.SupportsFloat | typing.SupportsIndex = 1.0, postscale: typing.SupportsFloat | typing.SupportsIndex = 1.0, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> Handle:
        """
        Start reduce; returns a Handle. The arrays belong to the operation until it is done.
        """
    def reduce_scatter(self, x: typing.Any, op: typing.SupportsInt | typing.SupportsIndex = 0, out: typing.Any = None, *, rows: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] | None = None, prescale: typing.SupportsFloat | typing.SupportsIndex = 1.0, postscale: typing.SupportsFloat | typing.SupportsIndex = 1.0, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> typing.Any:
        """
        Reduce over ranks and keep this rank's rows of dimension 0: as `rows` says, or the first n % size ranks one more.
        """
    def reduce_scatter_async(self, x: typing.Any, op: typing.SupportsInt | typing.SupportsIndex = 0, out: typing.Any = None, *, rows: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] | None = None, prescale: typing.SupportsFloat | typing.SupportsIndex = 1.0, postscale: typing.SupportsFloat | typing.SupportsIndex = 1.0, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> Handle:
        """
        Start reduce_scatter; returns a Handle. The arrays belong to the operation until it is done.
        """
    def scatter(self, x: typing.Any = None, root: typing.SupportsInt | typing.SupportsIndex = 0, rows: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] | None = None, out: typing.Any = None, *, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> typing.Any:
        """
        Root's rows of dimension 0, divided among the ranks: evenly, or as `rows` says on every rank. Ranks other than root give `out`, and no x.
        """
    def scatter_async(self, x: typing.Any = None, root: typing.SupportsInt | typing.SupportsIndex = 0, rows: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] | None = None, out: typing.Any = None, *, name: str = '', timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> Handle:
        """
        Start scatter; returns a Handle. The arrays belong to the operation until it is done.
        """
    def send(self, x: typing.Any, dest: typing.SupportsInt | typing.SupportsIndex, *, timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> typing.Any:
        """
        Send `x` to a rank; sends and receives between two ranks meet in order.
        """
    def send_async(self, x: typing.Any, dest: typing.SupportsInt | typing.SupportsIndex, *, timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> Handle:
        """
        Start send; returns a Handle. The arrays belong to the operation until it is done.
        """
    def sendrecv(self, x: typing.Any, dest: typing.SupportsInt | typing.SupportsIndex, out: typing.Any, source: typing.SupportsInt | typing.SupportsIndex, *, timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> typing.Any:
        """
        Send `x` to a rank while receiving into `out` from another, or the same.
        """
    def sendrecv_async(self, x: typing.Any, dest: typing.SupportsInt | typing.SupportsIndex, out: typing.Any, source: typing.SupportsInt | typing.SupportsIndex, *, timeout: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> Handle:
        """
        Start sendrecv; returns a Handle. The arrays belong to the operation until it is done.
        """
    def shutdown(self, seconds: typing.SupportsFloat | typing.SupportsIndex = 5.0) -> None:
        """
        Leave the job and the groups made of it. Rank 0 waits up to `seconds`, in all, for the others to leave.
        """
    def split(self, color: typing.SupportsInt | typing.SupportsIndex | None, key: typing.SupportsInt | typing.SupportsIndex = 0) -> Communicator | None:
        """
        A communicator of the ranks that give the same color (from 0 on), in the order of key, then rank; None for a rank that gives None. All ranks call it. It has memory, connections and a failure detector of its own; PeerLostError names ranks of the whole job.
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
    def members(self) -> list[int]:
        """
        The rank in the whole job of every rank here; the same numbers unless this came from split().
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
class EngineHandle:
    """
    A named request under way.
    """
    def done(self) -> bool:
        """
        True when wait() would not block.
        """
    def wait(self) -> typing.Any:
        """
        Block until the request is done; return its result or raise its error.
        """
class Engine:
    """
    Named requests, from any thread and in any order, agreed between the ranks of a job.
    
    Every method starts a request and returns a handle. Arrays as for Communicator; they belong to the
    request until it is done. An empty name is made up: counted per kind and process set. device: -1, or
    the index of the GPU that the caller's tensors are on.
    Raises InvalidArgumentError and DuplicateNameError at once; MismatchError, on all ranks and the job
    goes on, from wait(); PeerLostError, TimeoutError etc. end the engine.
    """
    def __init__(self, communicator: Communicator) -> None:
        """
        All ranks of the communicator together.
        """
    def add_process_set(self, ranks: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> EngineHandle:
        """
        All ranks of the job call it. wait() returns the set's number, that of an equal set where there is one.
        """
    def allgather(self, xs: list, *, name: str = '', process_set: typing.SupportsInt | typing.SupportsIndex = 0, device: typing.SupportsInt | typing.SupportsIndex = -1) -> EngineHandle:
        """
        Concatenate every rank's arrays along dimension 0, in which ranks may differ. wait() returns a list.
        """
    def allreduce(self, xs: list, outs: list | None = None, op: typing.SupportsInt | typing.SupportsIndex = 0, *, prescale: typing.SupportsFloat | typing.SupportsIndex = 1.0, postscale: typing.SupportsFloat | typing.SupportsIndex = 1.0, name: str = '', process_set: typing.SupportsInt | typing.SupportsIndex = 0, device: typing.SupportsInt | typing.SupportsIndex = -1) -> EngineHandle:
        """
        Reduce a list of arrays over ranks, all or none. wait() returns a list. op 5 is Adasum.
        """
    def allreduce_in_place(self, x: typing.Any, op: typing.SupportsInt | typing.SupportsIndex = 0, prescale: typing.SupportsFloat | typing.SupportsIndex = 1.0, postscale: typing.SupportsFloat | typing.SupportsIndex = 1.0, name: str = '', process_set: typing.SupportsInt | typing.SupportsIndex = 0) -> typing.Any:
        """
        Reduce one array over ranks. wait() returns it.
        """
    def alltoall(self, x: typing.Any, splits: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] | None = None, *, name: str = '', process_set: typing.SupportsInt | typing.SupportsIndex = 0, device: typing.SupportsInt | typing.SupportsIndex = -1) -> EngineHandle:
        """
        splits[i] rows go to the set's rank i; evenly without. wait() returns the new array and the rows from each rank.
        """
    def barrier(self, *, process_set: typing.SupportsInt | typing.SupportsIndex = 0) -> EngineHandle:
        """
        Done when all ranks of the set have come.
        """
    def broadcast(self, x: typing.Any, root: typing.SupportsInt | typing.SupportsIndex, *, name: str = '', process_set: typing.SupportsInt | typing.SupportsIndex = 0, device: typing.SupportsInt | typing.SupportsIndex = -1) -> EngineHandle:
        """
        Overwrite `x` with that of `root`, a rank of the job. wait() returns x.
        """
    def close(self) -> None:
        """
        End what is pending and leave.
        """
    def join(self, *, device: typing.SupportsInt | typing.SupportsIndex = -1) -> EngineHandle:
        """
        From here on this rank takes part in what others call, with neutral elements and no rows, until all have joined. wait() returns the rank that joined last.
        """
    def reduce_scatter(self, xs: list, op: typing.SupportsInt | typing.SupportsIndex = 0, *, prescale: typing.SupportsFloat | typing.SupportsIndex = 1.0, postscale: typing.SupportsFloat | typing.SupportsIndex = 1.0, name: str = '', process_set: typing.SupportsInt | typing.SupportsIndex = 0, device: typing.SupportsInt | typing.SupportsIndex = -1) -> EngineHandle:
        """
        Reduce and keep this rank's rows of dimension 0; the first n % size ranks one more. wait() returns a list.
        """
    def remove_process_set(self, process_set: typing.SupportsInt | typing.SupportsIndex) -> EngineHandle:
        """
        All ranks of the job call it.
        """
    def reset_stats(self) -> None:
        """
        Count from here.
        """
    def start_timeline(self, path: str, mark_cycles: bool = False) -> None:
        """
        Write what happens to every tensor to a Chrome trace, a file for each rank: {rank} in the path, or .rank3 before its extension. Raises InvalidArgumentError when it cannot be written or is on already.
        """
    def stats(self) -> dict:
        """
        What the engine has done, since it began or reset_stats(). "kinds": by kind of request, counts, bytes on this rank and seconds summed over requests. "waited_for": by rank, how often it was the last to become ready, and how long this rank's requests had waited by then.
        """
    def stop_timeline(self) -> None:
        """
        Complete the file.
        """
    @property
    def process_sets(self) -> dict[int, list[int]]:
        """
        Ranks of each process set, by number.
        """
class OptimizerPlan:
    """
    Steps many tensors of one rule, one set of dtypes and one device at once. It looks at params, states and the other lists when it is made, at gradients in every step.
    """
    def __init__(self, rule: str, options: dict, params: typing.Any, states: list, *, masters: typing.Any = None, copies: typing.Any = None, averages: typing.Any = None, steps: typing.Any = None) -> None:
        ...
    def gradients(self, params: typing.Any) -> typing.Any:
        """
        The gradients of these parameters, if they are the plan's, still in the memory that it was made for, and each has one; else None.
        """
    def result(self) -> tuple:
        """
        (norm, skipped) of the last step; on a GPU this waits for it.
        """
    def step(self, grads: typing.Any, hyper: typing.Any, *, grad_scale: typing.Any = None, found_inf: typing.Any = None, clip: typing.Any = None, max_norm: typing.Any = None, check_finite: bool = False, seed: typing.SupportsInt | typing.SupportsIndex = 0, threads: typing.SupportsInt | typing.SupportsIndex = 0, stream: typing.SupportsInt | typing.SupportsIndex = 0) -> tuple:
        """
        One step. Returns (norm of the unscaled gradients or None, whether the step was skipped); on a GPU (None, None), as soon as it is queued.
        """
    @property
    def count(self) -> int:
        ...
    @property
    def device(self) -> int:
        """
        The GPU, -1 for the CPU.
        """
    @property
    def tensors(self) -> int:
        ...
def addresses() -> list:
    """
    This host's interfaces that are up: (name, address, bits of its network).
    """
def failpoints() -> list:
    """
    Names of the points that ROUNDEL_FAILPOINT may name.
    """
def finish_mpi(seconds: typing.SupportsFloat | typing.SupportsIndex = 5.0) -> None:
    """
    Finalize MPI at the end of the process, if it was initialized here and all ranks come to their end.
    """
def flight_record() -> list:
    """
    The last 256 operations of this process, oldest first, as dictionaries: number, sequence, epoch, group, kind, what, name, dtype, bytes,
    queued, started, finished (seconds since 1970, 0 for not yet), state (queued, running, done, failed), waiting_for (ranks).
    """
def grad_norm(tensors: typing.Any, grad_scale: typing.Any = None, threads: typing.SupportsInt | typing.SupportsIndex = 0, stream: typing.SupportsInt | typing.SupportsIndex = 0) -> float:
    """
    2-norm of all elements together, in float64; inf or nan when one is not finite.
    """
def in_forked_child() -> bool:
    """
    True in a process that was forked from a rank.
    """
def info(folders: collections.abc.Sequence[str] = []) -> dict:
    """
    What was built and found, as text by topic. folders: where MPI libraries may be, beside the loader's path.
    """
def mpi_threads() -> typing.Any:
    """
    The thread level of the MPI library in use, such as 'MPI_THREAD_MULTIPLE', or None.
    """
def optimizer_hyper(rule: str, options: dict) -> list[str]:
    """
    Names and order of a rule's hyper-parameters.
    """
def optimizer_needs_steps(rule: str, options: dict) -> bool:
    """
    Whether a plan of this rule must have steps.
    """
def optimizer_states(rule: str, options: dict) -> list[str]:
    """
    Names and order of a rule's moments.
    """
def scale_tensors(tensors: typing.Any, factor: typing.Any, threads: typing.SupportsInt | typing.SupportsIndex = 0, stream: typing.SupportsInt | typing.SupportsIndex = 0) -> None:
    """
    Multiply all elements in place, in one pass.
    """
def setting_bytes(arg0: str) -> int:
    """
    The value of a setting that counts bytes.
    """
def settings() -> list:
    """
    All settings: (name, default, doc, other libraries' names for it).
    """
def write_flight_record(prefix: str, rank: typing.SupportsInt | typing.SupportsIndex, size: typing.SupportsInt | typing.SupportsIndex, why: str = 'asked for') -> None:
    """
    Write the record to PREFIX.rank<rank>.json, for `roundel flight`.
    """
