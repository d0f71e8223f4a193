"""join(): ranks that have no more data serve the others, in single operations and in DistributedOptimizer's steps."""

from __future__ import annotations

import pytest
import roundel
import roundel.torch as hvd
import torch
from test_torch_ops import assert_close, assert_equal
from test_torch_optimizer import assert_same_model_on_all_ranks, batch, loss_of, mlp, sgd
from torch import nn

TEAMS = [("shm", 1), ("shm", 2), ("shm", 3), ("shm", 4), ("tcp", 2), ("tcp", 3), ("tcp", 4)]


def test_join_returns_the_rank_that_came_last(comm):
    for last in range(comm.size):
        for _ in range((comm.rank - last - 1) % comm.size):  # the next rank after `last` has nothing to do, `last` has most
            hvd.allreduce(torch.ones(1))
        assert hvd.join() == last


def test_those_who_have_joined_give_zeros_and_no_rows(comm):
    if comm.rank:
        hvd.join()
        return
    x = torch.full((4,), 6.0)
    assert_equal(hvd.allreduce(x, op=hvd.Sum), x)
    assert_close(hvd.allreduce(x), x / comm.size)  # over all ranks
    assert_equal(hvd.grouped_allreduce([x, x], op=hvd.Sum)[1], x)
    assert_equal(hvd.allgather(torch.ones(2, 3)), torch.ones(2, 3))
    rows = torch.ones(comm.size, requires_grad=True)
    (hvd.allgather(rows) * 3).sum().backward()
    assert_close(rows.grad, torch.full((comm.size,), 3.0 / comm.size))
    got, received = hvd.alltoall(torch.ones(2 * comm.size), splits=[2] * comm.size)
    assert_equal(got, torch.ones(2))
    assert_equal(received, torch.tensor([2] + [0] * (comm.size - 1), dtype=torch.int32))
    assert_equal(hvd.reducescatter(torch.full((comm.size,), 5.0), op=hvd.Sum), torch.tensor([5.0]))
    hvd.barrier()
    assert hvd.join() == 0


def test_a_broadcast_from_a_rank_that_has_joined_is_an_error_and_the_job_goes_on(comm):
    if comm.size == 1:
        return
    if comm.rank == 1:
        hvd.join()
    else:
        with pytest.raises(roundel.MismatchError, match="joined"):
            hvd.broadcast(torch.ones(2), 1, name="of a rank that has joined")
        hvd.join()
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum) == comm.size


def expected_after(comm, steps_of: list[int], lr: float) -> list[torch.Tensor]:
    """Parameters after plain steps with the mean over all ranks of the gradients that there were."""
    model = mlp()
    for step in range(max(steps_of)):
        model.zero_grad()
        for rank, steps in enumerate(steps_of):
            if step < steps:
                (loss_of(model, batch(rank, step)) / comm.size).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("others", [0, 1])
def test_an_optimizers_steps_go_on_without_the_ranks_that_have_joined(comm, first, others):
    """Ranks have different numbers of batches, also none; with another optimizer in use, whose buckets go another way."""
    busy = [sgd(mlp()) for _ in range(others)]
    for optimizer in busy:
        loss_of_any(optimizer).backward()
        optimizer.step()
    model = mlp()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    steps_of = [first + (rank + 1) % comm.size * 2 for rank in range(comm.size)]
    for step in range(steps_of[comm.rank]):
        optimizer.zero_grad()
        loss_of(model, batch(comm.rank, step)).backward()
        optimizer.step()
    last = hvd.join()
    assert steps_of[last] == max(steps_of)
    hvd.broadcast_parameters(model.state_dict(), root_rank=last)
    for p, expected in zip(model.parameters(), expected_after(comm, steps_of, 0.1), strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-5)
    for step in range(10, 12):  # and the next epoch
        optimizer.zero_grad()
        loss_of(model, batch(comm.rank, step)).backward()
        optimizer.step()
    assert_same_model_on_all_ranks(comm, model)
    if comm.rank == 0:  # another one joins
        hvd.join()
    else:
        optimizer.zero_grad()
        loss_of(model, batch(comm.rank, 12)).backward()
        optimizer.step()
        hvd.join()


def loss_of_any(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    return sum(p.sum() for group in optimizer.param_groups for p in group["params"])


def test_sparse_gradients_without_the_ranks_that_have_joined(comm):
    def make(sparse: bool) -> nn.Sequential:
        torch.manual_seed(4)
        return nn.Sequential(nn.Embedding(6, 2, sparse=sparse), nn.Linear(2, 1))

    model, expected = make(True), make(False)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), op=hvd.Sum)
    plain = torch.optim.SGD(expected.parameters(), lr=0.5)
    for step in range(3 if comm.rank == 0 else 1):
        optimizer.zero_grad()
        model(torch.tensor([comm.rank])).square().sum().backward()
        optimizer.step()
        plain.zero_grad()
        expected(torch.arange(comm.size if step == 0 else 1)).square().sum().backward()
        plain.step()
    assert hvd.join() == 0
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_join_between_backward_and_step_is_an_error(comm):
    if comm.size == 1:
        return
    model = mlp()
    optimizer = sgd(model)
    for step in range(2):
        loss_of(model, batch(comm.rank, step)).backward()
        if step == 1:
            with pytest.raises(roundel.RoundelError, match="between backward"):
                hvd.join()
        optimizer.step()
        optimizer.zero_grad()
    assert hvd.join() in range(comm.size)
