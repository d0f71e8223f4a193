"""roundel.optim under DistributedOptimizer: fused steps on gradients that are views of its buckets, and loss scaling."""

from __future__ import annotations

import contextlib

import pytest
import roundel.optim
import roundel.torch as hvd
import torch
from roundel.errors import RoundelError
from test_torch_optimizer import (
    assert_close_models,
    assert_same_model_on_all_ranks,
    batch,
    distribute,
    everyones_batch,
    loss_of,
    mlp,
    train,
)

TEAMS = [("shm", 2), ("tcp", 2)]

RULES = {"SGD": {"lr": 0.1, "momentum": 0.9}, "AdamW": {"lr": 0.01}, "LAMB": {"lr": 0.01}}


def backward(model, rank: int, step: int, scale: float = 1.0) -> None:
    (loss_of(model, batch(rank, step, next(model.parameters()).dtype)) * scale).backward()


@pytest.mark.parametrize("name", RULES)
def test_trains_as_one_process_would(comm, name):
    model, single = mlp(), mlp()
    kind = getattr(roundel.optim, name)
    optimizer = distribute(model, kind(model.parameters(), **RULES[name]))
    train(model, optimizer, [batch(comm.rank, step) for step in range(6)])
    train(single, kind(single.parameters(), **RULES[name]), [everyones_batch(comm.size, step) for step in range(6)])
    assert isinstance(optimizer, kind)
    assert_close_models(model, single)
    assert_same_model_on_all_ranks(comm, model)


def test_gradients_are_views_of_the_buckets_and_stay_where_they_are(comm):
    model = mlp()
    optimizer = distribute(model, roundel.optim.AdamW(model.parameters(), lr=0.01, max_norm=1.0))
    places, norms = [], []
    for step in range(4):
        optimizer.zero_grad()
        backward(model, comm.rank, step)
        optimizer.step()
        places.append([p.grad.data_ptr() for p in model.parameters()])
        norms.append(optimizer.last_grad_norm)
    assert places[1] == places[2] == places[3]
    everyones = hvd.allgather_object(norms)
    assert all(other == norms for other in everyones)
    assert_same_model_on_all_ranks(comm, model)


def test_clipping_takes_the_norm_of_reduced_gradients(comm):
    model, single = mlp(), mlp()
    optimizer = distribute(model, roundel.optim.SGD(model.parameters(), lr=0.1, max_norm=0.05))
    alone = torch.optim.SGD(single.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        backward(model, comm.rank, step)
        optimizer.step()
        alone.zero_grad()
        loss_of(single, everyones_batch(comm.size, step)).backward()
        norm = torch.nn.utils.clip_grad_norm_(single.parameters(), 0.05)
        alone.step()
        assert optimizer.last_grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert_close_models(model, single)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_loss_scaler_skips_on_all_ranks_or_none(comm, ours, dtype):
    """An infinity on one rank only."""
    model = mlp(getattr(torch, dtype))
    options = {"master_weights": True} if ours else {}
    kind = roundel.optim.SGD if ours else torch.optim.SGD
    optimizer = distribute(model, kind(model.parameters(), lr=0.1, **options))
    scaler = roundel.optim.LossScaler(init_scale=256.0)
    for step in range(4):
        optimizer.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]
        backward(model, comm.rank, step, scaler.get_scale() * (float("inf") if (step, comm.rank) == (1, 1) else 1))
        scaler.step(optimizer)
        scaler.update()
        unchanged = all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert unchanged == (step == 1)
        assert scaler.get_scale() == (256 if step == 0 else 128)
    assert_same_model_on_all_ranks(comm, model)


def test_grad_scaler_of_torch_needs_reduced_gradients(comm):
    """It looks for infinities before step() reduces them, where ranks could disagree."""
    model = mlp()
    optimizer = distribute(model, roundel.optim.SGD(model.parameters(), lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch(comm.rank, step)) * (float("nan") if (step, comm.rank) == (1, 1) else 1)).backward()
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (256 if step == 0 else 128)
    assert_same_model_on_all_ranks(comm, model)
    optimizer.zero_grad()
    scaler.scale(loss_of(model, batch(comm.rank, 3))).backward()
    with pytest.raises(RoundelError, match="GradScaler looked at gradients that were not yet reduced"):
        scaler.step(optimizer)
    with contextlib.suppress(AttributeError):
        del optimizer.grad_scale, optimizer.found_inf


def test_state_goes_to_all_ranks(comm):
    model = mlp(torch.bfloat16)
    if comm.rank == 0:
        first = roundel.optim.AdamW(model.parameters(), lr=0.02, master_weights=True)
        for step in range(2):
            first.zero_grad()
            backward(model, 0, step)
            first.step()
    optimizer = roundel.optim.AdamW(model.parameters(), lr=0.01, master_weights=True)
    if comm.rank == 0:
        optimizer.load_state_dict(first.state_dict())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = distribute(model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert all(state["step"] == 2 and state["master"].dtype == torch.float32 for state in optimizer.state.values())
    train(model, optimizer, [batch(comm.rank, step, torch.bfloat16) for step in range(2, 4)])
    assert_same_model_on_all_ranks(comm, model)


def test_masters_follow_adasum(comm):
    """It moves parameters after the step: a next step with no gradient to speak of must leave them where they are."""
    model = mlp(torch.bfloat16)
    optimizer = roundel.optim.SGD(model.parameters(), lr=0.5, master_weights=True)
    optimizer = distribute(model, optimizer, op=hvd.Adasum)
    backward(model, comm.rank, 0)
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad.zero_()
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert_same_model_on_all_ranks(comm, model)


def bytes_of_gradients(optimizer: torch.optim.Optimizer) -> int:
    return sum(view.nbytes for bucket in optimizer._reducer.buckets for view in bucket.views)


def test_frozen_parameters_cost_no_collective(comm):
    """Frozen before: they are in no bucket. Frozen in mid-training: not after wrapping again, and their state can go."""
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = distribute(model, roundel.optim.AdamW(model.parameters(), lr=0.01))
    train(model, optimizer, [batch(comm.rank, step) for step in range(2)])
    trained = [p for layer in (model[2], model[4]) for p in layer.parameters()]
    assert bytes_of_gradients(optimizer) == sum(p.nbytes for p in trained)
    assert set(optimizer.state) == set(trained)
    model[2].requires_grad_(False)
    optimizer = distribute(model, optimizer)
    before = model[2].weight.detach().clone()
    released = optimizer.release_frozen()
    assert released == 2 * (model[2].weight.nbytes + model[2].bias.nbytes) + 2 * 4
    train(model, optimizer, [batch(comm.rank, step) for step in range(2, 4)])
    assert bytes_of_gradients(optimizer) == sum(p.nbytes for p in model[4].parameters())
    assert set(optimizer.state) == set(model[4].parameters())
    assert torch.equal(model[2].weight, before)
    assert_same_model_on_all_ranks(comm, model)
