"""DistributedOptimizer's further arguments: pre-division, groups, sparse gradients, process sets, Adasum, joining ranks."""

from __future__ import annotations

import warnings

import pytest
import roundel
import roundel.torch as hvd
import torch
from test_torch_optimizer import (
    assert_close_models,
    assert_same_model_on_all_ranks,
    batch,
    distribute,
    everyones_batch,
    loss_of,
    mlp,
    sgd,
    train,
)
from torch import nn

TEAMS = [("shm", 1), ("shm", 2), ("shm", 3), ("shm", 4), ("tcp", 2), ("tcp", 3), ("tcp", 4)]


def alone_on(single: nn.Module, batches) -> None:
    """The same in one process: plain SGD as in sgd()."""
    train(single, torch.optim.SGD(single.parameters(), lr=0.1, momentum=0.9), batches)


def check_trains_as_one(comm, steps: int = 3, **arguments) -> torch.optim.Optimizer:
    model, single = mlp(), mlp()
    optimizer = sgd(model, **arguments)
    train(model, optimizer, [batch(comm.rank, step) for step in range(steps)])
    alone_on(single, [everyones_batch(comm.size, step) for step in range(steps)])
    assert_close_models(model, single)
    assert_same_model_on_all_ranks(comm, model)
    return optimizer


@pytest.mark.parametrize("factor", [0.5, 2.0, 1000.0])
def test_predivision_changes_nothing_but_the_size_of_what_is_added(comm, factor):
    check_trains_as_one(comm, gradient_predivide_factor=factor)


def test_a_large_predivision_keeps_track_of_parameters_without_gradient_in_16_bits(comm):
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([used, unused], lr=1.0), gradient_predivide_factor=1e9, compression=hvd.Compression.fp16
    )
    for _ in range(2):
        optimizer.zero_grad()
        (used * 1e5).sum().backward()
        optimizer.step()
        assert used.grad is not None and unused.grad is None


@pytest.mark.parametrize("groups", [1, 2, 100, "lists"])
def test_groups_travel_together(comm, groups):
    model, single = mlp(), mlp()
    params = list(model.parameters())
    given = [params[0:3], [params[4]]] if groups == "lists" else groups
    optimizer = sgd(model, groups=given)
    train(model, optimizer, [batch(comm.rank, step) for step in range(3)])
    alone_on(single, [everyones_batch(comm.size, step) for step in range(3)])
    assert_close_models(model, single)
    if comm.size > 1:
        number = {p: i for i, p in enumerate(params)}
        together = sorted(sorted(number[p] for p in bucket.params) for bucket in optimizer._reducer.buckets)
        expected = {
            1: [[0, 1, 2, 3, 4, 5]],
            2: [[0, 1, 2], [3, 4, 5]],
            100: [[0], [1], [2], [3], [4], [5]],
            "lists": [[0, 1, 2], [3], [4], [5]],
        }[groups]
        assert together == expected


def test_num_groups_is_the_older_name_of_groups(comm):
    with pytest.warns(DeprecationWarning, match="num_groups"):
        optimizer = check_trains_as_one(comm, num_groups=3)
    assert comm.size == 1 or len(optimizer._reducer.buckets) == 3


def test_groups_of_several_dtypes(comm):
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([a, b], lr=1.0), groups=[[a, b]], op=hvd.Sum)
    (a.sum() * (comm.rank + 1) + b.sum()).backward()
    optimizer.step()
    torch.testing.assert_close(a.detach(), torch.full((3,), 1.0 - sum(range(1, comm.size + 1))))
    torch.testing.assert_close(b.detach(), torch.full((3,), 1.0 - comm.size, dtype=torch.float64))


