"""DistributedOptimizer trains as one process on everybody's data would, for any model, optimizer and order of gradients."""

from __future__ import annotations

import contextlib
import copy
import os
import warnings

import pytest
import roundel.torch as hvd
import torch
from torch import nn

TEAMS = [("shm", 1), ("shm", 2), ("shm", 3), ("tcp", 2), ("hosts", 4)]
ROWS = 6  # of every rank's batch


@contextlib.contextmanager
def bucket_bytes(size: str):
    """For optimizers that take their first step inside."""
    os.environ["ROUNDEL_BUCKET_BYTES"] = size
    try:
        yield
    finally:
        del os.environ["ROUNDEL_BUCKET_BYTES"]


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 2)).to(dtype)


def batch(rank: int, step: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(ROWS, 5, generator=random).to(dtype), torch.randn(ROWS, 2, generator=random).to(dtype)


def everyones_batch(size: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    xs, ys = zip(*(batch(r, step) for r in range(size)), strict=True)
    return torch.cat(xs), torch.cat(ys)


def loss_of(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.mse_loss(model(data[0]), data[1])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches) -> None:
    for data in batches:
        optimizer.zero_grad()
        loss_of(model, data).backward()
        optimizer.step()


def distribute(model: nn.Module, optimizer: torch.optim.Optimizer, **arguments) -> torch.optim.Optimizer:
    return hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), **arguments)


def sgd(model: nn.Module, **arguments) -> torch.optim.Optimizer:
    return distribute(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **arguments)


def assert_same_model_on_all_ranks(comm, model: nn.Module) -> None:
    for name, p in model.state_dict().items():
        bits = p.detach().reshape(1, -1).contiguous().view(torch.uint8)
        everyones = hvd.allgather(bits)
        assert torch.equal(everyones, everyones[:1].expand_as(everyones)), f"ranks hold different bits of {name}"


def assert_close_models(model: nn.Module, expected: nn.Module, **tolerance) -> None:
    for (name, p), q in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "Adam": (torch.optim.Adam, {"lr": 0.01}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.01}),
}


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
@pytest.mark.parametrize("size_of_buckets", ["1", "1K", "8M"])
def test_trains_as_one_process_on_everybodys_batch(comm, kind, size_of_buckets):
    optimizer_class, hyper = OPTIMIZERS[kind]
    model, single = mlp(), mlp()
    with bucket_bytes(size_of_buckets):
        train(
            model,
            distribute(model, optimizer_class(model.parameters(), **hyper)),
            [batch(comm.rank, step) for step in range(6)],
        )
    train(single, optimizer_class(single.parameters(), **hyper), [everyones_batch(comm.size, step) for step in range(6)])
    assert_close_models(model, single)
    assert_same_model_on_all_ranks(comm, model)


def test_sum_is_average_times_the_number_of_ranks(comm):
    model, single = mlp(), mlp()
    optimizer = distribute(model, torch.optim.SGD(model.parameters(), lr=0.1 / comm.size), op=hvd.Sum)
    train(model, optimizer, [batch(comm.rank, step) for step in range(4)])
    train(single, torch.optim.SGD(single.parameters(), lr=0.1), [everyones_batch(comm.size, step) for step in range(4)])
    assert_close_models(model, single)


@pytest.mark.parametrize("op", ["Min", "Max", "Product"])
def test_other_operators_count_a_missing_gradient_as_zero(comm, op):
    p, q, unused = (nn.Parameter(torch.zeros(3)) for _ in range(3))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p, q, unused], lr=1.0), op=hvd.__dict__[op])
    for _ in range(2):
        optimizer.zero_grad()
        values = torch.tensor([1.0, -2.0, 3.0])
        loss = (p * values * (comm.rank + 1)).sum()
        if comm.rank == 0:
            loss = loss + (q * values).sum()
        loss.backward()
        optimizer.step()
        everyones = torch.stack([values * (r + 1) for r in range(comm.size)])
        with_zeros = torch.stack([values, *[torch.zeros(3)] * (comm.size - 1)])
        reduce = {"Min": lambda x: x.amin(0), "Max": lambda x: x.amax(0), "Product": lambda x: x.prod(0)}[op]
        assert torch.equal(p.grad, reduce(everyones))
        assert torch.equal(q.grad, reduce(with_zeros))
        assert unused.grad is None


