"""DistributedOptimizer when something goes wrong: no rank waits, no half of a step is used, and the text says what to do."""

from __future__ import annotations

import os
import time

import pytest
import roundel
import roundel.torch as hvd
import torch
from test_torch_optimizer import (
    Branches,
    assert_close_models,
    assert_same_model_on_all_ranks,
    batch,
    bucket_bytes,
    everyones_batch,
    loss_of,
    mlp,
    sgd,
    train,
)
from torch import nn

TEAMS = [("shm", 1), ("shm", 3), ("tcp", 2)]


class Fail(Exception):
    pass


class FailsInBackward(torch.autograd.Function):
    """The identity, until `armed`."""

    armed = False

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if FailsInBackward.armed:
            raise Fail("no backward")
        return gradient


class Fragile(nn.Module):
    """A mlp whose backward can fail in the middle: after layer 4's gradients, before those of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x):
        return self.layers[3:](FailsInBackward.apply(self.layers[:3](x)))


def fail_in_backward(model, data):
    FailsInBackward.armed = True
    try:
        with pytest.raises(Fail):
            loss_of(model, data).backward()
    finally:
        FailsInBackward.armed = False


def alone_on(single, batches):
    train(single, torch.optim.SGD(single.parameters(), lr=0.1, momentum=0.9), batches)


def test_too_many_backward_passes_name_the_parameter(comm):
    if comm.size == 1:
        return
    for warm_up in (0, 1):
        for passes in (1, 2):
            model = mlp()
            optimizer = sgd(model, backward_passes_per_step=passes)
            for step in range(warm_up):
                optimizer.zero_grad()
                for _ in range(passes):
                    loss_of(model, batch(comm.rank, step)).backward()
                optimizer.step()
            for _ in range(passes):
                loss_of(model, batch(comm.rank, 1)).backward()
            with pytest.raises(roundel.RoundelError, match=rf"gradient of '4\.\w+' was computed more than {passes} times"):
                loss_of(model, batch(comm.rank, 1)).backward()
            optimizer.zero_grad()  # gives up
            for _ in range(passes):
                loss_of(model, batch(comm.rank, 2)).backward()
            optimizer.step()
            assert_same_model_on_all_ranks(comm, model)


def test_fewer_backward_passes_than_announced_are_reduced_as_they_are(comm):
    model, single = mlp(), mlp()
    optimizer = sgd(model, backward_passes_per_step=3)
    train(model, optimizer, [batch(comm.rank, step) for step in range(3)])
    alone_on(single, [everyones_batch(comm.size, step) for step in range(3)])
    assert_close_models(model, single)


@pytest.mark.parametrize("warm_up", [0, 1])
def test_zero_grad_between_backward_and_step_is_an_error(comm, warm_up):
    if comm.size == 1:
        return
    model, single = mlp(), mlp()
    optimizer = sgd(model)
    train(model, optimizer, [batch(comm.rank, step) for step in range(warm_up)])
    loss_of(model, batch(comm.rank, warm_up)).backward()
    for arguments in ({}, {"set_to_none": False}):
        with pytest.raises(roundel.RoundelError, match=r"zero_grad\(\) between backward\(\) and step"):
            optimizer.zero_grad(**arguments)
    if warm_up:
        return optimizer.synchronize()
    optimizer.step()  # nothing was lost
    alone_on(single, [everyones_batch(comm.size, 0)])
    assert_close_models(model, single)
    return None


def test_zero_grad_between_passes_of_one_step_starts_the_step_over(comm):
    model, single = mlp(), mlp()
    optimizer = sgd(model, backward_passes_per_step=2)
    alone = torch.optim.SGD(single.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        for net, opt, data in ((model, optimizer, batch(comm.rank, step)), (single, alone, everyones_batch(comm.size, step))):
            opt.zero_grad()
            loss_of(net, data).backward()
            opt.zero_grad()
            loss_of(net, data).backward()
            loss_of(net, data).backward()
            opt.step()
    assert_close_models(model, single)


def test_step_in_skip_synchronize_without_synchronize_is_an_error(comm):
    if comm.size == 1:
        return
    model = mlp()
    optimizer = sgd(model)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, batch(comm.rank, step)).backward()
        before = model[0].weight.detach().clone()
        with pytest.raises(roundel.RoundelError, match=r"call synchronize\(\) first"), optimizer.skip_synchronize():
            optimizer.step()
        assert torch.equal(model[0].weight, before)
        optimizer.step()
        assert not torch.equal(model[0].weight, before)


def clip(model):
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)


def scale_one(model):
    model[4].weight.grad.mul_(0.5)


def replace_one(model):
    model[4].weight.grad = model[4].weight.grad * 0.5


def replace_the_last_to_become_ready(model):
    model[0].bias.grad = model[0].bias.grad.clone()


def drop_one(model):
    model[2].bias.grad = None


def zero_by_model(model):
    model.zero_grad(set_to_none=False)


def drop_by_model(model):
    model.zero_grad()


@pytest.mark.parametrize(
    "change",
    ["clip", "scale_one", "replace_one", "replace_the_last_to_become_ready", "drop_one", "zero_by_model", "drop_by_model"],
)
@pytest.mark.parametrize("size_of_buckets", ["1", "8M"])
def test_changing_gradients_while_they_are_reduced_is_an_error(comm, change, size_of_buckets):
    if comm.size == 1:
        return
    for warm_up in (0, 1, 2):
        model = mlp()
        with bucket_bytes(size_of_buckets):
            optimizer = sgd(model)
            train(model, optimizer, [batch(comm.rank, step) for step in range(warm_up)])
            optimizer.zero_grad()
            loss_of(model, batch(comm.rank, 7)).backward()
            before = model[4].weight.detach().clone()
            globals()[change](model)
            with pytest.raises(
                roundel.RoundelError, match=r"gradients? of '\d\.\w+'.*: changed between backward\(\) and step\(\)"
            ):
                optimizer.step()
            assert torch.equal(model[4].weight, before)
            train(model, optimizer, [batch(comm.rank, 8)])  # and goes on
        assert_same_model_on_all_ranks(comm, model)


@pytest.mark.parametrize("size_of_buckets", ["1", "8M"])
@pytest.mark.parametrize("warm_up", [0, 2])
def test_going_on_after_an_exception_in_forward_or_backward_of_all_ranks(comm, size_of_buckets, warm_up):
    model, single = Fragile(), Fragile()
    with bucket_bytes(size_of_buckets):
        optimizer = sgd(model)
        train(model, optimizer, [batch(comm.rank, step) for step in range(warm_up)])
        for _ in range(2):
            optimizer.zero_grad()
            fail_in_backward(model, batch(comm.rank, 50))
            assert model.layers[4].weight.grad is not None and model.layers[0].weight.grad is None
        optimizer.zero_grad(set_to_none=False)
        with pytest.raises(RuntimeError):
            model(torch.ones(3, 3))  # forward: wrong shape
        train(model, optimizer, [batch(comm.rank, step) for step in range(warm_up, 4)])
    alone_on(single, [everyones_batch(comm.size, step) for step in range(4)])
    assert_close_models(model, single)
    assert_same_model_on_all_ranks(comm, model)


def test_step_after_a_failed_backward_uses_what_there_is_as_torch_does(comm):
    model = Fragile()
    optimizer = sgd(model)
    train(model, optimizer, [batch(comm.rank, 0)])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.zero_grad()
    fail_in_backward(model, batch(comm.rank, 1))
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (not name.startswith("layers.4")), name
    assert_same_model_on_all_ranks(comm, model)


@pytest.mark.parametrize("size_of_buckets", ["1", "8M"])
def test_a_rank_that_gives_up_is_named_by_the_others_and_all_can_go_on(comm, size_of_buckets):
    if comm.size == 1:
        return
    bad = comm.size - 1
    model, single = Fragile(), Fragile()
    with bucket_bytes(size_of_buckets):
        optimizer = sgd(model)
        train(model, optimizer, [batch(comm.rank, 0)])
        before = model.layers[0].weight.detach().clone()
        optimizer.zero_grad()
        if comm.rank == bad:
            fail_in_backward(model, batch(comm.rank, 50))
        else:
            loss_of(model, batch(comm.rank, 50)).backward()
            with pytest.raises(roundel.RoundelError, match=f"rank {comm.rank}: rank {bad} gave up this step"):
                optimizer.step()
            assert torch.equal(model.layers[0].weight, before)
        train(model, optimizer, [batch(comm.rank, 1)])
    alone_on(single, [everyones_batch(comm.size, step) for step in range(2)])
    assert_close_models(model, single)
    assert_same_model_on_all_ranks(comm, model)


@pytest.mark.parametrize("size_of_buckets", ["1", "8M"])
def test_a_rank_whose_backward_fails_after_all_its_gradients_gives_up_too(comm, size_of_buckets):
    if comm.size == 1:
        return
    model = mlp()
    with bucket_bytes(size_of_buckets):
        optimizer = sgd(model)
        train(model, optimizer, [batch(comm.rank, 0)])
        optimizer.zero_grad()
        x, y = batch(comm.rank, 1)
        through = FailsInBackward.apply(x.requires_grad_(True))
        if comm.rank == 0:
            fail_in_backward(model, (through, y))
            assert all(p.grad is not None for p in model.parameters())
            time.sleep(0.1)  # time for whatever was launched to finish
        else:
            loss_of(model, (through, y)).backward()
            with pytest.raises(roundel.RoundelError, match="rank 0 gave up"):
                optimizer.step()
        train(model, optimizer, [batch(comm.rank, 2)])
        assert_same_model_on_all_ranks(comm, model)


def test_a_rank_that_fails_before_any_gradient_gives_its_next_batch_instead(comm):
    model = Fragile()
    with bucket_bytes("1"):
        optimizer = sgd(model)
        train(model, optimizer, [batch(comm.rank, 0)])
        optimizer.zero_grad()
        if comm.rank == 0:
            with pytest.raises(RuntimeError):
                model(torch.ones(3, 3))
        train(model, optimizer, [batch(comm.rank, 1), batch(comm.rank, 2)])
    assert_same_model_on_all_ranks(comm, model)


def test_parameters_unfrozen_or_added_later_are_not_left_out_silently(comm):
    if comm.size == 1:
        return
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([*model[0].parameters(), *model[2].parameters()], lr=0.1))
    train(model, optimizer, [batch(comm.rank, 0)])
    before = model[0].weight.detach().clone()
    model[0].requires_grad_(True)
    loss_of(model, batch(comm.rank, 1)).backward()
    with pytest.raises(roundel.InvalidArgumentError, match="2 parameters have gradients but were frozen"):
        optimizer.step()
    assert torch.equal(model[0].weight, before)
    model[0].requires_grad_(False)
    model.zero_grad()
    optimizer.add_param_group({"params": model[4].parameters()})
    loss_of(model, batch(comm.rank, 1)).backward()
    with pytest.raises(roundel.InvalidArgumentError, match=r"DistributedOptimizer\(optimizer, ...\)"):
        optimizer.step()


def test_mistakes_in_named_parameters(comm):
    model = mlp()
    named = list(model.named_parameters())

    def make(names):
        return hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=names)

    for wrong, text in [
        (named[:-1], "1 of the optimizer's 6 parameters have no name"),
        ([], "6 of the optimizer's 6"),
        ([*named, ("0.weight", nn.Parameter(torch.ones(1)))], "each name once, got 0.weight"),
        (model.parameters(), "pairs such as"),
        (model.state_dict(), "pairs such as"),
    ]:
        with pytest.raises(ValueError, match=text):
            make(wrong)
    make([*named, ("somebody else's", nn.Parameter(torch.ones(1)))])  # more names than parameters
    make(None)
    make(iter(named))


def test_mistakes_in_other_arguments(comm):
    p = nn.Parameter(torch.ones(2))
    for passes in (0, -1):
        with pytest.raises(ValueError, match="backward_passes_per_step: expected at least 1"):
            hvd.DistributedOptimizer(torch.optim.SGD([p], lr=0.1), backward_passes_per_step=passes)
    if comm.size > 1:
        with pytest.raises(ValueError, match="99"):
            hvd.DistributedOptimizer(torch.optim.SGD([p], lr=0.1), op=99)
        wrong = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        with pytest.raises(roundel.InvalidArgumentError, match="got 'parameter 0' of torch.complex64"):
            hvd.DistributedOptimizer(torch.optim.SGD([wrong], lr=0.1))
    patched = torch.optim.SGD([p], lr=0.1)
    patched.step = lambda: None
    with pytest.raises(roundel.InvalidArgumentError, match="replaced one"):
        hvd.DistributedOptimizer(patched)
    assert "step" in vars(patched)
    assert not p._post_accumulate_grad_hooks  # nothing is left of what was refused


@pytest.mark.parametrize("what", ["shape", "same count", "number", "name", "op", "passes"])
def test_ranks_with_different_models_or_arguments_find_out_in_the_first_step(comm, what):
    if comm.size == 1:
        return
    last = comm.rank == comm.size - 1
    shapes, names, arguments = [(2, 3), (4,)], ["a", "b"], {}
    if last:
        if what == "op":
            arguments["op"] = hvd.Sum
        elif what == "passes":
            arguments["backward_passes_per_step"] = 2
        elif what == "name":
            names = ["a", "c"]
        elif what == "number":
            shapes, names = [(2, 3), (4,), (5,)], ["a", "b", "c"]
        else:
            shapes[0] = (2, 4) if what == "shape" else (3, 2)
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(params, lr=0.1), named_parameters=list(zip(names, params, strict=True)), **arguments
    )
    sum(p.sum() for p in params).backward()
    text = {
        "shape": r"'a' \(float32 of shape \(2, 3\)\) where rank \d has 'a' \(float32 of shape \(2, 4\)\)",
        "same count": r"'a' \(float32 of shape \(2, 3\)\) where rank \d has 'a' \(float32 of shape \(3, 2\)\)",
        "number": r"nothing more where rank \d has 'c' \(float32 of shape \(5,\)\)",
        "name": r"'b' \(float32 of shape \(4,\)\) where rank \d has 'c'",
        "op": r"Average, .* where rank \d has Sum,",
        "passes": "Average, .* 1 backward passes per step where rank . has .*2 backward passes",
    }[what]
    with pytest.raises(roundel.MismatchError, match=f"rank 0 has {text}"):
        optimizer.step()
    assert all(torch.equal(p, torch.ones_like(p)) for p in params)


def test_ranks_may_differ_in_the_size_of_buckets(comm):
    model, single = mlp(), mlp()
    with bucket_bytes(str(1 + 500 * comm.rank)):
        train(model, sgd(model), [batch(comm.rank, step) for step in range(3)])
    alone_on(single, [everyones_batch(comm.size, step) for step in range(3)])
    assert_close_models(model, single)


def test_an_unreadable_size_of_buckets_is_an_error_in_the_first_step(comm):
    if comm.size == 1:
        return
    model = mlp()
    optimizer = sgd(model)
    loss_of(model, batch(comm.rank, 0)).backward()
    os.environ["ROUNDEL_BUCKET_BYTES"] = "big"
    try:
        with pytest.raises(roundel.InvalidArgumentError, match="ROUNDEL_BUCKET_BYTES"):
            optimizer.step()
    finally:
        del os.environ["ROUNDEL_BUCKET_BYTES"]
    optimizer.step()
    assert_same_model_on_all_ranks(comm, model)


def test_a_parameter_that_one_rank_stopped_using_is_still_updated_there(comm):
    model = Branches()
    optimizer = sgd(model)
    for step in range(4):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        x, y = batch(comm.rank, step)
        order = [0] if comm.rank == 0 and step > 0 else [0, 1]
        nn.functional.mse_loss(model(x, order), y).backward()
        optimizer.step()
    assert_same_model_on_all_ranks(comm, model)