class Lookup(nn.Module):
    """A table with sparse gradients and a layer with dense ones."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table, self.head = nn.Embedding(12, 4, sparse=sparse), nn.Linear(4, 1)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(words).mean(1)).sum()


def words(rank: int, step: int) -> torch.Tensor:
    return (torch.arange(6) * (rank + 2) + step).remainder(12).view(3, 2)


@pytest.mark.parametrize("as_dense", [False, True])
@pytest.mark.parametrize("op", ["Sum", "Average"])
def test_sparse_gradients(comm, as_dense, op):
    model, dense = Lookup(True), Lookup(False)
    optimizer = distribute(model, torch.optim.SGD(model.parameters(), lr=0.1), op=getattr(hvd, op), sparse_as_dense=as_dense)
    plain = torch.optim.SGD(dense.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        plain.zero_grad()
        model(words(comm.rank, step)).backward()
        optimizer.step()
        assert model.table.weight.grad.is_sparse and not model.head.weight.grad.is_sparse
        total = sum(dense(words(r, step)) for r in range(comm.size))
        (total / (comm.size if op == "Average" else 1)).backward()
        plain.step()
    assert_close_models(model, dense)
    assert_same_model_on_all_ranks(comm, model)


@pytest.mark.parametrize("as_dense", [False, True])
def test_sparse_gradients_of_one_rank_only_and_of_none(comm, as_dense):
    model = Lookup(True)
    optimizer = distribute(model, torch.optim.SGD(model.parameters(), lr=1.0), op=hvd.Sum, sparse_as_dense=as_dense)
    start = model.table.weight.detach().clone()
    for step in range(3):
        optimizer.zero_grad()
        loss = model.head(torch.ones(1, 4)).sum()
        if comm.rank == 0 and step < 2:
            loss = loss + model.table(torch.tensor([5])).sum()
        loss.backward()
        optimizer.step()
        assert (model.table.weight.grad is None) == (step == 2)
    start[5] -= 2.0
    torch.testing.assert_close(model.table.weight.detach(), start)


def test_an_optimizer_of_sparse_parameters_only(comm):
    table = nn.Embedding(10, 2, sparse=True)
    hvd.broadcast_parameters(table.state_dict())
    optimizer = distribute(table, torch.optim.SparseAdam(table.parameters(), lr=0.1))
    for step in range(2):
        optimizer.zero_grad()
        table(words(comm.rank, step).clamp(max=9)).square().sum().backward()
        optimizer.step()
    assert_same_model_on_all_ranks(comm, table)


def test_sparse_gradients_of_two_passes_and_with_an_operator_that_needs_them_dense(comm):
    model = Lookup(True)
    optimizer = distribute(model, torch.optim.SGD(model.parameters(), lr=1.0), op=hvd.Sum, backward_passes_per_step=2)
    before = model.table.weight.detach().clone()
    for _ in range(2):
        model.table(torch.tensor([comm.rank])).sum().backward()
    optimizer.step()
    before[: comm.size] -= 2.0
    torch.testing.assert_close(model.table.weight.detach(), before)
    if comm.size > 1:
        model = Lookup(True)
        optimizer = distribute(model, torch.optim.SGD(model.parameters(), lr=1.0), op=hvd.Max)
        model(words(0, 0)).backward()
        with pytest.raises(roundel.InvalidArgumentError, match="sparse_as_dense=True"):
            optimizer.step()


def test_changing_a_sparse_gradient_while_it_is_reduced_is_an_error(comm):
    if comm.size == 1:
        return
    model = Lookup(True)
    optimizer = distribute(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(2):  # before and after the plan
        model(words(comm.rank, step)).backward()
        model.table.weight.grad = model.table.weight.grad * 2
        with pytest.raises(roundel.RoundelError, match="'table.weight': changed between"):
            optimizer.step()
        optimizer.zero_grad()


def test_a_process_set_trains_for_itself(comm):
    if comm.size == 1:
        return
    sets = [hvd.add_process_set(list(range(first, comm.size, 2))) for first in (0, 1)]
    mine = sets[comm.rank % 2]
    model, single = mlp(), mlp()
    optimizer = sgd(model, process_set=mine)
    batches = [[batch(r, step) for r in mine.ranks] for step in range(3)]
    train(model, optimizer, [batches[step][mine.rank()] for step in range(3)])
    alone_on(single, [tuple(torch.cat(column) for column in zip(*step, strict=True)) for step in batches])
    assert_close_models(model, single)
    outside = mlp()
    optimizer = sgd(outside, process_set=sets[0])  # ranks that are not in it take their own steps
    train(outside, optimizer, [batch(comm.rank if comm.rank % 2 else 0, 0)])
    assert (optimizer._reducer is None) == (comm.rank % 2 == 1 or len(sets[0].ranks) == 1)
    with pytest.raises(roundel.InvalidArgumentError, match="not known to the job"):
        sgd(mlp(), process_set=hvd.ProcessSet([0]))
    assert all(hvd.remove_process_set(s) for s in sets)


def test_two_optimizers_in_turn_and_at_once(comm):
    models = [mlp() for _ in range(2)]
    single = mlp()
    optimizers = [sgd(model) for model in models]  # the same names in both
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        sum(loss_of(model, batch(comm.rank, step)) for model in models).backward()
        for optimizer in optimizers:
            optimizer.step()
    alone_on(single, [everyones_batch(comm.size, step) for step in range(3)])
    for model in models:
        assert_close_models(model, single)


def pairwise(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Adasum of two, in float64."""
    product, left, right = (a * b).sum(), (a * a).sum(), (b * b).sum()
    return a * (1 - product / (2 * left) if left else 1) + b * (1 - product / (2 * right) if right else 1)


