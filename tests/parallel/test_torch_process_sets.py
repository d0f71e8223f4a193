"""Process sets under Horovod's names: adding, removing, every operation and gradient within a set, what is refused."""

from __future__ import annotations

import pytest
import roundel
import roundel.torch as hvd
import torch
from test_torch_ops import assert_close, assert_equal

TEAMS = [("shm", 2), ("shm", 3), ("shm", 4), ("tcp", 2), ("tcp", 3), ("tcp", 4)]


class Sets:
    """The even and the odd ranks, for a `with` block."""

    def __init__(self, size: int) -> None:
        self.ranks = [list(range(0, size, 2)), list(range(1, size, 2))]

    def __enter__(self) -> hvd.ProcessSet:
        self.sets = [hvd.add_process_set(ranks) for ranks in self.ranks]
        return self.sets[hvd.rank() % 2]

    def __exit__(self, *exc) -> None:
        if exc[0] is None:
            assert all(hvd.remove_process_set(s) for s in self.sets)


def test_sets_know_who_they_are(comm):
    fresh = hvd.ProcessSet([comm.size - 1, 0])
    assert (fresh.process_set_id, fresh.size(), fresh.rank(), fresh.included()) == (None, None, None, None)
    assert fresh.ranks == [0, comm.size - 1]
    everyone = hvd.global_process_set
    assert (everyone.process_set_id, everyone.size(), everyone.rank(), everyone.included()) == (0, comm.size, comm.rank, True)
    assert everyone.ranks == list(range(comm.size))
    with Sets(comm.size) as mine:
        assert mine.process_set_id > 0 and mine.included()
        assert (mine.ranks[mine.rank()], mine.size()) == (comm.rank, len(mine.ranks))
        again = hvd.ProcessSet(mine.ranks)
        assert again.process_set_id is None
    assert (mine.process_set_id, mine.size(), mine.included()) == (None, None, None)


def test_a_rank_outside_a_set(comm):
    one = hvd.add_process_set([0])
    assert one.included() == (comm.rank == 0)
    if comm.rank == 0:
        assert one.rank() == 0
        assert_equal(hvd.allreduce(torch.ones(2), op=hvd.Sum, process_set=one), torch.ones(2))
    else:
        with pytest.raises(roundel.InvalidArgumentError, match="not in process set"):
            one.rank()
        with pytest.raises(roundel.RoundelError, match="not in process set"):
            hvd.allreduce(torch.ones(2), process_set=one)
    assert hvd.remove_process_set(one)


def test_adding_and_removing(comm):
    known = [s.process_set_id for s in roundel.process_sets.process_sets()]
    a = hvd.add_process_set([0])
    b = hvd.add_process_set(hvd.ProcessSet([comm.size - 1]))
    assert [s.process_set_id for s in roundel.process_sets.process_sets()] == [*known, a.process_set_id, b.process_set_id]
    assert roundel.process_sets.process_set_by_id(b.process_set_id) is b
    with pytest.raises(roundel.InvalidArgumentError, match="already"):
        hvd.add_process_set([0])
    for wrong, text in (
        ([], "at least one"),
        ([0, 0], "each once"),
        ([comm.size], "from 0 to"),
        ([-1], "from 0"),
        ("0", "list"),
    ):
        with pytest.raises(ValueError, match=text):
            hvd.add_process_set(wrong)
    with pytest.raises(ValueError, match="duplicate"):
        hvd.add_process_set(list(range(comm.size)))
    assert hvd.remove_process_set(hvd.global_process_set) is False
    assert hvd.remove_process_set(a) is True
    assert hvd.remove_process_set(a) is False
    for call in (
        hvd.allreduce,
        hvd.allgather,
        hvd.alltoall,
        hvd.reducescatter,
        lambda x, process_set: hvd.barrier(process_set),
    ):
        with pytest.raises(roundel.InvalidArgumentError, match="not known to the job"):
            call(torch.ones(comm.size), process_set=a)
        with pytest.raises(roundel.InvalidArgumentError, match="expected a ProcessSet"):
            call(torch.ones(comm.size), process_set=[0])
    a = hvd.add_process_set(a)  # and again
    assert hvd.remove_process_set(a) and hvd.remove_process_set(b)


