"""Mistakes that end the job: every rank gets an error that says what happened, and none waits for ever."""

from __future__ import annotations

import pytest
import roundel
import roundel.torch as hvd
import torch

TEAMS = [("shm", 3), ("tcp", 2)]


@pytest.mark.ends_communicator
@pytest.mark.parametrize("what", ["shape", "dtype", "name", "operation"])
def test_different_calls_are_a_mismatch_on_every_rank(comm, what):
    last = comm.rank == comm.size - 1
    with pytest.raises(roundel.MismatchError):
        if what == "shape":
            hvd.allreduce(torch.ones(3 if last else 4))
        elif what == "dtype":
            hvd.allreduce(torch.ones(4, dtype=torch.float64 if last else torch.float32))
        elif what == "name":
            hvd.allreduce(torch.ones(4), name="first" if last else "second")
        else:
            hvd.synchronize(hvd.broadcast_async(torch.ones(4), 0) if last else hvd.allreduce_async(torch.ones(4)))


@pytest.mark.ends_communicator
def test_a_sparse_gradient_on_one_rank_is_named_there_and_ends_the_others(comm):
    table, fc = torch.nn.Embedding(10, 4, sparse=True), torch.nn.Linear(4, 1)
    named = [("table", table.weight), *fc.named_parameters()]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p for _, p in named], lr=0.1), named_parameters=named)
    if comm.rank == comm.size - 1:
        with pytest.raises(roundel.InvalidArgumentError, match=f"rank {comm.rank}: the gradient of 'table' is sparse"):
            fc(table(torch.tensor([1, 2]))).sum().backward()
        hvd.shutdown()  # as when the exception ends the script
        return
    fc(torch.ones(1, 4)).sum().backward()
    with pytest.raises(roundel.PeerLostError):
        optimizer.step()
