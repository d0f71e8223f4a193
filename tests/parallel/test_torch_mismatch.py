"""Ranks that ask for different things under one name: the same MismatchError on all of them, and the job goes on."""

from __future__ import annotations

import pytest
import roundel
import roundel.torch as hvd
import torch

TEAMS = [("shm", 2), ("shm", 3), ("shm", 4), ("tcp", 2), ("tcp", 3), ("tcp", 4)]


def calls(last: bool) -> dict[str, object]:
    """What differs, and the calls: the last rank's are other ones."""
    x, one = torch.ones(6, 2), torch.ones(3)
    return {
        "shape": lambda: hvd.allreduce(torch.ones(3 if last else 4)),
        "dtype": lambda: hvd.allreduce(torch.ones(4, dtype=torch.float64 if last else torch.float32)),
        "op": lambda: hvd.allreduce(one, op=hvd.Max if last else hvd.Sum),
        "prescale": lambda: hvd.allreduce(one, prescale_factor=2.0 if last else 1.0),
        "postscale": lambda: hvd.reducescatter(x, postscale_factor=2.0 if last else 1.0),
        "root": lambda: hvd.broadcast(one, 1 if last else 0),
        "group": lambda: hvd.grouped_allreduce([one, one] if last else [one, one, one]),
        "rows": lambda: hvd.allgather(torch.ones(2, 3) if last else torch.ones(2, 4)),
        "alltoall": lambda: hvd.alltoall(x.int() if last else x, splits=[6] + [0] * (hvd.size() - 1)),
        "set": lambda: hvd.add_process_set([0] if last else [1]),
    }


@pytest.mark.parametrize("what", list(calls(False)))
def test_different_calls_are_one_mismatch_on_every_rank_and_the_job_goes_on(comm, what):
    last = comm.rank == comm.size - 1
    with pytest.raises(roundel.MismatchError, match="rank .* called .* where rank .* called") as raised:
        calls(last)[what]()
    assert isinstance(raised.value, roundel.HorovodInternalError)
    texts = hvd.allgather_object(str(raised.value))
    assert len(set(texts)) == 1, texts
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum) == comm.size


def test_a_name_that_is_in_flight_is_refused_at_once(comm):
    if comm.rank == 0:
        handle = hvd.allreduce_async(torch.ones(3), op=hvd.Sum, name="twice")
        for call in (hvd.allreduce_async, hvd.allreduce_async_):
            with pytest.raises(roundel.DuplicateNameError, match="'twice'.* under way") as raised:
                call(torch.ones(3), name="twice")
            assert isinstance(raised.value, ValueError)
        hvd.broadcast(torch.ones(1), 0)
    else:
        hvd.broadcast(torch.ones(1), 0)
        handle = hvd.allreduce_async(torch.ones(3), op=hvd.Sum, name="twice")
    assert torch.equal(handle.wait(), torch.full((3,), float(comm.size)))
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum, name="twice") == comm.size  # and may come again