def adasum(parts: list[torch.Tensor]) -> torch.Tensor:
    """Over the tree: what exceeds a power of two goes into the ranks before it, then neighbours are combined."""
    parts = [part.double() for part in parts]
    power = 1 << (len(parts).bit_length() - 1)
    extra = len(parts) - power
    for i in range(extra):
        parts[power - extra + i] = pairwise(parts[power - extra + i], parts[power + i])
    parts = parts[:power]
    while len(parts) > 1:
        parts = [pairwise(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_adasum_combines_what_the_ranks_steps_changed(comm, kind):
    def make(model: nn.Module) -> torch.optim.Optimizer:
        return getattr(torch.optim, kind)(model.parameters(), lr=0.05)

    model = mlp()
    optimizer = distribute(model, make(model), op=hvd.Adasum)
    twins = [mlp() for _ in range(comm.size)]  # what every rank does
    steppers = [make(twin) for twin in twins]
    for step in range(2):
        starts = [p.detach().clone() for p in twins[0].parameters()]
        optimizer.zero_grad()
        loss_of(model, batch(comm.rank, step)).backward()
        optimizer.step()
        for rank, (twin, stepper) in enumerate(zip(twins, steppers, strict=True)):
            stepper.zero_grad()
            loss_of(twin, batch(rank, step)).backward()
            stepper.step()
        for i, start in enumerate(starts):
            moved = adasum([list(twin.parameters())[i].detach() - start for twin in twins])
            for twin in twins:
                list(twin.parameters())[i].data.copy_(start + moved)
    for p, q in zip(model.parameters(), twins[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert_same_model_on_all_ranks(comm, model)


def test_adasum_with_closures_compression_schedulers_and_what_it_refuses(comm):
    model = mlp()
    optimizer = distribute(model, torch.optim.SGD(model.parameters(), lr=0.05), op=hvd.Adasum, compression=hvd.Compression.bf16)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, batch(comm.rank, 0))
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer.step(closure) > 0
        scheduler.step()
    assert_same_model_on_all_ranks(comm, model)
    optimizer.synchronize()
    optimizer.set_backward_passes_per_step(2)
    if comm.size > 1:
        with pytest.raises(AssertionError, match="Adasum"), optimizer.skip_synchronize():
            pass


def test_setting_the_number_of_passes(comm):
    model, single = mlp(), mlp()
    optimizer = sgd(model)
    train(model, optimizer, [batch(comm.rank, 0)])
    optimizer.set_backward_passes_per_step(2)
    optimizer.zero_grad()
    for step in (1, 2):
        (loss_of(model, batch(comm.rank, step)) / 2).backward()
        if step == 1 and comm.size > 1:
            with pytest.raises(roundel.RoundelError, match="between backward"):
                optimizer.set_backward_passes_per_step(1)
    optimizer.step()
    both = [torch.cat(pair) for pair in zip(everyones_batch(comm.size, 1), everyones_batch(comm.size, 2), strict=True)]
    alone_on(single, [everyones_batch(comm.size, 0), tuple(both)])
    assert_close_models(model, single)
    with pytest.raises(ValueError, match="at least 1"):
        optimizer.set_backward_passes_per_step(0)


def test_mistakes_in_arguments_are_refused_and_leave_nothing(comm):
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    for arguments, text in (
        ({"gradient_predivide_factor": 2.0, "op": hvd.Sum}, "expected op to be Average"),
        ({"gradient_predivide_factor": 0.0}, "above 0"),
        ({"groups": 0}, "groups: expected a number from 1 on"),
        ({"groups": "two"}, "groups: expected"),
        ({"groups": [[p], [p]]}, "each parameter once"),
        ({"groups": [[p, 3]]}, "lists of parameters"),
        ({"compression": "fp16"}, "compression: expected"),
        ({"process_set": [0]}, "expected a ProcessSet"),
    ):
        with pytest.raises(ValueError, match=text):
            hvd.DistributedOptimizer(torch.optim.SGD([p, q], lr=0.1), **arguments)
    assert not p._post_accumulate_grad_hooks


@pytest.mark.parametrize("what", ["groups", "predivide", "sparse"])
def test_ranks_with_different_arguments_find_out_in_the_first_step(comm, what):
    if comm.size == 1:
        return
    last = comm.rank == comm.size - 1
    arguments = {
        "groups": {"groups": 2 if last else 1},
        "predivide": {"gradient_predivide_factor": 2.0 if last else 1.0},
        "sparse": {"sparse_as_dense": last},
    }[what]
    model = mlp()
    optimizer = sgd(model, **arguments)
    loss_of(model, batch(comm.rank, 0)).backward()
    with pytest.raises(roundel.MismatchError, match=r"rank 0 has Average.* where rank \d has Average"):
        optimizer.step()
