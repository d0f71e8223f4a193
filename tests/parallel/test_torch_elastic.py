"""hvd.elastic on a job that keeps its size: states, samplers, and training functions that go back to their last commit."""

from __future__ import annotations

import pytest
import roundel
import roundel.torch as hvd
import torch
from roundel.elastic import HostUpdateResult
from test_torch_optimizer import assert_same_model_on_all_ranks, batch, loss_of, mlp
from torch import nn

TEAMS = [("shm", 1), ("shm", 2), ("shm", 3), ("shm", 4), ("tcp", 2), ("tcp", 3), ("tcp", 4)]


def make(comm) -> hvd.elastic.TorchState:
    """A state that differs between ranks until it is synchronized."""
    model = mlp()
    nn.init.constant_(model[0].bias, comm.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * (comm.rank + 1), momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    sampler = hvd.elastic.ElasticSampler(range(100), seed=1)
    return hvd.elastic.TorchState(model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler, step=0, notes=[])


def take_step(comm, state: hvd.elastic.TorchState) -> None:
    state.optimizer.zero_grad()
    loss_of(state.model, batch(comm.rank, state.step)).backward()
    state.optimizer.step()
    state.step += 1


def test_sync_takes_everything_from_rank_0(comm):
    state = make(comm)
    state.step, state.notes = comm.rank, [comm.rank]
    state.save()
    state.sync()
    assert (state.step, state.notes) == (0, [0])
    assert bool((state.model[0].bias == 0).all())
    assert state.optimizer.param_groups[0]["lr"] == 0.1


def test_restore_goes_back_to_the_last_commit(comm):
    state = make(comm)
    state.sync()
    take_step(comm, state)
    state.commit()
    before = [p.detach().clone() for p in state.model.parameters()]
    take_step(comm, state)
    state.notes.append("forgotten")
    state.sampler.record_batch(0, 3)
    state.scheduler.step()
    assert not torch.equal(before[0], next(state.model.parameters()))
    state.restore()
    assert (state.step, state.notes, state.sampler.processed_num, state.scheduler.last_epoch) == (1, [], 0, 0)
    for p, q in zip(state.model.parameters(), before, strict=True):
        assert torch.equal(p, q)
    take_step(comm, state)
    assert_same_model_on_all_ranks(comm, state.model)
    state.model = replaced = mlp()  # another object takes its place
    nn.init.zeros_(replaced[0].bias)
    state.save()
    nn.init.ones_(replaced[0].bias)
    state.restore()
    assert state.model is replaced and bool((replaced[0].bias == 0).all())


def test_run_repeats_from_the_last_commit_after_an_internal_error(comm):
    seen, resets = [], []

    @hvd.elastic.run
    def train(state, steps, fail_at):
        """What is run."""
        while state.step < steps:
            seen.append(state.step)
            take_step(comm, state)
            if seen.count(fail_at) == 1 and state.step == fail_at + 1:
                raise roundel.HorovodInternalError("a collective failed")
            state.commit()
        return "done"

    state = make(comm)
    state.register_reset_callbacks([lambda: resets.append(state.step)])
    assert train(state, 4, fail_at=2) == "done"
    assert train.__doc__ == "What is run."
    assert seen == [0, 1, 2, 2, 3] and resets == [2]
    assert_same_model_on_all_ranks(comm, state.model)
    reference = make(comm)
    reference.sync()
    for _ in range(4):
        take_step(comm, reference)
    for p, q in zip(state.model.parameters(), reference.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("update", ["added", "removed"])
def test_news_of_hosts_interrupts_all_ranks_at_the_next_commit(comm, update):
    runs, syncs = [], []

    class Counting(hvd.elastic.TorchState):
        def sync(self) -> None:
            syncs.append(1)
            super().sync()

    @hvd.elastic.run
    def train(state):
        runs.append(state.step)
        while state.step < 3:
            state.step += 1
            if comm.rank == 0 and state.step == 2:
                state.on_hosts_updated(1.0, getattr(HostUpdateResult, update))
            state.commit()

    train(Counting(step=0))
    assert runs == [0, 2]  # without going back
    assert len(syncs) == (2 if update == "added" else 1)


def test_run_raises_what_would_come_again_after_restoring_the_state(comm):
    if comm.size == 1:
        return

    @hvd.elastic.run
    def train(state):
        state.step = 5
        hvd.allreduce(torch.ones(2 + (comm.rank == 0)))

    state = hvd.elastic.TorchState(step=0)
    with pytest.raises(roundel.MismatchError):
        train(state)
    assert state.step == 0


def test_samplers_divide_what_is_left(comm):
    sampler = hvd.elastic.ElasticSampler(range(23), shuffle=True, seed=3)

    def everyones() -> list[int]:
        return [i for mine in hvd.allgather_object(list(sampler)) for i in mine]

    assert len(sampler) == len(list(sampler)) == -(-23 // comm.size)
    first = everyones()
    assert set(first) == set(range(23)) and len(first) == len(sampler) * comm.size
    done = {i for mine in hvd.allgather_object(list(sampler)[:2]) for i in mine}
    sampler.record_batch(0, 2)
    saved = sampler.state_dict()
    sampler.load_state_dict(saved)
    assert set(everyones()) == set(range(23)) - done
    sampler.set_epoch(1)
    assert set(everyones()) == set(range(23)) and everyones() != first
    plain = hvd.elastic.ElasticSampler(range(comm.size * 2), shuffle=False)
    assert list(plain) == [comm.rank, comm.rank + comm.size]
    assert len(list(torch.utils.data.DataLoader(range(comm.size * 2), batch_size=1, sampler=plain))) == 2


def test_samplers_of_datasets_smaller_than_the_job(comm):
    sampler = hvd.elastic.ElasticSampler(range(1))
    assert list(sampler) == [0]
    sampler.record_batch(0, 1)
    sampler.load_state_dict(sampler.state_dict())
    assert list(sampler) == [] and len(sampler) == 0
