"""SyncBatchNorm is torch's batch normalization of everybody's batch: outputs, gradients, running statistics."""

from __future__ import annotations

import pytest
import roundel.torch as hvd
import torch
from torch import nn

TEAMS = [("shm", 1), ("shm", 2), ("shm", 3), ("shm", 4), ("tcp", 2), ("tcp", 3), ("tcp", 4)]


def batch_of(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    random = torch.Generator().manual_seed(rank)
    return torch.randn(rank + 2, *shape, generator=random, dtype=torch.float64).add_(rank).mul_(3).to(dtype)


def check(comm, shape, dtype=torch.float64, rows=None, **arguments) -> None:
    """Two steps and an evaluation beside torch's own on the joined batches."""
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(shape)]
    ours, whole = hvd.SyncBatchNorm(shape[0], **arguments).to(dtype), kind(shape[0], **arguments).to(dtype)
    for module in (ours, whole):
        if module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
            nn.init.uniform_(module.bias, -1, 1, generator=torch.Generator().manual_seed(2))
    batches = [batch_of(r, shape, dtype)[: None if rows is None else rows[r]] for r in range(comm.size)]
    begin = sum(len(b) for b in batches[: comm.rank])
    mine = slice(begin, begin + len(batches[comm.rank]))
    for _ in range(2):
        x, everyone = batches[comm.rank].clone().requires_grad_(), torch.cat(batches).requires_grad_()
        y, expected = ours(x), whole(everyone)
        torch.testing.assert_close(y, expected[mine])
        weights = torch.arange(expected.numel(), dtype=dtype).reshape(expected.shape).sin()
        (y * weights[mine]).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(x.grad, everyone.grad[mine])
    for name, value in whole.named_buffers():
        torch.testing.assert_close(dict(ours.named_buffers())[name], value)
    for p, q in zip(ours.parameters(), whole.parameters(), strict=True):  # this rank's part; the optimizer sums them up
        torch.testing.assert_close(hvd.allreduce(p.grad, op=hvd.Sum), q.grad)
    ours.eval(), whole.eval()
    torch.testing.assert_close(ours(torch.cat(batches)[mine]), whole(torch.cat(batches))[mine])


@pytest.mark.parametrize("shape", [(3,), (3, 5), (4, 2, 3), (2, 2, 1, 3)])
def test_it_is_batch_normalization_of_everybodys_batch(comm, shape):
    check(comm, shape)


@pytest.mark.parametrize(
    "arguments", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"eps": 0.1, "momentum": 0.5}]
)
def test_arguments(comm, arguments):
    check(comm, (3, 2), **arguments)


def test_float32_and_batches_far_from_zero(comm):
    check(comm, (3, 2, 2), torch.float32)
    ours = hvd.SyncBatchNorm(1)
    x = torch.tensor([[1e4], [1e4 + 1.0]])  # a sum of squares in float32 would lose the variance
    torch.testing.assert_close(ours(x), torch.tensor([[-1.0], [1.0]]), rtol=1e-3, atol=1e-3)


def test_empty_batches_of_some_ranks(comm):
    if comm.size > 1:
        check(comm, (3, 2), rows=[0 if r == 0 else None for r in range(comm.size)])


def test_16_bit_inputs_are_normalized_in_float32(comm):
    ours = hvd.SyncBatchNorm(3)
    x = batch_of(comm.rank, (3, 2), torch.bfloat16).requires_grad_()
    y = ours(x)
    y.float().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16


def test_in_a_network_that_trains(comm):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), hvd.SyncBatchNorm(6), nn.ReLU(), nn.Linear(6, 3), hvd.SyncBatchNorm(3))
    single = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3), nn.BatchNorm1d(3))
    single.load_state_dict(net.state_dict())
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), net.named_parameters())
    plain = torch.optim.SGD(single.parameters(), lr=0.1)
    x = torch.randn(comm.size, 5, 4, generator=torch.Generator().manual_seed(5))
    for _ in range(3):
        optimizer.zero_grad()
        plain.zero_grad()
        net(x[comm.rank]).square().mul(torch.arange(3.0)).mean().backward()
        single(x.flatten(0, 1)).square().mul(torch.arange(3.0)).mean().backward()
        optimizer.step()
        plain.step()
    for p, q in zip(net.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_too_few_dimensions_or_values_are_refused(comm):
    with pytest.raises(ValueError, match="2D"):
        hvd.SyncBatchNorm(3)(torch.ones(3))
    rows = 1 if comm.rank == 0 else 0
    if comm.size > 1:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            hvd.SyncBatchNorm(3)(torch.ones(rows, 3))
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum) == comm.size
