"""Checking that ranks were given the same things, before bytes travel that could not tell."""

from __future__ import annotations

import hashlib
import itertools
import json

import torch

from roundel.errors import MismatchError
from roundel.world import communicator

__all__ = ["describe", "require_same"]


def describe(name: str, tensor: torch.Tensor) -> str:
    """ "'fc.weight' (float32 of shape (10, 4))" """
    return f"'{name}' ({str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)})"


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def require_same(what: str, mine: list[str]) -> None:
    """Raise MismatchError on every rank, naming the first difference, unless all have the same texts. The job can go on.

    Costs one all-gather of 32 bytes where they are the same.
    """
    comm = communicator()
    text = json.dumps(mine).encode()
    digests = comm.allgather(_bytes(hashlib.sha256(text).digest()), name=f"{what}: digest").view(comm.size, -1)
    if bool((digests == digests[0]).all()):
        return
    lengths = comm.allgather(torch.tensor([len(text)]), name=f"{what}: lengths").tolist()
    joined = comm.allgather(_bytes(text), lengths, name=f"{what}: texts").numpy().tobytes()
    ends = list(itertools.accumulate(lengths))
    lists = [json.loads(joined[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
    for entries in itertools.zip_longest(*lists, fillvalue="nothing more"):
        for other, entry in enumerate(entries):
            if entry != entries[0]:
                raise MismatchError(f"rank {comm.rank}: {what}: rank 0 has {entries[0]} where rank {other} has {entry}")