class Branches(nn.Module):
    """Three branches; which are used, and in which order, is up to the caller."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(5, 8)
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 2)) for _ in range(3))

    def forward(self, x: torch.Tensor, order: list[int]) -> torch.Tensor:
        x = self.stem(x)
        return sum(self.branches[i](x) for i in order)


@pytest.mark.parametrize("size_of_buckets", ["1", "8M"])
def test_gradients_may_become_ready_in_different_order_on_different_ranks(comm, size_of_buckets):
    model, single = Branches(), Branches()
    with bucket_bytes(size_of_buckets):
        optimizer = sgd(model)
        for step in range(5):
            x, y = batch(comm.rank, step)
            order = [(i * (1 if comm.rank % 2 else -1) + comm.rank + step) % 3 for i in range(3)]
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x, order), y).backward()
            optimizer.step()
    alone = torch.optim.SGD(single.parameters(), lr=0.1, momentum=0.9)
    for step in range(5):
        x, y = everyones_batch(comm.size, step)
        alone.zero_grad()
        nn.functional.mse_loss(single(x, [0, 1, 2]), y).backward()
        alone.step()
    assert_close_models(model, single)
    assert_same_model_on_all_ranks(comm, model)


@pytest.mark.parametrize("size_of_buckets", ["1", "8M"])
def test_branches_used_by_some_ranks_in_some_steps(comm, size_of_buckets):
    def used(rank: int, step: int) -> list[int]:
        return [0, 1] if rank == step % comm.size else [0]  # branch 2 never, by nobody

    model, single = Branches(), Branches()
    hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    never = copy.deepcopy(model.branches[2].state_dict())
    with bucket_bytes(size_of_buckets):
        optimizer = distribute(model, torch.optim.SGD(model.parameters(), **hyper))
        for step in range(6):
            x, y = batch(comm.rank, step)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x, used(comm.rank, step)), y).backward()
            optimizer.step()
            assert all(p.grad is None for p in model.branches[2].parameters())
            assert all(p.grad is not None for p in model.branches[1].parameters())
    alone = torch.optim.SGD(single.parameters(), **hyper)
    for step in range(6):
        alone.zero_grad()
        losses = [nn.functional.mse_loss(single(batch(r, step)[0], used(r, step)), batch(r, step)[1]) for r in range(comm.size)]
        torch.stack(losses).mean().backward()
        alone.step()
    assert_close_models(model, single)
    assert_same_model_on_all_ranks(comm, model)
    for name, p in model.branches[2].state_dict().items():
        assert torch.equal(p, never[name]), "weight decay changed a parameter without gradient"


def test_a_parameter_used_by_no_rank_in_one_step_stays_in_that_step(comm):
    model = Branches()
    optimizer = distribute(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    for step, order in enumerate([[0, 1, 2], [0, 2], [0, 1, 2], [0]]):
        before = [p.detach().clone() for p in model.branches[1].parameters()]
        optimizer.zero_grad()
        x, y = batch(comm.rank, step)
        nn.functional.mse_loss(model(x, order), y).backward()
        optimizer.step()
        for p, q in zip(model.branches[1].parameters(), before, strict=True):
            assert (p.grad is not None) == (1 in order)
            assert torch.equal(p, q) == (1 not in order)


def zero_by_optimizer(model, optimizer):
    optimizer.zero_grad()


def zero_by_optimizer_in_place(model, optimizer):
    optimizer.zero_grad(set_to_none=False)


def zero_by_model(model, optimizer):
    model.zero_grad()


def zero_by_model_in_place(model, optimizer):
    model.zero_grad(set_to_none=False)


def zero_by_new_tensors(model, optimizer):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


def zero_by_turns(model, optimizer):
    optimizer.zero_grad(set_to_none=bool(torch.randint(2, ())))


@pytest.mark.parametrize(
    "zero",
    [
        "zero_by_optimizer",
        "zero_by_optimizer_in_place",
        "zero_by_model",
        "zero_by_model_in_place",
        "zero_by_new_tensors",
        "zero_by_turns",
    ],
)
@pytest.mark.parametrize("passes", [1, 2])
def test_every_way_to_zero_gradients(comm, zero, passes):
    model, single = mlp(), mlp()
    with bucket_bytes("1K"):
        optimizer = sgd(model, backward_passes_per_step=passes)
        alone = torch.optim.SGD(single.parameters(), lr=0.1, momentum=0.9)
        for step in range(5):
            for net, opt in ((model, optimizer), (single, alone)):
                globals()[zero](net, opt)
                for micro in range(passes):
                    data = (
                        (everyones_batch(comm.size, 10 * step + micro))
                        if net is single
                        else batch(comm.rank, 10 * step + micro)
                    )
                    loss_of(net, data).backward()
                opt.step()
    assert_close_models(model, single)
    assert_same_model_on_all_ranks(comm, model)


@pytest.mark.parametrize("size_of_buckets", ["1", "8M"])
def test_parameters_used_in_one_of_two_backward_passes(comm, size_of_buckets):
    model, single = Branches(), Branches()
    for parameter in [*model.stem.parameters(), *single.stem.parameters()]:
        parameter.requires_grad_(False)
    orders = [[0, 1], [2, 0]]  # in the second pass the last gradients are those of branch 2, which are not complete
    with bucket_bytes(size_of_buckets):
        optimizer = sgd(model, backward_passes_per_step=2)
        alone = torch.optim.SGD(single.parameters(), lr=0.1, momentum=0.9)
        for step in range(4):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            alone.zero_grad(set_to_none=step % 2 == 0)
            for micro in (0, 1):
                x, y = batch(comm.rank, 10 * step + micro)
                nn.functional.mse_loss(model(x, orders[micro]), y).backward()
                x, y = everyones_batch(comm.size, 10 * step + micro)
                nn.functional.mse_loss(single(x, orders[micro]), y).backward()
            optimizer.step()
            alone.step()
    assert_close_models(model, single)


def test_two_losses_with_a_backward_each(comm):
    model, single = Branches(), Branches()
    for parameter in [*model.stem.parameters(), *single.stem.parameters()]:
        parameter.requires_grad_(False)
    with bucket_bytes("1"):
        optimizer = sgd(model)
        alone = torch.optim.SGD(single.parameters(), lr=0.1, momentum=0.9)
        for step in range(4):
            for net, opt, (x, y) in (
                (model, optimizer, batch(comm.rank, step)),
                (single, alone, everyones_batch(comm.size, step)),
            ):
                opt.zero_grad()
                for branch in (0, 1):
                    nn.functional.mse_loss(net(x, [branch]), y).backward()
                opt.step()
    assert_close_models(model, single)


def test_gradients_that_were_never_zeroed_go_on_accumulating(comm):
    model, single = mlp(), mlp()
    optimizer, alone = sgd(model), torch.optim.SGD(single.parameters(), lr=0.1, momentum=0.9)
    for step in range(4):
        loss_of(model, batch(comm.rank, step)).backward()
        optimizer.step()
        loss_of(single, everyones_batch(comm.size, step)).backward()
        alone.step()
    assert_close_models(model, single)


def test_gradients_set_by_hand_are_reduced(comm):
    p = nn.Parameter(torch.zeros(3))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p], lr=1.0))
    for step in range(1, 4):
        p.grad = torch.full((3,), float(comm.rank))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full((3,), -step * (comm.size - 1) / 2))


def test_gradients_are_views_of_buckets_after_the_first_step(comm):
    if comm.size == 1:
        return
    model = mlp()
    with bucket_bytes("1K"):
        optimizer = sgd(model)
        for step in range(3):
            optimizer.zero_grad(set_to_none=step == 1)
            loss_of(model, batch(comm.rank, step)).backward()
            optimizer.step()
            buckets = optimizer._reducer.buckets
            assert len(buckets) == 3
            assert sum(len(bucket.params) for bucket in buckets) == 6
            for bucket in buckets:
                for p, view in zip(bucket.params, bucket.views, strict=True):
                    assert p.grad.data_ptr() == view.data_ptr()
                    assert p.grad.untyped_storage().data_ptr() == bucket.views[0].untyped_storage().data_ptr()


def test_a_gradient_already_in_its_bucket_is_not_copied(comm):
    if comm.size == 1:
        return
    model = mlp()
    optimizer = sgd(model)
    train(model, optimizer, [batch(comm.rank, 0)])
    optimizer.zero_grad(set_to_none=False)
    versions = [bucket.views[0]._version for bucket in optimizer._reducer.buckets]
    loss_of(model, batch(comm.rank, 1)).backward()
    added = [bucket.views[0]._version - v for bucket, v in zip(optimizer._reducer.buckets, versions, strict=True)]
    assert added == [2 * len(bucket.params) for bucket in optimizer._reducer.buckets]  # autograd's sum and the flag
    optimizer.step()


def test_buckets_are_on_their_way_before_backward_ends(comm):
    if comm.size == 1:
        return
    model = mlp()
    seen = []
    with bucket_bytes("1"):
        optimizer = sgd(model)
        model[0].weight.register_post_accumulate_grad_hook(lambda _: seen.append(optimizer._reducer.next_launch))
        train(model, optimizer, [batch(comm.rank, step) for step in range(3)])
    assert len(optimizer._reducer.buckets) == 6
    assert seen == [0, 5, 5]  # the first step learns the order; then the last bucket alone waits for step()


def test_mixed_dtypes_each_travel_in_buckets_of_their_own(comm):
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 8).to(torch.bfloat16)
            self.c, self.d = nn.Linear(8, 8).double(), nn.Linear(8, 2)

        def forward(self, x):
            x = self.b(self.a(x).to(torch.bfloat16))
            return self.d(self.c(x.double()).float())

    model, single = Mixed(), Mixed()
    for size_of_buckets in ("1", "8M"):
        with bucket_bytes(size_of_buckets):
            train(model, sgd(model), [batch(comm.rank, step) for step in range(4)])
        alone = torch.optim.SGD(single.parameters(), lr=0.1, momentum=0.9)
        for step in range(4):
            alone.zero_grad()
            torch.stack([loss_of(single, batch(r, step)) for r in range(comm.size)]).mean().backward()
            alone.step()
        assert_close_models(model, single, rtol=0.02, atol=0.02)
        assert_same_model_on_all_ranks(comm, model)


def test_a_scattered_dtype_does_not_hold_up_the_others(comm):
    if comm.size == 1:
        return
    layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(8))
    scales = nn.ParameterList(
        nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(2)
    )  # before and behind the layers
    seen = []
    with bucket_bytes("256"):
        optimizer = sgd(nn.ModuleList([layers, scales]))
        layers[0].bias.register_post_accumulate_grad_hook(lambda _: seen.append(optimizer._reducer.next_launch))
        for _ in range(2):
            optimizer.zero_grad()
            x = torch.ones(1, 8) * scales[0].float().sum()
            for layer in layers:
                x = layer(x)
            (x * scales[1].float().sum()).sum().backward()
            optimizer.step()
    buckets = optimizer._reducer.buckets
    assert [p.dtype for p in buckets[-1].params] == [torch.float64] * 2
    assert len(buckets) > 6 and seen[1] >= len(buckets) - 2


def test_one_giant_parameter_among_small_ones(comm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 100_000), nn.Linear(100_000, 2, bias=False))
    single = copy.deepcopy(model)
    with bucket_bytes("64K"):
        optimizer = distribute(model, torch.optim.SGD(model.parameters(), lr=1e-3))
        train(model, optimizer, [batch(comm.rank, step) for step in range(2)])
    if comm.size > 1:
        giants = [bucket for bucket in optimizer._reducer.buckets if any(p.numel() > 99_999 for p in bucket.params)]
        assert [len(bucket.params) for bucket in giants] == [1, 1, 1]
    alone = torch.optim.SGD(single.parameters(), lr=1e-3)
    train(single, alone, [everyones_batch(comm.size, step) for step in range(2)])
    assert_close_models(model, single, rtol=1e-4, atol=1e-5)


def test_frozen_empty_scalar_and_strided_parameters(comm):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.frozen = nn.Linear(5, 4).requires_grad_(False)
            self.transposed = nn.Parameter(torch.randn(2, 4).t())
            self.scale = nn.Parameter(torch.tensor(1.5))
            self.empty = nn.Parameter(torch.empty(0, 2))

        def forward(self, x):
            return self.frozen(x) @ self.transposed * self.scale + self.empty.sum()

    model, single = Odd(), Odd()
    train(model, sgd(model), [batch(comm.rank, step) for step in range(4)])
    alone = torch.optim.SGD(single.parameters(), lr=0.1, momentum=0.9)
    train(single, alone, [everyones_batch(comm.size, step) for step in range(4)])
    assert_close_models(model, single)
    assert model.frozen.weight.grad is None
    assert model.empty.grad is not None


def test_an_optimizer_of_frozen_parameters_has_nothing_to_do(comm):
    model = nn.Linear(2, 2).requires_grad_(False)
    optimizer = sgd(model)
    optimizer.step()
    optimizer.zero_grad()


def test_tied_weights(comm):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.out = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))

    model, single = Tied(), Tied()
    named = list(model.named_parameters(remove_duplicate=False))
    assert len(named) == 6 and len(list(model.parameters())) == 5
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), named_parameters=named)
    train(model, optimizer, [batch(comm.rank, step) for step in range(4)])
    alone = torch.optim.SGD(single.parameters(), lr=0.1, momentum=0.9)
    train(single, alone, [everyones_batch(comm.size, step) for step in range(4)])
    assert_close_models(model, single)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_compressed_gradients_train_nearly_alike_and_exactly_alike_on_all_ranks(comm, kind):
    model, single = mlp(), mlp()
    with bucket_bytes("1K"):
        optimizer = sgd(model, compression=getattr(hvd.Compression, kind))
        train(model, optimizer, [batch(comm.rank, step) for step in range(4)])
    alone = torch.optim.SGD(single.parameters(), lr=0.1, momentum=0.9)
    train(single, alone, [everyones_batch(comm.size, step) for step in range(4)])
    assert_close_models(model, single, rtol=0, atol={"fp16": 1e-3, "bf16": 1e-2}[kind])
    assert_same_model_on_all_ranks(comm, model)
    if comm.size > 1:
        wire = {"fp16": torch.float16, "bf16": torch.bfloat16}[kind]
        for p in model.parameters():  # what came off the wire was of 16 bits
            assert torch.equal(p.grad, p.grad.to(wire).float())


def test_compression_keeps_track_of_parameters_without_gradient(comm):
    model = Branches()
    optimizer = sgd(model, compression=hvd.Compression.fp16)
    for step in range(3):
        optimizer.zero_grad()
        model(batch(comm.rank, step)[0], [0, 1] if comm.rank == 0 else [0]).sum().backward()
        optimizer.step()
        assert all(p.grad is not None for p in model.branches[1].parameters())
        assert all(p.grad is None for p in model.branches[2].parameters())
