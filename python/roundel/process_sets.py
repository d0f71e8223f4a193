"""Process sets: some ranks of the job that do collectives among themselves, under Horovod's names.

    even = roundel.ProcessSet([0, 2])
    roundel.torch.init(process_sets=[even])       # or, any time later and on every rank: add_process_set(even)

Adding and removing are collective: every rank of the job does both, also ranks outside the set.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from roundel import world
from roundel.errors import InvalidArgumentError

__all__ = [
    "ProcessSet",
    "add_process_set",
    "check_process_sets",
    "global_process_set",
    "number_of",
    "process_set_by_id",
    "process_sets",
    "remove_process_set",
]


def _check_ranks(ranks: object) -> list[int]:
    if isinstance(ranks, (str, bytes)) or not isinstance(ranks, Iterable):
        if hasattr(ranks, "Get_rank"):
            raise InvalidArgumentError(
                "ProcessSet: a set is made of ranks here, not of an MPI communicator: ProcessSet(comm.allgather(hvd.rank()))"
            )
        raise InvalidArgumentError(f"ProcessSet: expected a list of ranks, got {type(ranks).__name__}")
    ranks = list(ranks)
    if any(not isinstance(r, int) or isinstance(r, bool) for r in ranks):
        raise InvalidArgumentError(f"ProcessSet: expected a list of ranks, got {ranks}")
    if not ranks or min(ranks) < 0 or len(set(ranks)) < len(ranks):
        raise InvalidArgumentError(f"ProcessSet: expected at least one rank, from 0 on and each once, got {ranks}")
    return sorted(ranks)


class ProcessSet:
    """Some ranks of the job. Give it to init(process_sets=[...]) or to add_process_set(), then to any operation.

    ranks: ascending. process_set_id: None until the set has been added, and again when it was removed or the job has ended.
    """

    mpi_comm = None

    def __init__(self, ranks_or_comm: Sequence[int]) -> None:
        self.ranks: list[int] | None = _check_ranks(ranks_or_comm)
        self._id: int | None = None
        self._engine: Any = None

    @property
    def process_set_id(self) -> int | None:
        """The job's number for the set."""
        if self._id is None or not world.is_initialized() or world.engine() is not self._engine:
            return None
        return self._id

    def size(self) -> int | None:
        """How many ranks are in the set; None until it has been added."""
        return None if self.process_set_id is None else len(self.ranks)

    def rank(self) -> int | None:
        """This process's number within the set; None until it has been added. Roots of broadcasts are ranks of the job.

        Raises InvalidArgumentError in a process outside the set.
        """
        if self.process_set_id is None:
            return None
        if world.rank() not in self.ranks:
            raise InvalidArgumentError(f"rank {world.rank()} is not in process set {self}")
        return self.ranks.index(world.rank())

    def included(self) -> bool | None:
        """Whether this process is in the set; None until it has been added."""
        return None if self.process_set_id is None else world.rank() in self.ranks

    def __str__(self) -> str:
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks}, mpi_comm=None)"

    __repr__ = __str__


class _Global(ProcessSet):
    """All ranks of the job, whenever there is one."""

    def __init__(self) -> None:
        pass

    @property
    def ranks(self) -> list[int]:
        return list(range(world.size())) if world.is_initialized() else []

    @property
    def process_set_id(self) -> int:
        return 0

    def size(self) -> int | None:
        return world.size() if world.is_initialized() else None

    def rank(self) -> int | None:
        return world.rank() if world.is_initialized() else None

    def included(self) -> bool | None:
        return True if world.is_initialized() else None


global_process_set = _Global()

_added: dict[int, ProcessSet] = {}  # the first object that was added for each id


def check_process_sets(sets: Iterable[ProcessSet], size: int | None = None) -> list[ProcessSet]:
    """The sets as a list. Raises InvalidArgumentError unless they are ProcessSets, of different ranks, below size."""
    sets = list(sets)
    for given in sets:
        if not isinstance(given, ProcessSet) or given is global_process_set:
            raise InvalidArgumentError(f"process_sets: expected ProcessSet objects, got {given!r}")
        if size is not None and given.ranks[-1] >= size:
            raise InvalidArgumentError(f"process_sets: expected ranks from 0 to {size - 1}, got {given.ranks}")
    for i, given in enumerate(sets):
        if any(given.ranks == other.ranks for other in sets[:i]) or given.ranks == list(range(size or 0)):
            raise InvalidArgumentError(f"process_sets: entry {i} is a duplicate: {given}")
    return sets


def number_of(process_set: ProcessSet, what: str) -> int:
    """The set's id. Raises InvalidArgumentError for what is no set, or one that the job does not know (any more).

    RoundelError before init().
    """
    world.engine()  # raises before init()
    if process_set is global_process_set:
        return 0
    if not isinstance(process_set, ProcessSet):
        raise InvalidArgumentError(f"{what}: expected a ProcessSet, got {type(process_set).__name__}")
    number = process_set.process_set_id
    if number is None:
        raise InvalidArgumentError(
            f"{what}: {process_set} is not known to the job: give it to init(process_sets=[...]) or add_process_set() first"
        )
    return number


def add_process_set(process_set: ProcessSet | Sequence[int]) -> ProcessSet:
    """Make a set of ranks known to the job. Every rank of the job calls this with the same ranks. Returns the set.

    Raises InvalidArgumentError (a rank that does not exist, ranks that are a set already), MismatchError (ranks called with
    different sets), PeerLostError, TimeoutError.
    """
    if not isinstance(process_set, ProcessSet):
        process_set = ProcessSet(process_set)
    engine = world.engine()
    check_process_sets([process_set], world.size())
    existing = [number for number, ranks in engine.process_sets.items() if list(ranks) == process_set.ranks]
    if existing:
        raise InvalidArgumentError(f"add_process_set: the ranks {process_set.ranks} are process set {existing[0]} already")
    number = engine.add_process_set(process_set.ranks).wait()
    process_set._engine, process_set._id = engine, number
    _added[number] = process_set
    return process_set


def remove_process_set(process_set: ProcessSet) -> bool:
    """Forget a set. Every rank of the job calls this. False for the global set and for one that is not (or no longer) known."""
    number = process_set.process_set_id
    if not number:
        return False
    process_set._engine.remove_process_set(number).wait()
    process_set._id = process_set._engine = None
    _added.pop(number, None)
    return True


def process_sets() -> list[ProcessSet]:
    """The sets that are known, the global one first."""
    return [global_process_set, *(known for _, known in sorted(_added.items()) if known.process_set_id is not None)]


def process_set_by_id(process_set_id: int) -> ProcessSet:
    """The set with this number. Raises InvalidArgumentError where there is none."""
    for known in process_sets():
        if known.process_set_id == process_set_id:
            return known
    raise InvalidArgumentError(f"no known process set with id {process_set_id}")