def test_every_operation_within_a_set(comm):
    with Sets(comm.size) as mine:
        ranks, size = torch.tensor(mine.ranks), mine.size()
        total, x = float(ranks.sum()), torch.full((4,), float(comm.rank))
        how = {"process_set": mine}
        assert_equal(hvd.allreduce(x, op=hvd.Sum, **how), torch.full((4,), total))
        assert_close(hvd.allreduce(x, **how), torch.full((4,), total / size))
        assert_equal(hvd.allreduce_(x.clone(), op=hvd.Max, **how), torch.full((4,), float(ranks.max())))
        assert_equal(hvd.synchronize(hvd.allreduce_async(x, op=hvd.Sum, **how)), torch.full((4,), total))
        assert_equal(hvd.synchronize(hvd.allreduce_async_(x.clone(), op=hvd.Sum, **how)), torch.full((4,), total))
        for call in (hvd.grouped_allreduce, hvd.grouped_allreduce_):
            got = call([x.clone(), x.clone()], op=hvd.Sum, **how)
            assert_equal(got[1], torch.full((4,), total))
        assert_equal(hvd.grouped_allreduce_async([x], op=hvd.Sum, **how).wait()[0], torch.full((4,), total))
        assert_equal(hvd.grouped_allreduce_async_([x.clone()], op=hvd.Sum, **how).wait()[0], torch.full((4,), total))
        assert_equal(hvd.allgather(torch.tensor(comm.rank), **how), ranks)
        assert_equal(hvd.allgather_async(torch.tensor(comm.rank), **how).wait(), ranks)
        assert_equal(hvd.grouped_allgather([torch.tensor(comm.rank)], **how)[0], ranks)
        assert_equal(hvd.grouped_allgather_async([torch.tensor(comm.rank)], **how).wait()[0], ranks)
        root = mine.ranks[-1]  # a rank of the job
        assert_equal(hvd.broadcast(x, root, **how), torch.full((4,), float(root)))
        assert_equal(hvd.broadcast_(x.clone(), root, **how), torch.full((4,), float(root)))
        assert_equal(hvd.broadcast_async(x, root, **how).wait(), torch.full((4,), float(root)))
        assert_equal(hvd.broadcast_async_(x.clone(), root, **how).wait(), torch.full((4,), float(root)))
        assert_equal(hvd.alltoall(torch.full((size,), comm.rank), **how), ranks)
        got, received = hvd.alltoall(torch.full((size,), comm.rank), splits=[1] * size, **how)
        assert_equal(got, ranks)
        assert_equal(received, torch.ones(size, dtype=torch.int32))
        assert_equal(hvd.alltoall_async(torch.full((size,), comm.rank), **how).wait()[0], ranks)
        rows = torch.full((size,), float(comm.rank))
        assert_equal(hvd.reducescatter(rows, op=hvd.Sum, **how), torch.tensor([total]))
        assert_equal(hvd.reducescatter_async(rows, op=hvd.Sum, **how).wait(), torch.tensor([total]))
        assert_equal(hvd.grouped_reducescatter([rows], op=hvd.Sum, **how)[0], torch.tensor([total]))
        assert_equal(hvd.grouped_reducescatter_async([rows], op=hvd.Sum, **how).wait()[0], torch.tensor([total]))
        sparse = torch.eye(3)[:1].to_sparse()
        assert_close(hvd.sparse_allreduce_async(sparse, "s", hvd.Sum, **how)().to_dense(), torch.eye(3)[:1] * size)
        hvd.barrier(**how)
        with pytest.raises(roundel.InvalidArgumentError, match="expected root_rank to be one of"):
            hvd.broadcast(x, (comm.rank + 1) % 2, **how)


def test_gradients_within_a_set(comm):
    with Sets(comm.size) as mine:
        size, weight = mine.size(), float(comm.rank + 1)
        mean = (sum(mine.ranks) + size) / size
        x = torch.ones(size, requires_grad=True)

        def gradient(result: torch.Tensor) -> torch.Tensor:
            (got,) = torch.autograd.grad((result * weight).sum(), x)
            return got

        assert_close(gradient(hvd.allreduce(x, op=hvd.Sum, process_set=mine)), torch.full((size,), mean * size))
        assert_close(gradient(hvd.allgather(x, process_set=mine)), torch.full((size,), mean))
        root = mine.ranks[0]
        expected = mean if comm.rank == root else 0.0
        assert_close(gradient(hvd.broadcast(x, root, process_set=mine)), torch.full((size,), expected))
        assert_close(gradient(hvd.alltoall(x, process_set=mine)), torch.tensor(mine.ranks) + 1.0)
        assert_close(gradient(hvd.reducescatter(x, process_set=mine)), torch.tensor(mine.ranks) + 1.0)


def test_objects_and_parameters_within_a_set(comm):
    with Sets(comm.size) as mine:
        root = mine.ranks[-1]
        assert hvd.broadcast_object(comm.rank, root, process_set=mine) == root
        assert hvd.allgather_object(comm.rank, process_set=mine) == mine.ranks
        model = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(model.weight, comm.rank)
        hvd.broadcast_parameters(model.state_dict(), root, process_set=mine)
        assert bool((model.weight == root).all())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5 + comm.rank)
        hvd.broadcast_optimizer_state(optimizer, root, process_set=mine)
        assert optimizer.param_groups[0]["lr"] == 0.5 + root


def test_sets_of_init(comm):
    sets = [hvd.ProcessSet([0]), hvd.ProcessSet([comm.size - 1])]
    hvd.init(process_sets=sets)  # the job is there already: only the sets are added
    assert all(s.process_set_id is not None for s in sets)
    hvd.init(process_sets=sets)  # changes nothing
    hvd.init(process_sets="dynamic")
    hvd.init(comm=list(range(comm.size)))
    for wrong in ({"comm": [0]}, {"comm": list(range(comm.size))[::-1]}, {"comm": 5}, {"process_sets": "static"}):
        with pytest.raises(ValueError, match="init: expected"):
            hvd.init(**wrong)
    for wrong in ([[0]], [hvd.ProcessSet([0]), hvd.ProcessSet([0])], [hvd.ProcessSet([comm.size])]):
        with pytest.raises(ValueError, match="process_sets"):
            hvd.init(process_sets=wrong)
    assert hvd.is_initialized()
    assert all(hvd.remove_process_set(s) for s in sets)
