"""Operations without tensors: barrier, and join for ranks that have no more data."""

from __future__ import annotations

import torch

from roundel import world
from roundel.process_sets import ProcessSet, global_process_set
from roundel.torch import joining
from roundel.torch.allgather import allgather
from roundel.torch.staging import number_of

__all__ = ["barrier", "join"]


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Wait for every rank of the set."""
    world.engine().barrier(process_set=number_of(process_set, "barrier")).wait()


def join(device: int = -1) -> int:
    """This rank has no more data: take part in the others' operations with zeros (all-reduce) or no rows, until all have
    joined.

    device: where Horovod would make those zeros; only compared between ranks. Returns the rank that joined last, the one to
    broadcast parameters from. Averages are still taken over all ranks. DistributedOptimizer's steps are served too.
    """
    joining.require_no_step()
    handle = world.engine().join(device=device)
    served = joining.serve_until_all_have_joined()
    last = handle.wait()
    if served == 0:
        return last
    # The engine says whose word came last; a rank whose last step came later may have been heard earlier.
    everyones = allgather(torch.tensor([[world.rank(), served]]), name="join: steps served").tolist()
    fewest = min(steps for _, steps in everyones)
    latest = [r for r, steps in everyones if steps == fewest]
    return last if last in latest else latest[0]
